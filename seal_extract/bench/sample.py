"""What everything is measured on: the same patches of a slide, from the middle of its tissue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from seal_extract.errors import GeometryError
from seal_extract.patches.grid import PatchGrid
from seal_extract.patches.regions import PatchReader, RegionReader, Resampling
from seal_extract.patches.stream import JOB_BYTES, ROWS_PER_JOB
from seal_extract.patches.tiled import Unsuitable
from seal_extract.patches.tiles import TileReader, open_patch_reader
from seal_extract.run.job import SlideJob, find_tissue_and_grid
from seal_extract.run.options import ExtractOptions
from seal_extract.slides.entry import SlideEntry
from seal_extract.slides.slide import Slide


@dataclass(frozen=True)
class Sample:
    """Patches of one slide, and how they are to be read.

    Attributes:
        slide: open.
        grid: the patches, neighbours in scan order.
        in_grid: patches that the whole slide has.
        tissue_s: seconds that opening, finding the tissue and laying the grid took.
        device: where the patches are wanted.
        options: all choices of a run.
    """

    slide: Slide
    grid: PatchGrid
    in_grid: int
    tissue_s: float
    device: torch.device
    options: ExtractOptions

    @property
    def is_whole(self) -> bool:
        """Whether it is all patches of the slide."""
        return len(self.grid) == self.in_grid

    def decoder(self) -> PatchReader:
        """As a run opens it; each reads the patches once."""
        return open_patch_reader(
            self.slide,
            self.grid,
            self.device,
            filter=self.options.resample,
            fast=self.options.fast_decode,
        )

    def region_decoder(self) -> PatchReader:
        """One that hands over regions as they were decoded, for `PatchReader.to_patches`."""
        return self._decoder(early=False)

    def decoder_alone(self) -> PatchReader:
        """One that decodes as a run's does, and does not resample.

        Where a run resamples in the reading threads, it decodes into memory that is used again and again. To
        have that here too, regions are declared to be patches.
        """
        if self.device.type == "cuda":
            return self.region_decoder()
        decoder = self.region_decoder()
        decoder.close()
        return self._decoder(early=True, patch_px=decoder.side_px)

    def _decoder(self, early: bool, patch_px: int | None = None) -> PatchReader:
        finish = Resampling(
            patch_px or self.grid.patch_px,
            self.options.resample,
            early=early,
            pinned=self.device.type == "cuda",
        )
        try:
            return TileReader(self.slide, self.grid, finish, self.options.fast_decode)
        except Unsuitable as exc:
            return RegionReader(self.slide, self.grid, finish, str(exc))

    def jobs(self, side_px: int) -> list[range]:
        """The grid rows that threads read at a time, as `stream_batches` divides them."""
        step = max(1, min(ROWS_PER_JOB, JOB_BYTES // (3 * side_px**2)))
        rows = len(self.grid)
        return [range(start, min(start + step, rows)) for start in range(0, rows, step)]

    def describe(self) -> dict[str, Any]:
        """The slide and what is read of it, as JSON."""
        slide, grid = self.slide, self.grid
        return {
            "path": str(slide.path),
            "size_l0": list(slide.size_l0),
            "mpp": slide.mpp,
            "reader": slide.reader,
            "patches_in_grid": self.in_grid,
            "patches": len(grid),
            "patch_px": grid.patch_px,
            "patch_mpp": grid.mpp,
            "level": grid.level,
            "read_px": grid.read_px,
            "tissue_s": self.tissue_s,
        }


@contextmanager
def take_sample(path: Path, patches: int, device: torch.device, options: ExtractOptions) -> Iterator[Sample]:
    """Open a slide and choose patches in the middle of its grid, all of them where it has fewer.

    Raises:
        SlideError: it cannot be read.
        GeometryError: it has no tissue.
    """
    started = perf_counter()
    job = SlideJob.of(SlideEntry.of(path), Path(), options)
    with job.open() as slide:
        _, grid = find_tissue_and_grid(slide, job.options)
        seconds = perf_counter() - started
        if not len(grid):
            raise GeometryError(
                f"{path}: no tissue was found, so nothing can be measured; give another slide"
            )
        first = max(0, len(grid) - patches) // 2
        chosen = replace(grid, xy_l0=grid.xy_l0[first : first + patches])
        yield Sample(slide, chosen, len(grid), seconds, device, options)
