"""CLAM's layout: a features folder per encoder, and the coordinates in CLAM's own terms.

OUT/patches/{slide}.h5                             coords, and what to read at each
OUT/features_{encoder}/h5_files/{slide}.h5         features, coords
OUT/features_{encoder}/pt_files/{slide}.pt         the features as a float32 tensor
OUT/features_{encoder}/without_patches/{slide}.h5  slides that CLAM must not meet, for resuming
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import h5py
import numpy as np

from seal_extract.features.layouts.layout import Layout
from seal_extract.features.layouts.pixels import HERE
from seal_extract.features.store import PIXELS, Keep, SlideLabel, read_pieces, write_described
from seal_extract.hdf5 import Disk, checked, open_hdf5
from seal_extract.names import shown
from seal_extract.patches.grid import PatchGrid
from seal_extract.publish import publish


@dataclass(frozen=True)
class ClamLayout(Layout):
    """What CLAM takes as a features folder is ``OUT/features_{encoder}``."""

    name = "clam"

    def features(self, slide: str, encoder: str) -> Path:
        """Features of a slide, by its name without suffix."""
        return self._folder(encoder) / "h5_files" / f"{slide}.h5"

    def empty(self, slide: str, encoder: str) -> Path:
        """A file apart: CLAM stops at a bag without rows."""
        return self._folder(encoder) / "without_patches" / f"{slide}.h5"

    def derived(self, slide: str, encoder: str) -> tuple[Path, ...]:
        """The tensor that CLAM trains on."""
        return (self._folder(encoder) / "pt_files" / f"{slide}.pt",)

    def coords(self, slide: str) -> Path:
        """Coordinates for CLAM's own extraction."""
        return self.out / "patches" / f"{slide}.h5"

    def _folder(self, encoder: str) -> Path:
        return self.out / f"features_{encoder}"

    def complete(self, slide: str, encoder: str) -> None:
        """Write the tensor where it is missing."""
        features, (tensor,) = self.features(slide, encoder), self.derived(slide, encoder)
        if features.exists() and not tensor.exists():
            write_tensor(features, tensor)

    def write_coords(
        self, label: SlideLabel, grid: PatchGrid, provenance: dict[str, Any], *, overwrite: bool = False
    ) -> None:
        """As in every layout, but none of a slide without patches."""
        if len(grid):
            super().write_coords(label, grid, provenance, overwrite=overwrite)
        elif overwrite:
            self.coords(label.name).unlink(missing_ok=True)

    def _write_coords(
        self, path: Path, label: SlideLabel, grid: PatchGrid, provenance: dict[str, Any], keep: Keep | None
    ) -> None:
        # CLAM reads patch_size pixels of patch_level and does not rescale: `Encoder.transform_for` does
        level, read_px = grid.level, grid.read_px
        if not provenance["slide"].get("reader", "").startswith("openslide"):
            level, read_px = 0, grid.patch_size_l0  # CLAM's reader may number the other levels otherwise
        downsample = grid.patch_size_l0 / read_px
        size = tuple(round(side / downsample) for side in label.size_l0)

        def describe(file: h5py.File) -> None:
            label.add_barcodes(file)
            file.create_dataset("coords", data=grid.xy_l0, **checked(grid.xy_l0)).attrs.update(
                patch_size=read_px,
                patch_level=level,
                target_patch_size=grid.patch_px,
                overlap=grid.overlap_px,
                downsample=(downsample, downsample),
                downsampled_level_dim=size,
                level_dim=size,
                name=shown(label.name),
                save_path=HERE,
            )

        write_described(path, provenance, describe, keep)


def write_tensor(features: Path, path: Path) -> None:
    """Write the rows of a features file as ``torch.save`` does: float32 [N, D].

    They go through a file, not through memory: a large slide has gigabytes of them.

    Raises:
        OutputError: it cannot be written.
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
