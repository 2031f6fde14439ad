"""What a former run finished: recognised by slide, options and weights, without tissue, patches or torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seal_extract.errors import OutputError
from seal_extract.grid import read_grid
from seal_extract.plan import ExtractOptions, coords_file
from seal_extract.provenance import describe_request, first_difference
from seal_extract.slide import Slide, open_slide
from seal_extract.store import SlideFeatures, TridentLayout, read_features, read_provenance

if TYPE_CHECKING:
    from seal_extract.encoders.request import EncoderRequest


def find_finished(
    slide: Slide, encoder: dict[str, Any], out: str | os.PathLike[str], options: ExtractOptions
) -> SlideFeatures | None:
    """The features that the same request wrote before, if they are there.

    Args:
        slide: the open slide.
        encoder: `Encoder.identity`.
        out: folder of the results.
        options: all choices.

    Raises:
        OutputError: a file of that name is there, made by something else, and ``overwrite`` is not set.
    """
    path = layout_for(slide, Path(out), options).features(slide.path.stem, encoder["name"])
    if options.overwrite or not path.exists():
        return None
    provenance = read_provenance(path)
    if provenance is None:
        raise OutputError(f"{path} exists and is not ours; type --overwrite to replace it, or another -o")
    difference = first_difference(provenance["request"], describe_request(slide, encoder, options))
    if difference is not None:
        raise OutputError(
            f"{path} exists, made with another request ({difference}); "
            f"type --overwrite to replace it, or another -o"
        )
    if provenance["read_errors"] > options.max_read_errors:
        return None
    return read_features(path)


def resume(
    slide: str | os.PathLike[str],
    encoder: EncoderRequest,
    out: str | os.PathLike[str],
    options: ExtractOptions,
) -> SlideFeatures | None:
    """`find_finished` for an encoder that is not loaded: its weights are read only if they may have changed.

    Raises:
        OutputError: a file of that name is there, made by something else, and ``overwrite`` is not set.
    """
    with open_slide(slide, mpp=options.slide_mpp) as opened:
        path = layout_for(opened, Path(out), options).features(opened.path.stem, encoder.spec.name)
        if options.overwrite or not path.exists():
            return None
        provenance = read_provenance(path)
        recorded = provenance["encoder"]["weights"] if provenance is not None else []
        identity = encoder.identity_if_unchanged(recorded) or encoder.load().identity
        return find_finished(opened, identity, out, options)


def layout_for(slide: Slide, out: Path, options: ExtractOptions) -> TridentLayout:
    """Where the results of a slide go: patch size and magnification are the grid's own if a file gave it."""
    if options.coords is None:
        return TridentLayout(out, options.patch_px, options.mpp, options.overlap_px)
    grid = read_grid(coords_file(slide, options.coords), slide)
    return TridentLayout(out, grid.patch_px, grid.mpp, grid.overlap_px)
