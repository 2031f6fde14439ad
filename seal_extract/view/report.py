"""One slide with its embedding, clusters, genes and attention as one HTML file, to mail to a colleague.

The file opens without a server and without a network. A slide of 50,000 patches with 50 genes takes about
12 MB: 9 MB for the genes, 1 to 3 MB for its picture.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from math import ceil, log2
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import OutputError, UsageError
from seal_extract.features.layouts import CONTOURS, of_grid
from seal_extract.features.store import SlideFeatures, sample_rows
from seal_extract.publish import publish
from seal_extract.slides.overview import Overview, read_overview
from seal_extract.slides.slide import Slide
from seal_extract.view.collection import Rings, describe_slide, jpeg, tissue_rings
from seal_extract.view.gene_maps import UNIT, GeneMaps
from seal_extract.view.layers import (
    Components,
    Layer,
    PatchRaster,
    cluster_layer,
    embedding_layer,
    find_attention,
    scale_layer,
)
from seal_extract.view.pages import made_by, render_report

if TYPE_CHECKING:
    from seal_extract.genes.decoder import GeneDecoder
    from seal_extract.genes.gene_lists import Signature

GENERATOR = "seal-extract report"  # in the page, by which it is known
SIDE_PX = (256, 3000, 8000)  # longest side of the slide's picture: least, default, most
QUALITY = 80  # of its JPEG
COARSE_MPP = 1.0  # beyond which nuclei cannot be judged
MOST_VALUES = 3_000_000  # patches times numbers of each; 4 bytes of the file each
DEFAULT_GENES = 24
CLUSTER_COUNTS = (3, 5, 8, 12)
SAMPLED_ROWS = 8192  # embeddings, for colours
HALF_BELOW = 2048  # where steps of float16 reach 1


def report_path(features: SlideFeatures, out: Path | None = None) -> Path:
    """The path of a slide's report: ``reports_ENCODER/SLIDE.html`` beside the folder of its features."""
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
    the run, if they exist.

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
    refuse_other(path, overwrite)
    content = _layers(features, decoder, genes, signatures)
    overview = read_overview(slide, slide.mpp * max(slide.size_l0) / max_px, holes=True)
    outline = _outline(features, overview.downsample / 2)
    described = describe_slide(slide, features, outline)
    described["notes"] += [*content.notes, *_notes(features, overview, outline)]
    data = {
        "slide": described,
        "most_zoom": max(0, 3 - ceil(log2(overview.downsample))),
        "picture": as_base64(jpeg(overview.rgb, QUALITY)),
        "xy": as_base64(features.grid.xy_l0.astype("<i4").tobytes()),
        "kinds": {kind: layers for kind, layers in content.kinds.items() if layers},
        "genes": {"named": not content.no_genes, "why": content.no_genes, "are": content.genes_are},
    }
    page = render_report(
        generator=GENERATOR, name=features.path.stem, data=data, made_by=foot_of(features.provenance)
    )
    with publish(path) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(page)
    return path


def refuse_other(path: Path, overwrite: bool) -> None:
    """Refuse a file that is no report of this package, unless it may be overwritten.

    Raises:
        OutputError: it is not.
    """
    if path.exists() and not overwrite and not is_report(path):
        raise OutputError(
            f"{path} exists and is no report of seal-extract; type --overwrite to replace it, or another -o"
        )


def is_report(path: Path) -> bool:
    """Whether `write_slide_report` wrote the file."""
    return made_by(path, GENERATOR)


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
    weights = [file["sha256"] for file in features.provenance["encoder"]["weights"]]
    if decoder is not None and decoder.weights.sha256 not in weights:
        raise UsageError(
            f"the decoder has weights {decoder.weights.sha256[:12]} and {features.path.name} was made "
            "by others; give the decoder of its own encoder, as decoder_of finds it"
        )


# --- layers ---------------------------------------------------------------------------------------


@dataclass
class _Content:
    """The layers of a page by their kind, and the sentences about them."""

    kinds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    no_genes: str = ""  # the reason why there are none
    genes_are: str = ""  # how they were chosen
    notes: list[str] = field(default_factory=list)


def _layers(
    features: SlideFeatures,
    decoder: GeneDecoder | None,
    genes: Sequence[str] | None,
    signatures: Sequence[Signature],
) -> _Content:
    encoder, patches, content = features.provenance["encoder"]["name"], len(features.grid), _Content()
    content.no_genes = _why_no_genes(encoder, decoder)
    if content.no_genes and (genes or signatures):
        asked = "leave out --genes and --signature, or give its --panel"
        raise UsageError(f"No genes: {content.no_genes.rstrip('.')}; {asked}")
    if not patches:
        content.notes.append("No patch was cut of this slide: there is nothing to show but its picture.")
        return content
    raster = PatchRaster.of(features.grid)
    components = Components.of(sample_rows(features.path, SAMPLED_ROWS))
    counts = [k for k in CLUSTER_COUNTS if k <= len(components.sample)]
    clusters = [cluster_layer(components, features.features, k, slides=1) for k in counts]
    content.kinds["embedding"] = [_packed(embedding_layer(components, features.features, slides=1), raster)]
    content.kinds["clusters"] = [_packed(layer, raster) for layer in clusters]
    of_same_grid = features.path.parent.parent.glob(f"slide_features_*/{features.path.name}")
    attention = find_attention(tuple(sorted(of_same_grid)))
    room, others = max(1, MOST_VALUES // patches), len(signatures) + len(attention)
    if others > room:
        raise UsageError(
            f"{len(signatures)} signatures and {len(attention)} attentions of {patches:,} patches would make "
            f"a page too large to mail; allowed: {room} in all"
        )
    if decoder is not None and not content.no_genes:
        columns = _choose_genes(features, decoder, genes, room - others)
        count = f"{len(columns)} of {decoder.n_genes:,} genes"
        varying = f"The {count} whose prediction varies most over this slide."
        content.genes_are = varying if genes is None else f"{count}, chosen by whoever made this page."
        content.kinds["genes"] = list(_gene_layers(features, decoder, columns, raster))
        maps = [(one.name, GeneMaps(lambda: decoder, {one.name: one})) for one in signatures]
        scores = [scale_layer(*own.values(features, name)) for name, own in maps]
        content.kinds["signatures"] = [_packed(layer, raster) for layer in scores]
        content.notes.append(
            f"Genes and signatures are predicted from the stained picture by {encoder}. Nothing was measured."
        )
    content.kinds["attention"] = []
    for one in attention:
        try:
            content.kinds["attention"].append(_packed(one.layer(features.grid.xy_l0), raster))
        except UsageError:  # its message names a path of this machine
            content.notes.append(f"The attention of {one.title} is left out: it is over other patches.")
    return content


def _why_no_genes(encoder: str, decoder: GeneDecoder | None) -> str:
    if decoder is None:
        return f"this page was made without an expression decoder of {encoder}."
    if decoder.genes is None:
        return f"the {decoder.n_genes:,} columns that {encoder} predicts have no names."
    return ""


def _choose_genes(
    features: SlideFeatures, decoder: GeneDecoder, genes: Sequence[str] | None, room: int
) -> list[int]:
    """Columns of the genes asked for, or of the 24 whose prediction varies most; at most ``room``."""
    if genes is None:
        from seal_extract.genes.predict import moments

        _, deviation = moments([features], decoder)
        varying: list[int] = np.argsort(-deviation, kind="stable").tolist()
        return varying[: max(0, min(DEFAULT_GENES, room))]
    columns = list(decoder.columns(list(dict.fromkeys(genes))))
    if len(columns) > room:
        raise UsageError(
            f"{len(columns)} genes of {len(features.grid):,} patches would make a page too large to mail; "
            f"allowed: {max(0, room)} for this slide; type fewer --genes"
        )
    return columns


def _gene_layers(
    features: SlideFeatures, decoder: GeneDecoder, columns: Sequence[int], raster: PatchRaster
) -> Iterator[dict[str, Any]]:
    """Each gene with its mean and standard deviation over the slide."""
    if not columns:
        return
    from seal_extract.genes.predict import predict_genes

    names = decoder.named()
    for column, values in zip(columns, predict_genes(features, decoder, columns).T, strict=True):
        mean, deviation = values.mean(dtype=np.float64), values.std(dtype=np.float64)
        layer = _packed(scale_layer(names[column], UNIT, values), raster)
        yield layer | {"mean": float(mean), "sd": float(deviation)}


def _packed(layer: Layer, raster: PatchRaster) -> dict[str, Any]:
    """A layer as the page's script takes it."""
    values = None if layer.values is None else pack_numbers(layer.values)
    return {"legend": layer.legend, "picture": as_base64(layer.png(raster)), "values": values}


def pack_numbers(values: NDArray[np.float32]) -> dict[str, str]:
    """Numbers for a page: float16, or float32 if there are large ones."""
    kind = "f2" if np.abs(values).max(initial=0) < HALF_BELOW else "f4"
    return {"type": kind, "base64": as_base64(values.astype(f"<{kind}").tobytes())}


def as_base64(data: bytes) -> str:
    """Bytes as a page holds them."""
    return base64.b64encode(data).decode("ascii")


# --- outline and words ------------------------------------------------------------------------------


def outline_path(features: SlideFeatures) -> Path:
    """The file of a slide's tissue outline, which may not exist."""
    name, grid = f"{features.path.stem}.geojson", features.grid.name
    places = (of_grid(folder / CONTOURS, grid, name) for folder in features.path.resolve().parents[:4])
    return next((place for place in places if place.exists()), Path(name))


def _outline(features: SlideFeatures, apart_l0: float) -> Rings:
    """The tissue's rings in level-0 pixels, no finer than the picture; none if they were never written."""
    rings = tissue_rings(outline_path(features))
    thinned = (cv2.approxPolyDP(np.asarray(ring, np.int32), apart_l0, True)[:, 0].tolist() for ring in rings)
    return [ring for ring in thinned if len(ring) > 2]


def _notes(features: SlideFeatures, overview: Overview, outline: Rings) -> Iterator[str]:
    height, width = overview.scanned.shape
    if not outline:
        yield "There is no tissue outline: none was found beside the features."
    if len(features.grid):
        yield "Colours of embedding and clusters are fitted to this slide alone; on another they differ."
    coarse = ": too coarse to judge cells by" if overview.mpp > COARSE_MPP else ""
    yield f"The slide is here as a picture of {width:,} × {height:,} px, {overview.mpp:.3g} µm each{coarse}."


def foot_of(provenance: dict[str, Any]) -> list[tuple[str, str | None]]:
    """The foot of a page about such features: label and text; None is not known."""
    encoder = provenance["encoder"]
    weights = ", ".join(file["sha256"][:12] for file in encoder["weights"])
    return [
        ("Encoder", encoder["name"]),
        ("Weights", f"sha256 {weights}" if weights else None),
        ("Licence", encoder.get("licence") or None),
        ("Level 0", f"{provenance['slide']['mpp']:.4g} µm/px"),
        ("Features", str(provenance.get("written", "–"))[:10]),
        ("Page", f"{datetime.now(timezone.utc):%Y-%m-%d}"),
        ("By", f"seal-extract {version('seal-extract')}"),
    ]
