"""A slide made ready for its encoders: opened, its tissue found, its patches laid."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seal_extract.encoders import Encoder
from seal_extract.features.feature_file import SlideLabel
from seal_extract.features.layout import Layout
from seal_extract.features.store import SlideFeatures
from seal_extract.patches.regions import PatchReader
from seal_extract.patches.tiles import open_patch_reader
from seal_extract.run.options import ExtractOptions, SlidePlan
from seal_extract.run.overlay import Style, draw_overlay
from seal_extract.run.provenance import describe, describe_request
from seal_extract.run.resume import find_finished, layout_for
from seal_extract.run.slide_process import open_within, plan_within
from seal_extract.slides.entry import SlideEntry
from seal_extract.slides.identity import FileStamp, file_stamp


@dataclass(frozen=True)
class Output:
    """What one encoder will write of a slide.

    Attributes:
        encoder: its position among the encoders of the run.
        provenance: of the features; read errors are added as they come.
        overwrite: replace the features that are there.
    """

    encoder: int
    provenance: dict[str, Any]
    overwrite: bool


@dataclass(frozen=True)
class PlannedSlide:
    """A slide that is ready to be read.

    Attributes:
        entry: what was asked for.
        plan: slide, tissue and patches.
        decoder: reads the patches.
        layout: where its files go.
        outputs: one per encoder that has still to see it.
        finished: what other encoders wrote in a former run.
        stamp: the state of the slide's files when it was opened.
        options: all choices.
    """

    entry: SlideEntry
    plan: SlidePlan
    decoder: PatchReader
    layout: Layout
    outputs: tuple[Output, ...]
    finished: tuple[SlideFeatures, ...]
    stamp: FileStamp
    options: ExtractOptions

    @property
    def label(self) -> SlideLabel:
        """What files say of the slide."""
        return SlideLabel(self.entry.name, self.plan.slide.size_l0, self.plan.slide.mpp)


def prepare(
    entry: SlideEntry, encoders: list[Encoder], out: Path, options: ExtractOptions
) -> PlannedSlide | tuple[SlideFeatures, ...]:
    """Open a slide, settle what will be read of it, and write its coordinates.

    Returns:
        The slide, whose file the caller closes; or its features, if all encoders finished it before.

    Raises:
        SealExtractError: the slide cannot be used, or a file of other options is in the way.
    """
    options = options.for_entry(entry)
    stamp = file_stamp(entry.file)
    slide = open_within(entry, options)
    with ExitStack() as closing:
        closing.callback(slide.close)
        found = [find_finished(slide, e.identity, out, options, entry.name, entry) for e in encoders]
        finished = tuple(features for features in found if features is not None)
        if len(finished) == len(encoders):
            return finished
        plan = plan_within(slide, entry, options)
        resample, fast = options.resample, options.fast_decode
        decoder = open_patch_reader(slide, plan.grid, encoders[0].device, filter=resample, fast=fast)
        closing.callback(decoder.close)
        layout = layout_for(slide, out, options, entry.name)
        outputs = tuple(
            _output(i, encoder, plan, decoder, options, entry, layout)
            for i, (encoder, done) in enumerate(zip(encoders, found, strict=True))
            if done is None
        )
        planned = PlannedSlide(entry, plan, decoder, layout, outputs, finished, stamp, options)
        layout.write_coords(planned.label, plan.grid, outputs[0].provenance, overwrite=options.overwrite)
        closing.pop_all()
    return planned


def _output(
    index: int,
    encoder: Encoder,
    plan: SlidePlan,
    decoder: PatchReader,
    options: ExtractOptions,
    entry: SlideEntry,
    layout: Layout,
) -> Output:
    request = describe_request(plan.slide, encoder.identity, options, entry.name)
    mismatch = encoder.spec.mismatch(plan.grid.patch_px, plan.grid.mpp)
    provenance = describe(plan, request, encoder.description | {"mismatch": mismatch}, decoder.name)
    if entry.url is not None:
        state = {"mtime_ns": None, "stamp": None, "version": entry.version}
        provenance["slide"] |= {"path": entry.source, **state}
    else:
        provenance["slide"]["path"] = str(entry.path.resolve())  # not that of its copy
    # features that are there and not finished hold more unreadable patches than are allowed now
    there = layout.find(entry.name, encoder.spec.name) is not None
    return Output(index, provenance, overwrite=options.overwrite or there)


def draw(planned: PlannedSlide) -> None:
    """Write the tissue and the picture of a slide that is open.

    Raises:
        SealExtractError: it cannot be read or they cannot be written.
    """
    plan, layout, name = planned.plan, planned.layout, planned.entry.name
    also: dict[Path, Style] = {}
    if plan.mask is not None:
        own = layout.tissue(name, plan.grid.name)
        shared = layout.shared_tissue(name, plan.grid.name, overwrite=planned.options.overwrite)
        for path in filter(None, (own, shared)):
            plan.mask.to_geojson(path)
        if shared is not None and (picture := layout.contours(name)):
            also[picture] = "outline"
    overlay = layout.overlay(name, plan.grid.name)
    draw_overlay(plan.slide, plan.mask, plan.grid, overlay, style=planned.options.overlay, also=also)
