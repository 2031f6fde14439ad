"""What was measured, as JSON and as a table: ratios first, since seconds are of one machine and one day."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from seal_extract.bench.measure import Ratio, Stage
from seal_extract.bench.reading import Reading, Versus
from seal_extract.bench.sample import Sample
from seal_extract.bench.whole import Encoding
from seal_extract.encoders import Encoder
from seal_extract.run.options import ExtractOptions
from seal_extract.run.provenance import LIBRARIES

OWN = ("read", "decode", "resample", "forward", "write")  # stages that no other is made of


@dataclass(frozen=True)
class BenchReport:
    """Every figure of one `bench`.

    Attributes:
        samples: what was measured on; the stages before the encoder on the first.
        synthetic: whether the slide was made for this, by repeating the bundled one.
        encoder: None where only reading was measured.
        asked: patches of each slide that were asked for.
        workers: reading threads.
        repeats: of each measurement.
        options: all choices of a run.
        reading: what comes before the encoder.
        encoding: the encoder and the whole, if measured.
        before_mb: resident memory before the bench began, the encoder included.
        peak_mb: largest resident memory, of the first whole run, or of reading where there is none.
    """

    samples: tuple[Sample, ...]
    synthetic: bool
    encoder: Encoder | None
    asked: int
    workers: int
    repeats: int
    options: ExtractOptions
    reading: Reading
    encoding: Encoding | None
    before_mb: float | None
    peak_mb: float | None

    @property
    def untrained(self) -> bool:
        """Whether the encoder's weights are random: it was read from no file."""
        return self.encoder is not None and not self.encoder.weights

    @property
    def stages(self) -> dict[str, Stage]:
        """All that was measured alone, and together, by name."""
        return self.reading.stages | (self.encoding.stages if self.encoding else {})

    @property
    def limits(self) -> str:
        """The stage that takes longest per patch, alone and with its own threads."""
        own = {name: s.wall_s / s.patches for name in OWN if (s := self.stages.get(name)) and s.wall_s}
        own["decode"] -= own.get("read", 0.0)  # decode cannot be run without it
        return max(own, key=own.__getitem__)

    def to_json(self) -> dict[str, Any]:
        """Every figure, with what is needed to repeat it."""
        versus, encoding = self.reading.openslide, self.encoding
        return {
            "read_ratio_vs_openslide": self._headline(versus).median if versus else None,
            "whole_vs_forward": encoding.whole_vs_forward.median if encoding else None,
            "whole_vs_forward_cpu": encoding.whole_vs_forward_cpu.median if encoding else None,
            "encoder_busy": median(run.busy for run in encoding.runs) if encoding else None,
            "limits": self.limits,
            "against_openslide": self._versus_json(versus) if versus else None,
            "against_one_thread": self._versus_json(one) if (one := self.reading.one_thread) else None,
            "stages": {name: stage.to_json() for name, stage in self.stages.items()},
            "whole": encoding.to_json() if encoding else None,
            "memory": {"before_mb": self.before_mb, "peak_mb": self.peak_mb},
            "decoder": self.reading.decoder,
            "synthetic": self.synthetic,
            "slides": [sample.describe() for sample in self.samples],
            "encoder": self._encoder_json(),
            "patches_asked": self.asked,
            "workers": self.workers,
            "repeats": self.repeats,
            "options": {k: v for k, v in asdict(self.options).items() if k not in ("roi", "coords")},
            "machine": machine(),
            "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        }

    def _headline(self, versus: Versus) -> Ratio:
        """CPU time where one thread reads: other processes on the machine do not change it."""
        return versus.per_cpu_s if self.workers == 1 else versus.per_s

    def _versus_json(self, versus: Versus) -> dict[str, Any]:
        return {
            "headline": "patches_per_cpu_s" if self.workers == 1 else "patches_per_s",
            "patches_per_s": asdict(versus.per_s),
            "patches_per_cpu_s": asdict(versus.per_cpu_s),
            "other": versus.stage.to_json(),
        }

    def _encoder_json(self) -> dict[str, Any] | None:
        if self.encoder is None:
            return None
        return {**self.encoder.description, "untrained": self.untrained}

    # --- for people -----------------------------------------------------------------------------------

    def lines(self) -> list[str]:
        """The table."""
        facts = machine()
        device = facts["gpu"] or "no GPU"
        return [
            *self._subjects(),
            "",
            *_aligned([("ratio", "median", "min", "max", ""), *self._ratios()]),
            "",
            *_aligned([_STAGE_HEAD, *(_stage_row(n, s) for n, s in self.stages.items())]),
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
        fewer = f" ({self.asked} asked)" if any(len(s.grid) < self.asked for s in self.samples) else ""
        lines.append(
            f"patches   {counts}{fewer}: {grid.patch_px} px at {grid.mpp:.4g} µm/px out of {grid.read_px} px "
            f"of level {grid.level}, {self.options.resample}; reading threads: {self.workers}"
        )
        if self.encoder is not None and self.encoding is not None:
            random = ", UNTRAINED: random weights" if self.untrained else ""
            lines.append(f"encoder   {self.encoder}{random}; batches of {self.encoding.batch_size}")
        return lines

    def _ratios(self) -> list[tuple[str, ...]]:
        rows = []
        if versus := self.reading.openslide:
            kinds = [("CPU time", versus.per_cpu_s), ("time", versus.per_s)]
            for kind, ratio in kinds if self.workers == 1 else reversed(kinds):
                rows.append(_ratio_row(f"reading faster than OpenSlide + PIL, {kind}", ratio, "x"))
        if one := self.reading.one_thread:
            rows.append(_ratio_row(f"{self.workers} reading threads faster than one, time", one.per_s, "x"))
        if encoding := self.encoding:
            busy = [run.busy for run in encoding.runs]
            rows += [
                _ratio_row("whole to the encoder alone, time", encoding.whole_vs_forward, "x"),
                _ratio_row("whole to the encoder alone, CPU time", encoding.whole_vs_forward_cpu, "x"),
                _ratio_row("encoder busy, of the whole", Ratio.of(busy, [1.0] * len(busy)), "%"),
                _ratio_row("encoder alone, of the device's matrix rate", encoding.matrix_share, "%"),
            ]
        return rows

    def _remarks(self) -> list[str]:
        lines = [f"limits    {self.limits}: the slowest when each works alone, with the threads above"]
        if encoding := self.encoding:
            facts = encoding.to_json()
            lines += [
                f"forward   {encoding.flops_per_patch / 1e9:.3g} GFLOP a patch, "
                f"{facts['forward_tflops_per_s']:.3g} TFLOP/s; matrices {facts['matrix_tflops_per_s']:.3g}",
                f"whole     {facts['startup_s']:.2f} s until the first forward pass, {facts['tail_s']:.2f} s "
                f"after the last; longest gap between two {1000 * facts['longest_gap_s']:.0f} ms",
            ]
        tissue = ", ".join(f"{sample.tissue_s:.2f}" for sample in self.samples)
        apart = (
            "in the whole too" if self.encoding and self.encoding.with_tissue else "not in any figure above"
        )
        lines.append(f"tissue    {tissue} s to open the slide, find its tissue and lay the grid, {apart}")
        if self.peak_mb is not None and self.before_mb is not None:
            gpu = self.encoding.peak_gpu_mb if self.encoding else None
            on_gpu = f"; {gpu:.0f} MB on the GPU" if gpu else ""
            lines.append(f"memory    {self.peak_mb:.0f} MB at most, {self.before_mb:.0f} MB before{on_gpu}")
        return lines


_STAGE_HEAD = ("stage", "patches/s", "patches/CPU-s", "s", "CPU-s", "threads", "what")


def _ratio_row(what: str, ratio: Ratio, unit: str) -> tuple[str, ...]:
    digits, scale = (0, 100) if unit == "%" else (2, 1)
    return (what, *(f"{scale * v:.{digits}f} {unit}" for v in (ratio.median, ratio.min, ratio.max)), "")


def _stage_row(name: str, stage: Stage) -> tuple[str, ...]:
    if stage.wall_s is None or stage.cpu_s is None:
        return (name, "-", "-", "-", "-", "-", stage.does)
    rates = (_rate(stage.patches_per_s), _rate(stage.patches_per_cpu_s))
    return (name, *rates, f"{stage.wall_s:.3f}", f"{stage.cpu_s:.3f}", str(stage.threads), stage.does)


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
    """CPU, cores, GPU and system, as JSON."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "gpu": gpu, "system": platform.platform()}


def _cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
