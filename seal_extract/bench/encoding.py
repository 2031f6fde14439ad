"""The encoder alone, and the whole run by the code that users run, on the same patches."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from seal_extract.bench.measure import (
    Progress,
    Ratio,
    Stage,
    Timing,
    Timings,
    each,
    kernel_seconds,
    memory_mb,
    reading_threads,
    reset_peak,
    take_turns,
    timed,
    wait_for,
)
from seal_extract.bench.reading import Sample
from seal_extract.encoders import Encoder
from seal_extract.features.feature_file import SlideLabel, create_coords, write_described
from seal_extract.features.layouts import FlatLayout
from seal_extract.patches.stream import stream_batches
from seal_extract.run.embed import CPU_ROWS, Embedder, Pending, open_embedder
from seal_extract.run.extract import BATCHES_AHEAD, extract_many
from seal_extract.run.options import ExtractOptions

HELD_BYTES = 512 * 2**20  # of patches; encoded again and again where more are asked for
MATRIX = {"cuda": (8192, 20), "cpu": (1024, 12)}  # side of the square matrices, products a measurement


@dataclass(frozen=True)
class Pass:
    """One forward pass, in seconds since the run began; ``cpu_s`` is 0 on a GPU."""

    start_s: float
    end_s: float
    cpu_s: float


@contextmanager
def record_passes(encoder: Encoder) -> Iterator[list[Pass]]:
    """Record the forward passes of an encoder; when the block has ended, they are in the list by their start.

    On a GPU the times are those of events in the queue, so nothing waits.
    """
    encode, device, on_gpu = encoder.encode_unchecked, encoder.device, encoder.device.type == "cuda"
    passes: list[Pass] = []
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def recorded(*given: Any) -> Tensor:
        if on_gpu:
            begun = _event(device)
            embeddings = encode(*given)
            events.append((begun, _event(device)))
            return embeddings
        start, cpu = perf_counter(), thread_time()
        embeddings = encode(*given)
        passes.append(Pass(start - began, perf_counter() - began, thread_time() - cpu))
        return embeddings

    wait_for(device)
    began = perf_counter()
    first = _event(device) if on_gpu else None
    vars(encoder)["encode_unchecked"] = recorded
    try:
        yield passes
    finally:
        del encoder.encode_unchecked
    wait_for(device)
    if first is not None:
        for begun, ended in events:
            passes.append(Pass(first.elapsed_time(begun) / 1000, first.elapsed_time(ended) / 1000, 0.0))
    passes.sort(key=lambda one: one.start_s)


def _event(device: torch.device) -> torch.cuda.Event:
    new_event: Callable[..., torch.cuda.Event] = torch.cuda.Event  # its own signature is untyped
    event = new_event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


@dataclass(frozen=True)
class WholeRun:
    """Where the time of one run went.

    Attributes:
        timing: of the run.
        busy: share of its wall time in which the encoder computed; on a CPU, of the time of all cores.
        busy_cpu: CPU seconds of the encoder as a share of the wall time of all cores; None on a GPU.
        startup_s: until the first forward pass.
        tail_s: from the end of the last one.
        longest_gap_s: between two, with none running.
        pass_s: median of a forward pass.
    """

    timing: Timing
    busy: float
    busy_cpu: float | None
    startup_s: float
    tail_s: float
    longest_gap_s: float
    pass_s: float

    @classmethod
    def of(cls, timing: Timing, passes: Sequence[Pass], at_once: int) -> WholeRun:
        """The figures of a run from its forward passes by their start, and how many can run at a time."""
        room = timing.wall_s * at_once
        gap, end = 0.0, passes[0].end_s
        for one in passes[1:]:
            gap, end = max(gap, one.start_s - end), max(end, one.end_s)
        cpu = sum(p.cpu_s for p in passes)
        return cls(
            timing,
            min(1.0, sum(p.end_s - p.start_s for p in passes) / room),
            cpu / room if cpu else None,
            passes[0].start_s,
            max(0.0, timing.wall_s - end),
            gap,
            median(p.end_s - p.start_s for p in passes),
        )


@dataclass(frozen=True)
class Encoding:
    """The figures of the encoder, alone and in a whole run.

    Attributes:
        stages: forward, write and whole, by name.
        runs: the whole runs.
        whole_vs_forward: seconds of the whole to those of the encoder alone.
        whole_vs_forward_cpu: the same of CPU seconds.
        with_tissue: whether the whole run found the tissue too; otherwise the patches were given.
        slides: number of slides in a whole run.
        batch_size: patches given to the encoder at once.
        flops_per_patch: of a forward pass.
        matrix_flops_per_s: the highest rate of the device with large matrices in that precision.
        matrix_share: share of that rate that the encoder alone reaches; on a CPU per CPU second of both.
        peak_mb: largest resident memory of the first whole run.
        peak_gpu_mb: the same on the GPU, if there is one.
        kernels_busy: share of the whole's time in which kernels ran on the GPU, by torch's profiler in one
            more run; None on a CPU. `WholeRun.busy` counts the gaps between kernels too.
    """

    stages: dict[str, Stage]
    runs: tuple[WholeRun, ...]
    whole_vs_forward: Ratio
    whole_vs_forward_cpu: Ratio
    with_tissue: bool
    slides: int
    batch_size: int
    flops_per_patch: float
    matrix_flops_per_s: float
    matrix_share: Ratio
    peak_mb: float | None
    peak_gpu_mb: float | None
    kernels_busy: float | None

    def to_json(self) -> dict[str, Any]:
        """All figures by name; those of whole runs are medians."""
        runs = {
            name: median(getattr(run, name) for run in self.runs)
            for name in ("startup_s", "tail_s", "longest_gap_s", "pass_s")
        }
        shares = [run.busy_cpu for run in self.runs if run.busy_cpu is not None]
        return {
            "whole_vs_forward": self.whole_vs_forward.median,
            "whole_vs_forward_min": self.whole_vs_forward.min,
            "whole_vs_forward_max": self.whole_vs_forward.max,
            "whole_vs_forward_cpu": self.whole_vs_forward_cpu.median,
            "encoder_busy": median(run.busy for run in self.runs),
            "encoder_busy_cpu": median(shares) if shares else None,
            "kernels_busy": self.kernels_busy,
            "with_tissue": self.with_tissue,
            "slides": self.slides,
            **runs,
            "batch_size": self.batch_size,
            "flops_per_patch": self.flops_per_patch,
            "forward_tflops_per_s": self.flops_per_patch
            * (self.stages["forward"].patches_per_s or 0.0)
            / 1e12,
            "matrix_tflops_per_s": self.matrix_flops_per_s / 1e12,
            "matrix_share": self.matrix_share.median,
            "peak_mb": self.peak_mb,
            "peak_gpu_mb": self.peak_gpu_mb,
        }


def measure_encoding(
    samples: Sequence[Sample], encoder: Encoder, folder: Path, workers: int, repeats: int, progress: Progress
) -> Encoding:
    """Measure the encoder alone, writing alone and the whole run, ``repeats`` times after one warm-up.

    Args:
        samples: one per slide of the whole run.
        encoder: on its device.
        folder: for results, which the caller deletes.
        workers: reading threads, and on a CPU as many that encode.
        repeats: of each measurement.
        progress: receives the name of the next measurement.

    Raises:
        SealExtractError: an error that stops a run.
    """
    device, patches = encoder.device, sum(len(sample.grid) for sample in samples)
    on_cpu, sample = device.type == "cpu", samples[0]
    at_once = workers if on_cpu else 1  # forward passes
    with_tissue = all(sample.is_whole for sample in samples)
    options = replace(sample.options, workers=workers)
    if not with_tissue:
        options = replace(options, coords=_write_coordinates(samples, folder / "coords"))
    runs: list[WholeRun] = []

    def whole() -> Timing:
        with TemporaryDirectory(dir=folder) as out:
            runs.append(_run([s.slide.path for s in samples], encoder, Path(out), options, at_once))
        return runs[-1].timing

    progress("whole, to warm up and for its memory")
    reset_peak()
    if not on_cpu:
        torch.cuda.reset_peak_memory_stats(device)
    whole()
    peak = memory_mb("VmHWM")
    peak_gpu = None if on_cpu else torch.cuda.max_memory_allocated(device) / 1e6
    runs.clear()

    with closing(open_embedder(encoder, sample.grid.patch_px, options.batch_size, workers)) as embedder:
        held = _hold_patches(sample, embedder.batch_size, workers)
        works = {
            "forward": lambda: _time_forward(embedder, held, patches, device),
            "whole": whole,
            "matrices": lambda: _time_matrices(device, encoder.precision, at_once),
            "write": lambda: _time_write(sample, encoder, folder / "written", embedder.batch_size),
        }
        timings = take_turns(works, repeats, progress)
        flops = flops_per_patch(encoder, held[0])
    kernels_s, made = None if on_cpu else kernel_seconds(whole, device), tuple(runs[:repeats])
    side, products = MATRIX[device.type]
    matrix_flops = at_once * products * 2.0 * side**3
    share = Ratio.of_cpu if on_cpu else Ratio.of_wall
    return Encoding(
        stages=_stages(timings, samples, at_once, workers, with_tissue),
        runs=made,
        whole_vs_forward=Ratio.of_wall(timings["whole"], timings["forward"]),
        whole_vs_forward_cpu=Ratio.of_cpu(timings["whole"], timings["forward"]),
        with_tissue=with_tissue,
        slides=len(samples),
        batch_size=embedder.batch_size,
        flops_per_patch=flops,
        matrix_flops_per_s=matrix_flops / min(t.wall_s for t in timings["matrices"]),
        matrix_share=share(timings["matrices"], timings["forward"]) * (flops * patches / matrix_flops),
        peak_mb=peak,
        peak_gpu_mb=peak_gpu,
        kernels_busy=kernels_s and min(1.0, kernels_s / median(run.timing.wall_s for run in made)),
    )


def _stages(
    timings: Timings, samples: Sequence[Sample], at_once: int, workers: int, with_tissue: bool
) -> dict[str, Stage]:
    tissue = "tissue, overlay" if with_tissue else "given patches, overlay"
    slides = f" of {len(samples)} slides" if len(samples) > 1 else ""
    whole = f"slide to features{slides}, by extract_many: {tissue}, all stages at once"
    first, patches = len(samples[0].grid), sum(len(sample.grid) for sample in samples)
    return {
        "forward": Stage.of("patches in memory to embeddings", patches, at_once, timings["forward"]),
        "write": Stage.of("embeddings to HDF5, synced", first, 1, timings["write"]),
        "whole": Stage.of(whole, patches, workers + at_once, timings["whole"]),
    }


def _write_coordinates(samples: Sequence[Sample], folder: Path) -> Path:
    """A folder of coordinates for ``--coords``."""
    for sample in samples:
        describe = partial(create_coords, label=_label(sample), grid=sample.grid)
        write_described(folder / f"{sample.slide.path.stem}_patches.h5", {}, describe)
    return folder


def _label(sample: Sample) -> SlideLabel:
    return SlideLabel(sample.slide.path.stem, sample.slide.size_l0, sample.slide.mpp)


def _run(
    slides: Sequence[Path], encoder: Encoder, out: Path, options: ExtractOptions, at_once: int
) -> WholeRun:
    def extract() -> None:
        for result in extract_many(slides, encoder, out, options=options):
            if result.error is not None:
                raise result.error

    with record_passes(encoder) as passes, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an encoder may be measured on patches that do not suit it
        timing = timed(extract, encoder.device)
    return WholeRun.of(timing, passes, at_once)


# --- each alone ---------------------------------------------------------------------------------------


def _hold_patches(sample: Sample, batch_size: int, workers: int) -> list[Tensor]:
    """The patches of a sample on its device, as many batches uint8 [B, 3, S, S] as may be held."""
    most = max(1, HELD_BYTES // (3 * sample.grid.patch_px**2 * batch_size))
    stream = stream_batches([sample.open_reader()], batch_size, device=sample.device, workers=workers)
    with closing(stream):
        return [batch.patches for batch in islice(stream, most)]


def _time_forward(embedder: Embedder, held: list[Tensor], patches: int, device: torch.device) -> Timing:
    """Encode ``patches`` patches from memory, with as many batches in progress as a run has."""

    def encode() -> None:
        left, pending = patches, deque[Pending]()
        for batch in cycle(held):
            pending.append(embedder.submit(batch[:left]))
            left -= len(batch[:left])
            if len(pending) > BATCHES_AHEAD:
                pending.popleft()()
            if not left:
                break
        while pending:
            pending.popleft()()

    return timed(encode, device)


def flops_per_patch(encoder: Encoder, patches: Tensor) -> float:
    """Floating-point operations of a forward pass; a multiplication and an addition are two."""
    few = patches[:CPU_ROWS]
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # fused attention on a CPU is not counted by every torch
        encoder.encode_unchecked(few)
    return float(counter.get_total_flops()) / len(few)


def _time_matrices(device: torch.device, precision: torch.dtype, threads: int) -> Timing:
    """Multiply large square matrices, which gives the highest rate of the device."""
    side, products = MATRIX[device.type]
    a, b = (torch.randn(side, side, device=device).to(precision) for _ in range(2))

    def multiply(times: int) -> None:
        with torch.inference_mode():
            for _ in range(times):
                torch.mm(a, b)

    with reading_threads(threads) as pool:
        each(pool, multiply, [1] * threads)
        wait_for(device)
        return timed(lambda: each(pool, multiply, [products] * threads), device)


def _time_write(sample: Sample, encoder: Encoder, out: Path, batch_size: int) -> Timing:
    grid, spec = sample.grid, encoder.spec
    features = np.random.default_rng(0).standard_normal((batch_size, spec.dim), np.float32)

    def write() -> None:
        with FlatLayout(out).write_features(_label(sample), grid, spec.name, spec.dim, {}) as writer:
            while writer.rows < len(grid):
                writer.append(features[: len(grid) - writer.rows])

    return timed(write, torch.device("cpu"))
