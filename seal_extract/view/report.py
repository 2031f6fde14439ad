"""One slide with all that was found on it as one HTML file, to mail to a colleague.

The file opens without a server and without a network. A slide of 50,000 patches with 50 genes takes about
12 MB: 9 MB for the genes, 1 to 3 MB for its picture.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from math import ceil, log2
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from seal_extract.errors import OutputError, UsageError
from seal_extract.features.layout import CONTOURS, of_grid
from seal_extract.features.store import SlideFeatures
from seal_extract.names import shown
from seal_extract.publish import publish
from seal_extract.slides.drawing import FOR_TRYING
from seal_extract.slides.overview import Overview, read_overview
from seal_extract.slides.slide import Slide
from seal_extract.view.gallery import tissue_rings
from seal_extract.view.layers import find_attention
from seal_extract.view.markup import Markup, fill_text
from seal_extract.view.report_layers import (
    LayerParts,
    Part,
    base64_of,
    choose_genes,
    most_numbers,
)
from seal_extract.view.report_page import page_html
from seal_extract.view.tiles import TILE_PX, jpeg

if TYPE_CHECKING:
    from seal_extract.genes.decoder import GeneDecoder
    from seal_extract.genes.signature import Signature

GENERATOR = '<meta name="generator" content="seal-extract report">'
HEAD_BYTES = 4096  # within which it stands
SIDE_PX = (256, 3000, 8000)  # longest side of the slide's picture: least, default, most
QUALITY = 80  # of its JPEG
COARSE_MPP = 1.0  # beyond which nuclei cannot be judged
Rings = list[list[list[int]]]  # of points (x, y), level-0 pixels


def report_path(features: SlideFeatures, out: Path | None = None) -> Path:
    """Where a slide's report lies: ``reports_ENCODER/SLIDE.html`` beside the folder of its features."""
    folder = out or features.path.parent.parent / f"reports_{features.provenance['encoder']['name']}"
    return folder / f"{features.path.stem}.html"


def write_slide_report(
    features: SlideFeatures,
    path: str | os.PathLike[str],
    *,
    slide: Slide,
    decoder: GeneDecoder | None,
    genes: Sequence[str] | None = None,
    signatures: Sequence[Signature] = (),
    max_px: int = SIDE_PX[1],
    overwrite: bool = False,
) -> Path:
    """Write one slide as one HTML file.

    Attention is taken from ``slide_features_*/SLIDE.h5`` and the tissue outline from ``contours_geojson`` of
    the run, where they are.

    Args:
        features: from `read_features`.
        path: the HTML file; its folder is made.
        slide: that the features were made of, as `open_origin` opens it.
        decoder: of the encoder that made the features; None leaves genes out, and the page says so.
        genes: by name; by default the 24 whose prediction varies most over the slide. An empty list has none.
        signatures: sets of genes, scored in standard deviations over this slide.
        max_px: longest side of the slide's picture.
        overwrite: replace a file that is no report of this package.

    Returns:
        ``path``.

    Raises:
        UsageError: an unknown gene, more genes than a page has room for, genes without a decoder or without
            names, another encoder's decoder, a size out of range, or Leaflet is not installed.
        OutputError: a file of something else is there, or it cannot be written.
        ReadError: much of the slide cannot be read.
    """
    path = Path(path)
    _check(features, slide, decoder, max_px)
    if path.exists() and not overwrite and not is_report(path):
        raise OutputError(
            f"{path} exists and is no report of seal-extract; type --overwrite to replace it, or another -o"
        )
    layers = _layers(features, decoder, genes, signatures)
    overview = read_overview(slide, slide.mpp * max(slide.size_l0) / max_px, holes=True)
    outline = _outline(features, overview.downsample / 2)
    if not outline:
        layers.notes.append("There is no tissue outline: none was found beside the features.")
    html = page_html(
        _data(features, slide, overview, layers, outline),
        generator=Markup(GENERATOR),
        name=features.path.stem,
        notes=_lines(layers.notes + _notes(features, overview)),
        footer=_footer(features),
    )
    with publish(path) as part:
        part.write_text(html, encoding="utf-8", newline="\n")
    return path


def is_report(path: Path) -> bool:
    """Whether `write_slide_report` wrote the file."""
    try:
        with path.open("rb") as file:
            return GENERATOR.encode() in file.read(HEAD_BYTES)
    except OSError:
        return False


def check_side(max_px: int) -> None:
    """Hold the longest side of the slide's picture to what a page can be.

    Raises:
        UsageError: it is out of range.
    """
    least, _, most = SIDE_PX
    if not least <= max_px <= most:
        raise UsageError(f"the picture's longest side is {max_px} px; allowed: --max-px {least} to {most}")


def _check(features: SlideFeatures, slide: Slide, decoder: GeneDecoder | None, max_px: int) -> None:
    check_side(max_px)
    made_of = tuple(features.provenance["slide"]["size_l0"])
    if slide.size_l0 != made_of:
        raise UsageError(
            f"the slide has {slide.size_l0[0]} x {slide.size_l0[1]} px and {features.path.name} was made of "
            f"{made_of[0]} x {made_of[1]}; give its own slide"
        )
    encoder = features.provenance["encoder"]
    if decoder is not None and decoder.weights.sha256 not in [w["sha256"] for w in encoder["weights"]]:
        raise UsageError(
            f"the decoder has weights {decoder.weights.sha256[:12]} and {features.path.name} was made "
            "by others; give the decoder of its own encoder, as decoder_of finds it"
        )


# --- layers -------------------------------------------------------------------------------------------


@dataclass
class _Layers:
    """What can be shown: its kinds in order, and what is to be said about them."""

    kinds: dict[str, list[Part]] = field(default_factory=dict)
    bounds_l0: tuple[float, float, float, float] | None = None
    no_genes: str = ""  # why
    genes_are: str = ""  # how they were chosen
    notes: list[str] = field(default_factory=list)


def _layers(
    features: SlideFeatures,
    decoder: GeneDecoder | None,
    genes: Sequence[str] | None,
    signatures: Sequence[Signature],
) -> _Layers:
    encoder, found = features.provenance["encoder"]["name"], _Layers()
    found.no_genes = _why_no_genes(encoder, decoder)
    if found.no_genes and (genes or signatures):
        raise UsageError(f"{found.no_genes[:-1]}; leave out --genes and --signature, or give its --panel")
    if not len(features.grid):
        found.notes.append("No patch was cut of this slide: there is nothing to show but its picture.")
        return found
    parts = LayerParts(features)
    found.bounds_l0 = parts.bounds_l0
    found.kinds = {"embedding": parts.embedding(), "clusters": parts.clusters()}
    attention = find_attention(tuple(_beside(features)))
    others, room = len(signatures) + len(attention), most_numbers(len(features.grid))
    if others > room:
        raise UsageError(
            f"{len(signatures)} signatures and {len(attention)} attentions of {len(features.grid):,} patches "
            f"would make a page too large to mail; allowed: {room} in all"
        )
    if decoder is not None and not found.no_genes:
        chosen = choose_genes(features, decoder, genes, others)
        found.kinds["genes"] = parts.genes(decoder, chosen.columns) if chosen.columns else []
        found.kinds["signatures"] = parts.signatures(decoder, signatures)
        count = f"{len(chosen.columns)} of {decoder.n_genes:,} genes"
        found.genes_are = (
            f"The {count} whose prediction varies most over this slide."
            if chosen.by_variance
            else f"{count}, chosen by whoever made this page."
        )
        found.notes.append(
            f"Genes and signatures are predicted from the stained picture by {encoder}. Nothing was measured."
        )
    found.kinds["attention"] = []
    for one in attention:
        try:
            found.kinds["attention"].append(parts.attention(one))
        except UsageError:  # its line names a path of this machine
            found.notes.append(f"The attention of {one.title} is left out: it is over other patches.")
    return found


def _why_no_genes(encoder: str, decoder: GeneDecoder | None) -> str:
    if decoder is None:
        return f"No genes: this page was made without an expression decoder of {encoder}."
    if decoder.genes is None:
        return f"No genes: the {decoder.n_genes:,} columns that {encoder} predicts have no names."
    return ""


def _beside(features: SlideFeatures) -> list[Path]:
    """Slide-level files of the same slide and grid."""
    return sorted(features.path.parent.parent.glob(f"slide_features_*/{features.path.name}"))


def outline_path(features: SlideFeatures) -> Path:
    """Where a slide's tissue outline lies, if anywhere."""
    name, grid = f"{features.path.stem}.geojson", features.grid.name
    places = (of_grid(folder / CONTOURS, grid, name) for folder in features.path.resolve().parents[:4])
    return next((place for place in places if place.exists()), Path(name))


def _outline(features: SlideFeatures, apart_l0: float) -> Rings:
    """The tissue's rings in level-0 pixels, no finer than the picture; none where they were never written."""
    rings = tissue_rings(outline_path(features))
    thinned = (cv2.approxPolyDP(np.asarray(ring, np.int32), apart_l0, True)[:, 0].tolist() for ring in rings)
    return [ring for ring in thinned if len(ring) > 2]


# --- the page -----------------------------------------------------------------------------------------


def _data(
    features: SlideFeatures, slide: Slide, overview: Overview, layers: _Layers, outline: Rings
) -> dict[str, Any]:
    """All that the page's script needs."""
    grid = features.grid
    return {
        "slide": {
            "name": shown(features.path.stem),
            "encoder": features.provenance["encoder"]["name"],
            "size_l0": list(slide.size_l0),
            "mpp": slide.mpp,
            "zooms": ceil(log2(max(1.0, max(slide.size_l0) / TILE_PX))) + 1,
            "most_zoom": max(0, 3 - ceil(log2(overview.downsample))),
            "patches": len(grid),
            "patch_size_l0": grid.patch_size_l0,
            "bounds_l0": layers.bounds_l0,
            "tissue": outline,
            "unread": [patch["row"] for patch in features.provenance["unreadable"]],
        },
        "facts": _facts(features, slide),
        "picture": base64_of(jpeg(overview.rgb, QUALITY)),
        "xy": base64_of(grid.xy_l0.astype("<i4").tobytes()),
        "kinds": {kind: parts for kind, parts in layers.kinds.items() if parts},
        "no_genes": layers.no_genes,
        "genes_are": layers.genes_are,
    }


def _facts(features: SlideFeatures, slide: Slide) -> list[tuple[str, str]]:
    (width, height), grid = slide.size_l0, features.grid
    tissue = features.provenance.get("tissue") or {}
    mm = slide.mpp / 1000
    facts = [
        ("Size", f"{width * mm:.1f} × {height * mm:.1f} mm"),
        ("Level 0", f"{width:,} × {height:,} px"),
        ("Resolution", f"{slide.mpp:.3g} µm/px"),
        ("Patches", f"{len(grid):,} of {grid.patch_px} px at {grid.mpp:.3g} µm/px"),
    ]
    if tissue.get("area_mm2") is not None:
        facts.insert(1, ("Tissue", f"{tissue['area_mm2']:.1f} mm²"))
    return facts


def _notes(features: SlideFeatures, overview: Overview) -> list[str]:
    encoder, height, width = features.provenance["encoder"], *overview.scanned.shape
    unread = len(features.provenance["unreadable"])
    notes = [FOR_TRYING[encoder["name"]]] if encoder["name"] in FOR_TRYING else []
    if encoder.get("mismatch"):
        notes.append(f"{encoder['mismatch']}.")
    if unread:
        words = "1 patch" if unread == 1 else f"{unread:,} patches"
        notes.append(f"{words} could not be read: what is shown there means nothing.")
    if features.grid.overlap_px:
        notes.append("Patches overlap: a colour fills the middle of its patch, as wide as their distance.")
    if len(features.grid):
        notes.append(
            "Colours of embedding and clusters are fitted to this slide alone; on another they differ."
        )
    coarse = ": too coarse to judge cells by" if overview.mpp > COARSE_MPP else ""
    notes.append(
        f"The slide is here as a picture of {width:,} × {height:,} px, {overview.mpp:.3g} µm each{coarse}."
    )
    return notes


def _footer(features: SlideFeatures) -> Markup:
    encoder = features.provenance["encoder"]
    weights = ", ".join(w["sha256"][:12] for w in encoder["weights"])
    pairs = [
        ("Encoder", encoder["name"]),
        ("Weights", f"sha256 {weights}" if weights else "–"),
        ("Licence", encoder.get("licence") or "–"),
        ("Level 0", f"{features.provenance['slide']['mpp']:.4g} µm/px"),
        ("Features", str(features.provenance.get("written", "–"))[:10]),
        ("Page", f"{datetime.now(timezone.utc):%Y-%m-%d}"),
        ("By", f"seal-extract {version('seal-extract')}"),
    ]
    return Markup(
        "".join(fill_text("<span>{{name}} <b>{{value}}</b></span>", name=n, value=v) for n, v in pairs)
    )


def _lines(texts: Sequence[str]) -> Markup:
    return Markup("".join(fill_text("<li>{{text}}</li>", text=text) for text in texts))
