"""The best patches of a search side by side: each as its encoder saw it, with its place and score."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from seal_extract.features.origin import open_origin
from seal_extract.features.store import SlideFeatures
from seal_extract.genes.search import Found
from seal_extract.publish import publish
from seal_extract.slides.drawing import (
    FAINT,
    caption_font,
    draw_fitting_text,
    draw_scale_bar,
    encoder_words,
)
from seal_extract.slides.slide import Slide

SIDE_PX = 192  # of a patch in the sheet
GAP_PX, CAPTION_PX, TITLE_PX = 12, 44, 76
COLUMNS = 6
QUERY_RGB = (200, 60, 0)  # frames the query


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
        picture = query.resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
        cells.insert(0, (picture, "query", "a picture"))
    columns = max(1, min(COLUMNS, len(cells)))
    rows = -(-len(cells) // columns)
    cell = SIDE_PX + GAP_PX
    width = max(GAP_PX + columns * cell, 640)
    sheet = Image.new("RGB", (width, TITLE_PX + rows * (cell + CAPTION_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    _head(draw, found, title, score, width)
    for i, (picture, name, place) in enumerate(cells):
        x, y = GAP_PX + i % columns * cell, TITLE_PX + i // columns * (cell + CAPTION_PX)
        sheet.paste(picture, (x, y))
        if query is not None and i == 0:
            draw.rectangle([x - 4, y - 4, x + SIDE_PX + 3, y + SIDE_PX + 3], None, QUERY_RGB, 4)
        draw_fitting_text(draw, (x, y + SIDE_PX + 5), name, SIDE_PX, 14)
        draw_fitting_text(draw, (x, y + SIDE_PX + 24), place, SIDE_PX, 12, ink=FAINT)
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
    room = width - 3 * GAP_PX - SIDE_PX
    draw_fitting_text(draw, (GAP_PX, 24), title, room, anchor="lm")
    if not found:
        return
    encoder = encoder_words(found[0].slide.provenance["encoder"]["name"])
    wide = " or ".join(f"{um:.4g} µm" for um in sorted(widths_um))
    text = f"{encoder}   patches {wide} wide   below each: level-0 pixels, {score}"
    draw_fitting_text(draw, (GAP_PX, 52), text, room, 14, ink=FAINT, anchor="lm")
    if len(widths_um) == 1:
        um_per_px = widths_um.pop() / SIDE_PX
        draw_scale_bar(draw, width - GAP_PX, 52, um_per_px, SIDE_PX / 2, caption_font(14))


def read_patch(slide: Slide, features: SlideFeatures, row: int, side_px: int = SIDE_PX) -> Image.Image:
    """A patch out of its open slide, ``side_px`` wide and high.

    Raises:
        ReadError: it cannot be read.
    """
    grid = features.grid
    x, y = grid.xy_l0[row].tolist()
    region = np.array(slide.read_region((x, y), grid.level, (grid.read_px,) * 2))  # uint8 [H, W, 3]
    grid.whiten(region, row, slide)
    return Image.fromarray(region).resize((side_px, side_px), Image.Resampling.LANCZOS)
