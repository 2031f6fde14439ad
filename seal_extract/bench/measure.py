"""The stopwatch: wall and CPU seconds of a stage, repeated; ratios of pairs; resident memory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from seal_extract.patches.stream import compute_alone

Item = TypeVar("Item")
Progress = Callable[[str], None]  # receives the name of the next measurement


class Timing(NamedTuple):
    """Seconds of one measurement; ``cpu_s`` is of all threads of this process."""

    wall_s: float
    cpu_s: float


Timings = Mapping[str, Sequence[Timing]]  # by the name of what was measured, one per repeat


@dataclass(frozen=True)
class Stage:
    """A part of the way from file to features, measured by itself.

    Attributes:
        does: description of the stage.
        patches: number of patches in one repeat.
        threads: number of threads that worked on it.
        patches_per_s: of the median; None if the stage is part of another, or has nothing to do.
        patches_per_cpu_s: likewise, per CPU second; None also below the resolution of the clock.
        seconds: median of the repeats.
        seconds_min: the shortest.
        seconds_max: the longest.
        cpu_seconds: median.
    """

    does: str
    patches: int
    threads: int
    patches_per_s: float | None = None
    patches_per_cpu_s: float | None = None
    seconds: float | None = None
    seconds_min: float | None = None
    seconds_max: float | None = None
    cpu_seconds: float | None = None

    @classmethod
    def of(cls, does: str, patches: int, threads: int, timings: Sequence[Timing]) -> Stage:
        """The figures of a stage from its repeats."""
        walls, cpu_s = [t.wall_s for t in timings], median(t.cpu_s for t in timings)
        rates = (patches / median(walls), patches / cpu_s if cpu_s else None)
        return cls(does, patches, threads, *rates, median(walls), min(walls), max(walls), cpu_s)


@dataclass(frozen=True)
class Ratio:
    """Median, smallest and largest of the ratios of pairs that were measured one after the other."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, over: Iterable[float], under: Iterable[float]) -> Ratio:
        """The ratios of ``over`` to ``under``, pair by pair."""
        ratios = [a / max(b, 1e-9) for a, b in zip(over, under, strict=True)]
        return cls(median(ratios), min(ratios), max(ratios))

    @classmethod
    def of_wall(cls, over: Iterable[Timing], under: Iterable[Timing]) -> Ratio:
        """The ratios of wall seconds."""
        return cls.of((t.wall_s for t in over), (t.wall_s for t in under))

    @classmethod
    def of_cpu(cls, over: Iterable[Timing], under: Iterable[Timing]) -> Ratio:
        """The ratios of CPU seconds, which other processes on the machine do not change."""
        return cls.of((t.cpu_s for t in over), (t.cpu_s for t in under))

    def __mul__(self, factor: float) -> Ratio:
        """All three, times a factor."""
        return Ratio(self.median * factor, self.min * factor, self.max * factor)


def timed(work: Callable[[], object], device: torch.device) -> Timing:
    """Run once, until the device has finished."""
    wall, cpu = perf_counter(), process_time()
    work()
    wait_for(device)
    return Timing(perf_counter() - wall, process_time() - cpu)


def kernel_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Run once; returns the seconds in which kernels of a GPU ran, copies left out.

    On a CPU these are the seconds of torch's own operations.
    """
    kind = device.type.upper()
    with profile(activities=[getattr(ProfilerActivity, kind)], acc_events=True) as profiler:
        work()
        wait_for(device)
    return covered(
        (event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in profiler.events() or ()
        if event.device_type.name == kind and not event.name.startswith(("Memcpy", "Memset"))
    )


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length that spans from a start to an end cover together; kernels of two streams overlap."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished everything that was submitted."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(works: Mapping[str, Callable[[], Timing]], repeats: int, progress: Progress) -> Timings:
    """Measure all of ``works`` in each repeat, every other time in reverse order: drift affects all."""
    timings: dict[str, list[Timing]] = {name: [] for name in works}
    for repeat in range(repeats):
        names = list(works)
        for name in names if repeat % 2 == 0 else reversed(names):
            progress(f"{name}, {repeat + 1} of {repeats}")
            timings[name].append(works[name]())
    return timings


@contextmanager
def reading_threads(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads compute alone, as the readers of `stream_batches` do."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "bench", initializer=compute_alone)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def each(pool: ThreadPoolExecutor, work: Callable[[Item], object], items: Iterable[Item]) -> None:
    """Process every item; each thread takes one after the other."""
    for _ in pool.map(work, items):
        pass


def reset_peak() -> None:
    """Start ``VmHWM`` of `memory_mb` anew, where the system can; elsewhere it is that of the process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def memory_mb(field: str) -> float | None:
    """``VmRSS``, the resident memory, or ``VmHWM``, its largest value, in 10^6 bytes; None without /proc."""
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 / 1e6 if found else None
