"""The stopwatch: wall and CPU seconds of a stage, repeated; ratios of pairs; resident memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


@dataclass(frozen=True)
class Timing:
    """One measurement, in seconds; ``cpu_s`` is of all threads of this process."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Stage:
    """A part of the way from file to features, measured by itself.

    Attributes:
        does: what it covers, in words.
        patches: that one repeat covers.
        threads: that worked on it.
        timings: one per repeat; none where the stage cannot be told from another, or has nothing to do.
    """

    does: str
    patches: int
    threads: int
    timings: tuple[Timing, ...] = ()

    @property
    def wall_s(self) -> float | None:
        """Median seconds."""
        return median(t.wall_s for t in self.timings) if self.timings else None

    @property
    def cpu_s(self) -> float | None:
        """Median CPU seconds."""
        return median(t.cpu_s for t in self.timings) if self.timings else None

    @property
    def patches_per_s(self) -> float | None:
        """Patches per second, of the median."""
        return None if self.wall_s is None else self.patches / self.wall_s

    @property
    def patches_per_cpu_s(self) -> float | None:
        """Patches per CPU-second, of the median; None below the clock's resolution."""
        return self.patches / self.cpu_s if self.cpu_s else None

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        walls = [t.wall_s for t in self.timings]
        return {
            "does": self.does,
            "patches": self.patches,
            "threads": self.threads,
            "patches_per_s": self.patches_per_s,
            "patches_per_cpu_s": self.patches_per_cpu_s,
            "seconds": self.wall_s,
            "seconds_min": min(walls, default=None),
            "seconds_max": max(walls, default=None),
            "cpu_seconds": self.cpu_s,
        }


@dataclass(frozen=True)
class Ratio:
    """Median, least and largest of the ratios of pairs that were measured one after the other."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, over: Iterable[float], under: Iterable[float]) -> Ratio:
        """The ratios of ``over`` to ``under``, pair by pair."""
        ratios = [a / max(b, 1e-9) for a, b in zip(over, under, strict=True)]
        return cls(median(ratios), min(ratios), max(ratios))


def timed(work: Callable[[], object], device: torch.device) -> Timing:
    """Do it once, on the device until it is done there."""
    wall, cpu = perf_counter(), process_time()
    work()
    wait_for(device)
    return Timing(perf_counter() - wall, process_time() - cpu)


def wait_for(device: torch.device) -> None:
    """Until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    works: dict[str, Callable[[], Timing]], repeats: int, say: Callable[[str], None]
) -> dict[str, tuple[Timing, ...]]:
    """Measure all of ``works`` in each repeat, every other time in reverse: what drifts, drifts for all."""
    timings: dict[str, list[Timing]] = {name: [] for name in works}
    for repeat in range(repeats):
        names = list(works)
        for name in names if repeat % 2 == 0 else reversed(names):
            say(f"{name}, {repeat + 1} of {repeats}")
            timings[name].append(works[name]())
    return {name: tuple(times) for name, times in timings.items()}


@contextmanager
def reading_threads(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads compute alone, as the readers of `stream_batches` do."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "bench", initializer=lambda: torch.set_num_threads(1))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def each(pool: ThreadPoolExecutor, work: Callable[[Item], None], items: Iterable[Item]) -> None:
    """Have every item worked on."""
    for _ in pool.map(work, items):
        pass


def forget_peak() -> None:
    """Let `peak_mb` begin anew, where the system can; elsewhere it counts from the start of the process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float | None:
    """The largest resident memory, in 10^6 bytes; None where the system has no /proc."""
    return _status_mb("VmHWM")


def resident_mb() -> float | None:
    """The resident memory now, in 10^6 bytes; None where the system has no /proc."""
    return _status_mb("VmRSS")


def _status_mb(field: str) -> float | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    return int(found[1]) * 1024 / 1e6 if found else None
