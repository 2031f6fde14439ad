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

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np

from seal_extract.errors import OutputError, UsageError
from seal_extract.features.feature_file import (
    HERE,
    MICROMETRES,
    PIXELS,
    FeatureWriter,
    SlideLabel,
    create_coords,
    write_described,
    write_padding,
    write_rows,
)
from seal_extract.features.store import has_coords, read_coords, read_provenance, write_tensor
from seal_extract.hdf5 import checked
from seal_extract.names import shareable, shown
from seal_extract.patches.grid import PatchGrid, grid_name
from seal_extract.publish import writing

OVERLAYS, CONTOURS = "overlays", "contours_geojson"  # folders with one subfolder per grid


@dataclass(frozen=True)
class Layout(ABC):
    """The files of a run under ``out``.

    A slide is finished when its feature file exists: that file is published last, and `complete` can make
    again the files that are derived from it.

    Attributes:
        out: folder of the results.
        name: the value of ``--layout``.
        dataset: name of the rows in a feature file.
        dtype: type of the rows in a feature file.
        one_encoder: whether the features of two encoders would get one name.
    """

    out: Path

    name: ClassVar[str]
    dataset: ClassVar[str] = PIXELS
    dtype: ClassVar[type[np.floating[Any]]] = np.float32
    one_encoder: ClassVar[bool] = False

    @abstractmethod
    def features(self, slide: str, encoder: str) -> Path:
        """The feature file of a slide."""

    def empty(self, slide: str, encoder: str) -> Path:
        """The feature file of a slide without patches; by default the same file, without rows."""
        return self.features(slide, encoder)

    def derived(self, slide: str, encoder: str) -> tuple[Path, ...]:
        """Files that are derived from the complete feature file."""
        return ()

    def coords(self, slide: str) -> Path | None:
        """The coordinates file of a slide; None if only the feature file holds them."""
        return None

    def overlay(self, slide: str, grid: str) -> Path:
        """The picture of a slide with this grid."""
        return self.out / OVERLAYS / grid / f"{slide}.jpg"

    def tissue(self, slide: str, grid: str) -> Path:
        """The tissue contours of a slide with this grid."""
        return self.out / CONTOURS / grid / f"{slide}.geojson"

    def shared_tissue(self, slide: str, grid: str, *, overwrite: bool = False) -> Path | None:
        """The contours where TRIDENT and QuPath users look for them; None if those are of another grid."""
        shared = self.out / CONTOURS / f"{slide}.geojson"
        if overwrite or not shared.exists():
            return shared
        grids = [g.name for g in os.scandir(shared.parent) if g.is_dir() and Path(g, shared.name).exists()]
        return shared if grids == [grid] else None

    def contours(self, slide: str) -> Path | None:
        """A picture by which another tool recognises that tissue was found; None if it looks for none."""
        return None

    def slide_level(self, slide: str, name: str) -> Path:
        """The slide-level embedding, by the name of the pooling."""
        return self.out / f"slide_features_{name}" / f"{slide}.h5"

    def patient_level(self, patient: str, name: str) -> Path:
        """The embedding of a patient, beside those of the slides."""
        return self.slide_level(patient, name).parent.with_name(f"patient_features_{name}") / f"{patient}.h5"

    def place(self, slide: str, encoder: str, grid: PatchGrid) -> Path:
        """The feature file of a slide with these patches."""
        return self.features(slide, encoder) if len(grid) else self.empty(slide, encoder)

    def find(self, slide: str, encoder: str) -> Path | None:
        """The feature file that exists, with or without patches; None if there is none."""
        places = (self.features(slide, encoder), self.empty(slide, encoder))
        return next((path for path in places if path.exists()), None)

    # --- writing --------------------------------------------------------------------------------------

    @contextmanager
    def write_features(
        self,
        label: SlideLabel,
        grid: PatchGrid,
        encoder: str,
        dim: int,
        provenance: dict[str, Any],
        *,
        overwrite: bool = True,
    ) -> Iterator[FeatureWriter]:
        """Open the feature file of a slide; it and the derived files appear when the block ends.

        ``provenance`` is written at the end, with the changes made until then.

        Raises:
            OutputError: the file cannot be written, rows are missing, or ``overwrite`` is not set and another
                run has meanwhile written the file from another request.
        """

        def describe(file: h5py.File) -> None:
            self._describe(file, label, grid, encoder)

        def keep(path: Path) -> bool:
            try:
                there = read_provenance(path)
            except OutputError:
                return False
            return there is not None and there["request"] == json.loads(json.dumps(provenance["request"]))

        name, shape = label.name, (len(grid), dim)
        path, kept = self.place(name, encoder, grid), None if overwrite else keep
        with write_rows(path, self.dataset, shape, self.dtype, provenance, describe, kept) as writer:
            yield writer
            writer.check()
            if overwrite or self.find(name, encoder) is None:  # otherwise they belong to another run
                derived = self.derived(name, encoder)  # from the file that is replaced
                for stale in {*derived, self.features(name, encoder), self.empty(name, encoder)} - {path}:
                    with writing(stale):
                        stale.unlink(missing_ok=True)
        self.complete(name, encoder)

    def _describe(self, file: h5py.File, label: SlideLabel, grid: PatchGrid, encoder: str) -> None:
        """Add coordinates and attributes to an open feature file."""
        file[PIXELS].attrs.update(name=shown(label.name), savetodir=HERE, encoder=encoder)
        create_coords(file, label, grid)

    def complete(self, slide: str, encoder: str) -> None:
        """Make the `derived` files that do not exist."""
        return None

    def write_coords(
        self, label: SlideLabel, grid: PatchGrid, provenance: dict[str, Any], *, overwrite: bool = False
    ) -> None:
        """Write the coordinates file, which encoders share, unless it holds the same coordinates already.

        Raises:
            OutputError: the file cannot be written, or holds other coordinates and ``overwrite`` is not set.
        """
        path = self.coords(label.name)
        if path is None:
            return
        exists = path.exists()  # asked first: another run may put it there meanwhile
        if exists and has_coords(path, grid):
            return
        if exists and not overwrite:
            there = read_coords(path)
            raise OutputError(
                f"{path} exists and its coordinates cannot be read; type --overwrite to replace it, or "
                "another -o"
                if there is None
                else f"{path} exists with {len(there[0])} other patches, and these are {len(grid)}; "
                f"type --coords {path.parent} to use those, --overwrite to replace them, or another -o"
            )

        def describe(file: h5py.File) -> None:
            self._describe_coords(file, label, grid, provenance)

        keep = None if overwrite else partial(has_coords, grid=grid)
        write_described(path, shareable(provenance), describe, keep)

    def _describe_coords(
        self, file: h5py.File, label: SlideLabel, grid: PatchGrid, provenance: dict[str, Any]
    ) -> None:
        """Add coordinates and attributes to an open coordinates file."""
        create_coords(file, label, grid)


def of_grid(folder: Path, grid: str, name: str) -> Path:
    """The file of a grid, or that of an older version, which wrote one file for all grids."""
    own = folder / grid / name
    return own if os.path.exists(own) else folder / name


# --- the layouts --------------------------------------------------------------------------------------


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
            path = self.coords(label.name)
            with writing(path):
                path.unlink(missing_ok=True)

    def _describe_coords(
        self, file: h5py.File, label: SlideLabel, grid: PatchGrid, provenance: dict[str, Any]
    ) -> None:
        # CLAM reads patch_size pixels of patch_level without rescaling; `Encoder.transform_for` rescales
        level, read_px = grid.level, grid.read_px
        if not provenance["slide"].get("reader", "").startswith("openslide"):
            level, read_px = 0, grid.patch_size_l0  # CLAM's reader may number other levels differently
        downsample = grid.patch_size_l0 / read_px
        size = tuple(round(side / downsample) for side in label.size_l0)
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


@dataclass(frozen=True)
class StampLayout(Layout):
    """STAMP's layout; `stamp train` and `stamp deploy` are given the folder ``OUT/{encoder}``."""

    name = "stamp"
    dataset = MICROMETRES
    dtype = np.float16

    def features(self, slide: str, encoder: str) -> Path:
        """The feature file of a slide."""
        return self.out / encoder / f"{slide}.h5"

    def _describe(self, file: h5py.File, label: SlideLabel, grid: PatchGrid, encoder: str) -> None:
        # STAMP's heatmaps divide by the µm/px of the slide file, so the true value is used
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
