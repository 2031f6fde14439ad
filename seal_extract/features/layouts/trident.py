"""TRIDENT's layout, which Patho-Bench and CLAM's loaders read as well.

OUT/20x_224px_0px_overlap/patches/{slide}_patches.h5      coords
OUT/20x_224px_0px_overlap/features_{encoder}/{slide}.h5   features, coords
OUT/contours/{slide}.jpg                                  picture of the tissue
OUT/20x_224px_0px_overlap/slide_features_{name}/{slide}.h5   of the whole slide
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from seal_extract.features.layouts.layout import Layout
from seal_extract.patches.grid import grid_name


@dataclass(frozen=True)
class TridentLayout(Layout):
    """One folder per magnification, patch size and overlap."""

    patch_px: int
    mpp: float
    overlap_px: int

    name = "trident"

    @property
    def folder(self) -> Path:
        """Folder of this magnification, patch size and overlap."""
        return self.out / grid_name(self.patch_px, self.mpp, self.overlap_px)

    def features(self, slide: str, encoder: str) -> Path:
        """Features of a slide, by its name without suffix."""
        return self.folder / f"features_{encoder}" / f"{slide}.h5"

    def coords(self, slide: str) -> Path:
        """Coordinates of a slide."""
        return self.folder / "patches" / f"{slide}_patches.h5"

    def contours(self, slide: str) -> Path:
        """TRIDENT segments again, over contours that are there, where it does not find this picture."""
        return self.out / "contours" / f"{slide}.jpg"

    def slide_level(self, slide: str, name: str) -> Path:
        """Embedding of a whole slide, beside those of its patches."""
        return self.folder / f"slide_features_{name}" / f"{slide}.h5"
