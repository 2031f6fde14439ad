"""``seal-extract SLIDES``: embed slides, with one line for each; a table and a page for several.

``--slide-level`` also pools the patches of each slide, and ``--patches`` embeds patches that are cut already.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.options import add_slide_options, comma_separated, parser_of, requested_encoders
from seal_extract.cli.slide_levels import SlideLevels
from seal_extract.cli.terminal import (
    EventLog,
    ProgressBars,
    echo,
    exit_status,
    fail,
    print_each,
    result_lines,
)
from seal_extract.errors import SealExtractError, UnexpectedError, UsageError

if TYPE_CHECKING:
    from seal_extract.encoders import Encoder
    from seal_extract.encoders.request import EncoderRequest
    from seal_extract.patches.grid import PatchGrid
    from seal_extract.run.cohort import CohortReport
    from seal_extract.run.options import ExtractOptions
    from seal_extract.run.status_table import SlideResult
    from seal_extract.run.workers import Engine
    from seal_extract.slides.listing import SlideList
    from seal_extract.slides.slide import Slide
    from seal_extract.tissue.mask import TissueMask


def slides_parser() -> argparse.ArgumentParser:
    """The parser of ``seal-extract SLIDES``."""
    parser = parser_of("", add_slide_options)
    parser.set_defaults(handler=run_slides)
    return parser


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
        return _run_dry(slides, options, requested_encoders(args) if options.tokens else [], args.debug)
    engine = _engine(args)
    return embed(slides, requested_encoders(args), options, args, engine)


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
    "tokens": 8,  # with --tokens
}


def _run_dry(
    slides: SlideList, options: ExtractOptions, with_tokens: list[EncoderRequest], debug: bool
) -> int:
    from seal_extract.run.job import SlideJob
    from seal_extract.run.slide_process import open_with_grid
    from seal_extract.run.staging import with_copy

    size_of = _token_bytes(with_tokens)
    _print_row(list(COLUMNS)[: None if with_tokens else -1])
    failed = 0
    for entry in slides.entries:
        try:
            with with_copy(SlideJob.of(entry, Path(), options)) as job:
                slide, mask, grid, _ = open_with_grid(job)
                with slide:
                    tokens = [f"{size_of(grid) / 1e9:.3g} GB"] if with_tokens else []
                    _print_row([*_dry_cells(slide, mask, grid), *tokens])
        except Exception as exc:
            failed += 1
            _print_failure(entry.blame(exc), debug)
    return _close_run(failed, len(slides))


def _token_bytes(encoders: list[EncoderRequest]) -> Callable[[PatchGrid], int]:
    """The bytes of the tokens of a slide by all encoders, whose weights are not needed.

    Raises:
        UsageError: an encoder has no grid of tokens.
    """
    if not encoders:
        return lambda grid: 0
    from seal_extract.encoders.dense import token_grid
    from seal_extract.encoders.tower import empty_tower

    towers = [(empty_tower(encoder.spec), encoder.spec) for encoder in encoders]

    def of_patch(px: int) -> int:
        sides = [spec.input.side_px or px for _, spec in towers]
        return sum(2 * math.prod(token_grid(*one, px, px)) for one, px in zip(towers, sides, strict=True))

    of_patch(towers[0][1].patch_px)  # an encoder without tokens is refused before any slide
    return lambda grid: len(grid) * of_patch(grid.patch_px)


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
    padded = (cell.ljust(width) for cell, width in zip(cells, COLUMNS.values(), strict=False))
    echo("  ".join(padded).rstrip())


# --- a run --------------------------------------------------------------------------------------------


def embed(
    slides: SlideList,
    encoders: list[EncoderRequest],
    options: ExtractOptions,
    args: argparse.Namespace,
    engine: Engine | None,
) -> int:
    """Embed slides; prints one line for each and writes a table, and for several slides a page."""
    from seal_extract.run.cohort import extract_cohort

    levels = SlideLevels(args, encoders, options, slides)
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
                log.write_outcome("slide level", outcome, slide=result.entry.source, name=result.name)

        try:
            report = extract_cohort(
                slides,
                encoders,
                args.out,
                options=options,
                engine=engine,
                retry_failed=args.retry_failed,
                status_name=f"status{_shard_suffix(args.shard)}.csv",
                on_result=on_result,
                progress=bars.show,
            )
        except KeyboardInterrupt:
            log.write("interrupted")
            raise
        for patient, outcome in levels.pool_patients():
            log.write_outcome("patient level", outcome, patient=patient)
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
    """Where the work is done; of several devices the first stays in ``args``, for the encoders."""
    several = args.device is not None and (args.device == "all" or "," in args.device)
    if args.engine == "ray":
        if several:
            raise UsageError(f"--device {args.device} and --engine ray both say which GPUs work; give one")
        from seal_extract.run.ray_engine import RayEngine

        return RayEngine(args.ray_address, args.ray_workers, args.ray_cores)
    if args.ray_address or args.ray_workers or args.ray_cores:
        raise UsageError("--ray-address, --ray-workers and --ray-cores need Ray; type --engine ray too")
    if not several:
        return None
    from seal_extract.run.devices import DeviceEngine

    engine = DeviceEngine.all() if args.device == "all" else DeviceEngine(tuple(comma_separated(args.device)))
    args.device = engine.devices[0]
    return engine


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


# --- patches that are cut already ---------------------------------------------------------------------

# the options that apply to patches that are cut already
ALLOWED = {
    *("slides", "out", "encoder", "checkpoint", "adapter", "revision", "precision", "device", "offline"),
    *("patches", "mpp", "slide_mpp", "layout", "batch_size", "workers", "overwrite"),
    *("quiet", "debug", "handler", "typed", "verbose"),
}


def embed_patch_images(args: argparse.Namespace) -> int:
    """Embed each file or folder; the exit status is 1 if one fails, which does not stop the others."""
    parser = slides_parser()
    for name, value in vars(args).items():  # options that would cut other patches are not ignored
        if name not in ALLOWED and value != parser.get_default(name):
            raise UsageError(
                f"--{name.replace('_', '-')} does not apply to patches that are cut already; "
                "leave out --patches or this option"
            )
    paths = _patch_files(args.slides)
    encoders = [request.load() for request in requested_encoders(args)]
    pairs = product(paths, encoders)
    return print_each(pairs, lambda pair: _embed_patch_file(*pair, args), alone=len(paths) == 1)


def _embed_patch_file(path: Path, encoder: Encoder, args: argparse.Namespace) -> str:
    """Embed the patches of a file or folder; returns the line to print."""
    from tqdm import tqdm

    from seal_extract.run.patch_images import extract_patches

    given = ("mpp", "slide_mpp", "layout", "batch_size", "workers", "overwrite")
    options = {name: getattr(args, name) for name in given}
    with tqdm(unit="patch", disable=True if args.quiet else None, leave=False) as bar:
        finished_before = True

        def show(done: int, total: int) -> None:
            nonlocal finished_before
            finished_before, bar.total = False, total
            bar.update(done - bar.n)

        made = extract_patches(path, encoder, args.out, **options, progress=show)
    slide, grid = made.provenance["slide"], made.grid
    before = ", finished before" if finished_before else ""
    return (
        f"{path.name}: {len(grid)} ready-cut patches by {encoder.spec.name}, {grid.patch_px} px at "
        f"{grid.mpp:.4g} µm/px by {slide['mpp_source']}{before} -> {made.path}"
    )


def _patch_files(given: list[str]) -> list[Path]:
    """Files and folders; a folder of HDF5 or NPZ files stands for all of them."""
    from seal_extract.slides.patch_files import TABLES

    paths: list[Path] = []
    for path in map(Path, given):
        tables = sorted(p for p in path.iterdir() if p.suffix.lower() in TABLES) if path.is_dir() else []
        paths += tables or [path]
    names = Counter(path.resolve().name if path.is_dir() else path.stem for path in paths)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise UsageError(
            f"{twice[0]} is the name of {names[twice[0]]} inputs, whose results would have one name; "
            "give each a run with an -o of its own"
        )
    return paths
