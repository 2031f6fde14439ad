"""The stages from the file to patches: each alone, and together as in a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import openslide
import torch
from PIL import Image
from torch import Tensor

from seal_extract.bench.measure import (
    Progress,
    Ratio,
    Stage,
    Timing,
    each,
    reading_threads,
    take_turns,
    timed,
)
from seal_extract.errors import GeometryError, UsageError
from seal_extract.patches.grid import PatchGrid
from seal_extract.patches.reader import open_patch_reader
from seal_extract.patches.regions import ROWS_AT_ONCE, PatchReader, RegionReader
from seal_extract.patches.resample import Resampling
from seal_extract.patches.stream import JOB_BYTES, stream_batches
from seal_extract.patches.tiled import TiledLevel, Unsuitable, open_level
from seal_extract.patches.tiles import TileReader
from seal_extract.run.extract import opening_threads
from seal_extract.run.job import SlideJob, find_tissue_and_grid
from seal_extract.run.options import ExtractOptions
from seal_extract.slides.entry import SlideEntry
from seal_extract.slides.slide import Slide

HELD_BYTES = 64 * 2**20  # of decoded regions that are resampled again and again
OURS, CLASSIC, ONE_THREAD = "reading", "OpenSlide + PIL", "reading by one thread"


@dataclass(frozen=True)
class Sample:
    """Patches from the middle of one slide's tissue, and how they are read.

    Attributes:
        slide: open.
        grid: the patches, neighbours in scan order.
        in_grid: number of patches of the whole slide.
        planning: of opening the slide, finding the tissue and making the grid.
        device: where the patches are needed.
        options: all options of a run.
    """

    slide: Slide
    grid: PatchGrid
    in_grid: int
    planning: Timing
    device: torch.device
    options: ExtractOptions

    @property
    def is_whole(self) -> bool:
        """Whether it is all patches of the slide."""
        return len(self.grid) == self.in_grid

    def open_reader(self) -> PatchReader:
        """The patch reader of a run; it reads the patches once."""
        return open_patch_reader(
            *(self.slide, self.grid, self.device),
            filter=self.options.resample,
            fast=self.options.fast_decode,
            gpu_decode=self.options.gpu_decode,
        )

    def open_region_reader(self) -> PatchReader:
        """One that gives regions as they were decoded, for `PatchReader.to_patches`."""
        return self._open(early=False)

    def open_without_resampling(self) -> PatchReader:
        """One that decodes as a run does, and does not resample.

        A run on a CPU resamples in the reading threads and decodes into memory that is used again and again.
        To do the same here, regions are declared to be patches.
        """
        reader = self.open_region_reader()
        if self.device.type == "cuda":
            return reader
        reader.close()
        return self._open(early=True, patch_px=reader.side_px)

    def _open(self, early: bool, patch_px: int | None = None) -> PatchReader:
        resampling = Resampling(patch_px or self.grid.patch_px, self.options.resample, early)
        try:
            return TileReader(self.slide, self.grid, resampling, self.options.fast_decode)
        except Unsuitable as exc:
            return RegionReader(self.slide, self.grid, resampling, str(exc))

    def jobs(self, side_px: int) -> list[range]:
        """The grid rows that a thread reads at a time, as in `stream_batches`."""
        step = max(1, min(ROWS_AT_ONCE, JOB_BYTES // (3 * side_px**2)))
        rows = len(self.grid)
        return [range(start, min(start + step, rows)) for start in range(0, rows, step)]

    def to_json(self) -> dict[str, Any]:
        """The slide and which patches of it are read."""
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
            "tissue_s": self.planning.wall_s,
        }


@contextmanager
def take_sample(path: Path, patches: int, device: torch.device, options: ExtractOptions) -> Iterator[Sample]:
    """Open a slide and choose patches in the middle of its grid, or all of them if it has fewer.

    Raises:
        SlideError: the slide cannot be read.
        GeometryError: it has no tissue.
    """
    wall, cpu = perf_counter(), process_time()
    job = SlideJob.of(SlideEntry.of(path), Path(), options)
    with job.open() as slide:
        _, grid, _ = find_tissue_and_grid(slide, job.options)
        planning = Timing(perf_counter() - wall, process_time() - cpu)
        if not len(grid):
            raise GeometryError(
                f"{path}: no tissue was found, so nothing can be measured; give another slide"
            )
        first = max(0, len(grid) - patches) // 2
        chosen = replace(grid, xy_l0=grid.xy_l0[first : first + patches])
        yield Sample(slide, chosen, len(grid), planning, device, options)


@dataclass(frozen=True)
class Versus:
    """Reading compared with another way to read; the ratios are ours to theirs.

    Attributes:
        headline: the ratio that counts.
        patches_per_s: ratio of wall time.
        patches_per_cpu_s: ratio of CPU time.
        other: the other way to read.
    """

    headline: str
    patches_per_s: Ratio
    patches_per_cpu_s: Ratio
    other: Stage


@dataclass(frozen=True)
class Reading:
    """The figures of reading.

    Attributes:
        decoder: its name.
        stages: planning, read, decode, resample (upload on a GPU, which resamples too) and reading, by name.
        openslide: compared with the classic loader, if asked for.
        one_thread: compared with one reading thread, if there are more.
    """

    decoder: str
    stages: dict[str, Stage]
    openslide: Versus | None
    one_thread: Versus | None


def measure_reading(
    sample: Sample, workers: int, batch_size: int, repeats: int, against_openslide: bool, progress: Progress
) -> Reading:
    """Measure everything before the encoder, ``repeats`` times after one warm-up.

    Raises:
        UsageError: OpenSlide is to be compared, and does not open the slide.
        ReadError: the slide is damaged.
    """
    works: dict[str, Callable[[], Timing]] = {OURS: lambda: _stream(sample, workers, batch_size)}
    if workers > 1:
        works[ONE_THREAD] = lambda: _stream(sample, 1, batch_size)
    if against_openslide:
        if not sample.slide.reader.startswith("openslide"):
            raise UsageError(
                f"--against openslide: {sample.slide.path.name} is read by {sample.slide.reader}; "
                "give a slide that OpenSlide opens, or leave --against out"
            )
        works[CLASSIC] = lambda: _classic(sample, workers)
    _stream(sample, workers, batch_size)
    timings = take_turns(works, repeats, progress)
    patches, ours = len(sample.grid), timings[OURS]

    def versus(name: str, does: str, threads: int) -> Versus | None:
        if name not in timings:
            return None
        return Versus(
            # of one thread, CPU time: other processes on the machine do not change it
            "patches_per_cpu_s" if workers == 1 else "patches_per_s",
            Ratio.of_wall(timings[name], ours),
            Ratio.of_cpu(timings[name], ours),
            Stage.of(does, patches, threads, timings[name]),
        )

    does = f"file to batches of {batch_size} patches, by the very stream of a run"
    with closing(sample.open_reader()) as reader:
        pass
    openers = opening_threads(workers)
    tissue = "opening, tissue and grid of a slide, once" + f"; {openers} at a time in a run" * (openers > 1)
    stages = {
        "planning": Stage.of(tissue, sample.in_grid * openers, openers, [sample.planning]),
        "read": _read_alone(sample, isinstance(reader, TileReader), workers, repeats, progress),
        "decode": _decode_alone(sample, workers, repeats, progress),
        "upload" if sample.device.type == "cuda" else "resample": _resample_alone(
            sample, workers, repeats, progress
        ),
        OURS: Stage.of(does, patches, workers, ours),
    }
    classic = versus(CLASSIC, "one region a patch, convert('RGB'), PIL's bicubic, one handle", workers)
    return Reading(reader.name, stages, classic, versus(ONE_THREAD, does, 1))


def _stream(sample: Sample, workers: int, batch_size: int) -> Timing:
    """Opening the patch reader is not counted, nor is opening the slide in `_classic`."""
    reader = sample.open_reader()

    def drain() -> None:
        for _ in stream_batches([reader], batch_size, device=sample.device, workers=workers):
            pass

    return timed(drain, sample.device)


def _classic(sample: Sample, workers: int) -> Timing:
    """The usual loader of other tools, in as many threads as ours."""
    grid = sample.grid
    side, size = (grid.read_px, grid.read_px), (grid.patch_px, grid.patch_px)
    with closing(openslide.OpenSlide(sample.slide.path)) as handle, reading_threads(workers) as pool:

        def read(rows: range) -> None:
            patches: list[Any] = []
            for xy in grid.xy_l0[rows.start : rows.stop].tolist():
                region = handle.read_region(xy, grid.level, side).convert("RGB")
                patches.append(region if side == size else region.resize(size, Image.Resampling.BICUBIC))
            np.stack([np.asarray(patch) for patch in patches])

        return timed(lambda: each(pool, read, sample.jobs(grid.patch_px)), sample.device)


# --- each alone ---------------------------------------------------------------------------------------


def _read_alone(sample: Sample, is_tiled: bool, workers: int, repeats: int, progress: Progress) -> Stage:
    patches = len(sample.grid)
    if not is_tiled:
        return Stage("part of decode: the slide's reader reads and decodes in one", patches, workers)
    with closing(open_level(sample.slide, sample.grid.level)) as level, reading_threads(workers) as pool:
        jobs = _tiles_of_jobs(sample, level)
        size = sum(len(data) for tiles in jobs for _, data in level.read(tiles))

        def read(tiles: list[int]) -> None:
            for _ in level.read(tiles):
                pass

        works = {"read": lambda: timed(lambda: each(pool, read, jobs), sample.device)}
        timings = take_turns(works, repeats, progress)["read"]
    does = f"{sum(map(len, jobs))} compressed tiles, {size / 1e6:.3g} MB, out of the page cache"
    return Stage.of(does, patches, workers, timings)


def _tiles_of_jobs(sample: Sample, level: TiledLevel) -> list[list[int]]:
    """The tiles that each job needs and no job before it."""
    grid = sample.grid
    corners = grid.xy_l0 // round(sample.slide.levels[grid.level].downsample)
    size, seen, jobs = np.asarray(level.size_px), set[int](), []
    first = np.clip(corners, 0, size) // level.tile_px
    last = (np.clip(corners + grid.read_px, 0, size) - 1) // level.tile_px
    spans = np.hstack([first, last]).tolist()
    for rows in sample.jobs(grid.patch_px):
        needed = {
            y * level.across + x
            for x0, y0, x1, y1 in spans[rows.start : rows.stop]
            for y in range(y0, y1 + 1)
            for x in range(x0, x1 + 1)
        }
        jobs.append(sorted(needed - seen))
        seen |= needed
    return jobs


def _decode_alone(sample: Sample, workers: int, repeats: int, progress: Progress) -> Stage:
    def once() -> Timing:
        with closing(sample.open_without_resampling()) as reader:
            return timed(lambda: each(pool, reader.read, sample.jobs(reader.side_px)), sample.device)

    with reading_threads(workers) as pool:
        timings = take_turns({"decode": once}, repeats, progress)["decode"]
    return Stage.of("file to regions, read included, not resampled", len(sample.grid), workers, timings)


def _resample_alone(sample: Sample, workers: int, repeats: int, progress: Progress) -> Stage:
    patches, after, on_gpu = len(sample.grid), sample.grid.patch_px, sample.device.type == "cuda"
    with closing(sample.open_region_reader()) as reader:
        rows = sample.jobs(reader.side_px)
        held = max(1, HELD_BYTES // (3 * reader.side_px**2 * len(rows[0])))
        regions = [reader.read(some).pixels for some in rows[:held]]
    before = regions[0].shape[-1]
    if on_gpu:  # as a run does: at once, from memory from which the GPU copies by itself
        regions = [torch.cat(regions).pin_memory()]
    elif before == after:
        return Stage("nothing left to do: decode gives patches", patches, workers)

    def resample(pixels: Tensor) -> None:
        reader.to_patches(pixels.to(sample.device, non_blocking=True))

    threads = 1 if on_gpu else workers  # one feeds a GPU
    jobs = list(islice(cycle(regions), -(-patches // len(regions[0]))))
    with reading_threads(threads) as pool:
        each(pool, resample, regions[:threads])
        works = {"resample": lambda: timed(lambda: each(pool, resample, jobs), sample.device)}
        timings = take_turns(works, repeats, progress)["resample"]
    where = "from host memory to the GPU and there" if on_gpu else "in memory"
    does = f"{before} px to {after} px, {sample.options.resample}, {where}"
    return Stage.of(does, sum(map(len, jobs)), threads, timings)
