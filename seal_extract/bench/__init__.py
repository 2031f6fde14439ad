"""How fast is this machine: every stage alone, all of them together, and against the classic loader.

Absolute figures wander with what else the machine does; ratios are therefore taken of pairs that were
measured one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from seal_extract.bench.large_slide import write_large_slide
from seal_extract.bench.measure import forget_peak, peak_mb, resident_mb
from seal_extract.bench.reading import measure_reading
from seal_extract.bench.report import BenchReport
from seal_extract.bench.sample import take_sample
from seal_extract.bench.whole import measure_encoding
from seal_extract.encoders import Encoder
from seal_extract.errors import UsageError
from seal_extract.patches.stream import available_cores
from seal_extract.run.options import ExtractOptions

__all__ = ["BenchOptions", "BenchReport", "bench"]


WITHOUT_ENCODER = 64  # patches of a batch where no encoder says how many it takes


@dataclass(frozen=True)
class BenchOptions:
    """What to measure, and how often.

    Attributes:
        patches: of each slide.
        repeats: of each measurement; figures are medians.
        against_openslide: read with OpenSlide and Pillow too, in turns.
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
    say: Callable[[str], None] = lambda _: None,
) -> BenchReport:
    """Measure stages on the first of ``slides`` and the whole run on all.

    Args:
        slides: of different names; if empty, a slide of `write_large_slide`.
        encoder: on its device; None to measure reading alone.
        run: all choices of a run.
        options: what to measure.
        device: where patches are wanted if there is no encoder; the CPU by default.
        say: told what is measured next.

    Raises:
        UsageError: two slides of one name.
        SealExtractError: whatever stops a run, and a slide without tissue.
    """
    if len({path.stem for path in slides}) < len(slides):
        raise UsageError("two of the slides have one name; give slides of different names")
    workers = run.workers or available_cores()
    device = encoder.device if encoder is not None else device or torch.device("cpu")
    with ExitStack() as closing:
        folder = Path(closing.enter_context(TemporaryDirectory(prefix="seal_extract_bench_")))
        paths = list(slides)
        if not paths:
            say(f"writing a slide of {options.size_px} x {options.size_px} px")
            paths = [write_large_slide(folder / "large.svs", (options.size_px,) * 2, options.tiles)]
        say("finding tissue")
        samples = tuple(
            closing.enter_context(take_sample(path, options.patches, device, run)) for path in paths
        )
        before, encoding = resident_mb(), None
        if encoder is not None:
            encoding = measure_encoding(samples, encoder, folder, workers, options.repeats, say)
        else:
            forget_peak()
        batch_size = encoding.batch_size if encoding else run.batch_size or WITHOUT_ENCODER
        reading = measure_reading(
            samples[0], workers, batch_size, options.repeats, options.against_openslide, say
        )
        return BenchReport(
            samples=samples,
            synthetic=not slides,
            encoder=encoder,
            asked=options.patches,
            workers=workers,
            repeats=options.repeats,
            options=run,
            reading=reading,
            encoding=encoding,
            before_mb=before,
            peak_mb=encoding.peak_mb if encoding else peak_mb(),
        )
