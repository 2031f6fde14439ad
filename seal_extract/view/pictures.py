"""PNG files: numbers of patches as colours over their slide, and the best patches of a search."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngImageFile, PngInfo

from seal_extract.errors import UsageError
from seal_extract.features.store import SlideFeatures, open_origin
from seal_extract.genes.index import Found
from seal_extract.patches.grid import PatchGrid
from seal_extract.publish import publish
from seal_extract.slides.drawing import (
    FAINT,
    INK,
    caption_font,
    draw_fitting_text,
    draw_scale_bar,
    draw_text,
    encoder_words,
)
from seal_extract.slides.overview import read_overview
from seal_extract.slides.readers import Array
from seal_extract.slides.slide import Slide
from seal_extract.view.layers import PatchRaster, Values, colour, limits, viridis

OPACITY = 0.65  # of the colours over the slide
PICTURE_PX = 1600  # longest side of a drawn picture without its legend
MOST_OVERVIEW_PX = 4096  # longest side of the slide that it is cut from
LEAST_PX = 640  # width of a picture, for the words below it
MARGIN = 0.04  # of slide around the patches

MADE_OF = "seal_extract"  # keyword of the text in the PNG

PATCH_PX = 192  # side of a patch in a contact sheet
GAP_PX, CAPTION_PX, TITLE_PX = 12, 44, 76
COLUMNS = 6
QUERY_RGB = (200, 60, 0)  # frames the query


# --- a heat map ----------------------------------------------------------------------------------


def draw_heatmap(
    slide: Slide,
    grid: PatchGrid,
    values: Values,
    path: str | os.PathLike[str],
    title: str,
    *,
    unit: str = "",
    encoder: str = "",
    made_of: dict[str, Any] | None = None,
) -> tuple[float, float]:
    """Draw values over the part of the slide that has patches, into a PNG with a title and a legend.

    Args:
        slide: seen from above, in grey; tissue without patches stays as it is.
        grid: where the patches lie.
        values: float [N], one per patch, finite.
        path: the PNG; its folder is made.
        title: in the legend.
        unit: of the values, behind the title.
        encoder: that the values were predicted by, named in the legend.
        made_of: JSON that goes into the file, for `read_made_of`.

    Returns:
        The values at the two ends of the colours.

    Raises:
        UsageError: another count of values than of patches, or NaN.
        GeometryError: there is no patch.
        ReadError: much of the slide cannot be read.
        OutputError: the picture cannot be written.
    """
    values = np.asarray(values)
    if values.shape != (len(grid),):
        raise UsageError(f"values are {list(values.shape)} for {len(grid)} patches; give one per patch")
    if not np.isfinite(values).all():
        raise UsageError(f"the value of patch {int(np.argmin(np.isfinite(values)))} is not finite")
    raster = PatchRaster.of(grid)
    low, high = limits(values)
    x0, y0, x1, y1 = _around(raster, slide.size_l0)
    downsample = max(max(x1 - x0, y1 - y0) / PICTURE_PX, max(slide.size_l0) / MOST_OVERVIEW_PX)
    overview = read_overview(slide, slide.mpp * downsample, holes=True)
    grey = np.repeat(cv2.cvtColor(overview.rgb, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    canvas = _lay(np.asarray(grey, np.uint8), raster, colour(values, low, high), overview.downsample)
    left, top, right, bottom = (round(v / overview.downsample) for v in (x0, y0, x1, y1))
    canvas = canvas[top:bottom, left:right]
    patches = f"{len(grid):,} patches of {grid.patch_px * grid.mpp:.4g} µm"
    source = "   ".join(filter(None, (slide.path.name, encoder and encoder_words(encoder), patches)))
    picture = _with_legend(canvas, legend_of(title, unit, source, values), overview.mpp)
    path = Path(path)
    about = PngInfo()
    if made_of is not None:
        about.add_text(MADE_OF, json.dumps(made_of), zip=True)
    with publish(path) as part:
        picture.save(part, "PNG", optimize=True, pnginfo=about)
    return low, high


def read_made_of(path: Path) -> dict[str, Any] | None:
    """The ``made_of`` that `draw_heatmap` put into a picture; None if there is none."""
    try:
        with Image.open(path) as picture:
            found = json.loads(picture.text[MADE_OF]) if isinstance(picture, PngImageFile) else None
    except (OSError, ValueError, KeyError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _lay(canvas: Array, raster: PatchRaster, rgb: NDArray[np.uint8], downsample: float) -> Array:
    """The canvas, uint8 [h, w, 3], with the raster over it."""
    height, width = canvas.shape[:2]
    painted = raster.paint(rgb)
    x0, y0, _, _ = raster.bounds_l0
    scale = raster.cell_l0 / downsample  # canvas pixels per cell
    move = np.array([[scale, 0, x0 / downsample], [0, scale, y0 / downsample]], np.float64)
    move[:, 2] += (scale - 1) / 2  # from centres of pixels to their edges and back
    laid = cv2.warpAffine(painted, move, (width, height), flags=cv2.INTER_NEAREST)
    share = OPACITY * (laid[..., 3:] > 0)
    return np.asarray(np.round(canvas * (1 - share) + laid[..., :3] * share), np.uint8)


def _around(raster: PatchRaster, size_l0: tuple[int, int]) -> tuple[float, float, float, float]:
    """The patches with a margin, inside the slide: (x0, y0, x1, y1) in level-0 pixels."""
    x0, y0, x1, y1 = raster.bounds_l0
    margin = MARGIN * max(x1 - x0, y1 - y0)
    return (
        max(0, x0 - margin),
        max(0, y0 - margin),
        min(size_l0[0], x1 + margin),
        min(size_l0[1], y1 + margin),
    )


def _with_legend(canvas: Array, legend: Legend, um_per_px: float) -> Image.Image:
    """The canvas above a white strip: what is drawn on the left, the colours and a scale bar on the right."""
    height, width = canvas.shape[0], max(canvas.shape[1], LEAST_PX)
    em = max(13, round(width / 64))  # px
    picture = Image.new("RGB", (width, height + 6 * em), "white")
    picture.paste(Image.fromarray(canvas))
    draw = ImageDraw.Draw(picture)
    bar_px, left = width // 4, width - width // 4 - em
    picture.paste(Image.fromarray(viridis()[None]).resize((bar_px, em)), (left, height + em * 3 // 4))
    for x, anchor, text in ((left, "la", legend.ends[0]), (left + bar_px, "ra", legend.ends[1])):
        draw_text(draw, (x, height + 2 * em), text, caption_font(em), anchor=anchor)
    draw_scale_bar(draw, left + bar_px, height + 5.3 * em, um_per_px, bar_px, caption_font(em))
    room = left - 2 * em
    for y, text, largest, ink in (
        (1.4, legend.title, 1.4, INK),
        (3.2, legend.source, 0.9, FAINT),
        (4.6, legend.span, 0.9, FAINT),
    ):
        place = (em, height + y * em)
        draw_fitting_text(draw, place, text, room, round(largest * em), ink=ink, anchor="lm")
    return picture


@dataclass(frozen=True)
class Legend:
    """Words below a picture.

    Attributes:
        title: what is drawn, and its unit.
        source: slide, encoder and patches.
        span: what the colours span; empty where they span all values.
        ends: the values at the two ends of the colours.
    """

    title: str
    source: str
    span: str
    ends: tuple[str, str]


def legend_of(title: str, unit: str, source: str, values: Values) -> Legend:
    """The legend of values, float [N]; ``≤`` and ``≥`` say that some lie beyond the ends."""
    (low, high), least, most = limits(values), float(values.min()), float(values.max())
    below, above = least < low - 1e-6, most > high + 1e-6
    ends = f"{'≤ ' if below else ''}{low:.3g}", f"{'≥ ' if above else ''}{high:.3g}"
    span = f"colours from the 1st to the 99th percentile; all from {least:.3g} to {most:.3g}"
    return Legend(f"{title}   {unit}".strip(), source, span if below or above else "", ends)


# --- a contact sheet -----------------------------------------------------------------------------


def draw_contact_sheet(
    found: Sequence[Found],
    path: str | os.PathLike[str],
    title: str,
    slides: Path | None = None,
    *,
    score: str = "score",
    query: Found | Image.Image | None = None,
    names: Mapping[Path, str] | None = None,
) -> None:
    """Draw patches in the order of their rank into a PNG, with the encoder and a scale bar above them.

    Args:
        found: best first.
        path: the PNG; its folder is made.
        title: above them.
        slides: folder that holds slides which have moved.
        score: name of the numbers.
        query: the patch, or a picture as large as one, that was searched for: drawn first, in a frame.
        names: of the slides by their features file; the file's name by default.

    Raises:
        SlideOpenError: a slide has moved.
        ReadError: a patch cannot be read.
        OutputError: the picture cannot be written.
    """
    first = [query] if isinstance(query, Found) else []
    pictures = enumerate(_read_patches([*first, *found], slides), 1 - len(first))
    cells = [(picture, *_caption(one, rank, names)) for rank, (one, picture) in pictures]
    if isinstance(query, Image.Image):
        picture = query.resize((PATCH_PX, PATCH_PX), Image.Resampling.LANCZOS)
        cells.insert(0, (picture, "query", "a picture"))
    columns = max(1, min(COLUMNS, len(cells)))
    rows = -(-len(cells) // columns)
    cell = PATCH_PX + GAP_PX
    width = max(GAP_PX + columns * cell, 640)
    sheet = Image.new("RGB", (width, TITLE_PX + rows * (cell + CAPTION_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    _head(draw, found, title, score, width)
    for i, (picture, name, place) in enumerate(cells):
        x, y = GAP_PX + i % columns * cell, TITLE_PX + i // columns * (cell + CAPTION_PX)
        sheet.paste(picture, (x, y))
        if query is not None and i == 0:
            draw.rectangle([x - 4, y - 4, x + PATCH_PX + 3, y + PATCH_PX + 3], None, QUERY_RGB, 4)
        draw_fitting_text(draw, (x, y + PATCH_PX + 5), name, PATCH_PX, 14)
        draw_fitting_text(draw, (x, y + PATCH_PX + 24), place, PATCH_PX, 12, ink=FAINT)
    with publish(Path(path)) as part:
        sheet.save(part, "PNG", optimize=True)


def _read_patches(found: Sequence[Found], slides: Path | None) -> list[tuple[Found, Image.Image]]:
    """Each with its picture, in order; every slide is opened once."""
    pictures: dict[int, Image.Image] = {}
    by_slide: dict[Path, list[int]] = {}
    for i, one in enumerate(found):
        by_slide.setdefault(one.slide.path, []).append(i)
    for places in by_slide.values():
        with closing(open_origin(found[places[0]].slide, slides)) as slide:
            for i in places:
                pictures[i] = read_patch(slide, found[i].slide, found[i].row)
    return [(one, pictures[i]) for i, one in enumerate(found)]


def _caption(one: Found, rank: int, names: Mapping[Path, str] | None) -> tuple[str, str]:
    """The two lines below a patch; that of rank 0 is the query."""
    name = one.slide.path.stem if names is None else names.get(one.slide.path, one.slide.path.stem)
    x, y = one.xy_l0
    if rank == 0:
        return f"query   {name}", f"{x}, {y}"
    return f"{rank}   {name}", f"{x}, {y}   {one.score:.3g}"


def _head(draw: ImageDraw.ImageDraw, found: Sequence[Found], title: str, score: str, width: int) -> None:
    """Title, encoder, what a number is, and a scale bar where all patches are of one width."""
    widths_um = {round(one.slide.grid.patch_px * one.slide.grid.mpp, 3) for one in found}
    room = width - 3 * GAP_PX - PATCH_PX
    draw_fitting_text(draw, (GAP_PX, 24), title, room, anchor="lm")
    if not found:
        return
    encoder = encoder_words(found[0].slide.provenance["encoder"]["name"])
    wide = " or ".join(f"{um:.4g} µm" for um in sorted(widths_um))
    text = f"{encoder}   patches {wide} wide   below each: level-0 pixels, {score}"
    draw_fitting_text(draw, (GAP_PX, 52), text, room, 14, ink=FAINT, anchor="lm")
    if len(widths_um) == 1:
        um_per_px = widths_um.pop() / PATCH_PX
        draw_scale_bar(draw, width - GAP_PX, 52, um_per_px, PATCH_PX / 2, caption_font(14))


def read_patch(slide: Slide, features: SlideFeatures, row: int, side_px: int = PATCH_PX) -> Image.Image:
    """A patch out of its open slide, ``side_px`` wide and high.

    Raises:
        ReadError: it cannot be read.
    """
    grid = features.grid
    x, y = grid.xy_l0[row].tolist()
    region = np.array(slide.read_region((x, y), grid.level, (grid.read_px,) * 2))  # uint8 [H, W, 3]
    grid.whiten(region, row, slide)
    return Image.fromarray(region).resize((side_px, side_px), Image.Resampling.LANCZOS)
