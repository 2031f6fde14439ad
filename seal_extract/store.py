"""The HDF5 files: streamed, published when complete, recognised when they lie there already.

The layout is TRIDENT's, which Patho-Bench and CLAM's loaders read as well:

    OUT/20x_224px_0px_overlap/patches/{slide}_patches.h5      coords
    OUT/20x_224px_0px_overlap/features_{encoder}/{slide}.h5   features, coords

What made a file hangs as JSON on the root attribute ``seal_extract``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
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
from seal_extract.slide import Slide

PROVENANCE = "seal_extract"  # at the root; "encoder" and "stamp_version" there would mislead STAMP
CHUNK_BYTES = 2**20  # a chunk of features is some hundred rows, never one


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
            features: NDArray[np.float32] = file["features"][()]
        return features

    def __repr__(self) -> str:
        name = self.provenance["encoder"]["name"]
        return f"SlideFeatures({self.path.name}: {len(self.grid)} patches, {name}, {self.grid.mpp:.4g} µm/px)"


@dataclass(frozen=True)
class TridentLayout:
    """Where the files of a run lie under ``out``."""

    out: Path
    patch_px: int
    mpp: float
    overlap_px: int

    @property
    def folder(self) -> Path:
        """Folder of this magnification, patch size and overlap."""
        return self.out / f"{10 / self.mpp:g}x_{self.patch_px}px_{self.overlap_px}px_overlap"

    def coords(self, slide: str) -> Path:
        """Coordinates of a slide, by its name without suffix."""
        return self.folder / "patches" / f"{slide}_patches.h5"

    def features(self, slide: str, encoder: str) -> Path:
        """Features of a slide."""
        return self.folder / f"features_{encoder}" / f"{slide}.h5"

    def overlay(self, slide: str) -> Path:
        """Picture of a slide."""
        return self.out / "overlays" / f"{slide}.jpg"

    def tissue(self, slide: str) -> Path:
        """Tissue contours of a slide."""
        return self.out / "contours_geojson" / f"{slide}.geojson"


class FeatureWriter:
    """Takes rows of features in grid order; made by `write_features`."""

    def __init__(self, path: Path, dataset: h5py.Dataset, disk: _Disk) -> None:
        self.path = path
        self.rows = 0
        self._dataset, self._disk = dataset, disk

    def append(self, features: NDArray[np.float32]) -> None:
        """Write the next rows: float32 [B, D]."""
        expected = (min(len(features), len(self._dataset) - self.rows), self._dataset.shape[1])
        if features.shape != expected:
            raise OutputError(
                f"{self.path}: row {self.rows} on is {list(features.shape)}, the file takes "
                f"{list(expected)}; nothing was kept"
            )
        with writing(self.path):
            self._dataset[self.rows : self.rows + len(features)] = features
            self._disk.check()
        self.rows += len(features)


@contextmanager
def write_features(
    path: Path, slide: Slide, grid: PatchGrid, encoder: str, dim: int, provenance: dict[str, Any]
) -> Iterator[FeatureWriter]:
    """Open the features file of a slide; it appears under its name when the block ends with all rows in.

    ``provenance`` is written last, as it then is.

    Raises:
        OutputError: it cannot be written, or not as many rows came as the grid has.
    """
    with publish(path) as part, _hdf5(part, path) as (file, disk):
        rows = max(1, min(len(grid), CHUNK_BYTES // (4 * dim)))
        chunks = (rows, dim) if len(grid) else None  # HDF5 has no chunks of nothing
        dataset = file.create_dataset("features", (len(grid), dim), np.float32, chunks=chunks)
        dataset.attrs.update(name=slide.path.stem, savetodir=str(path.parent), encoder=encoder)
        _create_coords(file, slide, grid, path.parent)
        writer = FeatureWriter(path, dataset, disk)
        yield writer
        if writer.rows != len(grid):
            raise OutputError(f"{path}: {writer.rows} rows came for {len(grid)} patches; nothing was kept")
        file.attrs[PROVENANCE] = json.dumps(provenance)


def write_coords(path: Path, slide: Slide, grid: PatchGrid, provenance: dict[str, Any]) -> None:
    """Write the coordinates file of a slide.

    Raises:
        OutputError: it cannot be written.
    """
    with publish(path) as part, _hdf5(part, path) as (file, _):
        _create_coords(file, slide, grid, path.parent)
        file.attrs[PROVENANCE] = json.dumps(provenance)


def read_features(path: str | os.PathLike[str]) -> SlideFeatures:
    """Open a features file that this package wrote.

    Raises:
        OutputError: it does not exist or was not written by this package.
    """
    path = Path(path)
    provenance = read_provenance(path)
    if provenance is None:
        raise OutputError(
            f"{path} is no features file of seal_extract; give OUT/20x_.../features_NAME/SLIDE.h5"
        )
    with h5py.File(path, "r") as file:
        grid = PatchGrid(file["coords"][()], **provenance["grid"])
    return SlideFeatures(path, grid, provenance)


def read_provenance(path: Path) -> dict[str, Any] | None:
    """What made the file, or None where this package did not."""
    try:
        with h5py.File(path, "r") as file:
            text = file.attrs.get(PROVENANCE) if "features" in file else None
    except OSError:
        return None
    return dict(json.loads(text)) if isinstance(text, str) else None


def grid_fields(grid: PatchGrid) -> dict[str, Any]:
    """All of a grid but its coordinates, as provenance keeps it."""
    return {f.name: getattr(grid, f.name) for f in fields(grid) if f.name != "xy_l0"}


class _Disk(FileIO):
    """A file that keeps its failure to itself: HDF5 would meet it again on closing, and not close."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            view = memoryview(data)
            while len(view) and self.failure is None:
                view = view[super().write(view) :]  # a disk about to be full takes a part
        except OSError as exc:
            self.failure = exc
        return len(data)

    def truncate(self, size: int | None = None) -> int:
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
def _hdf5(part: Path, path: Path) -> Iterator[tuple[h5py.File, _Disk]]:
    """A new HDF5 file on ``part``, complete on the disk when the block ends well."""
    with writing(path):
        disk = _Disk(part, "w+")
    with disk:
        with h5py.File(disk, "w") as file:
            yield file, disk
        with writing(path):
            disk.check()


def _create_coords(file: h5py.File, slide: Slide, grid: PatchGrid, folder: Path) -> None:
    """``coords`` int64 [N, 2] with the nine attributes that TRIDENT and Patho-Bench read."""
    coords = file.create_dataset("coords", data=grid.xy_l0)
    coords.attrs.update(
        patch_size=grid.patch_px,
        patch_size_level0=grid.patch_size_l0,
        level0_magnification=_magnification(grid.nominal_mpp_l0),
        target_magnification=_magnification(grid.mpp),
        overlap=grid.overlap_px,
        name=slide.path.stem,
        savetodir=str(folder),
        level0_width=slide.size_l0[0],
        level0_height=slide.size_l0[1],
    )


def _magnification(mpp: float) -> int | float:
    """10 / µm/px, the field's convention (0.5 µm/px = 20x), whole where it is."""
    value = round(10 / mpp, 2)
    return int(value) if value == int(value) else value
