"""Features and coordinates in level-0 pixels, with the attributes that TRIDENT and Patho-Bench read."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from seal_extract.features.store import PIXELS, FeatureWriter, Keep, SlideLabel, write_described, write_rows
from seal_extract.hdf5 import checked
from seal_extract.names import shown
from seal_extract.patches.grid import PatchGrid

HERE = "."  # the file's own folder: tools want one named, and no path of this machine is told


def write_pixel_features(
    path: Path,
    label: SlideLabel,
    grid: PatchGrid,
    encoder: str,
    dim: int,
    provenance: dict[str, Any],
    keep: Keep | None = None,
) -> AbstractContextManager[FeatureWriter]:
    """Open a file of ``features`` float32 [N, D] and ``coords`` int64 [N, 2]; see `write_rows`."""

    def describe(file: h5py.File) -> None:
        file[PIXELS].attrs.update(name=shown(label.name), savetodir=HERE, encoder=encoder)
        create_coords(file, label, grid)

    return write_rows(path, PIXELS, (len(grid), dim), np.float32, provenance, describe, keep)


def write_pixel_coords(
    path: Path, label: SlideLabel, grid: PatchGrid, provenance: dict[str, Any], keep: Keep | None = None
) -> None:
    """Write a file of ``coords`` int64 [N, 2]; for ``keep`` see `publish`.

    Raises:
        OutputError: it cannot be written.
    """
    write_described(path, provenance, lambda file: create_coords(file, label, grid), keep)


def create_coords(file: h5py.File, label: SlideLabel, grid: PatchGrid) -> None:
    """``coords`` int64 [N, 2] with the nine attributes, and ``padding`` where there is some."""
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
    """The share of each patch beyond the slide, float32 [N], where patches were kept that reach there."""
    if grid.inside_l0 is not None:
        file["padding"] = grid.padding.astype(np.float32)


def _magnification(mpp: float) -> int | float:
    """10 / µm/px, the field's convention (0.5 µm/px = 20x), whole where it is."""
    value = round(10 / mpp, 2)
    return int(value) if value == int(value) else value
