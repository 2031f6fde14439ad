"""One stream of patch batches over any number of slides, read ahead by threads, in grid order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from time import sleep

import numpy as np
import torch
from torch import Tensor

from seal_extract.errors import ReadError
from seal_extract.patches.regions import HostPixels, PatchReader

ROWS_PER_JOB = 8  # patches a thread reads at a time: large enough that handing over costs nothing
JOB_BYTES = 32 * 2**20  # fewer where patches are huge
SLIDES_READ_AHEAD = 4  # beyond the jobs that threads need: each open slide has caches of its own
READ_AHEAD_BYTES = 256 * 2**20  # host memory that decoded regions may fill

POLL_S = 0.005  # between two looks whether the next slide is ready, when there is nothing else to do

OnFailure = Callable[[int, Exception], None]


@dataclass(frozen=True)
class PatchBatch:
    """Patches on the device, and where they come from.

    Attributes:
        patches: uint8 [B, 3, S, S].
        slide: int64 [B], position of the patch's slide in the stream.
        row: int64 [B], row of the patch in that slide's grid.
        unreadable: why, for each position in the batch whose patch could not be read; its pixels are black.
    """

    patches: Tensor
    slide: Tensor
    row: Tensor
    unreadable: dict[int, str]

    def __len__(self) -> int:
        return len(self.row)

    def __repr__(self) -> str:
        slides = sorted(set(self.slide.tolist()))
        return f"PatchBatch({list(self.patches.shape)} on {self.patches.device}, slides {slides})"


@dataclass(frozen=True)
class _Job:
    """Consecutive rows of one slide, for one thread."""

    slide: int
    reader: PatchReader
    rows: range
    pixels: Future[HostPixels]

    @property
    def bytes(self) -> int:
        return len(self.rows) * 3 * self.reader.side_px**2

    @property
    def is_last(self) -> bool:
        return self.rows.stop == len(self.reader.grid)


_Done = tuple[_Job, Tensor, dict[int, str]]  # its patches, and why some are unreadable


def stream_batches(
    readers: Iterable[PatchReader],
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    max_read_errors: int = 0,
) -> Generator[PatchBatch, None, None]:
    """Read the grids of ``readers`` one after the other into batches of exactly ``batch_size``.

    Batches cross slide borders while the patch size stays the same; only the last of a size may be smaller.
    Order does not depend on ``workers``. Readers are taken from the iterable as their turn comes near, and
    closed when their last patch is read.

    Args:
        readers: one per slide.
        batch_size: patches per batch.
        device: where patches are resampled and handed out.
        workers: reading threads; all cores by default.
        max_read_errors: patches of a slide that may be unreadable before it fails.

    Raises:
        ReadError: a slide has failed, as soon as its turn has come.
    """
    stream = stream_ready(
        readers, batch_size, device=device, workers=workers, max_read_errors=max_read_errors
    )
    with closing(stream):
        yield from (batch for batch in stream if batch is not None)


def stream_ready(
    readers: Iterable[PatchReader | None],
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    max_read_errors: int = 0,
    on_failure: OnFailure | None = None,
    on_read: Callable[[int], None] | None = None,
) -> Generator[PatchBatch | None, None, None]:
    """`stream_batches` that never waits for a slide to be opened, nor ends with the first that fails.

    Args:
        readers: one per slide; None as long as the next one is not ready. What was read until then is handed
            out as a smaller batch, and then None again and again.
        batch_size: patches per batch.
        device: where patches are resampled and handed out.
        workers: reading threads; all cores by default.
        max_read_errors: patches of a slide that may be unreadable before it fails.
        on_failure: told the slide and its error; the stream then goes on without that slide's other patches.
        on_read: told the slide from which nothing is read any more.

    Raises:
        ReadError: a slide has failed, as soon as its turn has come, and there is no ``on_failure``.
    """
    device = torch.device(device)
    workers = workers or available_cores()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="read", initializer=compute_alone)
    threads = torch.get_num_threads()
    stream = _Stream(pool, workers, device, max_read_errors, on_failure, on_read or (lambda _: None))
    try:
        for batch in _collect(stream.decoded(readers), batch_size):
            if batch is None:
                sleep(POLL_S)
            yield batch
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


def available_cores() -> int:
    """The cores that this process may use: fewer than the machine's under Slurm, for example."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def compute_alone() -> None:
    """Let torch compute in the calling thread alone: the threads of a pool are the parallelism."""
    torch.set_num_threads(1)


class _Stream:
    """Jobs in order with their patches; as many are being read ahead as fit the memory set aside."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        workers: int,
        device: torch.device,
        max_read_errors: int,
        on_failure: OnFailure | None,
        on_read: Callable[[int], None],
    ) -> None:
        self._pool, self._workers, self._upload = pool, workers, _Upload(device)
        self._max_read_errors, self._on_failure, self._on_read = max_read_errors, on_failure, on_read
        self._errors: dict[int, int] = {}  # unreadable patches of each slide
        self._failed: set[int] = set()

    def decoded(self, readers: Iterable[PatchReader | None]) -> Iterator[_Done | None]:
        """Jobs in order, and None whenever there is nothing to do."""
        jobs = self._jobs(readers)
        waiting: deque[_Job] = deque()
        more = True
        while more or waiting:
            while more and self._has_room(waiting):
                try:
                    following = next(jobs)
                except StopIteration:
                    more = False
                    break
                if following is not None:
                    waiting.append(following)
                elif waiting:
                    break
                else:
                    yield None
            if not waiting:
                continue
            job = waiting.popleft()
            done = self._result(job)
            if job.is_last or (job.slide in self._failed and all(w.slide != job.slide for w in waiting)):
                self._close(job.slide, job.reader)
            if done is not None:
                yield done

    def _jobs(self, readers: Iterable[PatchReader | None]) -> Iterator[_Job | None]:
        slide = -1
        for reader in readers:
            if reader is None:
                yield None
                continue
            slide += 1
            rows = len(reader.grid)
            step = max(1, min(ROWS_PER_JOB, JOB_BYTES // (3 * reader.side_px**2)))
            for start in range(0, rows, step):
                if slide in self._failed:
                    break
                part = range(start, min(start + step, rows))
                yield _Job(slide, reader, part, self._pool.submit(reader.read, part))
            if not rows:
                self._close(slide, reader)

    def _close(self, slide: int, reader: PatchReader) -> None:
        reader.close()
        self._on_read(slide)

    def _has_room(self, waiting: deque[_Job]) -> bool:
        """Two jobs a thread, and more while they fit READ_AHEAD_BYTES and are of few slides."""
        if len(waiting) < 2 * self._workers:
            return True
        if waiting[-1].slide - waiting[0].slide >= SLIDES_READ_AHEAD:
            return False
        return len(waiting) < 16 * self._workers and sum(job.bytes for job in waiting) < READ_AHEAD_BYTES

    def _result(self, job: _Job) -> _Done | None:
        """What a job has read, on the device; None if its slide has failed."""
        try:
            decoded = job.pixels.result()
            if job.slide in self._failed:
                return None
            self._count(job, decoded)
            return job, self._upload(job.reader, decoded.pixels), dict(decoded.unreadable)
        except Exception as exc:  # whatever a damaged slide leads a reader to
            if self._on_failure is None:
                raise
            if job.slide not in self._failed:
                self._failed.add(job.slide)
                self._on_failure(job.slide, exc)
        return None

    def _count(self, job: _Job, decoded: HostPixels) -> None:
        errors = self._errors[job.slide] = self._errors.get(job.slide, 0) + len(decoded.unreadable)
        if errors > self._max_read_errors:
            first = next(iter(decoded.unreadable.values()))
            raise ReadError(
                first
                if not self._max_read_errors
                else f"{first} (patch {errors} of this slide that cannot be read; --max-read-errors allows "
                f"{self._max_read_errors})"
            )


class _Upload:
    """Brings what was read to the device; on a GPU beside the computing, not in its way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, reader: PatchReader, pixels: Tensor) -> Tensor:
        if self._stream is None:
            return reader.to_patches(pixels.to(self._device))
        with torch.cuda.stream(self._stream):
            patches = reader.to_patches(pixels.to(self._device, non_blocking=True))
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        patches.record_stream(computing)
        return patches


def _collect(decoded: Iterable[_Done | None], batch_size: int) -> Iterator[PatchBatch | None]:
    parts: list[PatchBatch] = []
    held = 0
    for done in decoded:
        if done is None:
            if parts:
                yield _join(parts)
            parts, held = [], 0
            yield None
            continue
        job, patches, unreadable = done
        if parts and parts[0].patches.shape[-1] != patches.shape[-1]:
            yield _join(parts)
            parts, held = [], 0
        rows = torch.arange(job.rows.start, job.rows.stop)
        why = {row - job.rows.start: reason for row, reason in unreadable.items()}
        parts.append(PatchBatch(patches, torch.full_like(rows, job.slide), rows, why))
        held += len(rows)
        while held >= batch_size:
            batch, rest = _split(_join(parts), batch_size)
            yield batch
            held -= batch_size
            parts = [rest] if held else []
    if parts:
        yield _join(parts)


def _join(parts: list[PatchBatch]) -> PatchBatch:
    unreadable: dict[int, str] = {}
    start = 0
    for part in parts:
        unreadable |= {start + i: why for i, why in part.unreadable.items()}
        start += len(part)
    if len(parts) == 1:
        return parts[0]
    return PatchBatch(
        _concatenate([p.patches for p in parts]),
        torch.cat([p.slide for p in parts]),
        torch.cat([p.row for p in parts]),
        unreadable,
    )


def _concatenate(patches: list[Tensor]) -> Tensor:
    """Batches as one, in channels-last memory; on the host without torch, whose idle threads would spin."""
    if patches[0].device.type != "cpu":
        return torch.cat(patches)
    joined = np.concatenate([p.permute(0, 2, 3, 1).numpy() for p in patches])
    return torch.from_numpy(joined).permute(0, 3, 1, 2)


def _split(batch: PatchBatch, at: int) -> tuple[PatchBatch, PatchBatch]:
    before = {i: why for i, why in batch.unreadable.items() if i < at}
    after = {i - at: why for i, why in batch.unreadable.items() if i >= at}
    return (
        PatchBatch(batch.patches[:at], batch.slide[:at], batch.row[:at], before),
        PatchBatch(batch.patches[at:], batch.slide[at:], batch.row[at:], after),
    )
