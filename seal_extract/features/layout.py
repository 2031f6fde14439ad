"""The base of all layouts: where the files of a slide lie, and how they are written."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import OutputError
from seal_extract.features.feature_file import (
    PIXELS,
    PROVENANCE,
    FeatureWriter,
    Keep,
    SlideLabel,
    write_pixel_coords,
    write_pixel_features,
)
from seal_extract.features.store import read_provenance
from seal_extract.hdf5 import DAMAGED, open_hdf5
from seal_extract.names import shareable
from seal_extract.patches.grid import PatchGrid
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
        one_encoder: whether the features of two encoders would get one name.
    """

    out: Path

    name: ClassVar[str]
    dataset: ClassVar[str] = PIXELS
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
        path = self.place(label.name, encoder, grid)
        others = {self.features(label.name, encoder), self.empty(label.name, encoder)} - {path}
        keep = None if overwrite else _of_same_request(provenance)
        with self._open(path, label, grid, encoder, dim, provenance, keep) as writer:
            yield writer
            writer.check()
            if overwrite or self.find(label.name, encoder) is None:  # otherwise they belong to another run
                for stale in (
                    *self.derived(label.name, encoder),
                    *others,
                ):  # derived from the file that is replaced
                    with writing(stale):
                        stale.unlink(missing_ok=True)
        self.complete(label.name, encoder)

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
        """Open the feature file; coordinates are in level-0 pixels."""
        return write_pixel_features(path, label, grid, encoder, dim, provenance, keep)

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
        there = _read_coords(path) if exists else None
        if there is not None and _same(there, grid):
            return
        if there is None and exists and not overwrite:
            raise OutputError(
                f"{path} exists and its coordinates cannot be read; "
                f"type --overwrite to replace it, or another -o"
            )
        if there is not None and not overwrite:
            raise OutputError(
                f"{path} exists with {len(there[0])} other patches, and these are {len(grid)}; "
                f"type --coords {path.parent} to use those, --overwrite to replace them, or another -o"
            )

        def keep(path: Path) -> bool:
            there = _read_coords(path)
            return there is not None and _same(there, grid)

        self._write_coords(path, label, grid, shareable(provenance), None if overwrite else keep)

    def _write_coords(
        self, path: Path, label: SlideLabel, grid: PatchGrid, provenance: dict[str, Any], keep: Keep | None
    ) -> None:
        write_pixel_coords(path, label, grid, provenance, keep)


def of_grid(folder: Path, grid: str, name: str) -> Path:
    """The file of a grid, or that of an older version, which wrote one file for all grids."""
    own = folder / grid / name
    return own if os.path.exists(own) else folder / name


def _of_same_request(provenance: dict[str, Any]) -> Keep:
    """Make a check whether a feature file was made by the same request as ``provenance``."""

    def keep(path: Path) -> bool:
        try:
            there = read_provenance(path)
        except OutputError:
            return False
        return there is not None and there["request"] == json.loads(json.dumps(provenance["request"]))

    return keep


def _read_coords(path: Path) -> tuple[NDArray[Any], dict[str, Any] | None] | None:
    """Coordinates, and the fields of their grid if the file is ours; None if it cannot be read."""
    try:
        with open_hdf5(path) as file:
            text = file.attrs.get(PROVENANCE)
            return np.asarray(file["coords"][()]), json.loads(text).get("grid") if text else None
    except DAMAGED:
        return None


def _same(there: tuple[NDArray[Any], dict[str, Any] | None], grid: PatchGrid) -> bool:
    xy_l0, said = there
    sizes = (grid.patch_px, grid.patch_size_l0)
    return np.array_equal(xy_l0, grid.xy_l0) and (
        said is None or (said["patch_px"], said["patch_size_l0"]) == sizes
    )
