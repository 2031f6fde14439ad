"""What every layout answers: where a slide's files lie, how they are written, whether they are there."""

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

OVERLAYS, CONTOURS = "overlays", "contours_geojson"  # folders, with one below for each grid


@dataclass(frozen=True)
class Layout(ABC):
    """The files of a run under ``out``.

    A slide is finished when its features file is there: it is published last, and what is derived from it
    can be made again by `complete`.

    Attributes:
        out: folder of the results.
        name: as ``--layout`` takes it.
        dataset: name of the rows in a features file.
        one_encoder: features of two encoders would have one name.
    """

    out: Path

    name: ClassVar[str]
    dataset: ClassVar[str] = PIXELS
    one_encoder: ClassVar[bool] = False

    @abstractmethod
    def features(self, slide: str, encoder: str) -> Path:
        """Features of a slide, by its name without suffix."""

    def empty(self, slide: str, encoder: str) -> Path:
        """What stands for the features of a slide that has no patches: the same file, with no rows."""
        return self.features(slide, encoder)

    def derived(self, slide: str, encoder: str) -> tuple[Path, ...]:
        """Files made from the features file once it is complete."""
        return ()

    def coords(self, slide: str) -> Path | None:
        """Coordinates of a slide; None where only its features file has them."""
        return None

    def overlay(self, slide: str, grid: str) -> Path:
        """Picture of a slide, by the name of the slide and of its grid."""
        return self.out / OVERLAYS / grid / f"{slide}.jpg"

    def tissue(self, slide: str, grid: str) -> Path:
        """Tissue contours of a slide, by the name of the slide and of its grid."""
        return self.out / CONTOURS / grid / f"{slide}.geojson"

    def shared_tissue(self, slide: str, grid: str, *, overwrite: bool = False) -> Path | None:
        """The same where TRIDENT and QuPath's users look for it; None where it is another grid's."""
        shared = self.out / CONTOURS / f"{slide}.geojson"
        if overwrite or not shared.exists():
            return shared
        grids = [g.name for g in os.scandir(shared.parent) if g.is_dir() and Path(g, shared.name).exists()]
        return shared if grids == [grid] else None

    def contours(self, slide: str) -> Path | None:
        """Picture of the tissue beside `shared_tissue`, by which another tool knows that it was found."""
        return None

    def slide_level(self, slide: str, name: str) -> Path:
        """Embedding of a whole slide, by the name of what pooled it."""
        return self.out / f"slide_features_{name}" / f"{slide}.h5"

    def place(self, slide: str, encoder: str, grid: PatchGrid) -> Path:
        """Where the features of a slide with these patches go."""
        return self.features(slide, encoder) if len(grid) else self.empty(slide, encoder)

    def find(self, slide: str, encoder: str) -> Path | None:
        """The features file that is there, with patches or without."""
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
        """Open the features file of a slide; when the block ends with all rows in, it and what is derived
        from it appear. ``provenance`` is written last, as it then is.

        Raises:
            OutputError: it cannot be written, or not as many rows came as the grid has; or ``overwrite`` is
                not set, and another run has meanwhile put a file there that another request made.
        """
        path = self.place(label.name, encoder, grid)
        others = {self.features(label.name, encoder), self.empty(label.name, encoder)} - {path}
        keep = None if overwrite else _of_same_request(provenance)
        with self._open(path, label, grid, encoder, dim, provenance, keep) as writer:
            yield writer
            writer.check()
            if overwrite or self.find(label.name, encoder) is None:  # or they are another run's
                for stale in (*self.derived(label.name, encoder), *others):  # of a file that is about to go
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
        """The features file, in level-0 pixels."""
        return write_pixel_features(path, label, grid, encoder, dim, provenance, keep)

    def complete(self, slide: str, encoder: str) -> None:
        """Make those of the `derived` files that are not there."""
        return None

    def write_coords(
        self, label: SlideLabel, grid: PatchGrid, provenance: dict[str, Any], *, overwrite: bool = False
    ) -> None:
        """Write the coordinates file, unless the same coordinates lie there: encoders share it.

        Raises:
            OutputError: it cannot be written, or holds other coordinates and ``overwrite`` is not set.
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
                f"{path} exists and holds no coordinates that can be read; "
                f"type --overwrite to replace it, or another -o"
            )
        if there is not None and not overwrite:
            raise OutputError(
                f"{path} exists, with {len(there[0])} other patches than these {len(grid)}; "
                f"type --coords {path.parent} to take those, --overwrite to replace them, or another -o"
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
    """A grid's own file, or where there is none that of an older version, which kept one for all grids."""
    own = folder / grid / name
    return own if os.path.exists(own) else folder / name


def _of_same_request(provenance: dict[str, Any]) -> Keep:
    """Whether a features file was made by the same request as ``provenance`` says."""

    def keep(path: Path) -> bool:
        try:
            there = read_provenance(path)
        except OutputError:
            return False
        return there is not None and there["request"] == json.loads(json.dumps(provenance["request"]))

    return keep


def _read_coords(path: Path) -> tuple[NDArray[Any], dict[str, Any] | None] | None:
    """Coordinates, and the fields of their grid where they are ours; None where no such file can be read."""
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
