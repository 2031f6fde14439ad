"""``seal-extract SLIDES``: the options filled in, a line for each slide, a table and a page for all."""

from __future__ import annotations

import argparse
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.progress import Events
from seal_extract.cli.terminal import echo, fail
from seal_extract.errors import SealExtractError, UnexpectedError, UsageError
from seal_extract.names import shown

if TYPE_CHECKING:
    from seal_extract.encoders.request import EncoderRequest
    from seal_extract.features.store import SlideFeatures
    from seal_extract.run.cohort import CohortReport, Engine
    from seal_extract.run.options import ExtractOptions, SlidePlan
    from seal_extract.run.status_table import SlideResult
    from seal_extract.slides.listing import SlideList


WHAT_DEFAULT_IS = (
    "by seal-tiny: bundled, trained on four sections of one breast cancer, for trying the tool and for "
    "tests; for science type --encoder seal-conch, or another of `seal-extract encoders`"
)


def run(args: argparse.Namespace) -> int:
    """Embed slides, or only say what would be read of them."""
    from seal_extract.slides.listing import list_slides

    if args.patches:
        from seal_extract.cli.patch_images import run_patches
        from seal_extract.cli.slide_options import slides_parser

        return run_patches(args, slides_parser())
    options = _options(args)
    slides = list_slides(args.slides, args.slide_folder)
    if args.shard is not None:
        slides = slides.shard(*args.shard)
    _tell_ignored(slides, args.verbose)
    if args.dry_run:
        return _run_dry(slides, options, args.debug)
    return embed(slides, requests(args), options, args)


def _options(args: argparse.Namespace) -> ExtractOptions:
    from dataclasses import fields

    from seal_extract.run.options import ExtractOptions

    given = {f.name: getattr(args, f.name) for f in fields(ExtractOptions)}
    return ExtractOptions(**{name: value for name, value in given.items() if value is not None})


def _tell_ignored(slides: SlideList, verbose: bool) -> None:
    if verbose:
        for path, reason in slides.ignored:
            echo(f"{path}: ignored, {reason}")
    elif slides.ignored:
        kinds = Counter(reason for _, reason in slides.ignored).most_common(3)
        named = ", ".join(f"{count} x {reason}" for reason, count in kinds)
        echo(f"{len(slides.ignored)} files ignored ({named}); --verbose lists them")


def shard(text: str) -> tuple[int, int]:
    """``2/8``: the second of eight shares.

    Raises:
        ValueError: something else; argparse tells it.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None:
        raise ValueError(text)
    return int(found[1]), int(found[2])


# --- a dry run ----------------------------------------------------------------------------------------


def _run_dry(slides: SlideList, options: ExtractOptions, debug: bool) -> int:
    from seal_extract.run.slide_process import plan_within
    from seal_extract.run.staging import open_by_itself

    echo(_row(DRY_HEAD))
    failed = 0
    for entry in slides.entries:
        try:
            with open_by_itself(entry, options) as slide:
                plan = plan_within(slide, entry, options.for_entry(entry))
                echo(_row(_dry_cells(plan)))
        except Exception as exc:
            failed += 1
            _tell_failure(entry.blame(exc), debug)
    return _status(failed, len(slides))


def _tell_failure(error: SealExtractError, debug: bool) -> None:
    fail(f"FAILED {error}", 1)
    if debug and isinstance(error, UnexpectedError):
        echo(*error.details.splitlines(), error=True)


DRY_HEAD = ("slide", "px", "µm/px", "source", "read", "patch", "level-0", "tissue", "patches")
WIDTHS = (28, 15, 7, 24, 18, 18, 8, 10, 8)


def _dry_cells(plan: SlidePlan) -> tuple[str, ...]:
    slide, grid = plan.slide, plan.grid
    return (
        slide.path.name,
        f"{slide.size_l0[0]} x {slide.size_l0[1]}",
        f"{slide.mpp:.4g}",
        slide.mpp_source,
        f"level {grid.level}, {grid.read_px} px",
        f"{grid.patch_px} px at {grid.mpp:.4g}",
        f"{grid.patch_size_l0} px",
        f"{plan.mask.area_mm2:.4g} mm²" if plan.mask is not None else grid.origin,
        str(len(grid)),
    )


def _row(cells: Sequence[str]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


# --- a run --------------------------------------------------------------------------------------------


def requests(args: argparse.Namespace) -> list[EncoderRequest]:
    """The encoders asked for; a checkpoint or an adapter is one encoder's."""
    from seal_extract.encoders.bundled import DEFAULT
    from seal_extract.encoders.request import EncoderRequest

    if args.encoder is None:
        args.encoder = DEFAULT
        echo(f"seal-extract: {WHAT_DEFAULT_IS}", error=True)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are told in our one line
    asked: list[str] = [args.encoder] if Path(args.encoder).exists() else args.encoder.split(",")
    if len(asked) > 1 and (args.checkpoint or args.adapter or args.revision):
        raise UsageError("--checkpoint, --adapter and --revision are of one encoder; give one --encoder")
    return [
        EncoderRequest(
            name.strip(),
            checkpoint=args.checkpoint,
            adapter=args.adapter,
            revision=args.revision,
            device=args.device,
            precision=args.precision,
            offline=args.offline,
        )
        for name in asked
    ]


def embed(
    slides: SlideList,
    requests: list[EncoderRequest],
    options: ExtractOptions,
    args: argparse.Namespace,
) -> int:
    """Embed slides, one line for each; a table for all, and a page where there are several."""
    from seal_extract.cli.slide_level import SlideLevels
    from seal_extract.run.cohort import extract_cohort

    levels = SlideLevels(args.slide_level, requests, args.out, options)

    with Events(args.log_json) as events, _Bars(args.quiet, len(slides)) as bars:
        events.tell("start", slides=len(slides), encoders=[r.spec.name for r in requests], out=str(args.out))

        def tell(result: SlideResult) -> None:
            bars.next_slide()
            events.tell_result(result)
            for line in _lines(result):
                echo(line)
            if result.error is not None:
                _tell_failure(result.error, args.debug)
            for said in levels.lines(result):
                events.tell_slide_level(result, said)
                if isinstance(said, SealExtractError):
                    fail(f"FAILED {said}", 1)
                else:
                    echo(said)

        try:
            report = extract_cohort(
                slides,
                requests,
                args.out,
                options=options,
                engine=_engine(args),
                retry_failed=args.retry_failed,
                status_name=_status_name(args.shard),
                on_result=tell,
                progress=bars.show,
            )
        except KeyboardInterrupt:
            events.tell("interrupted")
            raise
        events.tell("end", done=len(report.done), failed=len(report.failed), seconds=round(report.seconds, 1))
    return max(_close(report, args, _title(requests, options)), levels.status())


def _engine(args: argparse.Namespace) -> Engine | None:
    if args.engine != "ray":
        if args.ray_address or args.ray_workers or args.ray_cores:
            raise UsageError("--ray-address, --ray-workers and --ray-cores are of Ray; type --engine ray")
        return None
    from seal_extract.run.ray_engine import RayEngine

    return RayEngine(args.ray_address, args.ray_workers, args.ray_cores)


def _status_name(shard: tuple[int, int] | None) -> str:
    return "status.csv" if shard is None else f"status_{shard[0]}_of_{shard[1]}.csv"


def _title(encoders: Sequence[EncoderRequest], options: ExtractOptions) -> str:
    """What the cohort's page is about."""
    names = ", ".join(encoder.spec.name for encoder in encoders)
    if options.coords is not None:
        return f"Cohort report: {names}"
    return f"Cohort report: {names}, patches of {options.patch_px} px at {options.mpp:g} µm/px"


def _close(report: CohortReport, args: argparse.Namespace, title: str) -> int:
    slides = len(report.done) + len(report.failed)
    if slides > 1:
        from seal_extract.view.cohort_report import write_report

        page = report.status.with_suffix(".html").with_name(
            report.status.stem.replace("status", "report") + ".html"
        )
        write_report(report.rows, args.out, page, title=title, seconds=report.seconds)
        echo(f"{len(report.done)} of {slides} slides done, {report.seconds:.0f} s: {report.status}, {page}")
    return _status(len(report.failed), slides)


def _status(failed: int, slides: int) -> int:
    if failed and slides > 1:
        fail(f"{failed} of {slides} slides failed", 1)
    return 1 if failed else 0


class _Bars:
    """Slides, and patches of the one that is being written; nothing where there is no terminal."""

    def __init__(self, quiet: bool, slides: int) -> None:
        from tqdm import tqdm

        off = True if quiet else None  # None: no terminal
        self._slides = tqdm(
            total=slides, unit="slide", disable=True if slides == 1 else off, leave=False, position=0
        )
        self._patches = tqdm(unit="patch", disable=off, leave=False, position=0 if slides == 1 else 1)
        self._slide: Path | None = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()
        self._slides.close()

    def show(self, slide: Path, done: int, total: int) -> None:
        """Patches of a slide, told by another thread."""
        if slide != self._slide:
            self._slide = slide
            self._patches.reset(total)
            self._patches.set_description(shown(slide.name), refresh=False)
        self._patches.update(done - self._patches.n)

    def next_slide(self) -> None:
        """A slide has ended: make room for its line."""
        self._patches.clear()
        self._slides.clear()
        self._slides.update()


def _lines(result: SlideResult) -> list[str]:
    """What is said of a slide that went well, for each encoder."""
    name = result.path.name
    if result.finished_before:
        return [f"{name}: {len(f.grid)} patches, finished before -> {f.path}" for f in result.features]
    return [_closing_line(name, features, result.seconds) for features in result.features]


def _closing_line(name: str, result: SlideFeatures, seconds: float) -> str:
    slide, n = result.provenance["slide"], len(result.grid)
    if not n:
        tissue = result.provenance["tissue"]
        area = (
            f"{tissue['area_mm2']:.2g} mm² of tissue, too little for one"
            if tissue and tissue["area_mm2"]
            else ""
        )
        return f"{name}: 0 patches, {area or 'no tissue found'} -> {result.path}; look at its overlay"
    unread = result.provenance["read_errors"]
    errors = f", {unread} of them UNREADABLE and zero" if unread else ""
    uncovered = (result.provenance["tissue"] or {}).get("uncovered")
    left = f"; {uncovered:.1%} of the tissue under no patch" if uncovered is not None else ""
    padding = result.provenance["padding"]
    padded = f" ({padding:.1%} of their area beyond the slide)" if padding else ""
    return (
        f"{name}: {n} patches{padded}{errors} by {result.provenance['encoder']['name']}, "
        f"{slide['mpp']:.4g} µm/px by {slide['mpp_source']}, {slide['reader']} ({slide['decoder']}), "
        f"{seconds:.1f} s, {n / seconds:.3g} patches/s{left} -> {result.path}"
    )
