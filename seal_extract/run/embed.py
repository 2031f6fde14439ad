"""The encoder kept busy: batches in, embeddings out in the order they came, while the next are prepared.

On a CPU each thread encodes a few patches by itself. That is as fast as all threads at one batch, and an
embedding then depends on its patch alone: not on the batch, its neighbours or the number of threads. On a GPU
batches are queued, and their embeddings copied back, without waiting for either. There the last bits of a
product depend on the shape of its factors, so every batch has one shape, which no measured time decides.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seal_extract.encoders import Encoder
from seal_extract.errors import first_line, is_of_lost_device
from seal_extract.patches import available_cores
from seal_extract.patches.stream import compute_alone

CPU_ROWS = 4  # patches of one forward pass on a CPU, always: another number gives other last bits
TOKEN_BYTES = 2**28  # of a batch with tokens in the memory of the host, where a few batches wait
GPU_PIXELS = 256 * 224**2  # of a batch on a GPU: enough to fill a large one, in a few GB of its memory
ADVISED_S = 60  # a run on a CPU that takes as long is told of a faster precision
WARM_UPS = 2  # forward passes before one is recorded, in which libraries load kernels and take memory
Embeddings = NDArray[np.float32]
Work = Callable[[], Tensor]
Pending = Callable[[], Embeddings]  # waits for the embeddings of a batch: float32 [B, D], or packed ones


class Embedder(Protocol):
    """An encoder at work.

    Attributes:
        batch_size: patches that it takes best at once.
    """

    batch_size: int

    def submit(self, patches: Tensor) -> Pending:
        """Begin to encode uint8 [B, 3, S, S] on the encoder's device."""
        ...

    def make_room(self) -> bool:
        """Use less memory of the device from now on; whether that was possible."""
        ...

    def close(self) -> None:
        """Give back threads."""
        ...


def open_embedder(
    encoder: Encoder,
    patch_px: int,
    batch_size: int | None = None,
    threads: int | None = None,
    *,
    tokens: bool = False,
) -> Embedder:
    """Set an encoder to work on its device.

    Args:
        encoder: from `load_encoder`.
        patch_px: side of the patches to come.
        batch_size: patches at once; by default as many as hold `GPU_PIXELS` on a GPU.
        threads: on a CPU; all cores by default.
        tokens: give the tokens of each patch too, packed with its embedding; see `dense.pack`.

    Raises:
        UsageError: the encoder has no grid of tokens.
    """
    columns = columns_of(encoder, patch_px, tokens)
    if encoder.device.type == "cuda":
        side = encoder.spec.input.side_px or patch_px
        rows = max(1, GPU_PIXELS // side**2)
        rows = min(rows, max(1, TOKEN_BYTES // (4 * columns))) if tokens else rows
        rows = batch_size or rows - rows % 8 or rows
        return GpuEmbedder(encoder, rows, Cuda(encoder.device), tokens=tokens)
    return CpuEmbedder(encoder, batch_size, threads, tokens=tokens)


def columns_of(encoder: Encoder, patch_px: int, tokens: bool) -> int:
    """Numbers of a row that an embedder gives."""
    if not tokens:
        return encoder.spec.dim
    from seal_extract.encoders.dense import packed_columns

    return packed_columns(encoder.spec.dim, encoder.token_grid(patch_px))


class CpuEmbedder:
    """Threads that each encode `CPU_ROWS` patches."""

    def __init__(
        self,
        encoder: Encoder,
        batch_size: int | None = None,
        threads: int | None = None,
        *,
        tokens: bool = False,
    ) -> None:
        self._encoder, self._began = encoder, perf_counter()
        self._compute = encoder.compute_packed if tokens else None
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
        embeddings: Embeddings = self._encoder.encode_unchecked(patches, self._compute).numpy()
        return embeddings[:rows]

    def make_room(self) -> bool:
        """See `Embedder.make_room`."""
        return False

    def close(self) -> None:
        """See `Embedder.close`."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._before)
        spec, is_exact = self._encoder.spec, self._encoder.precision == torch.float32
        error = spec.errors.get("bfloat16")
        if error and is_exact and perf_counter() - self._began >= ADVISED_S and _has_bfloat16():
            warnings.warn(
                f"this CPU computes {spec.name} 1.5 to 2 times as fast with --precision bfloat16, which "
                f"moves an embedding by up to {error:.1%} of its length ({spec.errors_basis}); use one "
                "precision for all slides of a study",
                stacklevel=2,
            )


def _has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices by itself; older torch does not tell."""
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


class Cuda:
    """The commands that `GpuEmbedder` gives to a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record(self, work: Work) -> Work:
        """Record the kernels of ``work``; what is returned starts them all by one command.

        They read and write the same memory each time. Other threads may use the GPU meanwhile.

        Raises:
            RuntimeError: ``work`` does what cannot be recorded, such as waiting for the GPU.
        """
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):  # which brings the former stream back after a recording that failed
            for _ in range(WARM_UPS):
                work()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = work()
        torch.cuda.current_stream(self._device).wait_stream(stream)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def host_memory(self, rows: int, columns: int) -> Tensor:
        """Float32 [rows, columns] that the GPU can write to by itself."""
        return torch.empty(rows, columns, pin_memory=True)

    def mark(self) -> Callable[[], None]:
        """A function that waits until all commands so far are done."""
        wait: Callable[[], None] = torch.cuda.current_stream(self._device).record_event().synchronize
        return wait

    def release(self) -> None:
        """Give the memory back that is kept for later."""
        torch.cuda.empty_cache()


class GpuEmbedder:
    """A queue on a GPU, in batches of one shape; the last one is padded.

    The forward pass is recorded once and replayed, because a tower has hundreds of kernels, and starting them
    one by one would compete with the reading threads. A batch that does not fit the memory is halved, and so
    are those that follow.
    """

    def __init__(self, encoder: Encoder, batch_size: int, cuda: Cuda, *, tokens: bool = False) -> None:
        self._encoder, self._cuda, self._tokens = encoder, cuda, tokens
        self._compute = encoder.compute_packed if tokens else encoder.compute
        self.batch_size = batch_size
        self._pass: _RecordedPass | None = None
        self._records = True

    def submit(self, patches: Tensor) -> Pending:
        """See `Embedder.submit`."""
        columns = columns_of(self._encoder, patches.shape[-1], self._tokens)
        host = self._cuda.host_memory(len(patches), columns)
        start = 0
        while start < len(patches):
            part = patches[start : start + self.batch_size]
            failed = None
            try:
                embeddings = self._encode(part)
                host[start : start + len(part)].copy_(embeddings, non_blocking=True)
                start += len(part)
            except torch.OutOfMemoryError as exc:
                failed = exc.with_traceback(None)  # whose frames hold the memory of the failed pass
            if failed is not None and not self.make_room():
                raise failed
        wait = self._cuda.mark()

        def pending() -> Embeddings:
            wait()
            return host.numpy()

        return pending

    def _encode(self, patches: Tensor) -> Tensor:
        """What `_compute` gives, on the device; the next call may write into the same memory."""
        rows = len(patches)
        if self._records:
            try:
                return self._encoder.encode_unchecked(patches, self._replay)[:rows]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as exc:
                if is_of_lost_device(exc):
                    raise
                warnings.warn(
                    f"{self._encoder.spec.name} runs without a CUDA graph, more slowly: {first_line(exc)}",
                    stacklevel=2,
                )
            self._records, self._pass = False, None
        padding = patches[-1:].expand(self.batch_size - rows, -1, -1, -1)
        whole = torch.cat([patches, padding]) if len(padding) else patches
        return self._encoder.encode_unchecked(whole, self._compute)[:rows]

    def _replay(self, images: Tensor) -> Tensor:
        """As `_compute`, of at most `batch_size` images; the rows beyond them mean nothing."""
        shape = (self.batch_size, *images.shape[1:])
        if self._pass is None or self._pass.images.shape != shape:
            self._pass = None  # frees its memory first
            self._pass = _RecordedPass(self._compute, images.new_zeros(shape), self._cuda)
        return self._pass(images)

    def make_room(self) -> bool:
        """See `Embedder.make_room`."""
        if self.batch_size == 1:
            return False
        self.batch_size //= 2
        self._pass = None
        self._cuda.release()
        return True

    def close(self) -> None:
        """See `Embedder.close`."""
        self._pass = None


class _RecordedPass:
    """A forward pass of one shape, between memory that stays where it is."""

    def __init__(self, compute: Callable[[Tensor], Tensor], images: Tensor, cuda: Cuda) -> None:
        self.images = images  # uint8 [B, 3, S, S]
        self._replay = cuda.record(lambda: compute(images))

    def __call__(self, images: Tensor) -> Tensor:
        self.images[: len(images)].copy_(images, non_blocking=True)
        return self._replay()
