"""STAMP's layout: float16, coordinates in micrometres, one folder per encoder.

OUT/{encoder}/{slide}.h5   feats, coords
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from seal_extract.features.layouts.layout import Layout
from seal_extract.features.layouts.pixels import write_padding
from seal_extract.features.store import MICROMETRES, FeatureWriter, Keep, SlideLabel, write_rows
from seal_extract.hdf5 import checked
from seal_extract.patches.grid import PatchGrid


@dataclass(frozen=True)
class StampLayout(Layout):
    """What `stamp train` and `stamp deploy` take as a feature folder is ``OUT/{encoder}``."""

    name = "stamp"
    dataset = MICROMETRES

    def features(self, slide: str, encoder: str) -> Path:
        """Features of a slide, by its name without suffix."""
        return self.out / encoder / f"{slide}.h5"

    def _open(
        self,
        path: Path,
        label: SlideLabel,
        grid: PatchGrid,
        encoder: str,
        dim: int,
        provenance: dict[str, Any],
        keep: Keep | None,
    ) -> AbstractContextManager[FeatureWriter]:
        # STAMP's heatmaps divide by the µm/px that the slide file says: so the true one, not the nominal
        def describe(file: h5py.File) -> None:
            label.add_barcodes(file)
            coords_um = (grid.xy_l0 * label.mpp).astype(np.float32)
            file.create_dataset("coords", data=coords_um, **checked(coords_um))
            write_padding(file, grid)
            file.attrs.update(
                extractor=encoder,
                unit="um",
                tile_size_um=grid.patch_size_l0 * label.mpp,
                tile_size_px=grid.patch_px,
                feat_type="tile",
            )

        return write_rows(path, MICROMETRES, (len(grid), dim), np.float16, provenance, describe, keep)
