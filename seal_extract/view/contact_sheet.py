"""The best patches of a search side by side: each as its encoder saw it, with its place and score."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from seal_extract.genes.search import Found
from seal_extract.publish import publish, writing
from seal_extract.slide import Slide
from seal_extract.store import SlideFeatures
from seal_extract.view.origin import open_origin
from seal_extract.view.overlay import caption_font, fitting_font

SIDE_PX = 192  # of a patch in the sheet
GAP_PX, CAPTION_PX, TITLE_PX = 12, 40, 48
COLUMNS = 6
INK, FAINT = (40, 40, 40), (110, 110, 110)


def draw_contact_sheet(
    found: Sequence[Found], path: str | os.PathLike[str], title: str, slides: Path | None = None
) -> None:
    """Draw patches in the order of their rank into a PNG.

    Args:
        found: best first.
        path: the PNG; its folder is made.
        title: above them.
        slides: folder to look in for slides that have moved.

    Raises:
        SlideOpenError: a slide is not where it was.
        ReadError: a patch cannot be read.
        OutputError: the picture cannot be written.
    """
    pictures: dict[int, Image.Image] = {}
    by_slide: dict[Path, list[int]] = {}
    for rank, one in enumerate(found):
        by_slide.setdefault(one.slide.path, []).append(rank)
    for ranks in by_slide.values():
        with closing(open_origin(found[ranks[0]].slide, slides)) as slide:
            for rank in ranks:
                pictures[rank] = read_patch(slide, found[rank].slide, found[rank].row)
    columns = max(1, min(COLUMNS, len(found)))
    rows = -(-len(found) // columns)
    cell = SIDE_PX + GAP_PX
    width = max(GAP_PX + columns * cell, 480)
    sheet = Image.new("RGB", (width, TITLE_PX + rows * (cell + CAPTION_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP_PX, TITLE_PX / 2), title, INK, fitting_font(title, width - 2 * GAP_PX), anchor="lm")
    for rank, one in enumerate(found):
        x, y = GAP_PX + rank % columns * cell, TITLE_PX + rank // columns * (cell + CAPTION_PX)
        sheet.paste(pictures[rank], (x, y))
        name = f"{rank + 1}  {one.slide.path.stem}"
        draw.text((x, y + SIDE_PX + 4), name, INK, fitting_font(name, SIDE_PX, largest=14))
        place = f"{one.xy_l0[0]}, {one.xy_l0[1]}   {one.score:.3g}"
        draw.text((x, y + SIDE_PX + 22), place, FAINT, caption_font(12))
    with publish(Path(path)) as part, writing(Path(path)):
        sheet.save(part, "PNG", optimize=True)


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
