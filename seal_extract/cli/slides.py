"""``seal-extract SLIDE``: the options filled in, one slide after the other, one line for each."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.fail import fail
from seal_extract.errors import CheckpointError, HubError, SealExtractError, UsageError

if TYPE_CHECKING:
    from seal_extract.encoders.request import EncoderRequest
    from seal_extract.plan import ExtractOptions, SlidePlan
    from seal_extract.store import SlideFeatures

SLIDE_SUFFIXES = {
    *(".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide"),
    *(".dcm", ".png", ".jpg", ".jpeg"),
}
SAME_FOR_EVERY_SLIDE = (UsageError, CheckpointError, HubError)


def run(args: argparse.Namespace) -> int:
    """Embed slides, or only say what would be read of them."""
    options = _options(args)
    slides = find_slides(args.slides)
    if args.dry_run:
        return _run_dry(slides, options)
    return _embed(slides, args, options)


def _options(args: argparse.Namespace) -> ExtractOptions:
    from dataclasses import fields

    from seal_extract.plan import ExtractOptions

    return ExtractOptions(**{f.name: getattr(args, f.name) for f in fields(ExtractOptions)})


def find_slides(paths: Sequence[Path]) -> list[Path]:
    """Slide files as given, and those that lie in given folders, by name.

    Raises:
        UsageError: a folder without slides, or two slides of one name, whose results would collide.
    """
    slides: list[Path] = []
    for path in paths:
        inside = (
            sorted(p for p in path.iterdir() if p.suffix.lower() in SLIDE_SUFFIXES)
            if path.is_dir()
            else [path]
        )
        if not inside:
            raise UsageError(f"{path} holds no slide; allowed: {' '.join(sorted(SLIDE_SUFFIXES))}")
        slides += inside
    by_name: dict[str, Path] = {}
    for slide in slides:
        other = by_name.setdefault(slide.stem, slide)
        if other is not slide:
            raise UsageError(
                f"{other} and {slide} would both be written as {slide.stem}.h5; "
                f"give them in two runs with two -o"
            )
    return slides


def _run_dry(slides: list[Path], options: ExtractOptions) -> int:
    from seal_extract.plan import plan_slide
    from seal_extract.slide import open_slide

    def line(path: Path) -> str:
        with open_slide(path, mpp=options.slide_mpp) as slide:
            return _row(_dry_cells(plan_slide(slide, options)))

    print(_row(DRY_HEAD))
    return _each(slides, line)


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


def _each(slides: list[Path], work: Callable[[Path], str]) -> int:
    """Do one slide after the other; a slide that fails is told and counted, the others go on."""
    failed = 0
    for path in slides:
        try:
            print(work(path), flush=True)
        except SAME_FOR_EVERY_SLIDE:
            raise
        except SealExtractError as exc:
            failed += 1
            fail(f"FAILED {exc}", 1)
    return _status(failed, len(slides))


def _status(failed: int, slides: int) -> int:
    if failed and slides > 1:
        fail(f"{failed} of {slides} slides failed", 1)
    return 1 if failed else 0


def _embed(slides: list[Path], args: argparse.Namespace, options: ExtractOptions) -> int:
    from seal_extract.encoders.request import EncoderRequest

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are told in our one line
    request = EncoderRequest(
        _encoder_name(args.encoder),
        checkpoint=args.checkpoint,
        adapter=args.adapter,
        revision=args.revision,
        device=args.device,
        precision=args.precision,
        offline=args.offline,
    )
    return embed(slides, request, args.out, options, args.quiet)


def embed(
    slides: list[Path], request: EncoderRequest, out: Path, options: ExtractOptions, quiet: bool
) -> int:
    """Embed slides, one line for each; those that are finished need no encoder."""
    waiting, failed = _unfinished(slides, request, out, options)
    if waiting:
        from seal_extract.extract import extract_many

        bar = _Bar(quiet)
        for result in extract_many(waiting, request.load(), out, options=options, progress=bar.show):
            bar.clear()
            if result.error is not None:
                failed += 1
                fail(f"FAILED {result.error}", 1)
            for features in result.features:
                print(_closing_line(result.path, features, result.seconds), flush=True)
        bar.close()
    return _status(failed, len(slides))


def _unfinished(
    slides: list[Path], request: EncoderRequest, out: Path, options: ExtractOptions
) -> tuple[list[Path], int]:
    """The slides that have to be embedded, and how many cannot; a line for all others."""
    from seal_extract.finished import resume

    waiting: list[Path] = []
    failed = 0
    for path in slides:
        try:
            finished = resume(path, request, out, options)
        except SAME_FOR_EVERY_SLIDE:
            raise
        except SealExtractError as exc:
            failed += 1
            fail(f"FAILED {exc}", 1)
            continue
        if finished is None:
            waiting.append(path)
        else:
            print(f"{path.name}: {len(finished.grid)} patches, finished before -> {finished.path}")
    return waiting, failed


class _Bar:
    """Patches of the slide that is being written; nothing where there is no terminal."""

    def __init__(self, quiet: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(unit="patch", disable=True if quiet else None, leave=False)  # None: no terminal
        self._slide: Path | None = None

    def show(self, slide: Path, done: int, total: int) -> None:
        if slide != self._slide:
            self._slide = slide
            self._bar.reset(total)
            self._bar.set_description(slide.name, refresh=False)
        self._bar.update(done - self._bar.n)

    def clear(self) -> None:
        self._bar.clear()

    def close(self) -> None:
        self._bar.close()


def _closing_line(path: Path, result: SlideFeatures, seconds: float) -> str:
    slide, n = result.provenance["slide"], len(result.grid)
    if not n:
        return f"{path.name}: 0 patches, no tissue found -> {result.path}; look at its overlay"
    unread = result.provenance["read_errors"]
    errors = f", {unread} of them UNREADABLE and zero" if unread else ""
    return (
        f"{path.name}: {n} patches{errors} by {result.provenance['encoder']['name']}, "
        f"{slide['mpp']:.4g} µm/px by {slide['mpp_source']}, {slide['reader']} ({slide['decoder']}), "
        f"{seconds:.1f} s, {n / seconds:.3g} patches/s -> {result.path}"
    )


def _encoder_name(name: str | None) -> str:
    from seal_extract.encoders import list_encoders

    if name is None:
        names = ", ".join(spec.name for spec in list_encoders())
        raise UsageError(
            f"--encoder is missing; type --encoder NAME with one of {names}, or a folder of yours"
        )
    return name
