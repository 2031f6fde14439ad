"""What will be read of a slide, settled before any encoder is asked: options -> tissue -> grid."""

from __future__ import annotations

import math
import numbers
import os
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from seal_extract.errors import GeometryError, SlideError, UsageError
from seal_extract.features.layouts import check_layout
from seal_extract.patches.grid import MPP_TOLERANCE, Edges, PatchGrid, check_request, make_grid, read_grid
from seal_extract.slides.entry import SlideEntry
from seal_extract.slides.mpp import PLAUSIBLE_MPP
from seal_extract.slides.slide import Slide, absolute

if TYPE_CHECKING:
    from seal_extract.tissue.mask import TissueMask

Resampling = Literal["bicubic", "area"]
COORDS_NAMES = ("{}_patches.h5", "{}.h5")
ROI_NAMES = ("{}.geojson", "{}.json")
MAX_TIMEOUT_S = 86_400
NUMBERS = {int: numbers.Integral, float: numbers.Real}
KIND_WORDS = {int: "a whole number", float: "a number", bool: "True or False", Path: "a path", str: "a name"}
KIND_WORDS |= {type(None): "None"}


@dataclass(frozen=True)
class ExtractOptions:
    """Every choice of a run; the command line only fills it.

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
        max_read_errors: patches of a slide that may be unreadable before it fails; their features are zeros.
        batch_size: patches per forward pass; found by trying on a GPU by default.
        workers: threads that read, and on a CPU as many that encode; all cores by default.
        overwrite: replace a file that other options made.
        stage_dir: fast folder into which the next slides are copied before they are read.
        stage_gb: gigabytes that these copies may fill.
        plan_timeout_s: seconds in which a slide must be opened and its tissue found, or it has failed. A
            process of its own does that, held to 6 GB of memory too (on Linux); 0: here, without limits.
        overlay: patches in the picture of a slide: a faint ``"tint"``, or an ``"outline"``, which leaves the
            colours of the stains as they are.
        layout: where the files lie and in which form: ``"trident"``, ``"clam"``, ``"stamp"``, ``"flat"``.
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
    max_read_errors: int = 0
    batch_size: int | None = None
    workers: int | None = None
    overwrite: bool = False
    layout: str = "trident"
    overlay: Literal["tint", "outline"] = "tint"
    stage_dir: Path | None = None
    stage_gb: float = 50.0
    plan_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            object.__setattr__(self, name, _as_kind(name, getattr(self, name), kind))
        if self.roi is not None and self.coords is not None:
            raise UsageError("--roi and --coords both say where the patches lie; give one of them")
        if self.slide_mpp is not None and self.override_mpp is not None:
            raise UsageError("--override-mpp is for all slides and leaves no gap to --slide-mpp; give one")
        check_layout(self.layout)
        check_request(self.patch_px, self.mpp, self.overlap_px, self.min_tissue, self.mpp_tolerance)
        if self.max_read_errors < 0:
            raise UsageError(f"--max-read-errors is {self.max_read_errors}; allowed: 0 or more")
        if not 0 < self.stage_gb < math.inf:
            raise UsageError(f"--stage-gb is {self.stage_gb:.4g}; allowed: more than 0")
        if not 0 <= self.plan_timeout_s <= MAX_TIMEOUT_S:
            raise UsageError(f"--plan-timeout is {self.plan_timeout_s:.4g} s; allowed: 0 to {MAX_TIMEOUT_S}")
        low, high = PLAUSIBLE_MPP
        for name in ("slide_mpp", "override_mpp"):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # also refuses NaN
                raise UsageError(f"{_option(name)} is {value:.4g} µm/px; allowed: {low} to {high}")
        for name in ("batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{_option(name)} is {value}; allowed: 1 or more")

    def resolved(self) -> ExtractOptions:
        """The same, independent of the working folder."""
        paths = {name: getattr(self, name) for name in ("roi", "coords", "stage_dir")}
        found: dict[str, Any] = {name: path and absolute(path) for name, path in paths.items()}
        return replace(self, **found)

    def for_entry(self, entry: SlideEntry) -> ExtractOptions:
        """The options of one slide: a table may give its tissue."""
        return self if entry.roi is None else replace(self, roi=entry.roi)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _as_kind(name: str, value: object, kind: Any) -> object:
    """A choice as what it is declared to be: numbers of NumPy and paths as text become Python's own.

    Raises:
        UsageError: it is something else.
    """
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


@dataclass(frozen=True)
class SlidePlan:
    """A slide, its tissue, its patches; ``mask`` is None where the coordinates came from a file."""

    slide: Slide
    mask: TissueMask | None
    grid: PatchGrid


def plan_slide(
    slide: Slide, options: ExtractOptions = ExtractOptions(), name: str | None = None
) -> SlidePlan:
    """Find the tissue and lay the grid, or take either from the file that ``options`` names.

    In folders of such files the slide's is found by ``name``, or by the name of its own file.

    Raises:
        SlideError: the slide cannot be read, is not brightfield, or is coarser than the target.
        GeometryError: the file that ``options`` names does not fit the slide.
    """
    if options.coords is not None:
        grid = read_grid(coords_file(slide.path, options.coords, name), slide)
        if options.edges == "keep":
            grid = replace(grid, inside_l0=slide.bounds_l0)
        return SlidePlan(slide, None, grid)
    from seal_extract.tissue.mask import TissueMask  # with OpenCV, which finished slides do without
    from seal_extract.tissue.segmentation import find_tissue

    if options.roi is not None:
        path = roi_file(slide.path, options.roi, name)
        mask = TissueMask.from_geojson(path, slide)
        _warn_if_beside_tissue(path, mask, slide)
    else:
        mask = find_tissue(slide)
    grid = make_grid(
        slide,
        mask,
        options.patch_px,
        options.mpp,
        overlap_px=options.overlap_px,
        min_tissue=options.min_tissue,
        mpp_tolerance=options.mpp_tolerance,
        allow_upsampling=options.allow_upsampling,
        edges=options.edges,
    )
    return SlidePlan(slide, mask, grid)


def _warn_if_beside_tissue(path: Path, drawn: TissueMask, slide: Slide) -> None:
    from seal_extract.tissue.segmentation import find_tissue

    with suppress(SlideError):  # whoever draws tissue may have a slide on which none is found
        found = find_tissue(slide).mask
        if found.any() and not (found & drawn.mask).any():
            warnings.warn(
                f"{path}: all of it lies beside the tissue of {slide.path.name}; is it another slide's?",
                stacklevel=2,
            )


def coords_file(slide: Path, given: Path, name: str | None = None) -> Path:
    """The coordinates file of a slide: ``given`` itself, or the one in that folder.

    Raises:
        GeometryError: there is none.
    """
    return _file_for((name or slide.stem, slide.stem), given, COORDS_NAMES, "--coords")


def roi_file(slide: Path, given: Path, name: str | None = None) -> Path:
    """The GeoJSON file of a slide: ``given`` itself, or the one in that folder.

    Raises:
        GeometryError: there is none.
    """
    return _file_for((name or slide.stem, slide.stem), given, ROI_NAMES, "--roi")


def _file_for(stems: tuple[str, ...], given: Path, names: tuple[str, ...], option: str) -> Path:
    if given.is_file():
        return given
    candidates = [given / name.format(stem) for stem in dict.fromkeys(stems) for name in names]
    found = [c for c in candidates if c.is_file()]
    if not found:
        allowed = " or ".join(c.name for c in candidates)
        raise GeometryError(f"{option} {given} is neither a file nor a folder with {allowed}; check the path")
    return found[0]
