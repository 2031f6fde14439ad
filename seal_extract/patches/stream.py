"""One stream of patch batches over any number of slides, read ahead by threads, in grid order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from seal_extract.errors import ReadError, is_of_lost_device
from seal_extract.patches import available_cores
from seal_extract.patches.codecs import memory_for_pixels
from seal_extract.patches.regions import ROWS_AT_ONCE, HostPixels, PatchReader
from seal_extract.patches.resample import Memory

JOB_BYTES = 32 * 2**20  # fewer where patches are huge
SLIDES_READ_AHEAD = 4  # beyond the jobs that threads need: each open slide has caches of its own
UPLOAD_BYTES = 256 * 2**20  # of regions that are copied to a GPU at once
READ_AHEAD_BYTES = 256 * 2**20  # host memory that decoded regions may fill


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
class _Part:
    """Patches of consecutive rows of one slide, uint8 [B, 3, S, S]; ``unreadable`` by row of the grid."""

    patches: Tensor
    slide: int
    rows: range
    unreadable: Mapping[int, str]

    def __getitem__(self, some: slice) -> _Part:
        return replace(self, patches=self.patches[some], rows=self.rows[some])


@dataclass(frozen=True)
class _Job:
    """Consecutive rows of one slide, for one thread."""

    slide: int
    reader: PatchReader
    rows: range
    pixels: Future[HostPixels]
    place: Memory | None = None  # in its batch, for the reader to fill if it can

    @property
    def bytes(self) -> int:
        return len(self.rows) * 3 * self.reader.side_px**2

    @property
    def is_last(self) -> bool:
        return self.rows.stop == len(self.reader.grid)

    def continues(self, before: _Job) -> bool:
        """Whether both go to the device together: the pixels are neighbours, and make patches of one size."""
        if self.place is None or before.place is None:
            return False
        same_size = self.reader.grid.patch_px == before.reader.grid.patch_px
        return same_size and _are_neighbours(before.place.tensor, self.place.tensor)


def stream_batches(
    readers: Iterable[PatchReader],
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    max_read_errors: int = 0,
    is_next_ready: Callable[[], bool] = lambda: True,
    on_failure: Callable[[int, Exception], None] | None = None,
    on_read: Callable[[int], None] = lambda slide: None,
    make_room: Callable[[], bool] = lambda: False,
) -> Generator[PatchBatch, None, None]:
    """Read the grids of ``readers`` one after the other into batches of exactly ``batch_size``.

    Batches cross slide borders while the patch size stays the same; only the last batch of a size may be
    smaller, and one that would otherwise wait for a slide that is not ready. The order does not depend on
    ``workers``. Readers are taken from the iterable as their turn comes near, and closed when their last
    patch is read.

    Args:
        readers: one per slide.
        batch_size: patches per batch.
        device: where patches are handed out; on a GPU also resampled, but for those read there.
        workers: reading threads; all cores by default.
        max_read_errors: patches of a slide that may be unreadable before it fails.
        is_next_ready: whether ``readers`` gives the next one, or ends, without waiting.
        on_failure: receives the position of a slide that has failed, and its error; the stream then continues
            without the other patches of that slide.
        on_read: receives the position of a slide from which nothing is read any more.
        make_room: called when the device has no memory for the next patches; they are tried again if it
            returns True.

    Raises:
        ReadError: a slide has failed, as soon as its turn has come, and there is no ``on_failure``.
    """
    workers = workers or available_cores()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="read", initializer=compute_alone)
    threads = torch.get_num_threads()
    stream = _Stream(pool, workers, torch.device(device), max_read_errors, on_failure, on_read, make_room)
    try:
        yield from stream.batches(iter(readers), is_next_ready, batch_size)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


def compute_alone() -> None:
    """Let torch compute in the calling thread alone: the threads of a pool are the parallelism."""
    torch.set_num_threads(1)


class _Stream:
    """Reads ahead as many jobs as fit the memory set aside, and joins their patches, in order, to batches."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        workers: int,
        device: torch.device,
        max_read_errors: int,
        on_failure: Callable[[int, Exception], None] | None,
        on_read: Callable[[int], None],
        make_room: Callable[[], bool],
    ) -> None:
        self._pool, self._workers, self._upload = pool, workers, _Upload(device)
        self._max_read_errors, self._on_failure, self._on_read = max_read_errors, on_failure, on_read
        self._make_room = make_room
        self._waiting: deque[_Job] = deque()
        self._memory: Memory | None = None  # of the batch that jobs fill at present
        self._filled = 0  # rows of it
        self._read: list[_Part] = []  # neighbours in one memory, still on the host
        self._to_patches: Callable[[Tensor], Tensor]  # of their readers
        self._errors: dict[int, int] = {}  # unreadable patches of each slide
        self._failed: set[int] = set()

    def batches(
        self, readers: Iterator[PatchReader], is_next_ready: Callable[[], bool], batch_size: int
    ) -> Iterator[PatchBatch]:
        jobs: Iterator[_Job] = iter(())  # the slide that is being read ahead
        slide, ended = -1, False
        joined = _Joined(batch_size)
        while True:
            while self._has_room():
                if (job := next(jobs, None)) is not None:
                    self._waiting.append(job)
                    continue
                idle = not (self._waiting or joined.parts)
                if ended or not (is_next_ready() or idle):
                    break
                if (reader := next(readers, None)) is None:
                    ended = True
                    break
                slide += 1
                jobs = self._jobs(slide, reader, batch_size)
            if self._waiting:
                for part in self._next_parts():
                    yield from joined.add(part)
                continue
            yield from joined.rest()  # it does not wait for the next slide
            self._memory = None
            if ended:
                return

    def _jobs(self, slide: int, reader: PatchReader, batch_size: int) -> Iterator[_Job]:
        rows, start = len(reader.grid), 0
        step = max(1, min(reader.rows_at_once, JOB_BYTES // (3 * reader.side_px**2)))
        while start < rows and slide not in self._failed:
            part, place = range(start, min(start + step, rows)), None
            if not reader.on_device:
                place = self._place(reader.side_px, len(part), batch_size)
                part = part[: len(place.array)]
            yield _Job(slide, reader, part, self._pool.submit(reader.read, part, place), place)
            start = part.stop
        if not rows:
            self._close(slide, reader)

    def _place(self, side_px: int, rows: int, batch_size: int) -> Memory:
        """Memory for as many of ``rows`` as the batch that is being filled still takes."""
        memory = self._memory
        if memory is None or self._filled == len(memory.array) or memory.array.shape[1] != side_px:
            memory = self._memory = self._upload.memory(batch_size, side_px)
            self._filled = 0
        place = memory[self._filled : self._filled + rows]
        self._filled += len(place.array)
        return place

    def _next_parts(self) -> list[_Part]:
        """Take the job whose turn it is; what is then complete on the device, in order."""
        job = self._waiting.popleft()
        part = self._result(job)
        if job.is_last or (job.slide in self._failed and all(w.slide != job.slide for w in self._waiting)):
            self._close(job.slide, job.reader)
        if part is None or job.reader.on_device:
            return [*self._uploaded(), *([] if part is None else [part])]
        self._read.append(part)
        self._to_patches = job.reader.to_patches
        return [] if self._waiting and self._waiting[0].continues(job) else self._uploaded()

    def _uploaded(self) -> list[_Part]:
        """What was read since the last time, brought to the device at once."""
        read, self._read = self._read, []
        if not read:
            return []
        try:
            patches = self._upload(self._to_patches, _concatenate([part.patches for part in read]))
        except torch.OutOfMemoryError as exc:
            failed: Exception = exc.with_traceback(None)  # whose frames hold memory
        except Exception as exc:
            failed = exc
        else:
            places = torch.split(patches, [len(part.rows) for part in read])
            return [replace(part, patches=place) for part, place in zip(read, places, strict=True)]
        if isinstance(failed, torch.OutOfMemoryError) and self._make_room():
            self._read = read
            return self._uploaded()
        for part in read:
            self._fail(part.slide, failed)
        return []

    def _close(self, slide: int, reader: PatchReader) -> None:
        reader.close()
        self._on_read(slide)

    def _has_room(self) -> bool:
        """Two jobs a thread, or two whole batches; more while they fit the memory and are of few slides."""
        waiting = self._waiting
        are_small = not waiting or len(waiting[-1].rows) <= ROWS_AT_ONCE
        if len(waiting) < (2 * self._workers if are_small else 2):
            return True
        if waiting[-1].slide - waiting[0].slide >= SLIDES_READ_AHEAD:
            return False
        return len(waiting) < 16 * self._workers and sum(job.bytes for job in waiting) < READ_AHEAD_BYTES

    def _result(self, job: _Job) -> _Part | None:
        try:
            return self._part(job)
        except torch.OutOfMemoryError as exc:
            failed: Exception = exc.with_traceback(None)  # whose frames hold memory
        except Exception as exc:  # whatever a damaged slide leads a reader to
            failed = exc
        if isinstance(failed, torch.OutOfMemoryError) and self._make_room():
            return self._result(replace(job, pixels=self._pool.submit(job.reader.read, job.rows)))
        self._fail(job.slide, failed)
        return None

    def _fail(self, slide: int, error: Exception) -> None:
        if self._on_failure is None or is_of_lost_device(error):
            raise error
        if slide not in self._failed:
            self._failed.add(slide)
            self._on_failure(slide, error)

    def _part(self, job: _Job) -> _Part | None:
        """What a job has read, on the host unless its reader gives it on the device."""
        read = job.pixels.result()
        if job.slide in self._failed:
            return None
        self._count(job, read)
        return _Part(read.pixels, job.slide, job.rows, read.unreadable)

    def _count(self, job: _Job, decoded: HostPixels) -> None:
        errors = self._errors[job.slide] = self._errors.get(job.slide, 0) + len(decoded.unreadable)
        if (allowed := self._max_read_errors) < errors:
            why = next(iter(decoded.unreadable.values()))
            if allowed:
                why += (
                    f" (patch {errors} of this slide that cannot be read; --max-read-errors allows {allowed})"
                )
            raise ReadError(why)


class _Upload:
    """Brings what was read to the device; on a GPU beside the computing, not in its way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def memory(self, rows: int, side_px: int) -> Memory:
        """Memory of the host for so many rows, or fewer, to be brought to the device at once."""
        if self._stream is None:
            memory = torch.from_numpy(memory_for_pixels(rows, side_px, side_px, 3))
        else:  # from which a GPU copies by itself
            rows = min(rows, max(1, UPLOAD_BYTES // (3 * side_px**2)))
            memory = torch.empty(rows, side_px, side_px, 3, dtype=torch.uint8, pin_memory=True)
        return Memory(memory.permute(0, 3, 1, 2), memory.numpy())

    def __call__(self, to_patches: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        if self._stream is None:
            return to_patches(pixels.to(self._device))
        with torch.cuda.stream(self._stream):
            patches = to_patches(pixels.to(self._device, non_blocking=True))
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        patches.record_stream(computing)
        return patches


class _Joined:
    """Parts of a batch to come; all have one patch size."""

    def __init__(self, batch_size: int) -> None:
        self.parts: list[_Part] = []
        self._batch_size = batch_size

    def add(self, part: _Part) -> Iterator[PatchBatch]:
        if self.parts and self.parts[0].patches.shape[-1] != part.patches.shape[-1]:
            yield from self.rest()
        self.parts.append(part)
        while (surplus := sum(len(p.rows) for p in self.parts) - self._batch_size) >= 0:
            last = self.parts[-1]
            ends = len(last.rows) - surplus
            batch = _join([*self.parts[:-1], last[:ends] if surplus else last])
            self.parts = [last[ends:]] if surplus else []
            yield batch

    def rest(self) -> Iterator[PatchBatch]:
        if self.parts:
            batch, self.parts = _join(self.parts), []
            yield batch


def _join(parts: list[_Part]) -> PatchBatch:
    rows = np.concatenate([np.arange(p.rows.start, p.rows.stop, dtype=np.int64) for p in parts])
    slides = np.repeat(np.array([p.slide for p in parts], np.int64), [len(p.rows) for p in parts])
    reasons = [p.unreadable.get(row) for p in parts for row in p.rows]
    return PatchBatch(
        _concatenate([p.patches for p in parts]),
        torch.from_numpy(slides),
        torch.from_numpy(rows),
        {i: why for i, why in enumerate(reasons) if why is not None},
    )


def _concatenate(patches: list[Tensor]) -> Tensor:
    """Batches as one; on the host without torch, whose idle threads would spin."""
    if len(patches) == 1:
        return patches[0]
    first, rows = patches[0], sum(map(len, patches))
    if all(_are_neighbours(before, after) for before, after in pairwise(patches)):
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    if first.device.type != "cpu":
        return torch.cat(patches)
    joined = np.concatenate([p.permute(0, 2, 3, 1).numpy() for p in patches])
    return torch.from_numpy(joined).permute(0, 3, 1, 2)


def _are_neighbours(before: Tensor, after: Tensor) -> bool:
    """Whether both lie in one memory, one behind the other."""
    memory = before.untyped_storage().data_ptr()
    if after.untyped_storage().data_ptr() != memory:
        return False
    return after.data_ptr() == before.data_ptr() + before.nbytes
