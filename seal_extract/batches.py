"""One stream of patch batches over any number of slides, read ahead by threads, in grid order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from seal_extract.decode import RegionDecoder

ROWS_PER_JOB = 8  # patches a thread reads at a time: large enough that handing over costs nothing
READ_AHEAD_BYTES = 256 * 2**20  # host memory that decoded regions may fill


@dataclass(frozen=True)
class PatchBatch:
    """Patches on the device, and where they come from.

    Attributes:
        patches: uint8 [B, 3, S, S].
        slide: int64 [B], position of the patch's slide in the stream.
        row: int64 [B], row of the patch in that slide's grid.
    """

    patches: Tensor
    slide: Tensor
    row: Tensor

    def __repr__(self) -> str:
        slides = sorted(set(self.slide.tolist()))
        return f"PatchBatch({list(self.patches.shape)} on {self.patches.device}, slides {slides})"


@dataclass(frozen=True)
class _Job:
    """Consecutive rows of one slide, for one thread."""

    slide: int
    decoder: RegionDecoder
    rows: range


def stream_batches(
    decoders: Iterable[RegionDecoder],
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    workers: int | None = None,
) -> Iterator[PatchBatch]:
    """Decode the grids of ``decoders`` one after the other into batches of exactly ``batch_size``.

    Batches cross slide borders while the patch size stays the same; only the last of a size may be smaller.
    Order does not depend on ``workers``. Decoders are taken from the iterable as their turn comes near.

    Args:
        decoders: one per slide.
        batch_size: patches per batch.
        device: where patches are resampled and handed out.
        workers: reading threads; all cores by default.

    Raises:
        ReadError: from a decoder, as soon as its turn has come.
    """
    device = torch.device(device)
    workers = workers or os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers, thread_name_prefix="read")
    try:
        yield from _collect(_decoded(pool, workers, _jobs(decoders), device), batch_size)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _jobs(decoders: Iterable[RegionDecoder]) -> Iterator[_Job]:
    for slide, decoder in enumerate(decoders):
        for start in range(0, len(decoder.grid), ROWS_PER_JOB):
            yield _Job(slide, decoder, range(start, min(start + ROWS_PER_JOB, len(decoder.grid))))


def _decoded(
    pool: ThreadPoolExecutor, workers: int, jobs: Iterator[_Job], device: torch.device
) -> Iterator[tuple[_Job, Tensor]]:
    """Jobs in order with their patches; as many are being read ahead as fit the memory set aside."""
    waiting: deque[tuple[_Job, Future[Tensor]]] = deque()
    while True:
        for job in islice(jobs, _room(waiting, workers)):
            waiting.append((job, pool.submit(job.decoder.read, job.rows)))
        if not waiting:
            return
        job, future = waiting.popleft()
        yield job, job.decoder.to_patches(future.result().to(device))


def _room(waiting: deque[tuple[_Job, Future[Tensor]]], workers: int) -> int:
    """How many more jobs may start: two a thread at least, more while they fit READ_AHEAD_BYTES."""
    if not waiting:
        return 2 * workers
    side = waiting[-1][0].decoder.grid.read_px
    affordable = READ_AHEAD_BYTES // (ROWS_PER_JOB * side * side * 3)
    return max(0, max(2 * workers, min(affordable, 16 * workers)) - len(waiting))


def _collect(decoded: Iterable[tuple[_Job, Tensor]], batch_size: int) -> Iterator[PatchBatch]:
    parts: list[PatchBatch] = []
    held = 0
    for job, patches in decoded:
        if parts and parts[0].patches.shape[-1] != patches.shape[-1]:
            yield _join(parts)
            parts, held = [], 0
        rows = torch.arange(job.rows.start, job.rows.stop)
        parts.append(PatchBatch(patches, torch.full_like(rows, job.slide), rows))
        held += len(rows)
        while held >= batch_size:
            batch, rest = _split(_join(parts), batch_size)
            yield batch
            held -= batch_size
            parts = [rest] if held else []
    if parts:
        yield _join(parts)


def _join(parts: list[PatchBatch]) -> PatchBatch:
    fields = ([p.patches for p in parts], [p.slide for p in parts], [p.row for p in parts])
    return PatchBatch(*(torch.cat(field) for field in fields))


def _split(batch: PatchBatch, at: int) -> tuple[PatchBatch, PatchBatch]:
    fields = (batch.patches, batch.slide, batch.row)
    return PatchBatch(*(f[:at] for f in fields)), PatchBatch(*(f[at:] for f in fields))
