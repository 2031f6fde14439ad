"""Every choice of a run: those that decide the numbers, and those that do not."""

from __future__ import annotations

import hashlib
import math
import numbers
import os
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from seal_extract.errors import UsageError
from seal_extract.features.layouts import check_layout
from seal_extract.patches.grid import MPP_TOLERANCE, Edges, check_request
from seal_extract.slides.readers import PLAUSIBLE_MPP
from seal_extract.slides.slide import absolute

Resampling = Literal["bicubic", "area"]
GpuDecode = Literal["auto", "on", "off"]
MAX_TIMEOUT_S = 86_400
NUMBERS = {int: numbers.Integral, float: numbers.Real}
KIND_WORDS = {int: "a whole number", float: "a number", bool: "True or False", Path: "a path", str: "a name"}
KIND_WORDS |= {type(None): "None"}


@dataclass(frozen=True)
class PatchOptions:
    """The choices that decide which numbers stand in a features file.

    Attributes:
        patch_px: side of a patch as the encoder sees it.
        mpp: its µm/px.
        overlap_px: overlap of neighbouring patches, in pixels of the patch.
        min_tissue: smallest share of tissue in a patch, 0 to 1.
        mpp_tolerance: slides this close to a nominal µm/px are cut as if they had it.
        allow_upsampling: permit a target finer than the slide.
        slide_mpp: µm/px at level 0, for slides whose table and file do not say it.
        override_mpp: µm/px at level 0 of all slides, whatever their table and file say.
        roi: GeoJSON of the tissue, or a folder of ``{slide}.geojson``, in place of finding it.
        coords: coordinates of TRIDENT, CLAM or AtlasPatch, a file or a folder, in place of a grid.
        edges: ``"drop"`` leaves out the patches that would reach past the slide, ``"keep"`` has them, white
            beyond it.
        resample: ``"bicubic"``, as the field's other tools, or ``"area"``, which is faster.
        fast_decode: decode JPEG at reduced scale where patches shrink by a multiple of 2: other pixels.
    """

    patch_px: int = 224
    mpp: float = 0.5
    overlap_px: int = 0
    min_tissue: float = 0.5
    mpp_tolerance: float = MPP_TOLERANCE
    allow_upsampling: bool = False
    slide_mpp: float | None = None
    override_mpp: float | None = None
    roi: Path | None = None
    coords: Path | None = None
    edges: Edges = "drop"
    resample: Resampling = "bicubic"
    fast_decode: bool = False

    def __post_init__(self) -> None:
        _take_kinds(self, PatchOptions)
        if self.roi is not None and self.coords is not None:
            raise UsageError("--roi and --coords both say where the patches lie; give one of them")
        if self.slide_mpp is not None and self.override_mpp is not None:
            raise UsageError("--override-mpp is for all slides and leaves no gap to --slide-mpp; give one")
        check_request(self.patch_px, self.mpp, self.overlap_px, self.min_tissue, self.mpp_tolerance)
        low, high = PLAUSIBLE_MPP
        for name in ("slide_mpp", "override_mpp"):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # also refuses NaN
                raise UsageError(f"{_option(name)} is {value:.4g} µm/px; allowed: {low} to {high}")

    def fingerprint(self) -> dict[str, Any]:
        """These choices as JSON, once ``roi`` and ``coords`` are files, which are counted by their content.

        The µm/px of slides is not in it: the one that it leads to is recorded with the slide.
        """
        choices = {name: getattr(self, name) for name in FINGERPRINT_OPTIONS}
        for name in ("roi", "coords"):
            if choices[name] is not None:
                choices[name] = _sha256(choices[name])
        return choices


FINGERPRINT_OPTIONS = {  # with the defaults that count where a file does not record the option
    field.name: field.default
    for field in fields(PatchOptions)
    if field.name not in ("slide_mpp", "override_mpp")
}


@dataclass(frozen=True)
class RunOptions:
    """The choices that leave the numbers as they are: how the work is done, and where its files go.

    Attributes:
        max_read_errors: patches of a slide that may be unreadable before it fails; their features are zeros.
        batch_size: patches per forward pass; on a GPU by default as many as hold 256 x 224 x 224 px.
        workers: threads that read, and on a CPU as many that encode; all cores by default.
        gpu_decode: let a GPU decode JPEG tiles, to the same pixels: ``"auto"`` where it can; ``"on"``, and a
            slide fails where it cannot; ``"off"``.
        tokens: also write the tokens of each patch, as `Encoder.encode_tokens` gives them, in float16.
        overwrite: replace a file that other options made.
        layout: where the files lie and in which form: ``"trident"``, ``"clam"``, ``"stamp"``, ``"flat"``.
        overlay: patches in the picture of a slide: a faint ``"tint"``, or an ``"outline"``, which leaves the
            colours of the stains as they are.
        stage_dir: fast folder into which the next slides are copied before they are read.
        stage_gb: gigabytes that these copies may fill.
        plan_timeout_s: seconds in which a slide must be opened and its tissue found, or it has failed. A
            process of its own does that, limited to 6 GB of memory too (on Linux); 0 does it in this
            process, without limits.
    """

    max_read_errors: int = 0
    batch_size: int | None = None
    workers: int | None = None
    gpu_decode: GpuDecode = "auto"
    tokens: bool = False
    overwrite: bool = False
    layout: str = "trident"
    overlay: Literal["tint", "outline"] = "tint"
    stage_dir: Path | None = None
    stage_gb: float = 50.0
    plan_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        _take_kinds(self, RunOptions)
        check_layout(self.layout)
        if self.max_read_errors < 0:
            raise UsageError(f"--max-read-errors is {self.max_read_errors}; allowed: 0 or more")
        if not 0 < self.stage_gb < math.inf:
            raise UsageError(f"--stage-gb is {self.stage_gb:.4g}; allowed: more than 0")
        if not 0 <= self.plan_timeout_s <= MAX_TIMEOUT_S:
            raise UsageError(f"--plan-timeout is {self.plan_timeout_s:.4g} s; allowed: 0 to {MAX_TIMEOUT_S}")
        for name in ("batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{_option(name)} is {value}; allowed: 1 or more")


@dataclass(frozen=True)
class ExtractOptions(RunOptions, PatchOptions):
    """All choices of a run: those of `PatchOptions`, which decide the numbers, and those of `RunOptions`.

    The command line only fills it.
    """

    def __post_init__(self) -> None:
        PatchOptions.__post_init__(self)
        RunOptions.__post_init__(self)

    def resolved(self) -> ExtractOptions:
        """The same, independent of the working folder."""
        paths = {name: getattr(self, name) for name in ("roi", "coords", "stage_dir")}
        found: dict[str, Any] = {name: path and absolute(path) for name, path in paths.items()}
        return replace(self, **found)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _take_kinds(options: object, part: type) -> None:
    """Make each choice what it is declared to be: numbers of NumPy and paths as text become Python's own.

    Raises:
        UsageError: it is something else.
    """
    for name, kind in _kinds(part).items():
        object.__setattr__(options, name, _as_kind(name, getattr(options, name), kind))


@lru_cache
def _kinds(part: type) -> dict[str, Any]:
    return get_type_hints(part)


def _as_kind(name: str, value: object, kind: Any) -> object:
    one_of = get_args(kind)
    if get_origin(kind) is Literal:
        if value in one_of:
            return value
        raise UsageError(f"{_option(name)} is {value!r}; allowed: {', '.join(map(str, one_of))}")
    for one in one_of or (kind,):
        if one is Path and isinstance(value, str | os.PathLike):
            return Path(value)
        if one in (int, float) and isinstance(value, NUMBERS[one]) and not isinstance(value, bool):
            return one(value)
        if one not in (int, float) and isinstance(value, one):
            return value
    words = " or ".join(KIND_WORDS.get(one, "") for one in one_of or (kind,))
    raise UsageError(f"{_option(name)} is {value!r}; allowed: {words}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()
