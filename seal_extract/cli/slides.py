"""``seal-extract SLIDE``: the options filled in, one slide after the other, one line for each."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
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
        except (UsageError, CheckpointError, HubError):  # the same for every slide
            raise
        except SealExtractError as exc:
            failed += 1
            fail(f"FAILED {exc}", 1)
    if failed and len(slides) > 1:
        fail(f"{failed} of {len(slides)} slides failed", 1)
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
    return _each(slides, lambda path: embed_one(path, request, args.out, options, args.quiet))


def embed_one(path: Path, request: EncoderRequest, out: Path, options: ExtractOptions, quiet: bool) -> str:
    """Embed one slide unless it is finished; the closing line."""
    from tqdm import tqdm

    from seal_extract.finished import resume

    started = perf_counter()
    finished = resume(path, request, out, options)
    if finished is not None:
        return f"{path.name}: {len(finished.grid)} patches, finished before -> {finished.path}"

    from seal_extract.extract import extract

    encoder = request.load()
    with tqdm(
        unit="patch", desc=path.name, disable=True if quiet else None, leave=False
    ) as bar:  # None: no terminal

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = extract(path, encoder, out, options=options, progress=progress)
    return _closing_line(path, result, perf_counter() - started)


def _closing_line(path: Path, result: SlideFeatures, seconds: float) -> str:
    slide, n = result.provenance["slide"], len(result.grid)
    if not n:
        return f"{path.name}: 0 patches, no tissue found -> {result.path}; look at its overlay"
    return (
        f"{path.name}: {n} patches by {result.provenance['encoder']['name']}, {slide['mpp']:.4g} µm/px by "
        f"{slide['mpp_source']}, {slide['reader']} ({slide['decoder']}), {seconds:.1f} s, "
        f"{n / seconds:.3g} patches/s -> {result.path}"
    )


def _encoder_name(name: str | None) -> str:
    from seal_extract.encoders import list_encoders

    if name is None:
        names = ", ".join(spec.name for spec in list_encoders())
        raise UsageError(
            f"--encoder is missing; type --encoder NAME with one of {names}, or a folder of yours"
        )
    return name
