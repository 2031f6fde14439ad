"""Measure how fast this machine is: every stage alone, a whole run, and reading compared with OpenSlide.

Seconds depend on what else the machine does. Ratios are therefore taken of pairs that were measured one after
the other.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from seal_extract.bench.encoding import Encoding, measure_encoding
from seal_extract.bench.large_slide import write_large_slide
from seal_extract.bench.measure import Progress, Ratio, Stage, memory_mb, reset_peak
from seal_extract.bench.reading import Reading, Sample, measure_reading, take_sample
from seal_extract.encoders import Encoder
from seal_extract.errors import UsageError
from seal_extract.patches import available_cores
from seal_extract.run.options import ExtractOptions
from seal_extract.run.provenance import LIBRARIES

__all__ = ["BenchOptions", "BenchReport", "bench"]

WITHOUT_ENCODER = 64  # patches of a batch where no encoder says how many it takes
# the stages that work at the same time in a run, by the names that `BenchReport.limits` gives them
AT_ONCE = {
    "planning": "planning",
    "reading": "reading",
    "upload": "upload",
    "encoder": "forward",
    "writing": "write",
}


@dataclass(frozen=True)
class BenchOptions:
    """What to measure, and how often.

    Attributes:
        patches: number of patches of each slide.
        repeats: number of times that each measurement is repeated; figures are medians.
        against_openslide: also read with OpenSlide and Pillow, in turns.
        size_px: side of the slide that is made if none is given.
        tiles: kind of its tiles, see `write_large_slide`.
    """

    patches: int = 512
    repeats: int = 3
    against_openslide: bool = False
    size_px: int = 16_000
    tiles: str = "420-256"

    def __post_init__(self) -> None:
        for name in ("patches", "repeats", "size_px"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} is {getattr(self, name)}; allowed: 1 or more")


def bench(
    slides: Sequence[Path],
    encoder: Encoder | None,
    *,
    run: ExtractOptions = ExtractOptions(),
    options: BenchOptions = BenchOptions(),
    device: torch.device | None = None,
    progress: Progress = lambda step: None,
) -> BenchReport:
    """Measure the stages on the first of ``slides`` and the whole run on all.

    Args:
        slides: of different names; if empty, a slide of `write_large_slide`.
        encoder: on its device; None to measure reading alone.
        run: all options of a run.
        options: what to measure.
        device: where patches are needed if there is no encoder; the CPU by default.
        progress: receives the name of the next measurement.

    Raises:
        UsageError: two slides have one name.
        SealExtractError: an error that stops a run, or a slide without tissue.
    """
    if len({path.stem for path in slides}) < len(slides):
        raise UsageError("two of the slides have one name; give slides of different names")
    workers = run.workers or available_cores()
    device = encoder.device if encoder is not None else device or torch.device("cpu")
    with ExitStack() as closing:
        folder = Path(closing.enter_context(TemporaryDirectory(prefix="seal_extract_bench_")))
        paths = list(slides)
        if not paths:
            progress(f"writing a slide of {options.size_px} x {options.size_px} px")
            paths = [write_large_slide(folder / "large.svs", (options.size_px,) * 2, options.tiles)]
        progress("finding tissue")
        samples = tuple(
            closing.enter_context(take_sample(path, options.patches, device, run)) for path in paths
        )
        before, encoding = memory_mb("VmRSS"), None
        if encoder is not None:
            encoding = measure_encoding(samples, encoder, folder, workers, options.repeats, progress)
        else:
            reset_peak()
        batch_size = encoding.batch_size if encoding else run.batch_size or WITHOUT_ENCODER
        reading = measure_reading(
            samples[0], workers, batch_size, options.repeats, options.against_openslide, progress
        )
        return BenchReport(
            samples=samples,
            synthetic=not slides,
            encoder=encoder,
            workers=workers,
            run=run,
            options=options,
            reading=reading,
            encoding=encoding,
            before_mb=before,
            peak_mb=encoding.peak_mb if encoding else memory_mb("VmHWM"),
        )


@dataclass(frozen=True)
class BenchReport:
    """Every figure of one `bench`.

    Attributes:
        samples: the patches of each slide; the stages before the encoder are measured on the first.
        synthetic: whether the slide was made by repeating the bundled one.
        encoder: None where only reading was measured.
        workers: number of reading threads.
        run: all options of a run.
        options: what was measured.
        reading: the stages before the encoder.
        encoding: the encoder and the whole run, if measured.
        before_mb: resident memory before the first measurement, the encoder included.
        peak_mb: largest resident memory of the first whole run, or of reading where there is none.
    """

    samples: tuple[Sample, ...]
    synthetic: bool
    encoder: Encoder | None
    workers: int
    run: ExtractOptions
    options: BenchOptions
    reading: Reading
    encoding: Encoding | None
    before_mb: float | None
    peak_mb: float | None

    @property
    def stages(self) -> dict[str, Stage]:
        """All stages by name."""
        return self.reading.stages | (self.encoding.stages if self.encoding else {})

    @property
    def limits(self) -> str:
        """The one of `AT_ONCE` that is slowest alone, with its own threads: a run is no faster."""
        rates = {name: s.patches_per_s for name, key in AT_ONCE.items() if (s := self.stages.get(key))}
        return min(rates, key=lambda name: rates[name] or math.inf)

    @property
    def untrained(self) -> bool:
        """Whether the encoder's weights are random: it was read from no file."""
        return self.encoder is not None and not self.encoder.weights

    def to_json(self) -> dict[str, Any]:
        """Every figure, and what is needed to repeat it."""
        versus, one = self.reading.openslide, self.reading.one_thread
        whole = self.encoding.to_json() if self.encoding else None
        against = asdict(versus) if versus else None
        return {
            "read_ratio_vs_openslide": against[against["headline"]]["median"] if against else None,
            **{
                name: whole and whole[name]
                for name in ("whole_vs_forward", "whole_vs_forward_cpu", "encoder_busy")
            },
            "limits": self.limits,
            "against_openslide": against,
            "against_one_thread": asdict(one) if one else None,
            "stages": {name: asdict(stage) for name, stage in self.stages.items()},
            "whole": whole,
            "memory": {"before_mb": self.before_mb, "peak_mb": self.peak_mb},
            "decoder": self.reading.decoder,
            "synthetic": self.synthetic,
            "slides": [sample.to_json() for sample in self.samples],
            "encoder": self.encoder and {**self.encoder.description, "untrained": self.untrained},
            "patches_asked": self.options.patches,
            "workers": self.workers,
            "repeats": self.options.repeats,
            "options": {k: v for k, v in asdict(self.run).items() if k not in ("roi", "coords")},
            "machine": machine(),
            "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        }

    def lines(self) -> list[str]:
        """The figures as tables: ratios first, because seconds are of one machine and one day."""
        facts = machine()
        device = facts["gpu"] or "no GPU"
        return [
            *self._subjects(),
            "",
            *_aligned([("ratio", "median", "min", "max", ""), *self._ratios()]),
            "",
            *_aligned([STAGE_HEAD, *(_stage_row(name, stage) for name, stage in self.stages.items())]),
            "",
            *self._remarks(),
            f"machine   {facts['cpu']}, {facts['cores']} cores, {device}; "
            f"torch {version('torch')}, seal-extract {version('seal-extract')}",
        ]

    def _subjects(self) -> list[str]:
        sample = self.samples[0]
        grid, slide = sample.grid, sample.slide
        kind = ", which repeats the bundled slide" if self.synthetic else ""
        lines = [f"slide     {slide}{kind}; {self.reading.decoder}"]
        lines += [f"          {other.slide}, in the whole only" for other in self.samples[1:]]
        counts = ", ".join(f"{len(s.grid)} of {s.in_grid}" for s in self.samples)
        asked = self.options.patches
        fewer = f" ({asked} asked)" if any(len(s.grid) < asked for s in self.samples) else ""
        lines.append(
            f"patches   {counts}{fewer}: {grid.patch_px} px at {grid.mpp:.4g} µm/px out of {grid.read_px} px "
            f"of level {grid.level}, {self.run.resample}; reading threads: {self.workers}"
        )
        if self.encoder is not None and self.encoding is not None:
            random = ", UNTRAINED: random weights" if self.untrained else ""
            lines.append(f"encoder   {self.encoder}{random}; batches of {self.encoding.batch_size}")
        return lines

    def _ratios(self) -> list[tuple[str, ...]]:
        rows = []
        if versus := self.reading.openslide:
            kinds = [("CPU time", versus.patches_per_cpu_s), ("time", versus.patches_per_s)]
            for kind, ratio in kinds if self.workers == 1 else reversed(kinds):
                rows.append(_ratio_row(f"reading faster than OpenSlide + PIL, {kind}", ratio))
        if one := self.reading.one_thread:
            threads = f"{self.workers} reading threads faster than one, time"
            rows.append(_ratio_row(threads, one.patches_per_s))
        if encoding := self.encoding:
            busy = [run.busy for run in encoding.runs]
            shares = Ratio(median(busy), min(busy), max(busy))
            rows += [
                _ratio_row("whole to the encoder alone, time", encoding.whole_vs_forward),
                _ratio_row("whole to the encoder alone, CPU time", encoding.whole_vs_forward_cpu),
                _ratio_row("encoder busy, of the whole", shares, "%"),
                _ratio_row("encoder alone, of the device's matrix rate", encoding.matrix_share, "%"),
            ]
            if (share := encoding.kernels_busy) is not None:
                rows.append(_ratio_row("GPU kernels running, of the whole", Ratio(share, share, share), "%"))
        return rows

    def _remarks(self) -> list[str]:
        lines = [f"limits    {self.limits}: the slowest of those that work at once, {', '.join(AT_ONCE)}"]
        encoding = self.encoding
        if encoding:
            facts = encoding.to_json()
            lines += [
                f"forward   {encoding.flops_per_patch / 1e9:.3g} GFLOP a patch, "
                f"{facts['forward_tflops_per_s']:.3g} TFLOP/s; matrices {facts['matrix_tflops_per_s']:.3g}",
                f"whole     {facts['startup_s']:.2f} s until the first forward pass, {facts['tail_s']:.2f} s "
                f"after the last; longest gap between two {1000 * facts['longest_gap_s']:.0f} ms",
            ]
        tissue = ", ".join(f"{sample.planning.wall_s:.2f}" for sample in self.samples)
        apart = "in the whole too" if encoding and encoding.with_tissue else "not in any figure above"
        lines.append(f"tissue    {tissue} s to open the slide, find its tissue and lay the grid, {apart}")
        if self.peak_mb is not None and self.before_mb is not None:
            gpu = encoding.peak_gpu_mb if encoding else None
            on_gpu = f"; {gpu:.0f} MB on the GPU" if gpu else ""
            lines.append(f"memory    {self.peak_mb:.0f} MB at most, {self.before_mb:.0f} MB before{on_gpu}")
        return lines


STAGE_HEAD = ("stage", "patches/s", "patches/CPU-s", "s", "CPU-s", "threads", "what")


def _ratio_row(what: str, ratio: Ratio, unit: str = "x") -> tuple[str, ...]:
    digits, scale = (0, 100) if unit == "%" else (2, 1)
    return (what, *(f"{scale * v:.{digits}f} {unit}" for v in (ratio.median, ratio.min, ratio.max)), "")


def _stage_row(name: str, stage: Stage) -> tuple[str, ...]:
    if stage.seconds is None or stage.cpu_seconds is None:
        return (name, "-", "-", "-", "-", "-", stage.does)
    rates = (_rate(stage.patches_per_s), _rate(stage.patches_per_cpu_s))
    seconds = (f"{stage.seconds:.3f}", f"{stage.cpu_seconds:.3f}")
    return (name, *rates, *seconds, str(stage.threads), stage.does)


def _rate(per_s: float | None) -> str:
    return "-" if per_s is None else f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.1f}"


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """First and last column to the left, numbers to the right."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def machine() -> Mapping[str, Any]:
    """CPU, cores, GPU and system."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "gpu": gpu, "system": platform.platform()}


def _cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
