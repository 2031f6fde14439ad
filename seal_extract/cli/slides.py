"""``seal-extract SLIDES``: embed slides, with one line for each; a table and a page for several."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.options import requested_encoders
from seal_extract.cli.patch_images import embed_patch_images
from seal_extract.cli.progress import EventLog, ProgressBars, result_lines
from seal_extract.cli.terminal import echo, exit_status, fail
from seal_extract.errors import SealExtractError, UnexpectedError, UsageError

if TYPE_CHECKING:
    from seal_extract.encoders.request import EncoderRequest
    from seal_extract.patches.grid import PatchGrid
    from seal_extract.run.cohort import CohortReport, Engine
    from seal_extract.run.options import ExtractOptions
    from seal_extract.run.status_table import SlideResult
    from seal_extract.slides.listing import SlideList
    from seal_extract.slides.slide import Slide
    from seal_extract.tissue.mask import TissueMask


def run_slides(args: argparse.Namespace) -> int:
    """Embed slides or patches, or print what would be read of slides; returns the exit status."""
    if args.patches:
        return embed_patch_images(args)
    from seal_extract.run.options import ExtractOptions
    from seal_extract.slides.listing import list_slides

    given = {field.name: getattr(args, field.name) for field in fields(ExtractOptions)}
    options = ExtractOptions(**{name: value for name, value in given.items() if value is not None})
    slides = list_slides(args.slides, args.slide_folder)
    if args.shard is not None:
        slides = slides.shard(*args.shard)
    _print_ignored(slides, args.verbose)
    if args.dry_run:
        return _run_dry(slides, options, args.debug)
    return embed(slides, requested_encoders(args), options, args)


def _print_ignored(slides: SlideList, verbose: bool) -> None:
    if verbose:
        for path, reason in slides.ignored:
            echo(f"{path}: ignored, {reason}")
    elif slides.ignored:
        reasons = Counter(reason for _, reason in slides.ignored).most_common(3)
        named = ", ".join(f"{count} x {reason}" for reason, count in reasons)
        echo(f"{len(slides.ignored)} files ignored ({named}); --verbose lists them")


# --- a dry run ----------------------------------------------------------------------------------------

COLUMNS = {
    "slide": 28,
    "px": 15,
    "µm/px": 7,
    "source": 24,
    "read": 18,
    "patch": 18,
    "level-0": 8,
    "tissue": 10,
    "patches": 8,
}


def _run_dry(slides: SlideList, options: ExtractOptions, debug: bool) -> int:
    from seal_extract.run.job import SlideJob
    from seal_extract.run.slide_process import open_with_grid
    from seal_extract.run.staging import with_copy

    _print_row(list(COLUMNS))
    failed = 0
    for entry in slides.entries:
        try:
            with with_copy(SlideJob.of(entry, Path(), options)) as job:
                slide, mask, grid = open_with_grid(job)
                with slide:
                    _print_row(_dry_cells(slide, mask, grid))
        except Exception as exc:
            failed += 1
            _print_failure(entry.blame(exc), debug)
    return _close_run(failed, len(slides))


def _dry_cells(slide: Slide, mask: TissueMask | None, grid: PatchGrid) -> list[str]:
    return [
        slide.path.name,
        f"{slide.size_l0[0]} x {slide.size_l0[1]}",
        f"{slide.mpp:.4g}",
        slide.mpp_source,
        f"level {grid.level}, {grid.read_px} px",
        f"{grid.patch_px} px at {grid.mpp:.4g}",
        f"{grid.patch_size_l0} px",
        f"{mask.area_mm2:.4g} mm²" if mask is not None else grid.origin,
        str(len(grid)),
    ]


def _print_row(cells: Sequence[str]) -> None:
    padded = (cell.ljust(width) for cell, width in zip(cells, COLUMNS.values(), strict=True))
    echo("  ".join(padded).rstrip())


# --- a run --------------------------------------------------------------------------------------------


def embed(
    slides: SlideList,
    encoders: list[EncoderRequest],
    options: ExtractOptions,
    args: argparse.Namespace,
) -> int:
    """Embed slides; prints one line for each and writes a table, and for several slides a page."""
    from seal_extract.cli.slide_level import SlideLevels
    from seal_extract.run.cohort import extract_cohort

    levels = SlideLevels(args.slide_level, encoders, args.out, options)
    names = [encoder.spec.name for encoder in encoders]
    with EventLog(args.log_json) as log, ProgressBars(args.quiet, len(slides)) as bars:
        log.write("start", slides=len(slides), encoders=names, out=str(args.out))

        def on_result(result: SlideResult) -> None:
            bars.next_slide()
            log.write_result(result)
            echo(*result_lines(result))
            if result.error is not None:
                _print_failure(result.error, args.debug)
            for outcome in levels.pool(result):
                log.write_slide_level(result, outcome)
                if isinstance(outcome, SealExtractError):
                    fail(f"FAILED {outcome}", 1)
                else:
                    echo(outcome)

        try:
            report = extract_cohort(
                slides,
                encoders,
                args.out,
                options=options,
                engine=_engine(args),
                retry_failed=args.retry_failed,
                status_name=f"status{_shard_suffix(args.shard)}.csv",
                on_result=on_result,
                progress=bars.show,
            )
        except KeyboardInterrupt:
            log.write("interrupted")
            raise
        seconds = round(report.seconds, 1)
        log.write("end", done=len(report.done), failed=len(report.failed), seconds=seconds)
    processed = len(report.done) + len(report.failed)  # fewer than were listed, with --retry-failed
    if processed > 1:
        _write_page(report, args, names, options)
    return max(_close_run(len(report.failed), processed), levels.exit_status())


def _print_failure(error: SealExtractError, debug: bool) -> None:
    fail(f"FAILED {error}", 1)
    if debug and isinstance(error, UnexpectedError):
        echo(*error.details.splitlines(), error=True)


def _close_run(failed: int, slides: int) -> int:
    return exit_status(failed, slides, "slides") if slides > 1 else min(failed, 1)


def _engine(args: argparse.Namespace) -> Engine | None:
    if args.engine != "ray":
        if args.ray_address or args.ray_workers or args.ray_cores:
            raise UsageError("--ray-address, --ray-workers and --ray-cores need Ray; type --engine ray too")
        return None
    from seal_extract.run.ray_engine import RayEngine

    return RayEngine(args.ray_address, args.ray_workers, args.ray_cores)


def _shard_suffix(shard: tuple[int, int] | None) -> str:
    return "" if shard is None else f"_{shard[0]}_of_{shard[1]}"


def _write_page(
    report: CohortReport, args: argparse.Namespace, encoders: Sequence[str], options: ExtractOptions
) -> None:
    from seal_extract.view.cohort_report import write_report

    title = f"Cohort report: {', '.join(encoders)}"
    if options.coords is None:
        title += f", patches of {options.patch_px} px at {options.mpp:g} µm/px"
    page = report.status.with_name(f"report{_shard_suffix(args.shard)}.html")
    write_report(report.rows, args.out, page, title=title, seconds=report.seconds)
    slides = len(report.done) + len(report.failed)
    echo(f"{len(report.done)} of {slides} slides done, {report.seconds:.0f} s: {report.status}, {page}")
