"""Reading feature files: one file, or all files of a run, in whichever layout."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from seal_extract.encoders.folder import plain_word
from seal_extract.errors import OutputError, SlideOpenError, first_line
from seal_extract.features.feature_file import BARCODE, MICROMETRES, PIXELS, PROVENANCE
from seal_extract.hdf5 import DAMAGED, Disk, open_hdf5
from seal_extract.names import is_export, origin_of, written_twice
from seal_extract.patches.grid import PatchGrid
from seal_extract.publish import publish
from seal_extract.slides.ngff import is_store
from seal_extract.slides.remote import address
from seal_extract.slides.slide import Slide, open_slide

PIECE_BYTES = 2**24  # size of the pieces in which rows are read

TOKENS = "tokens"  # dataset of patch tokens, in files of their own
NO_FEATURES = (
    f"{TOKENS}_",
    "patches",
    "expression_",
    "slide_features_",
    "patient_features_",
)  # folders of other kinds of files
Found = TypeVar("Found")


@dataclass(frozen=True)
class SlideFeatures:
    """The embeddings of one slide, and the file that holds them.

    Attributes:
        path: the HDF5 file.
        grid: the places of the patches.
        provenance: slide, µm/px and its source, reader, encoder, weights, options, versions.
    """

    path: Path
    grid: PatchGrid
    provenance: dict[str, Any]

    @cached_property
    def features(self) -> NDArray[np.float32]:
        """float32 [N, D]; read from the file when first used."""
        with _open_rows(self.path) as rows, reading(self.path):
            features: NDArray[np.float32] = rows[()].astype(np.float32, copy=False)
        return features

    @cached_property
    def barcodes(self) -> tuple[str, ...] | None:
        """The name of each patch, for patches that were cut already; None for patches of a grid."""
        with reading(self.path), open_hdf5(self.path) as file:
            return tuple(file[BARCODE].asstr()[()].tolist()) if BARCODE in file else None

    @cached_property
    def dim(self) -> int:
        """Number of columns of the features."""
        with _open_rows(self.path) as rows:
            return int(rows.shape[1])

    def __repr__(self) -> str:
        name = self.provenance["encoder"]["name"]
        return f"SlideFeatures({self.path.name}: {len(self.grid)} patches, {name}, {self.grid.mpp:.4g} µm/px)"


def read_features(path: str | os.PathLike[str]) -> SlideFeatures:
    """Open a feature file that this package wrote, in whichever layout; the grid is in level-0 pixels.

    Raises:
        OutputError: the file does not exist, was not written by this package, or is damaged.
    """
    path = Path(path)
    features = find_features(path) if path.exists() else None
    if features is None:
        raise OutputError(
            f"{path} is not a feature file of seal_extract; give OUT/20x_.../features_NAME/SLIDE.h5"
        )
    return features


def list_features(folder: Path) -> tuple[list[SlideFeatures], dict[Path, OutputError]]:
    """All features of a finished run, in the order of their paths, without exports of other files.

    Args:
        folder: the ``-o`` of the run, or a part of it.

    Returns:
        The features, and an error for each damaged file.

    Raises:
        OutputError: no file can be read.
    """
    listed, damaged = scan_features(folder, find_features)
    ours = [listed[path] for path in without_copies({p: f.provenance for p, f in listed.items()})]
    if not ours:
        why = f" ({next(iter(damaged.values()))})" if damaged else ""
        raise OutputError(
            f"{folder} holds no feature file of seal_extract{why}; give the -o of a finished run"
        )
    return ours, damaged


def without_copies(files: Mapping[Path, dict[str, Any]]) -> list[Path]:
    """Files without the copies of them: exports, links, and the older one if a slide has got two names.

    Args:
        files: features files with their provenance.
    """
    older = written_twice(files.items())
    found = {path.resolve(): path for path in files if path not in older}
    originals = {origin_of(r, files[p]) for r, p in found.items() if not is_export(files[p])}
    ours: dict[Path | str, Path] = {}
    for resolved, path in found.items():
        exported, origin = is_export(files[path]), origin_of(resolved, files[path])
        if not (exported and origin in originals):
            ours.setdefault(origin if exported else resolved, path)
    return list(ours.values())


def scan_features(
    folder: Path, read: Callable[[Path], Found | None]
) -> tuple[dict[Path, Found], dict[Path, OutputError]]:
    """Read each feature file below a folder, in the order of their paths.

    Files of other tools, and our files of coordinates, expression and whole slides, are ignored.

    Args:
        folder: the ``-o`` of a run, or a part of it.
        read: `find_features`, or `read_provenance` if coordinates are not needed.

    Returns:
        The results by path, and an error for each damaged file.
    """
    found: dict[Path, Found] = {}
    damaged: dict[Path, OutputError] = {}
    for path in sorted(folder.rglob("*.h5")):
        try:
            if (one := read(path)) is not None:
                found[path] = one
        except OutputError as exc:
            if not path.parent.name.startswith(NO_FEATURES):
                damaged[path] = exc
    return found, damaged


def find_features(path: Path, dataset: str | None = None) -> SlideFeatures | None:
    """Like `read_features`, but None for a file of another tool.

    Args:
        path: the file.
        dataset: the name that its rows must have; by default that of any layout.

    Raises:
        OutputError: the file is damaged.
    """
    with reading(path), open_hdf5(path) as file:
        provenance = _provenance(file, dataset)
        if provenance is None:
            return None
        coords = file["coords"][()]
        if MICROMETRES in file:  # float32 keeps a tenth of a pixel over any slide
            coords = np.rint(coords.astype(np.float64) / provenance["slide"]["mpp"]).astype(np.int64)
        grid = PatchGrid(coords, **provenance["grid"])
        rows = rows_of(file)
        if rows.ndim != 2 or len(rows) != len(grid):
            raise ValueError(f"{list(rows.shape)} features for {len(grid)} patches")
    return SlideFeatures(path, grid, provenance)


def read_pieces(path: Path) -> Iterator[NDArray[Any]]:
    """Read the rows of a feature file in pieces of some thousand: float32 or float16 [B, D].

    Raises:
        OutputError: the file is damaged.
    """
    with _open_rows(path) as rows:
        step = max(1, PIECE_BYTES // max(1, rows.shape[1] * rows.dtype.itemsize))
        for start in range(0, len(rows), step):
            with reading(path):
                piece = rows[start : start + step]
            yield piece


def sample_rows(path: Path, most: int) -> NDArray[np.float32]:
    """Read at most ``most`` rows of a feature file, spread over it: float32 [M, D].

    Raises:
        OutputError: the file is damaged.
    """
    with _open_rows(path) as rows, reading(path):
        runs = min(8, most)
        starts = np.linspace(0, len(rows) - most // runs, runs).astype(int).tolist()
        whole = len(rows) <= most
        pieces = [rows[()]] if whole else [rows[start : start + most // runs] for start in starts]
    return np.concatenate(pieces).astype(np.float32, copy=False)


def read_provenance(path: Path, dataset: str | None = None) -> dict[str, Any] | None:
    """Read the provenance of a feature file; None for a file of another tool.

    Args:
        path: the file.
        dataset: the name that its rows must have; by default that of any layout.

    Raises:
        OutputError: the file is damaged.
    """
    with reading(path), open_hdf5(path) as file:
        return _provenance(file, dataset)


def has_coords(path: Path, grid: PatchGrid) -> bool:
    """Whether a file holds the coordinates of this grid, and its sizes if the file is ours."""
    there = read_coords(path)
    if there is None or not np.array_equal(there[0], grid.xy_l0):
        return False
    said, sizes = there[1], (grid.patch_px, grid.patch_size_l0)
    return said is None or (said["patch_px"], said["patch_size_l0"]) == sizes


def read_coords(path: Path) -> tuple[NDArray[Any], dict[str, Any] | None] | None:
    """Coordinates, and the fields of their grid if the file is ours; None if it cannot be read."""
    try:
        with open_hdf5(path) as file:
            text = file.attrs.get(PROVENANCE)
            return np.asarray(file["coords"][()]), json.loads(text).get("grid") if text else None
    except (*DAMAGED, AttributeError, TypeError):
        return None


def write_tensor(features: Path, path: Path) -> None:
    """Write the rows of a feature file as ``torch.save`` does: float32 [N, D].

    They are copied through a temporary file, because a large slide has gigabytes of rows.

    Raises:
        OutputError: the file cannot be written.
    """
    import torch

    with publish(path) as part:
        with open_hdf5(features) as file:
            shape = file[PIXELS].shape
        with TemporaryFile(dir=path.parent) as raw, Disk(part, "w") as disk:
            for piece in read_pieces(features):
                raw.write(np.ascontiguousarray(piece, np.float32).data)
            raw.flush()
            torch.save(torch.from_numpy(np.memmap(raw, np.float32, "c", shape=shape)), disk)
            disk.check()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Translate errors that occur while the feature file ``path`` is read.

    Raises:
        OutputError: in place of any error of h5py, json or numpy.
    """
    try:
        yield
    except OutputError:
        raise
    except Exception as exc:
        why = f"{path} cannot be read ({first_line(exc)})"
        raise OutputError(f"{why}; encode that slide again with --overwrite") from exc


def _provenance(file: h5py.File, dataset: str | None) -> dict[str, Any] | None:
    """Provenance of an open file; None for a file of another tool.

    Raises:
        ValueError: a name in it could lead to a file elsewhere, or a required field is missing.
    """
    there = any(name in file for name in ([dataset] if dataset else (PIXELS, MICROMETRES)))
    text = file.attrs.get(PROVENANCE) if there else None
    provenance = json.loads(text) if isinstance(text, str) else {}
    if "grid" not in provenance:  # a slide-level file has no grid of its own
        return None
    source = provenance.get("features", provenance)
    plain_word(source["encoder"]["name"])  # it becomes part of file names
    dict(source["slide"])
    return dict(provenance)


def grid_fields(grid: PatchGrid) -> dict[str, Any]:
    """The fields of a grid without its coordinates, as the provenance holds them."""
    return {f.name: getattr(grid, f.name) for f in fields(grid) if f.name != "xy_l0"}


@contextmanager
def _open_rows(path: Path) -> Iterator[h5py.Dataset]:
    with ExitStack() as closing:
        with reading(path):
            rows = rows_of(closing.enter_context(open_hdf5(path)))
        yield rows


def rows_of(file: h5py.File) -> h5py.Dataset:
    """The rows of an open feature file, in whichever layout."""
    return file[PIXELS if PIXELS in file else MICROMETRES]


# --- the slide from which features were made ------------------------------------------------------------


def open_origin(features: SlideFeatures, slides: Path | None = None) -> Slide:
    """Open the slide of these features, at its recorded path or by its file name in another folder.

    Args:
        features: from `read_features`.
        slides: folder to search, with its subfolders, if the slide has moved.

    Raises:
        SlideOpenError: the slide is not found, has another size, or cannot be opened.
    """
    path, made = _find_origin(features, slides), features.provenance["slide"]
    expected = tuple(made["size_l0"])
    if "plane" in made:  # of a volume
        from seal_extract.slides.planes import open_plane  # OpenCV takes long to import

        slide = open_plane(Path(path), made["plane"], made["mpp"], expected)
    else:
        slide = open_slide(path, mpp=made["mpp"])
    if slide.size_l0 != expected:
        slide.close()
        raise SlideOpenError(
            f"{path} has {slide.size_l0[0]} x {slide.size_l0[1]} px, but {features.path.name} was made from "
            f"{expected[0]} x {expected[1]}; give the folder of the right slide as --slides"
        )
    return slide


def url_of_origin(provenance: dict[str, Any]) -> str | None:
    """The URL at which the slide is read; None for a slide that is a file, or was copied to be read."""
    where = address(provenance["slide"]["path"])
    return where if isinstance(where, str) and is_store(where) else None


def _find_origin(features: SlideFeatures, slides: Path | None = None) -> Path | str:
    """Where the slide is; see `open_origin`.

    Raises:
        SlideOpenError: the slide is not found, or several files have its name.
    """
    if slides is None and (url := url_of_origin(features.provenance)) is not None:
        return url
    known = Path(features.provenance["slide"]["path"])
    if slides is None:
        if known.is_absolute() and known.exists():
            return known
        why = (
            "is no longer there"
            if known.is_absolute()
            else "has no recorded folder, because this is an export"
        )
        raise SlideOpenError(f"the slide {known} {why}; give the folder that holds it as --slides")
    found = [slides] if slides.name == known.name else sorted(slides.rglob(known.name))
    if len(found) != 1 or not found[0].exists():
        what = f"{len(found)} files" if len(found) > 1 else "no file"
        raise SlideOpenError(
            f"{slides} holds {what} of the name {known.name}; give the folder of the right one"
        )
    return found[0]
