"""From the file to patches: reading, decoding and resampling, each alone and as a run does them together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import openslide
from PIL import Image
from torch import Tensor

from seal_extract.bench.measure import Ratio, Stage, Timing, each, reading_threads, take_turns, timed
from seal_extract.bench.sample import Sample
from seal_extract.errors import UsageError
from seal_extract.patches.stream import stream_batches
from seal_extract.patches.tiled import TiledLevel, open_level
from seal_extract.patches.tiles import TileReader

HELD_BYTES = 64 * 2**20  # of decoded regions that are resampled again and again
OURS, CLASSIC, ONE_THREAD = "reading", "OpenSlide + PIL", "reading by one thread"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Versus:
    """Reading against another way to read, in patches per second and per CPU-second.

    Attributes:
        stage: the other way.
        per_s: ours to theirs.
        per_cpu_s: ours to theirs.
    """

    stage: Stage
    per_s: Ratio
    per_cpu_s: Ratio

    @classmethod
    def of(cls, ours: Stage, theirs: Stage) -> Versus:
        """Two stages that took turns."""
        pairs = (theirs.timings, ours.timings)
        return cls(
            theirs,
            Ratio.of(*([t.wall_s for t in times] for times in pairs)),
            Ratio.of(*([t.cpu_s for t in times] for times in pairs)),
        )


@dataclass(frozen=True)
class Reading:
    """The figures of reading.

    Attributes:
        decoder: its name.
        stages: read, decode, resample and reading, by name.
        openslide: against the classic loader, if asked for.
        one_thread: against one reading thread, if there are more.
    """

    decoder: str
    stages: dict[str, Stage]
    openslide: Versus | None
    one_thread: Versus | None


def measure_reading(
    sample: Sample,
    workers: int,
    batch_size: int,
    repeats: int,
    against_openslide: bool,
    say: Say = lambda _: None,
) -> Reading:
    """Measure all that comes before the encoder.

    Args:
        sample: what is read.
        workers: reading threads.
        batch_size: patches that the stream puts together.
        repeats: of each measurement, after one that warms up.
        against_openslide: read with the classic loader too, in turns.
        say: told what is measured next.

    Raises:
        UsageError: the slide is none that OpenSlide opens.
        ReadError: it is damaged.
    """
    together = _together(sample, workers, batch_size, repeats, against_openslide, say)
    name, regions = _decoder_facts(sample)
    return Reading(
        name,
        {
            "read": _read_alone(sample, workers, repeats, say),
            "decode": _decode_alone(sample, workers, repeats, say),
            "resample": _resample_alone(sample, regions, workers, repeats, say),
            OURS: together[OURS],
        },
        Versus.of(together[OURS], together[CLASSIC]) if CLASSIC in together else None,
        Versus.of(together[OURS], together[ONE_THREAD]) if ONE_THREAD in together else None,
    )


def _decoder_facts(sample: Sample) -> tuple[str, list[Tensor]]:
    """The name of the decoder, and some regions as it decodes them."""
    decoder, late = sample.decoder(), sample.region_decoder()
    try:
        jobs = sample.jobs(late.side_px)
        held = max(1, HELD_BYTES // (3 * late.side_px**2 * len(jobs[0])))
        return decoder.name, [late.read(rows).pixels for rows in jobs[:held]]
    finally:
        decoder.close()
        late.close()


# --- each alone ---------------------------------------------------------------------------------------


def _read_alone(sample: Sample, workers: int, repeats: int, say: Say) -> Stage:
    decoder = sample.decoder()
    decoder.close()
    if not isinstance(decoder, TileReader):
        does = "part of decode: the slide's reader reads and decodes in one"
        return Stage(does, len(sample.grid), workers)
    level = open_level(sample.slide, sample.grid.level)
    try:
        jobs = _tiles_of_jobs(sample, level)
        size = sum(len(data) for tiles in jobs for _, data in level.read(tiles))

        def read(tiles: list[int]) -> None:
            for _ in level.read(tiles):
                pass

        with reading_threads(workers) as pool:
            works = {"read": lambda: timed(lambda: each(pool, read, jobs), sample.device)}
            timings = take_turns(works, repeats, say)["read"]
    finally:
        level.close()
    tiles = sum(map(len, jobs))
    does = f"{tiles} compressed tiles, {size / 1e6:.3g} MB, out of the page cache"
    return Stage(does, len(sample.grid), workers, timings)


def _tiles_of_jobs(sample: Sample, level: TiledLevel) -> list[list[int]]:
    """The tiles that each job needs and none before it."""
    grid = sample.grid
    corners = grid.xy_l0 // round(sample.slide.levels[grid.level].downsample)
    size, seen, jobs = np.asarray(level.size_px), set[int](), []
    first = np.clip(corners, 0, size) // level.tile_px
    last = (np.clip(corners + grid.read_px, 0, size) - 1) // level.tile_px
    for rows in sample.jobs(grid.patch_px):
        spans = zip(
            first[rows.start : rows.stop].tolist(), last[rows.start : rows.stop].tolist(), strict=True
        )
        needed = {
            y * level.across + x
            for (x0, y0), (x1, y1) in spans
            for y in range(y0, y1 + 1)
            for x in range(x0, x1 + 1)
        }
        jobs.append(sorted(needed - seen))
        seen |= needed
    return jobs


def _decode_alone(sample: Sample, workers: int, repeats: int, say: Say) -> Stage:
    def once() -> Timing:
        decoder = sample.decoder_alone()

        def read(rows: range) -> None:
            decoder.read(rows)

        try:
            jobs = sample.jobs(decoder.side_px)
            return timed(lambda: each(pool, read, jobs), sample.device)
        finally:
            decoder.close()

    with reading_threads(workers) as pool:
        timings = take_turns({"decode": once}, repeats, say)["decode"]
    return Stage("file to regions, read included, not resampled", len(sample.grid), workers, timings)


def _resample_alone(sample: Sample, regions: list[Tensor], workers: int, repeats: int, say: Say) -> Stage:
    patches, decoder = len(sample.grid), sample.region_decoder()
    decoder.close()
    before, after = regions[0].shape[-1], sample.grid.patch_px
    if before == after:
        return Stage("nothing left to do: decode gives patches", patches, workers)

    def resample(pixels: Tensor) -> None:
        decoder.to_patches(pixels.to(sample.device, non_blocking=True))

    on_gpu = sample.device.type == "cuda"
    threads = 1 if on_gpu else workers  # one feeds a GPU
    jobs = list(islice(cycle(regions), -(-patches // len(regions[0]))))
    resampled = sum(map(len, jobs))
    with reading_threads(threads) as pool:
        each(pool, resample, regions[:threads])
        works = {"resample": lambda: timed(lambda: each(pool, resample, jobs), sample.device)}
        timings = take_turns(works, repeats, say)["resample"]
    upload = ", upload included" if on_gpu else ""
    does = f"{before} px to {after} px, {sample.options.resample}, in memory{upload}"
    return Stage(does, resampled, threads, timings)


# --- together -----------------------------------------------------------------------------------------


def _together(
    sample: Sample, workers: int, batch_size: int, repeats: int, against_openslide: bool, say: Say
) -> dict[str, Stage]:
    """Ours, and what it is compared with, in turns."""
    patches = len(sample.grid)
    works: dict[str, Callable[[], Timing]] = {OURS: lambda: _stream(sample, workers, batch_size)}
    does = {OURS: f"file to batches of {batch_size} patches, by the very stream of a run"}
    threads = {OURS: workers, ONE_THREAD: 1, CLASSIC: workers}
    if workers > 1:
        works[ONE_THREAD] = lambda: _stream(sample, 1, batch_size)
        does[ONE_THREAD] = does[OURS]
    if against_openslide:
        _check_openslide(sample)
        works[CLASSIC] = lambda: _classic(sample, workers)
        does[CLASSIC] = "one region a patch, convert('RGB'), PIL's bicubic, one handle"
    _stream(sample, workers, batch_size)
    timings = take_turns(works, repeats, say)
    return {name: Stage(does[name], patches, threads[name], times) for name, times in timings.items()}


def _stream(sample: Sample, workers: int, batch_size: int) -> Timing:
    """Opening the decoder is not counted, nor is opening the slide for the classic loader."""
    decoder = sample.decoder()

    def drain() -> None:
        for _ in stream_batches([decoder], batch_size, device=sample.device, workers=workers):
            pass

    return timed(drain, sample.device)


def _check_openslide(sample: Sample) -> None:
    if not sample.slide.reader.startswith("openslide"):
        raise UsageError(
            f"--against openslide: {sample.slide.path.name} is read by {sample.slide.reader}; "
            "give a slide that OpenSlide opens, or leave --against out"
        )


def _classic(sample: Sample, workers: int) -> Timing:
    """What tools have done so far, in as many threads as ours."""
    grid, handle = sample.grid, openslide.OpenSlide(sample.slide.path)
    side, size = (grid.read_px, grid.read_px), (grid.patch_px, grid.patch_px)

    def read(rows: range) -> None:
        patches: list[Any] = []
        for xy in grid.xy_l0[rows.start : rows.stop].tolist():
            region = handle.read_region(xy, grid.level, side).convert("RGB")
            patches.append(region if side == size else region.resize(size, Image.Resampling.BICUBIC))
        np.stack([np.asarray(patch) for patch in patches])

    try:
        with reading_threads(workers) as pool:
            jobs = sample.jobs(grid.patch_px)
            return timed(lambda: each(pool, read, jobs), sample.device)
    finally:
        handle.close()
