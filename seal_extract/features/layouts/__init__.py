"""Where the results of a run lie, and in which form: one file per layout.

trident  OUT/20x_224px_0px_overlap/features_{encoder}/{slide}.h5   TRIDENT, Patho-Bench, CLAM's h5 loader
clam     OUT/features_{encoder}/{h5_files,pt_files}/               CLAM
stamp    OUT/{encoder}/{slide}.h5                                  STAMP
flat     OUT/{slide}.h5                                            Patho-Bench, MIL-Lab
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from seal_extract.errors import UsageError
from seal_extract.features.layouts.clam import ClamLayout
from seal_extract.features.layouts.flat import FlatLayout
from seal_extract.features.layouts.layout import CONTOURS, OVERLAYS, Layout, of_grid
from seal_extract.features.layouts.stamp import StampLayout
from seal_extract.features.layouts.trident import TridentLayout
from seal_extract.patches.grid import PatchGrid

__all__ = [
    "CONTOURS",
    "LAYOUTS",
    "OVERLAYS",
    "Layout",
    "check_layout",
    "layout_of_grid",
    "of_grid",
    "open_layout",
]

LAYOUTS: dict[str, type[Layout]] = {
    layout.name: layout for layout in (TridentLayout, ClamLayout, StampLayout, FlatLayout)
}


def open_layout(name: str, out: Path, patch_px: int, mpp: float, overlap_px: int) -> Layout:
    """The layout of that name under ``out``, for patches of ``patch_px`` at ``mpp``.

    Raises:
        UsageError: there is no such layout.
    """
    check_layout(name)
    if name == TridentLayout.name:
        return TridentLayout(out, patch_px, mpp, overlap_px)
    return LAYOUTS[name](out)


def layout_of_grid(name: str, out: Path, grid: PatchGrid) -> Layout:
    """`open_layout` for patches that are there already."""
    return open_layout(name, out, grid.patch_px, grid.mpp, grid.overlap_px)


def check_layout(name: str, encoders: Sequence[str] = ()) -> None:
    """Refuse a layout that does not exist, or cannot hold these encoders in one folder.

    Raises:
        UsageError: either.
    """
    if name not in LAYOUTS:
        raise UsageError(f"--layout is {name!r}; allowed: {', '.join(LAYOUTS)}")
    if LAYOUTS[name].one_encoder and len(encoders) > 1:
        raise UsageError(
            f"--layout {name} has one file per slide, for {len(encoders)} encoders ({', '.join(encoders)}); "
            f"give each a run with an -o of its own, or type --layout trident"
        )
