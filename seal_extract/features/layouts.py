"""The four layouts: which files a run writes, where they lie, and which tools read them.

trident  OUT/20x_224px_0px_overlap/patches/{slide}_patches.h5        coords
         OUT/20x_224px_0px_overlap/features_{encoder}/{slide}.h5     features, coords
         OUT/contours/{slide}.jpg                                    picture of the tissue
clam     OUT/patches/{slide}.h5                                      coords, in CLAM's own terms
         OUT/features_{encoder}/h5_files/{slide}.h5                  features, coords
         OUT/features_{encoder}/pt_files/{slide}.pt                  features as a float32 tensor
         OUT/features_{encoder}/without_patches/{slide}.h5           slides without patches, for resuming
stamp    OUT/{encoder}/{slide}.h5                                    feats float16, coords in micrometres
flat     OUT/{slide}.h5                                              features, coords

TRIDENT, Patho-Bench and CLAM's h5 loader read ``trident``; Patho-Bench and MIL-Lab read ``flat``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import h5py
import numpy as np

from seal_extract.errors import UsageError
from seal_extract.features.feature_file import (
    HERE,
    MICROMETRES,
    PIXELS,
    FeatureWriter,
    Keep,
    SlideLabel,
    write_described,
    write_padding,
    write_rows,
)
from seal_extract.features.layout import Layout
from seal_extract.features.store import read_pieces
from seal_extract.hdf5 import Disk, checked, open_hdf5
from seal_extract.names import shown
from seal_extract.patches.grid import PatchGrid, grid_name
from seal_extract.publish import publish


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
        """The feature file of a slide."""
        return self.folder / f"features_{encoder}" / f"{slide}.h5"

    def coords(self, slide: str) -> Path:
        """The coordinates file of a slide."""
        return self.folder / "patches" / f"{slide}_patches.h5"

    def contours(self, slide: str) -> Path:
        """The picture without which TRIDENT would segment the tissue again."""
        return self.out / "contours" / f"{slide}.jpg"

    def slide_level(self, slide: str, name: str) -> Path:
        """The slide-level embedding, beside the features of the patches."""
        return self.folder / f"slide_features_{name}" / f"{slide}.h5"


@dataclass(frozen=True)
class ClamLayout(Layout):
    """CLAM's layout; CLAM is given the folder ``OUT/features_{encoder}``."""

    name = "clam"

    def features(self, slide: str, encoder: str) -> Path:
        """The feature file of a slide."""
        return self._folder(encoder) / "h5_files" / f"{slide}.h5"

    def empty(self, slide: str, encoder: str) -> Path:
        """A separate folder, because CLAM stops at a bag without rows."""
        return self._folder(encoder) / "without_patches" / f"{slide}.h5"

    def derived(self, slide: str, encoder: str) -> tuple[Path, ...]:
        """The tensor on which CLAM trains."""
        return (self._folder(encoder) / "pt_files" / f"{slide}.pt",)

    def coords(self, slide: str) -> Path:
        """The coordinates for CLAM's own extraction."""
        return self.out / "patches" / f"{slide}.h5"

    def _folder(self, encoder: str) -> Path:
        return self.out / f"features_{encoder}"

    def complete(self, slide: str, encoder: str) -> None:
        """Write the tensor if it is missing."""
        features, (tensor,) = self.features(slide, encoder), self.derived(slide, encoder)
        if features.exists() and not tensor.exists():
            write_tensor(features, tensor)

    def write_coords(
        self, label: SlideLabel, grid: PatchGrid, provenance: dict[str, Any], *, overwrite: bool = False
    ) -> None:
        """Write the coordinates file, except for a slide without patches."""
        if len(grid):
            super().write_coords(label, grid, provenance, overwrite=overwrite)
        elif overwrite:
            self.coords(label.name).unlink(missing_ok=True)

    def _write_coords(
        self, path: Path, label: SlideLabel, grid: PatchGrid, provenance: dict[str, Any], keep: Keep | None
    ) -> None:
        # CLAM reads patch_size pixels of patch_level without rescaling; `Encoder.transform_for` rescales
        level, read_px = grid.level, grid.read_px
        if not provenance["slide"].get("reader", "").startswith("openslide"):
            level, read_px = 0, grid.patch_size_l0  # CLAM's reader may number other levels differently
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


@dataclass(frozen=True)
class StampLayout(Layout):
    """STAMP's layout; `stamp train` and `stamp deploy` are given the folder ``OUT/{encoder}``."""

    name = "stamp"
    dataset = MICROMETRES

    def features(self, slide: str, encoder: str) -> Path:
        """The feature file of a slide."""
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
        # STAMP's heatmaps divide by the µm/px of the slide file, so the true value is used
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


@dataclass(frozen=True)
class FlatLayout(Layout):
    """``OUT/{slide}.h5``: features and coords."""

    name = "flat"
    one_encoder = True

    def features(self, slide: str, encoder: str) -> Path:
        """The feature file of a slide."""
        return self.out / f"{slide}.h5"


LAYOUTS: dict[str, type[Layout]] = {
    layout.name: layout for layout in (TridentLayout, ClamLayout, StampLayout, FlatLayout)
}


def open_layout(name: str, out: Path, patch_px: int, mpp: float, overlap_px: int) -> Layout:
    """Open the layout of that name under ``out``, for patches of ``patch_px`` at ``mpp``.

    Raises:
        UsageError: there is no such layout.
    """
    check_layout(name)
    if name == TridentLayout.name:
        return TridentLayout(out, patch_px, mpp, overlap_px)
    return LAYOUTS[name](out)


def layout_of_grid(name: str, out: Path, grid: PatchGrid) -> Layout:
    """Open the layout of that name for patches that exist already."""
    return open_layout(name, out, grid.patch_px, grid.mpp, grid.overlap_px)


def check_layout(name: str, encoders: Sequence[str] = ()) -> None:
    """Refuse an unknown layout, and a layout that cannot hold several encoders in one folder.

    Raises:
        UsageError: the layout is refused.
    """
    if name not in LAYOUTS:
        raise UsageError(f"--layout is {name!r}; allowed: {', '.join(LAYOUTS)}")
    if LAYOUTS[name].one_encoder and len(encoders) > 1:
        raise UsageError(
            f"--layout {name} has one file per slide, but these are {len(encoders)} encoders "
            f"({', '.join(encoders)}); run each with an -o of its own, or type --layout trident"
        )
