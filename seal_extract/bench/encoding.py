"""The encoder by itself: how fast it is, how many operations that is, and how many the device could do."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from time import perf_counter, thread_time
from types import TracebackType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from seal_extract.bench.measure import Timing, each, reading_threads, timed, wait_for
from seal_extract.bench.sample import Sample
from seal_extract.encoders import Encoder
from seal_extract.patches.stream import stream_batches
from seal_extract.run.embed import CPU_ROWS, Embedder, Pending
from seal_extract.run.extract import BATCHES_AHEAD

HELD_BYTES = 512 * 2**20  # of patches; encoded again and again where more are asked for
MATRIX = {"cuda": (8192, 20), "cpu": (1024, 12)}  # side of the square matrices, products a measurement


@dataclass(frozen=True)
class Pass:
    """One forward pass, in seconds since `Busy` began; ``cpu_s`` is 0 on a GPU."""

    start_s: float
    end_s: float
    cpu_s: float


class Busy:
    """Notes when an encoder computes: stands in for its `encode_unchecked` while the block lasts.

    On a GPU the times are those of events in the queue, so nothing waits.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self._encode = encoder, encoder.encode_unchecked
        self._on_gpu = encoder.device.type == "cuda"
        self._passes: list[Pass] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Busy:
        wait_for(self._encoder.device)
        self._began = perf_counter()
        if self._on_gpu:
            self._began_event = self._event()
        self._encoder.encode_unchecked = self._noting  # type: ignore[method-assign]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._encoder.encode_unchecked

    def passes(self) -> list[Pass]:
        """All that have ended, by their start."""
        wait_for(self._encoder.device)
        on_gpu = [Pass(self._since(start), self._since(end), 0.0) for start, end in self._events]
        return sorted(on_gpu + self._passes, key=lambda p: p.start_s)

    def _noting(self, patches: Tensor) -> Tensor:
        if self._on_gpu:
            begun = self._event()
            embeddings = self._encode(patches)
            self._events.append((begun, self._event()))
            return embeddings
        start, cpu = perf_counter(), thread_time()
        embeddings = self._encode(patches)
        noted = Pass(start - self._began, perf_counter() - self._began, thread_time() - cpu)
        with self._lock:
            self._passes.append(noted)
        return embeddings

    def _event(self) -> torch.cuda.Event:
        new_event: Callable[..., torch.cuda.Event] = torch.cuda.Event  # its own signature is untyped
        event = new_event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._encoder.device))
        return event

    def _since(self, event: torch.cuda.Event) -> float:
        return float(self._began_event.elapsed_time(event)) / 1000


def hold_patches(sample: Sample, batch_size: int, workers: int) -> list[Tensor]:
    """The patches of a sample on its device, as many batches uint8 [B, 3, S, S] as may be held."""
    most = max(1, HELD_BYTES // (3 * sample.grid.patch_px**2 * batch_size))
    held: list[Tensor] = []
    for batch in stream_batches([sample.decoder()], batch_size, device=sample.device, workers=workers):
        held.append(batch.patches)
        if len(held) == most:
            break
    return held


def time_forward(forward: Embedder, held: list[Tensor], patches: int, device: torch.device) -> Timing:
    """Encode ``patches`` patches out of memory, with as many batches under way as a run has."""

    def encode() -> None:
        left, pending = patches, deque[Pending]()
        for batch in cycle(held):
            pending.append(forward.submit(batch[:left]))
            left -= len(batch[:left])
            if len(pending) > BATCHES_AHEAD:
                pending.popleft()()
            if not left:
                break
        while pending:
            pending.popleft()()

    return timed(encode, device)


def flops_per_patch(encoder: Encoder, patches: Tensor) -> float:
    """Floating-point operations of a forward pass, a multiplication and an addition each counted."""
    few = patches[:CPU_ROWS]
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # fused attention on a CPU is not counted by every torch
        encoder.encode_unchecked(few)
    return float(counter.get_total_flops()) / len(few)


def matrix_flops_of(device: torch.device, threads: int) -> float:
    """Floating-point operations of `time_matrix`."""
    side, products = MATRIX[device.type]
    return (threads if device.type == "cpu" else 1) * products * 2.0 * side**3


def time_matrix(device: torch.device, precision: torch.dtype, threads: int) -> Timing:
    """Multiply large square matrices: what the device can do; on a CPU each thread has its own."""
    side, products = MATRIX[device.type]
    a, b = (torch.randn(side, side, device=device).to(precision) for _ in range(2))

    def multiply(times: int) -> None:
        with torch.inference_mode():
            for _ in range(times):
                torch.mm(a, b)

    places = threads if device.type == "cpu" else 1
    with reading_threads(places) as pool:
        each(pool, multiply, [1] * places)
        wait_for(device)
        return timed(lambda: each(pool, multiply, [products] * places), device)
