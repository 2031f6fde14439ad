"""The whole run, by the code that users run, beside the encoder's own time for the same patches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from seal_extract.bench.encoding import (
    Busy,
    Pass,
    flops_per_patch,
    hold_patches,
    matrix_flops_of,
    time_forward,
    time_matrix,
)
from seal_extract.bench.measure import Ratio, Stage, Timing, forget_peak, peak_mb, take_turns, timed
from seal_extract.bench.sample import Sample
from seal_extract.encoders import Encoder
from seal_extract.features.feature_file import SlideLabel, write_pixel_coords, write_pixel_features
from seal_extract.run.embed import open_embedder
from seal_extract.run.extract import extract_many
from seal_extract.run.options import ExtractOptions

Say = Callable[[str], None]


@dataclass(frozen=True)
class WholeRun:
    """What one run was spent on.

    Attributes:
        timing: of all of it.
        busy: share of its wall time in which the encoder computed; on a CPU, of the time of all cores.
        busy_cpu: CPU seconds of the encoder, of the wall time of all cores; None on a GPU.
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
        """A run that has ended: its forward passes by their start, and how many can run at a time."""
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
        whole_vs_forward_cpu: the same of CPU seconds, which other processes do not change.
        with_tissue: whether the whole found the tissue too; else the patches were given.
        slides: of a whole run.
        batch_size: patches given to the encoder at once.
        flops_per_patch: of a forward pass.
        matrix_flops_per_s: the best that the device reaches with large matrices in that precision.
        matrix_share: of that, what the encoder alone reaches; on a CPU per CPU-second of both.
        peak_mb: largest resident memory of the first whole run.
        peak_gpu_mb: the same on the GPU, if there is one.
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

    @property
    def forward_flops_per_s(self) -> float:
        """That the encoder reaches alone."""
        return self.flops_per_patch * (self.stages["forward"].patches_per_s or 0.0)

    def to_json(self) -> dict[str, Any]:
        """All figures by name, of a whole run the medians."""
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
            "with_tissue": self.with_tissue,
            "slides": self.slides,
            **runs,
            "batch_size": self.batch_size,
            "flops_per_patch": self.flops_per_patch,
            "forward_tflops_per_s": self.forward_flops_per_s / 1e12,
            "matrix_tflops_per_s": self.matrix_flops_per_s / 1e12,
            "matrix_share": self.matrix_share.median,
            "peak_mb": self.peak_mb,
            "peak_gpu_mb": self.peak_gpu_mb,
        }


def measure_encoding(
    samples: Sequence[Sample],
    encoder: Encoder,
    folder: Path,
    workers: int,
    repeats: int,
    say: Say = lambda _: None,
) -> Encoding:
    """Measure the encoder alone, writing alone, and the whole, which is done first for the sake of its peak.

    Args:
        samples: one per slide; all of them are the whole.
        encoder: on its device.
        folder: for results, which the caller deletes.
        workers: reading threads, and on a CPU as many that encode.
        repeats: of each measurement, after one that warms up.
        say: told what is measured next.

    Raises:
        SealExtractError: whatever stops a run.
    """
    device, patches = encoder.device, sum(len(sample.grid) for sample in samples)
    with_tissue = all(sample.is_whole for sample in samples)
    runs: list[WholeRun] = []

    def whole() -> Timing:
        options = replace(samples[0].options, workers=workers)
        if not with_tissue:
            options = replace(options, coords=_coordinates(samples, folder / "coords"))
        with TemporaryDirectory(dir=folder) as out:
            runs.append(_run(samples, encoder, Path(out), options))
        return runs[-1].timing

    say("whole, to warm up and for its memory")
    forget_peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    whole()
    peak = peak_mb()
    peak_gpu = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None
    runs.clear()

    forward = open_embedder(encoder, samples[0].grid.patch_px, samples[0].options.batch_size, workers)
    try:
        held = hold_patches(samples[0], forward.batch_size, workers)
        works = {
            "forward": lambda: time_forward(forward, held, patches, device),
            "whole": whole,
            "matrices": lambda: time_matrix(device, encoder.precision, workers),
            "write": lambda: _time_write(samples[0], encoder, folder / "written.h5", forward.batch_size),
        }
        timings = take_turns(works, repeats, say)
        flops = flops_per_patch(encoder, held[0])
    finally:
        forward.close()
    forward_s, whole_s = ([t.wall_s for t in timings[name]] for name in ("forward", "whole"))
    forward_cpu_s, whole_cpu_s = ([t.cpu_s for t in timings[name]] for name in ("forward", "whole"))
    matrix_flops = matrix_flops_of(device, workers)
    share = _matrix_share(timings, flops * patches / matrix_flops, by_cpu=device.type == "cpu")
    return Encoding(
        stages=_stages(timings, patches, samples, workers, with_tissue),
        runs=tuple(runs),
        whole_vs_forward=Ratio.of(whole_s, forward_s),
        whole_vs_forward_cpu=Ratio.of(whole_cpu_s, forward_cpu_s),
        with_tissue=with_tissue,
        slides=len(samples),
        batch_size=forward.batch_size,
        flops_per_patch=flops,
        matrix_flops_per_s=matrix_flops / min(t.wall_s for t in timings["matrices"]),
        matrix_share=share,
        peak_mb=peak,
        peak_gpu_mb=peak_gpu,
    )


def _matrix_share(timings: dict[str, tuple[Timing, ...]], operations: float, by_cpu: bool) -> Ratio:
    """Rate of the forward pass to that of matrices, with ``operations`` times as many to do."""
    forward, matrices = (
        [t.cpu_s if by_cpu else t.wall_s for t in timings[name]] for name in ("forward", "matrices")
    )
    return Ratio.of([operations * s for s in matrices], forward)


def _stages(
    timings: dict[str, tuple[Timing, ...]],
    patches: int,
    samples: Sequence[Sample],
    workers: int,
    with_tissue: bool,
) -> dict[str, Stage]:
    threads = _at_once(samples[0].device, workers)
    tissue = "tissue, overlay" if with_tissue else "given patches, overlay"
    slides = f" of {len(samples)} slides" if len(samples) > 1 else ""
    whole = f"slide to features{slides}, by extract_many: {tissue}, all stages at once"
    return {
        "forward": Stage("patches in memory to embeddings", patches, threads, timings["forward"]),
        "write": Stage("embeddings to HDF5, synced", len(samples[0].grid), 1, timings["write"]),
        "whole": Stage(whole, patches, workers + threads, timings["whole"]),
    }


def _at_once(device: torch.device, workers: int) -> int:
    """Forward passes that run at a time: one on a GPU, one per thread on a CPU."""
    return 1 if device.type == "cuda" else workers


def _coordinates(samples: Sequence[Sample], folder: Path) -> Path:
    """A folder of coordinates for ``--coords``."""
    for sample in samples:
        path = folder / f"{sample.slide.path.stem}_patches.h5"
        if not path.exists():
            write_pixel_coords(path, _label(sample), sample.grid, {})
    return folder


def _label(sample: Sample) -> SlideLabel:
    return SlideLabel(sample.slide.path.stem, sample.slide.size_l0, sample.slide.mpp)


def _run(samples: Sequence[Sample], encoder: Encoder, out: Path, options: ExtractOptions) -> WholeRun:
    def extract() -> None:
        for result in extract_many([s.slide.path for s in samples], encoder, out, options=options):
            if result.error is not None:
                raise result.error

    with Busy(encoder) as busy, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an encoder may be measured on patches that do not suit it
        timing = timed(extract, encoder.device)
    return WholeRun.of(timing, busy.passes(), _at_once(encoder.device, options.workers or 1))


def _time_write(sample: Sample, encoder: Encoder, path: Path, batch_size: int) -> Timing:
    grid, spec = sample.grid, encoder.spec
    features = np.random.default_rng(0).standard_normal((batch_size, spec.dim), np.float32)

    def write() -> None:
        with write_pixel_features(path, _label(sample), grid, spec.name, spec.dim, {}) as writer:
            while writer.rows < len(grid):
                writer.append(features[: len(grid) - writer.rows])

    return timed(write, torch.device("cpu"))
