"""Checks of one file: does it hold what the loader of another tool reads?

The facts come from the loaders of those tools. Every file is read to its end, also files of other tools.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import h5py
import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import first_line
from seal_extract.features.feature_file import PROVENANCE
from seal_extract.features.store import PIECE_BYTES, TOKENS
from seal_extract.hdf5 import open_hdf5

TRIDENT_COORDS = (
    *("patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap"),
    *("name", "savetodir", "level0_width", "level0_height"),
)
POOLED = ("slide_features_", "patient_features_")  # folders of embeddings of whole slides and patients
TRIDENT_FEATURES = ("name", "savetodir", "encoder")
MIN_GAPS = 8  # least number of neighbours in a row whose median distance is meaningful


@dataclass(frozen=True)
class Problem:
    """A problem of one file. Warnings do not stop the reader from loading the file.

    Attributes:
        path: the file.
        problem: what the file holds, and what the reader expects.
        is_warning: whether the reader loads the file all the same.
    """

    path: Path
    problem: str
    is_warning: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {'warning: ' if self.is_warning else ''}{self.problem}"


@dataclass
class CheckedFile:
    """A checked file: its problems, and its facts that are compared between files."""

    path: Path
    problems: list[Problem] = field(default_factory=list)
    rows: int | None = None
    dim: int | None = None
    patch_size_l0: int | None = None
    feature_type: str | None = None
    clam_resize: str | None = None

    def short(self, problem: str) -> None:
        """Add a problem that stops the reader."""
        self.problems.append(Problem(self.path, problem))

    def warn(self, problem: str) -> None:
        """Add a warning."""
        self.problems.append(Problem(self.path, problem, is_warning=True))


Check = Callable[[CheckedFile], None]


def in_hdf5(check: Callable[[CheckedFile, h5py.File], None]) -> Check:
    """Make a check of an HDF5 file from a check of its contents."""

    def look(seen: CheckedFile) -> None:
        with open_hdf5(seen.path) as file:
            check(seen, file)

    return look


def look(path: Path, check: Check) -> CheckedFile:
    """Check one file; any error while it is read is a problem of the file."""
    seen = CheckedFile(path)
    try:
        check(seen)
    except Exception as exc:  # h5py raises many kinds of errors on damaged files
        seen.short(f"cannot be read to its end: truncated, damaged or no HDF5 ({first_line(exc)})")
    return seen


# --- a check per kind of file -----------------------------------------------------------------------


def trident_coords(seen: CheckedFile, file: h5py.File) -> None:
    """Check TRIDENT's coordinates."""
    coords = _coords(seen, file)
    if coords is not None:
        _attributes(seen, coords, TRIDENT_COORDS)
        _sizes(seen, coords, ("patch_size", "patch_size_level0"))
        _level0(seen, coords)
        if not len(coords):
            seen.warn("no patches")


def trident_features(seen: CheckedFile, file: h5py.File) -> None:
    """Check TRIDENT's features."""
    patho_bench(seen, file, empty_is_short=False)
    if isinstance(file.get("features"), h5py.Dataset):
        _attributes(seen, file["features"], TRIDENT_FEATURES)


def patch_tokens(seen: CheckedFile, file: h5py.File) -> None:
    """Check tokens, which lie beside the features; no other tool reads them."""
    _rows(seen, file, TOKENS, np.float16, empty_is_short=False, form="[N, h, w, C]")
    _coords(seen, file)


def patho_bench(seen: CheckedFile, file: h5py.File, *, empty_is_short: bool = True) -> None:
    """Check features with coordinates, as Patho-Bench reads them, or the embedding of a slide."""
    if is_pooled(seen, file):
        return _patho_bench_pooled(seen, file)
    _rows(seen, file, "features", np.float32, empty_is_short=empty_is_short)
    coords = _coords(seen, file)
    if coords is not None:
        _sizes(seen, coords, ("patch_size_level0",))
        _level0(seen, coords)


def is_pooled(seen: CheckedFile, file: h5py.File) -> bool:
    """Whether the file holds the embedding of a slide or patient: ours, or by its folder's name."""
    return "pooling" in read_provenance(file) or seen.path.parent.name.startswith(POOLED)


def _patho_bench_pooled(seen: CheckedFile, file: h5py.File) -> None:
    """Check the one row that Patho-Bench reads from ``pooled_embeddings_dir``."""
    rows = file.get("features")
    if isinstance(rows, h5py.Dataset) and (rows.ndim != 2 or len(rows) != 1):
        return seen.short(
            f"'features' is {rows.dtype} {list(rows.shape)}; Patho-Bench expects float32 [1, D] of a whole "
            f"slide; if an older version wrote the file, delete it and run the same --slide-level again"
        )
    _rows(seen, file, "features", np.float32)


def clam_features(seen: CheckedFile, file: h5py.File) -> None:
    """Check features that CLAM loads from ``h5_files``."""
    _rows(seen, file, "features", np.float32)
    _coords(seen, file)


def clam_coords(seen: CheckedFile, file: h5py.File) -> None:
    """Check coordinates that CLAM extracts from."""
    coords = _coords(seen, file)
    if coords is None:
        return
    _sizes(seen, coords, ("patch_size", "patch_level"), smallest=0)
    _clam_resize(seen, coords, read_provenance(file).get("grid"))
    if "patch_level" in coords.attrs and "patch_size_level0" not in coords.attrs:
        step = coords.attrs.get("patch_size", 0) * np.max(coords.attrs.get("downsample", 1.0))
        step *= 1 - coords.attrs.get("overlap", 0) / coords.attrs.get("target_patch_size", 1)
        _distances(seen, coords[()], float(step), "level-0 pixels", "patch_size")
    if not len(coords):
        seen.short("no patches; CLAM's extraction stops at this file: leave it out")


def _clam_resize(seen: CheckedFile, coords: h5py.Dataset, ours: dict[str, Any] | None) -> None:
    """Note where CLAM reads other pixels for one of our patches than the encoder expects."""
    level, read_px = (coords.attrs.get(name) for name in ("patch_level", "patch_size"))
    if ours is not None and (level, read_px) != (ours["level"], ours["patch_px"]):
        patch_px = ours["patch_px"]
        seen.clam_resize = (
            f"CLAM reads {read_px} px for a patch of {patch_px} px and does not resize: give it "
            f"encoder.transform_for({patch_px}), not encoder.transform"
        )
        if level != ours["level"]:
            seen.clam_resize += (
                f"; it reads level {level}, seal_extract read level {ours['level']}, "
                f"so that embeddings differ by some 1 %"
            )


def mil_lab(seen: CheckedFile, file: h5py.File) -> None:
    """Check a bag float32 [M, D], as MIL-Lab's models read it."""
    if is_pooled(seen, file):
        seen.short("is the embedding of a whole slide; MIL-Lab expects the embeddings of its patches")
    _rows(seen, file, "features", np.float32)


def stamp(seen: CheckedFile, file: h5py.File) -> None:
    """Check STAMP's features."""
    _rows(seen, file, "feats", np.float16, np.float32, empty_is_short=False)
    root = file.attrs
    for name in ("encoder", "stamp_version"):
        if name in root:
            seen.short(f"root attribute {name!r}; STAMP mistakes the file for another kind: leave it out")
    if root.get("unit") != "um":
        seen.short(f"root attribute unit is {_plain(root.get('unit'))!r}; STAMP expects 'um'")
    size_um = root.get("tile_size_um")
    for name in ("tile_size_um", "tile_size_px"):
        if not _is_number(root.get(name)):
            seen.short(f"root attribute {name} is {_plain(root.get(name))!r}; STAMP expects a number")
    seen.feature_type = str(root.get("feat_type", "tile"))
    if seen.feature_type != "tile":
        seen.short(f"root attribute feat_type is {seen.feature_type!r}; STAMP expects 'tile' for patches")
    coords = _coords(seen, file, np.floating)
    if coords is not None and _is_number(size_um):
        _distances(seen, coords[()], float(size_um), "micrometres", "tile_size_um")


def check_tensor(seen: CheckedFile) -> None:
    """Check a ``.pt`` file as CLAM loads it; only tensors are ever unpickled."""
    import torch

    try:
        tensor = torch.load(seen.path, map_location="cpu", weights_only=True)
    except Exception as exc:  # torch raises many kinds of errors on damaged files
        seen.short(
            f"torch.load finds no tensor: the file is truncated or holds other objects ({first_line(exc)})"
        )
        return
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32 or tensor.ndim != 2:
        what = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor)
        seen.short(f"holds {what}; expected: a tensor float32 [N, D]")
        return
    seen.rows, seen.dim = tensor.shape
    _count(seen, (tensor.numpy(),), recorded=0)
    if is_zipfile(seen.path):  # files of torch before 1.6 are not, and have no checksums
        with ZipFile(seen.path) as archive:  # torch.load does not verify them
            if archive.testzip() is not None:
                seen.short("a checksum is wrong: the file was damaged on the disk; export it again")
    if not seen.rows:
        seen.short("no patches; a bag without rows cannot be trained on: leave the slide out")


# --- one property -----------------------------------------------------------------------------------


def _rows(
    seen: CheckedFile,
    file: h5py.File,
    name: str,
    *dtypes: type[np.floating[Any]],
    empty_is_short: bool = True,
    form: str = "[N, D]",
) -> None:
    """Check that features have the right form, are finite, and are as many as the coordinates."""
    rows, ndim = file.get(name), form.count(",") + 1
    taken = " or ".join(np.dtype(t).name for t in dtypes)
    if not isinstance(rows, h5py.Dataset):
        what = "a group" if rows is not None else "missing"
        seen.short(f"{name!r} is {what}, there is {sorted(file)}; expected: a dataset {taken} {form}")
        return
    if rows.ndim != ndim or rows.dtype not in dtypes:
        seen.short(f"{name!r} is {rows.dtype} {list(rows.shape)}; expected: {taken} {form}")
    if rows.ndim != ndim or rows.dtype.kind != "f":
        return
    seen.rows, seen.dim = len(rows), rows.shape[1] if ndim == 2 else None
    width = math.prod(rows.shape[1:])
    step = max(1, PIECE_BYTES // max(1, width * rows.dtype.itemsize))
    pieces = (rows[start : start + step].reshape(-1, width) for start in range(0, len(rows), step))
    _count(seen, pieces, int(read_provenance(file).get("read_errors", 0)))
    if not len(rows) and empty_is_short:
        seen.short("no patches; a bag without rows cannot be trained on: leave the slide out")
    elif not len(rows):
        seen.warn("no patches")


def _count(seen: CheckedFile, pieces: Iterable[NDArray[Any]], recorded: int) -> None:
    """Count rows that cannot be embeddings: NaN or infinite, or all zeros."""
    bad = zeros = rows = 0
    for piece in pieces:
        rows += len(piece)
        bad += int((~np.isfinite(piece).all(axis=1)).sum())
        zeros += int((~piece.any(axis=1)).sum())
    if bad:
        seen.short(f"{bad} of {rows} rows hold NaN or infinity; encode the slide again in float32")
    if zeros:
        why = f"{recorded} recorded as unreadable" if recorded else "no reason recorded"
        seen.warn(f"{zeros} of {rows} rows are zeros, {why}; leave them out of training")


def read_provenance(file: h5py.File) -> dict[str, Any]:
    """How our own file was made; empty for a file of another tool."""
    text = file.attrs.get(PROVENANCE)
    return dict(json.loads(text)) if isinstance(text, str) else {}


def _coords(seen: CheckedFile, file: h5py.File, kind: Any = np.integer) -> h5py.Dataset | None:
    coords = file.get("coords")
    wanted = "integers [N, 2] in level-0 pixels" if kind is np.integer else "float32 [N, 2] in micrometres"
    if not isinstance(coords, h5py.Dataset):
        seen.short(f"'coords' is missing, there is {sorted(file)}; expected: {wanted}")
        return None
    if coords.ndim != 2 or coords.shape[1] != 2 or not np.issubdtype(coords.dtype, kind):
        seen.short(f"'coords' is {coords.dtype} {list(coords.shape)}; expected: {wanted}")
        return None
    coords[()]  # raises an error if a checksum is wrong
    if seen.rows is not None and len(coords) != seen.rows:
        seen.short(f"{len(coords)} coordinates for {seen.rows} rows of features; they must be as many")
    return coords


def _attributes(seen: CheckedFile, dataset: h5py.Dataset, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in dataset.attrs]
    if missing:
        where = dataset.name.strip("/")
        seen.short(f"attributes missing on {where!r}: {', '.join(missing)}")


def _sizes(seen: CheckedFile, coords: h5py.Dataset, names: Sequence[str], smallest: int = 1) -> None:
    for name in names:
        value = _plain(coords.attrs.get(name))
        if not _is_number(value) or value != int(value) or value < smallest:
            seen.short(f"attribute {name} on 'coords' is {value!r}; expected: a whole number")
        elif name == "patch_size_level0":
            seen.patch_size_l0 = int(value)


def _level0(seen: CheckedFile, coords: h5py.Dataset) -> None:
    """Check that coordinates lie on the slide, one patch apart; those of another level lie closer."""
    attrs, xy = coords.attrs, coords[()]
    size = [attrs.get("level0_width"), attrs.get("level0_height")]
    if all(map(_is_number, size)) and len(xy):
        outside = int(((xy < 0) | (xy >= np.array(size, float))).any(axis=1).sum())
        if outside:
            seen.short(
                f"{outside} of {len(xy)} coordinates lie outside the slide of {size[0]} x {size[1]} px"
            )
    if seen.patch_size_l0 and _is_number(attrs.get("patch_size", 1)):
        share = 1 - attrs.get("overlap", 0) / attrs.get("patch_size", 1)
        _distances(seen, xy, seen.patch_size_l0 * share, "level-0 pixels", "patch_size_level0")


def _distances(seen: CheckedFile, xy: NDArray[Any], step: float, unit: str, said: str) -> None:
    """Check that neighbours in a row are one step apart; otherwise the coordinates have another unit."""
    ordered = xy[np.lexsort((xy[:, 0], xy[:, 1]))].astype(np.float64)
    gaps = np.diff(ordered[:, 0])[np.diff(ordered[:, 1]) == 0]
    gaps = gaps[gaps > 0]
    if len(gaps) < MIN_GAPS or step <= 0:
        return
    typical = float(np.median(gaps))
    if typical < 0.75 * step - 1 or gaps.min() > 1.5 * step:
        seen.short(
            f"neighbouring coordinates are {typical:g} apart, but {said} means {step:g}: they are not {unit}"
        )


def _plain(value: Any) -> Any:
    """An attribute as a plain Python value, which prints as 512 and not as np.int64(512)."""
    return value.item() if isinstance(value, np.generic) else value


def _is_number(value: Any) -> bool:
    return np.ndim(value) == 0 and isinstance(value, (int, float, np.integer, np.floating))
