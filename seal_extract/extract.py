"""The story, told once: slide -> tissue -> grid -> batches -> encoder -> store."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

from seal_extract.batches import stream_batches
from seal_extract.decode import open_decoder
from seal_extract.encoders import Encoder
from seal_extract.finished import find_finished, layout_for
from seal_extract.plan import ExtractOptions, SlidePlan, plan_slide
from seal_extract.provenance import describe, describe_request
from seal_extract.slide import open_slide
from seal_extract.store import SlideFeatures, write_coords, write_features
from seal_extract.view.overlay import draw_overlay

BATCH_SIZE = {"cuda": 64, "cpu": 16}


def extract(
    slide: str | os.PathLike[str],
    encoder: Encoder,
    out: str | os.PathLike[str],
    *,
    options: ExtractOptions = ExtractOptions(),
    progress: Callable[[int, int], None] | None = None,
) -> SlideFeatures:
    """Embed the tissue of one slide into ``out``, in TRIDENT's layout.

    Beside the features it writes the coordinates, the tissue as GeoJSON and a picture of both. A file that
    the same request finished before is returned as it is.

    Args:
        slide: the slide file.
        encoder: from `load_encoder`.
        out: folder for the results.
        options: all choices.
        progress: called with (patches done, patches in all) after each batch.

    Raises:
        SealExtractError: one of its children; nothing half-written is left.
    """
    with open_slide(slide, mpp=options.slide_mpp) as opened:
        finished = find_finished(opened, encoder.identity, out, options)
        if finished is not None:
            return finished
        plan = plan_slide(opened, options)
        return encode_slide(plan, encoder, Path(out), options, progress)


def encode_slide(
    plan: SlidePlan,
    encoder: Encoder,
    out: Path,
    options: ExtractOptions,
    progress: Callable[[int, int], None] | None = None,
) -> SlideFeatures:
    """Encode the patches of a plan and write all that belongs to the slide; see `extract`."""
    slide, grid, name = plan.slide, plan.grid, plan.slide.path.stem
    layout = layout_for(slide, out, options)
    decoder = open_decoder(slide, grid, encoder.device)
    request = describe_request(slide, encoder.identity, options)
    mismatch = encoder.spec.mismatch(grid.patch_px, grid.mpp)
    if mismatch is not None:
        warnings.warn(mismatch, stacklevel=3)
    provenance = describe(plan, request, encoder.description | {"mismatch": mismatch}, decoder.name)

    if plan.mask is not None:
        plan.mask.to_geojson(layout.tissue(name))
    draw_overlay(slide, plan.mask, grid, layout.overlay(name))
    write_coords(layout.coords(name), slide, grid, provenance)

    path = layout.features(name, encoder.spec.name)
    batch_size = options.batch_size or BATCH_SIZE.get(encoder.device.type, BATCH_SIZE["cpu"])
    with write_features(path, slide, grid, encoder.spec.name, encoder.spec.dim, provenance) as writer:
        for batch in stream_batches([decoder], batch_size, device=encoder.device, workers=options.workers):
            writer.append(encoder.encode(batch.patches).cpu().numpy())
            if progress is not None:
                progress(writer.rows, len(grid))
    return SlideFeatures(path, grid, provenance)
