"""A slide made ready for its encoders: opened, its tissue found, its patches laid, its side files written."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seal_extract.decode import Decoder, open_decoder
from seal_extract.encoders import Encoder
from seal_extract.errors import ResolutionError
from seal_extract.finished import find_finished, layout_for
from seal_extract.plan import ExtractOptions, SlidePlan, plan_slide
from seal_extract.provenance import describe, describe_request
from seal_extract.slide import Slide, open_slide
from seal_extract.slide_list import SlideEntry
from seal_extract.store import SlideFeatures, write_coords
from seal_extract.view.overlay import draw_overlay


@dataclass(frozen=True)
class Output:
    """What one encoder will write of a slide.

    Attributes:
        encoder: its position among the encoders of the run.
        path: of the features.
        provenance: of the features; read errors are added as they come.
    """

    encoder: int
    path: Path
    provenance: dict[str, Any]


@dataclass(frozen=True)
class PlannedSlide:
    """A slide that is ready to be read.

    Attributes:
        entry: what was asked for.
        plan: slide, tissue and patches.
        decoder: reads the patches.
        outputs: one per encoder that has still to see it.
        finished: what other encoders wrote in a former run.
        stamp: the slide file's state when it was opened.
    """

    entry: SlideEntry
    plan: SlidePlan
    decoder: Decoder
    outputs: tuple[Output, ...]
    finished: tuple[SlideFeatures, ...]
    stamp: tuple[int, int, int]


def prepare(
    entry: SlideEntry, encoders: list[Encoder], out: Path, options: ExtractOptions
) -> PlannedSlide | tuple[SlideFeatures, ...]:
    """Open a slide, settle what will be read of it, and write all that belongs to it but its features.

    Returns:
        The slide, whose file the caller closes; or its features, if all encoders finished it before.

    Raises:
        SealExtractError: the slide cannot be used, or a file of other options is in the way.
    """
    options = for_entry(entry, options)
    stamp = file_stamp(entry.path)
    slide = open_entry(entry, options)
    with ExitStack() as closing:
        closing.callback(slide.close)
        found = [find_finished(slide, encoder.identity, out, options) for encoder in encoders]
        finished = tuple(features for features in found if features is not None)
        if len(finished) == len(encoders):
            return finished
        plan = plan_slide(slide, options)
        resample, fast = options.resample, options.fast_decode
        decoder = open_decoder(slide, plan.grid, encoders[0].device, filter=resample, fast=fast)
        outputs = tuple(
            _output(i, encoder, plan, decoder, out, options)
            for i, (encoder, done) in enumerate(zip(encoders, found, strict=True))
            if done is None
        )
        _write_beside(plan, outputs[0], out, options)
        closing.pop_all()
    return PlannedSlide(entry, plan, decoder, outputs, finished, stamp)


def for_entry(entry: SlideEntry, options: ExtractOptions) -> ExtractOptions:
    """The options of one slide: a table may give its tissue."""
    return options if entry.roi is None else replace(options, roi=entry.roi)


def open_entry(entry: SlideEntry, options: ExtractOptions) -> Slide:
    """Open the slide of an entry, whose µm/px must not contradict the file's.

    Raises:
        SlideError: see `open_slide`.
    """
    if entry.mpp is None or options.slide_mpp is not None:
        return open_slide(entry.path, mpp=options.slide_mpp)
    try:
        slide = open_slide(entry.path)
    except ResolutionError:  # the file does not know it
        return open_slide(entry.path, mpp=entry.mpp)
    if abs(slide.mpp / entry.mpp - 1) > options.mpp_tolerance:
        slide.close()
        raise ResolutionError(
            f"{entry.path}: the table gives {entry.mpp:.4g} µm/px, the file {slide.mpp:.4g} "
            f"({slide.mpp_source}); correct the table, or type --slide-mpp VALUE to overrule the file"
        )
    return slide


def file_stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced or written to; zeros where there is no file."""
    try:
        stat = path.stat()
    except OSError:
        return (0, 0, 0)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _output(
    index: int, encoder: Encoder, plan: SlidePlan, decoder: Decoder, out: Path, options: ExtractOptions
) -> Output:
    layout = layout_for(plan.slide, out, options)
    request = describe_request(plan.slide, encoder.identity, options)
    mismatch = encoder.spec.mismatch(plan.grid.patch_px, plan.grid.mpp)
    provenance = describe(plan, request, encoder.description | {"mismatch": mismatch}, decoder.name)
    return Output(index, layout.features(plan.slide.path.stem, encoder.spec.name), provenance)


def _write_beside(plan: SlidePlan, output: Output, out: Path, options: ExtractOptions) -> None:
    layout, name = layout_for(plan.slide, out, options), plan.slide.path.stem
    if plan.mask is not None:
        plan.mask.to_geojson(layout.tissue(name))
    draw_overlay(plan.slide, plan.mask, plan.grid, layout.overlay(name))
    write_coords(layout.coords(name), plan.slide, plan.grid, output.provenance)
