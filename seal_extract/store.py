"""The HDF5 files: rows streamed in, published when complete, read back whatever layout they lie in.

Where they lie and what stands in them beside the rows is the business of `seal_extract.layouts`. What made
a file hangs as JSON on its root attribute ``seal_extract``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import OutputError
from seal_extract.grid import PatchGrid
from seal_extract.publish import publish, writing

PROVENANCE = "seal_extract"  # at the root; "encoder" and "stamp_version" there would mislead STAMP
EXPORTED_FROM = "exported_from"  # in the provenance of a copy in another layout
PIXELS, MICROMETRES = "features", "feats"  # datasets of rows; STAMP's has coords in µm
CHUNK_BYTES = 2**20  # a chunk of features is some hundred rows, never one
PIECE_BYTES = 2**24  # rows copied from file to file at a time
DAMAGED = (OSError, RuntimeError, ValueError, KeyError)  # what h5py and json find in damaged files

Describe = Callable[[h5py.File], None]


@dataclass(frozen=True)
class SlideLabel:
    """What files say of a slide.

    Attributes:
        name: of its files, without suffix.
        size_l0: (width, height) in level-0 pixels.
        mpp: its true µm/px at level 0.
    """

    name: str
    size_l0: tuple[int, int]
    mpp: float


@dataclass(frozen=True)
class SlideFeatures:
    """The embeddings of one slide, in the file that holds them.

    Attributes:
        path: the HDF5 file.
        grid: where the patches lie.
        provenance: what made them: slide, µm/px and its source, reader, encoder, weights, options, versions.
    """

    path: Path
    grid: PatchGrid
    provenance: dict[str, Any]

    @cached_property
    def features(self) -> NDArray[np.float32]:
        """float32 [N, D], read from the file at the first use."""
        with h5py.File(self.path, "r") as file:
            features: NDArray[np.float32] = _rows(file)[()].astype(np.float32, copy=False)
        return features

    @cached_property
    def dim(self) -> int:
        """Columns of the features."""
        with h5py.File(self.path, "r") as file:
            return int(_rows(file).shape[1])

    def __repr__(self) -> str:
        name = self.provenance["encoder"]["name"]
        return f"SlideFeatures({self.path.name}: {len(self.grid)} patches, {name}, {self.grid.mpp:.4g} µm/px)"


class FeatureWriter:
    """Takes rows of features in grid order; made by `write_rows`."""

    def __init__(self, path: Path, dataset: h5py.Dataset, disk: Disk) -> None:
        self.path = path
        self.rows = 0
        self._dataset, self._disk = dataset, disk

    def append(self, features: NDArray[np.float32]) -> None:
        """Write the next rows: float32 [B, D].

        Raises:
            OutputError: rows of another width, more than expected, or beyond what the file's type can hold.
        """
        expected = (min(len(features), len(self._dataset) - self.rows), self._dataset.shape[1])
        if features.shape != expected:
            raise OutputError(
                f"{self.path}: row {self.rows} on is {list(features.shape)}, the file takes "
                f"{list(expected)}; nothing was kept"
            )
        with writing(self.path):
            self._dataset[self.rows : self.rows + len(features)] = self._fitting(features)
            self._disk.check()
        self.rows += len(features)

    def check(self) -> None:
        """Raise if rows are missing.

        Raises:
            OutputError: not as many came as the file is to have.
        """
        if self.rows != len(self._dataset):
            raise OutputError(
                f"{self.path}: {self.rows} rows came for {len(self._dataset)} patches; nothing was kept"
            )

    def _fitting(self, features: NDArray[np.float32]) -> NDArray[Any]:
        dtype = self._dataset.dtype
        largest = float(np.abs(features).max(initial=0))
        if dtype == np.float16 and largest > float(np.finfo(np.float16).max):
            raise OutputError(
                f"{self.path}: a feature of {largest:.4g} does not fit float16, which holds up to 65504; "
                "choose another --layout, all of which are float32"
            )
        return features.astype(dtype, copy=False)


@contextmanager
def write_rows(
    path: Path,
    dataset: str,
    shape: tuple[int, int],
    dtype: type[np.floating[Any]],
    provenance: dict[str, Any],
    describe: Describe,
) -> Iterator[FeatureWriter]:
    """Open a file of rows; it appears under its name when the block ends with all rows in.

    Args:
        path: its final name.
        dataset: name of the rows.
        shape: (N, D).
        dtype: of the rows in the file.
        provenance: written last, as it then is.
        describe: adds coordinates and attributes to the open file.

    Raises:
        OutputError: it cannot be written, or not as many rows came as ``shape`` says.
    """
    with publish(path) as part, _hdf5(part, path) as (file, disk):
        rows = max(1, min(shape[0], CHUNK_BYTES // max(1, np.dtype(dtype).itemsize * shape[1])))
        chunks = (rows, shape[1]) if all(shape) else None  # HDF5 has no chunks of nothing
        writer = FeatureWriter(path, file.create_dataset(dataset, shape, dtype, chunks=chunks), disk)
        describe(file)
        yield writer
        writer.check()
        file.attrs[PROVENANCE] = json.dumps(provenance)


def write_described(path: Path, provenance: dict[str, Any], describe: Describe) -> None:
    """Write a file without rows, such as coordinates.

    Raises:
        OutputError: it cannot be written.
    """
    with publish(path) as part, _hdf5(part, path) as (file, _):
        describe(file)
        file.attrs[PROVENANCE] = json.dumps(provenance)


def read_features(path: str | os.PathLike[str]) -> SlideFeatures:
    """Open a features file that this package wrote, in whichever layout; the grid is in level-0 pixels.

    Raises:
        OutputError: it does not exist or was not written by this package.
    """
    path = Path(path)
    features = find_features(path)
    if features is None:
        raise OutputError(
            f"{path} is no features file of seal_extract; give OUT/20x_.../features_NAME/SLIDE.h5"
        )
    return features


def list_features(folder: Path) -> list[SlideFeatures]:
    """All features of a finished run, in the order of their paths; of a file and its exports only one.

    Args:
        folder: the ``-o`` of the run, or a part of it.

    Raises:
        OutputError: there are none.
    """
    found = {path.resolve(): find_features(path) for path in sorted(folder.rglob("*.h5"))}
    ours: dict[Path, SlideFeatures] = {}
    for path, features in found.items():
        if features is not None:
            source = Path(features.provenance.get(EXPORTED_FROM, path))
            if source == path or (found.get(source) is None and source not in ours):
                ours[source] = features
    if not ours:
        raise OutputError(f"{folder} holds no features file of seal_extract; give the -o of a finished run")
    return list(ours.values())


def find_features(path: Path, dataset: str | None = None) -> SlideFeatures | None:
    """`read_features`, or None where this package did not write the file; it is opened once.

    Args:
        path: the file.
        dataset: what its rows must be called; by default any of the layouts' names.
    """
    try:
        with h5py.File(path, "r") as file:
            provenance = _provenance(file, dataset)
            if provenance is None:
                return None
            coords = file["coords"][()]
            if MICROMETRES in file:  # float32 keeps a tenth of a pixel over any slide
                coords = np.rint(coords.astype(np.float64) / provenance["slide"]["mpp"]).astype(np.int64)
            grid = PatchGrid(coords, **provenance["grid"])
    except DAMAGED:
        return None
    return SlideFeatures(path, grid, provenance)


def read_pieces(path: Path) -> Iterator[NDArray[Any]]:
    """The rows of a features file, some thousand at a time, as it has them: float32 or float16 [B, D]."""
    with h5py.File(path, "r") as file:
        rows = _rows(file)
        step = max(1, PIECE_BYTES // max(1, rows.shape[1] * rows.dtype.itemsize))
        for start in range(0, len(rows), step):
            yield rows[start : start + step]


def sample_rows(path: Path, most: int) -> NDArray[np.float32]:
    """At most ``most`` rows of a features file, in runs from all over it: float32 [M, D]."""
    with h5py.File(path, "r") as file:
        rows = _rows(file)
        runs = min(8, most)
        if len(rows) <= most:
            sample: NDArray[np.float32] = rows[()].astype(np.float32, copy=False)
            return sample
        starts = np.linspace(0, len(rows) - most // runs, runs).astype(int)
        pieces = [rows[start : start + most // runs] for start in starts.tolist()]
    return np.concatenate(pieces).astype(np.float32, copy=False)


def read_provenance(path: Path, dataset: str | None = None) -> dict[str, Any] | None:
    """What made the features file, or None where this package did not.

    Args:
        path: the file.
        dataset: what its rows must be called; by default any of the layouts' names.
    """
    try:
        with h5py.File(path, "r") as file:
            return _provenance(file, dataset)
    except DAMAGED:
        return None


def _provenance(file: h5py.File, dataset: str | None) -> dict[str, Any] | None:
    there = any(name in file for name in ([dataset] if dataset else (PIXELS, MICROMETRES)))
    text = file.attrs.get(PROVENANCE) if there else None
    provenance = dict(json.loads(text)) if isinstance(text, str) else {}
    return provenance if "grid" in provenance else None  # a slide-level file has none of its own


def grid_fields(grid: PatchGrid) -> dict[str, Any]:
    """All of a grid but its coordinates, as provenance keeps it."""
    return {f.name: getattr(grid, f.name) for f in fields(grid) if f.name != "xy_l0"}


def _rows(file: h5py.File) -> h5py.Dataset:
    return file[PIXELS if PIXELS in file else MICROMETRES]


class Disk(FileIO):
    """A file that keeps its failure to itself: HDF5 would meet it again on closing, and not close."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of it, or remember why not."""
        try:
            view = memoryview(data)
            while len(view) and self.failure is None:
                view = view[super().write(view) :]  # a disk about to be full takes a part
        except OSError as exc:
            self.failure = exc
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        """Set the size, or remember why not."""
        try:
            return super().truncate(size)
        except OSError as exc:
            self.failure = self.failure or exc
            return size or 0

    def check(self) -> None:
        """Raise what failed since the file was opened."""
        if self.failure is not None:
            raise self.failure


@contextmanager
def new_hdf5(path: Path) -> Iterator[h5py.File]:
    """A new HDF5 file that appears under its name, complete, when the block ends well.

    Raises:
        OutputError: it cannot be written.
    """
    with publish(path) as part, _hdf5(part, path) as (file, _):
        yield file


@contextmanager
def _hdf5(part: Path, path: Path) -> Iterator[tuple[h5py.File, Disk]]:
    """A new HDF5 file on ``part``, complete on the disk when the block ends well."""
    with writing(path):
        disk = Disk(part, "w+")
    with disk:
        with h5py.File(disk, "w") as file:
            yield file, disk
        with writing(path):
            disk.check()
