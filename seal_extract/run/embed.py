"""The encoder kept busy: batches in, embeddings out in the order they came, while the next are prepared.

On a CPU each thread encodes a few patches by itself. That is as fast as all threads at one batch, and an
embedding then depends on its patch alone: not on the batch, its neighbours or the number of threads. On a GPU
batches are queued, and their embeddings copied back, without waiting for either.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seal_extract.encoders import Encoder
from seal_extract.patches.stream import available_cores, compute_alone

CPU_ROWS = 4  # patches of one forward pass on a CPU, always: another number gives other last bits
TRIED = (32, 64, 128, 256, 512)  # batch sizes on a GPU
GAIN = 1.03  # a larger batch has to be this much faster
Embeddings = NDArray[np.float32]
Pending = Callable[[], Embeddings]  # waits for the embeddings of a batch: float32 [B, D]


class Embedder(Protocol):
    """An encoder at work.

    Attributes:
        batch_size: patches that it takes best at once.
    """

    batch_size: int

    def submit(self, patches: Tensor) -> Pending:
        """Begin to encode uint8 [B, 3, S, S] on the encoder's device."""
        ...

    def close(self) -> None:
        """Give back threads."""
        ...


def open_embedder(
    encoder: Encoder, patch_px: int, batch_size: int | None = None, threads: int | None = None
) -> Embedder:
    """Set an encoder to work on its device.

    Args:
        encoder: from `load_encoder`.
        patch_px: side of the patches to come.
        batch_size: patches at once; found by trying on a GPU, if not given.
        threads: on a CPU; all cores by default.
    """
    if encoder.device.type == "cuda":
        return GpuEmbedder(encoder, batch_size or find_batch_size(encoder, patch_px))
    return CpuEmbedder(encoder, batch_size, threads)


class CpuEmbedder:
    """Threads that each encode `CPU_ROWS` patches."""

    def __init__(self, encoder: Encoder, batch_size: int | None = None, threads: int | None = None) -> None:
        self._encoder = encoder
        self._before = torch.get_num_threads()
        threads = threads or available_cores()
        self._pool = ThreadPoolExecutor(threads, "forward", initializer=compute_alone)
        self.batch_size = -(-(batch_size or CPU_ROWS * threads) // CPU_ROWS) * CPU_ROWS

    def submit(self, patches: Tensor) -> Pending:
        """See `Embedder.submit`."""
        parts = [self._pool.submit(self._encode, part) for part in torch.split(patches, CPU_ROWS)]
        return lambda: np.concatenate([part.result() for part in parts])

    def _encode(self, patches: Tensor) -> Embeddings:
        rows = len(patches)
        if rows < CPU_ROWS:
            patches = torch.cat([patches, patches[-1:].expand(CPU_ROWS - rows, -1, -1, -1)])
        embeddings: Embeddings = self._encoder.encode_unchecked(patches).numpy()
        return embeddings[:rows]

    def close(self) -> None:
        """See `Embedder.close`."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._before)


class GpuEmbedder:
    """A queue on the GPU; a batch that does not fit its memory is halved, and so are those that follow."""

    def __init__(self, encoder: Encoder, batch_size: int) -> None:
        self._encoder = encoder
        self.batch_size = batch_size

    def submit(self, patches: Tensor) -> Pending:
        """See `Embedder.submit`."""
        embeddings = self._encode(patches)
        if embeddings.device.type != "cuda":
            return lambda: embeddings.numpy()
        host = torch.empty(embeddings.shape, pin_memory=True)
        host.copy_(embeddings, non_blocking=True)
        copied = torch.cuda.current_stream(embeddings.device).record_event()

        def pending() -> Embeddings:
            copied.synchronize()
            return host.numpy()

        return pending

    def _encode(self, patches: Tensor) -> Tensor:
        if len(patches) > self.batch_size:
            return torch.cat([self._encode(part) for part in torch.split(patches, self.batch_size)])
        try:
            return self._encoder.encode_unchecked(patches)
        except torch.OutOfMemoryError:
            if len(patches) == 1:
                raise
        # outside the handler: the exception holds on to the memory of the failed pass
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.batch_size = len(patches) // 2
        return self._encode(patches)

    def close(self) -> None:
        """See `Embedder.close`."""


_found: dict[tuple[str, str, int], int] = {}


def find_batch_size(encoder: Encoder, patch_px: int) -> int:
    """The smallest of `TRIED` that is nearly as fast as the fastest, measured once per encoder and device."""
    key = (repr(encoder), torch.cuda.get_device_name(encoder.device), patch_px)
    if key not in _found:
        _found[key] = _try_batch_sizes(encoder, patch_px)
    return _found[key]


def _try_batch_sizes(encoder: Encoder, patch_px: int) -> int:
    best, rate = 1, 0.0
    for size in TRIED:
        patches = torch.randint(
            0, 256, (size, 3, patch_px, patch_px), dtype=torch.uint8, device=encoder.device
        )
        try:
            now = _rate(encoder, patches)
        except torch.OutOfMemoryError:
            break
        if now < rate * GAIN:
            break
        best, rate = size, now
    torch.cuda.empty_cache()
    return best


def _rate(encoder: Encoder, patches: Tensor) -> float:
    """Patches per second, after a pass that warms up."""
    encoder.encode_unchecked(patches)
    torch.cuda.synchronize(patches.device)
    started = perf_counter()
    for _ in range(3):
        encoder.encode_unchecked(patches)
    torch.cuda.synchronize(patches.device)
    return 3 * len(patches) / (perf_counter() - started)
