"""Writing a feature file: HDF5 rows streamed in, with coordinates and the attributes that other tools read.

The root attribute ``seal_extract`` holds, as JSON, how the file was made: the provenance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import OutputError
from seal_extract.hdf5 import Disk, checked, new_hdf5
from seal_extract.names import shown
from seal_extract.patches.grid import PatchGrid
from seal_extract.publish import writing

PROVENANCE = "seal_extract"  # STAMP would be misled by the root attributes "encoder" and "stamp_version"
PIXELS, MICROMETRES = "features", "feats"  # datasets of rows; STAMP's file has coords in µm
BARCODE = "barcode"  # dataset of the names of patches, where they have names
CHUNK_BYTES = 2**18  # a chunk holds some hundred rows of features and has one checksum

Describe = Callable[[h5py.File], None]
Keep = Callable[[Path], bool]
HERE = "."  # other tools expect a folder here; a path of this machine would be given away


@dataclass(frozen=True)
class SlideLabel:
    """The facts about a slide that its files hold.

    Attributes:
        name: the name of the files, without suffix.
        size_l0: (width, height) in level-0 pixels.
        mpp: the true µm/px at level 0.
        barcodes: one name per patch, if patches have names; they are written beside the rows.
    """

    name: str
    size_l0: tuple[int, int]
    mpp: float
    barcodes: tuple[str, ...] | None = None

    def add_barcodes(self, file: h5py.File) -> None:
        """Write the dataset ``barcode``, UTF-8 [N], if there are barcodes."""
        if self.barcodes is not None:
            file.create_dataset(BARCODE, data=list(self.barcodes), dtype=h5py.string_dtype())


class FeatureWriter:
    """Writes rows of features in the order of the grid; made by `write_rows`."""

    def __init__(self, path: Path, dataset: h5py.Dataset, disk: Disk) -> None:
        self.path = path
        self.rows = 0
        self._dataset, self._disk = dataset, disk

    def append(self, features: NDArray[Any]) -> None:
        """Write the next rows: float32 [B, D], or tokens float16 [B, h, w, C].

        Raises:
            OutputError: rows have another width, are too many, or have values beyond the type of the file.
        """
        expected = (min(len(features), len(self._dataset) - self.rows), *self._dataset.shape[1:])
        if features.shape != expected:
            raise OutputError(
                f"{self.path}: the rows from {self.rows} on are {list(features.shape)}, but the file expects "
                f"{list(expected)}; nothing was written"
            )
        with writing(self.path):
            self._dataset[self.rows : self.rows + len(features)] = self._fitting(features)
            self._disk.check()
        self.rows += len(features)

    def check(self) -> None:
        """Check that no row is missing.

        Raises:
            OutputError: rows are missing.
        """
        if self.rows != len(self._dataset):
            raise OutputError(
                f"{self.path}: {self.rows} rows for {len(self._dataset)} patches; nothing was written"
            )

    def _fitting(self, features: NDArray[Any]) -> NDArray[Any]:
        dtype = self._dataset.dtype
        if features.dtype == dtype:
            return features
        largest = float(np.abs(features).max(initial=0))
        if dtype == np.float16 and largest > float(np.finfo(np.float16).max):
            raise OutputError(
                f"{self.path}: a feature of {largest:.4g} does not fit float16, which holds up to 65504; "
                "choose another --layout; the others are float32"
            )
        return features.astype(dtype, copy=False)


@contextmanager
def write_rows(
    path: Path,
    dataset: str,
    shape: tuple[int, ...],
    dtype: type[np.floating[Any]],
    provenance: dict[str, Any],
    describe: Describe,
    keep: Keep | None = None,
) -> Iterator[FeatureWriter]:
    """Open a new file of rows; it gets its name when the block ends and all rows are written.

    Args:
        path: the final name.
        dataset: the name of the rows.
        shape: (N, D), or (N, h, w, C) of tokens.
        dtype: the type of the rows in the file.
        provenance: written at the end, with the changes made until then.
        describe: adds coordinates and attributes to the open file.
        keep: see `publish`.

    Raises:
        OutputError: the file cannot be written, or rows are missing.
    """
    with new_hdf5(path, keep) as (file, disk):
        writer = FeatureWriter(path, create_rows(file, dataset, shape, dtype), disk)
        describe(file)
        yield writer
        writer.check()
        file.attrs[PROVENANCE] = json.dumps(provenance)


def create_rows(
    file: h5py.File, name: str, shape: tuple[int, ...], dtype: type[np.floating[Any]]
) -> h5py.Dataset:
    """An empty dataset of rows, in chunks of whole rows with a checksum each."""
    row_bytes = np.dtype(dtype).itemsize * math.prod(shape[1:])
    rows = max(1, min(shape[0], CHUNK_BYTES // max(1, row_bytes)))
    chunks = (rows, *shape[1:]) if all(shape) else None  # HDF5 cannot chunk an empty dataset
    return file.create_dataset(name, shape, dtype, chunks=chunks, fletcher32=chunks is not None)


def write_described(
    path: Path, provenance: dict[str, Any], describe: Describe, keep: Keep | None = None
) -> None:
    """Write a file without rows, such as coordinates; for ``keep`` see `publish`.

    Raises:
        OutputError: the file cannot be written.
    """
    with new_hdf5(path, keep) as (file, _):
        describe(file)
        file.attrs[PROVENANCE] = json.dumps(provenance)


def create_coords(file: h5py.File, label: SlideLabel, grid: PatchGrid) -> None:
    """Write ``coords`` int64 [N, 2] with TRIDENT's nine attributes, and ``padding`` if there is any."""
    label.add_barcodes(file)
    write_padding(file, grid)
    coords = file.create_dataset("coords", data=grid.xy_l0, **checked(grid.xy_l0))
    coords.attrs.update(
        patch_size=grid.patch_px,
        patch_size_level0=grid.patch_size_l0,
        level0_magnification=_magnification(grid.nominal_mpp_l0),
        target_magnification=_magnification(grid.mpp),
        overlap=grid.overlap_px,
        name=shown(label.name),
        savetodir=HERE,
        level0_width=label.size_l0[0],
        level0_height=label.size_l0[1],
    )


def write_padding(file: h5py.File, grid: PatchGrid) -> None:
    """Write the share of each patch beyond the slide, float32 [N], if such patches were kept."""
    if grid.inside_l0 is not None:
        file["padding"] = grid.padding.astype(np.float32)


def _magnification(mpp: float) -> int | float:
    """Magnification by the convention of the field, 10 / µm/px (0.5 µm/px = 20x)."""
    value = round(10 / mpp, 2)
    return int(value) if value == int(value) else value
