"""A picture per slide: the overview, the tissue's outline, the patches, and a caption with a scale bar."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import cv2
import numpy as np
import shapely
from PIL import Image, ImageDraw

from seal_extract.patches.grid import PatchGrid
from seal_extract.publish import publish
from seal_extract.slides.drawing import (
    draw_fitting_text,
    draw_scale_bar,
    exif_of,
    fitting_font,
    make_thumbnail,
)
from seal_extract.slides.overview import PICTURE_PX
from seal_extract.slides.readers import Array
from seal_extract.slides.slide import Slide
from seal_extract.tissue.mask import TissueMask

Style = Literal["tint", "outline"]  # of the patches

PATCH_RGB = (0, 120, 110)
TISSUE_RGB = (25, 35, 160)
FAINT, DENSE = 0.12, 0.32  # how much of the patch colour covers it: with its border drawn, and without
BORDER_FROM_PX = 6  # patches smaller than this in the picture are filled, not framed
MIN_PX = 900  # small slides are enlarged to this


def draw_overlay(
    slide: Slide,
    picture: Array,
    mask: TissueMask | None,
    grid: PatchGrid,
    path: str | os.PathLike[str],
    *,
    style: Style = "tint",
    also: Mapping[Path, Style] = MappingProxyType({}),
) -> None:
    """Draw tissue and patches over the slide into a JPEG that carries its own thumbnail.

    Args:
        slide: gives its name and its µm/px; nothing is read.
        picture: uint8 [h, w, 3], the whole slide, from `read_picture`.
        mask: outlined; None where the coordinates came from elsewhere.
        grid: every patch is drawn.
        path: the JPEG; its folder is made.
        style: ``"tint"`` covers the patches with a faint colour, which shows also the smallest; ``"outline"``
            draws lines alone, which leave the colours of the stains as they are.
        also: other JPEGs of the same, each with its style.

    Raises:
        OutputError: the picture cannot be written.
    """
    longest = max(slide.size_l0)
    scale = min(PICTURE_PX, max(MIN_PX, longest)) / longest  # pixels of the picture per level-0 pixel
    width, height = (max(1, round(side * scale)) for side in slide.size_l0)
    caption = _caption_strip(width, _caption(slide, mask, grid), slide.mpp / scale)
    bare = cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC)
    page = np.empty((height + len(caption), width, 4), np.uint8)  # RGBX, as Pillow has pixels
    canvas, page[height:] = page[:height], caption
    for file, how in {Path(path): style, **also}.items():
        cv2.cvtColor(bare, cv2.COLOR_RGB2RGBA, dst=canvas)
        _draw_patches(canvas, grid, scale, how)
        if mask is not None:
            _draw_tissue(canvas, mask, scale)
        thumbnail = make_thumbnail(_for_pillow(canvas))
        with publish(file) as part:
            _for_pillow(page).save(part, "JPEG", quality=88, exif=exif_of(thumbnail))


def _draw_patches(canvas: Array, grid: PatchGrid, scale: float, style: Style) -> None:
    """Squares with a thin border, faintly filled for a tint; where they are tiny the fill or its outline."""
    side = grid.patch_size_l0 * scale
    corners = [_box(x, y, grid.patch_size_l0, scale) for x, y in grid.xy_l0.tolist()]
    if style == "tint":
        share, filled = FAINT if side >= BORDER_FROM_PX else DENSE, canvas.copy()
        for start, end in corners:
            cv2.rectangle(filled, start, end, PATCH_RGB, cv2.FILLED)
        cv2.addWeighted(canvas, 1 - share, filled, share, 0, dst=canvas)
    elif side < BORDER_FROM_PX:
        covered = np.zeros(canvas.shape[:2], np.uint8)
        for start, end in corners:
            cv2.rectangle(covered, start, end, 1, cv2.FILLED)
        rings, _ = cv2.findContours(covered, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
        cv2.polylines(canvas, rings, True, PATCH_RGB, 2, cv2.LINE_AA)
    if side >= BORDER_FROM_PX:
        thickness = 1 if side < 60 else 2
        for start, end in corners:
            cv2.rectangle(canvas, start, end, PATCH_RGB, thickness, cv2.LINE_AA)


def _box(x: int, y: int, size_l0: int, scale: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """Top-left and bottom-right pixel of a patch in the picture."""
    return (round(x * scale), round(y * scale)), (
        max(round(x * scale), round((x + size_l0) * scale) - 1),
        max(round(y * scale), round((y + size_l0) * scale) - 1),
    )


def _draw_tissue(canvas: Array, mask: TissueMask, scale: float) -> None:
    rings = [shapely.get_coordinates(ring)[:-1] for ring in shapely.get_rings(mask.polygons_l0)]
    lines = [np.round(ring * scale).astype(np.int32) for ring in rings]
    cv2.polylines(canvas, lines, True, TISSUE_RGB, 2, cv2.LINE_AA)


def _caption(slide: Slide, mask: TissueMask | None, grid: PatchGrid) -> str:
    tissue = f"{mask.area_mm2:.3g} mm² tissue" if mask is not None else f"coordinates of {grid.origin}"
    return (
        f"{slide.path.name}   {slide.mpp:.4g} µm/px   {tissue}   "
        f"{len(grid):,} patches of {grid.patch_px} px at {grid.mpp:.4g} µm/px"
    )


def _caption_strip(width: int, text: str, um_per_px: float) -> Array:
    """A white strip with the text on the left and a scale bar on the right: uint8 [h, width, 4]."""
    most_px = 0.12 * width
    text_px = width - most_px - 60
    font = fitting_font(text, text_px)
    strip = Image.new("RGBX", (width, round(font.size * 2.2)), "white")
    draw = ImageDraw.Draw(strip)
    middle = strip.height / 2
    draw_fitting_text(draw, (12, middle), text, text_px, anchor="lm")
    draw_scale_bar(draw, width - 14, middle + font.size * 0.6, um_per_px, most_px, font)
    return np.asarray(strip)


def _for_pillow(rgbx: Array) -> Image.Image:
    """The pixels where they are; Pillow would copy RGB into new memory, half as slowly as it compresses."""
    return Image.frombuffer("RGBX", rgbx.shape[1::-1], rgbx, "raw", "RGBX", 0, 1)
