"""Numbers of patches as colours over the slide: a pixel per patch for a viewer, a PNG with a legend to keep.

Colours are viridis: of even lightness steps, and told apart without red and green.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngImageFile, PngInfo

from seal_extract.errors import GeometryError, UsageError
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

FINER = 8  # cells a patch is wide where patches do not lie on one grid
MOST_CELLS = 2**26  # of a raster; an overview of a 100,000 px slide in 224 px patches has 200,000
PERCENTILES = (1.0, 99.0)  # of the values, at the ends of the colours: a few outliers do not dim the rest
OPACITY = 0.65  # of the colours over the slide
SIDE_PX = 1600  # longest side of a drawn picture without its legend
MOST_OVERVIEW_PX = 4096  # longest side of the slide that it is cut from
LEAST_PX = 640  # width of a picture, for the words below it
MARGIN = 0.04  # of slide around the patches

MADE_OF = "seal_extract"  # keyword of the text in the PNG

Values = NDArray[np.floating]


@dataclass(frozen=True)
class PatchRaster:
    """A picture with one pixel per patch, or several where patches do not lie on a common grid.

    Attributes:
        shape: (h, w) in cells.
        bounds_l0: (x0, y0, x1, y1) that the picture covers, in level-0 pixels.
        cell_l0: side of a cell in level-0 pixels.
        boxes: int64 [N, 4], (column, row, column after, row after) of each patch.
    """

    shape: tuple[int, int]
    bounds_l0: tuple[float, float, float, float]
    cell_l0: float
    boxes: NDArray[np.int64]

    @classmethod
    def of(cls, grid: PatchGrid) -> PatchRaster:
        """The raster of a grid; of overlapping patches it has the middle, as wide as their distance.

        Raises:
            GeometryError: there is no patch.
        """
        if not len(grid):
            raise GeometryError("there is no patch to draw; choose a slide whose tissue gave some")
        first, step = grid.xy_l0.min(0), _stride(grid)
        side = 1
        if ((grid.xy_l0 - first) % step).any():  # another tool's, with a grid of its own for each piece
            side = FINER if step >= FINER else 1
            step /= side
        corner = ((grid.xy_l0 - first) / step).round().astype(np.int64)
        boxes = np.concatenate([corner, corner + side], axis=1)
        width, height = (int(v) for v in boxes[:, 2:].max(0))
        if width * height > MOST_CELLS:
            raise GeometryError(f"the patches lie on {width} x {height} cells; allowed: {MOST_CELLS}")
        x0, y0 = (float(v) + (grid.patch_size_l0 - side * step) / 2 for v in first)
        return cls((height, width), (x0, y0, x0 + width * step, y0 + height * step), float(step), boxes)

    def paint(self, rgb: NDArray[np.uint8]) -> Array:
        """Colours of patches, uint8 [N, 3], to uint8 [h, w, 4], transparent where no patch is."""
        picture = np.zeros((*self.shape, 4), np.uint8)
        colours = np.concatenate([rgb, np.full((len(rgb), 1), 255, np.uint8)], axis=1)
        if np.array_equal(self.boxes[:, 2:], self.boxes[:, :2] + 1):
            picture[self.boxes[:, 1], self.boxes[:, 0]] = colours
            return picture
        for (x0, y0, x1, y1), colour in zip(self.boxes.tolist(), colours, strict=True):
            picture[y0:y1, x0:x1] = colour
        return picture


def limits(values: Values) -> tuple[float, float]:
    """The values at the two ends of the colours: 1st and 99th percentile, apart even if all are equal."""
    low, high = (float(v) for v in np.percentile(values, PERCENTILES))
    return (low, high) if high > low else (low, low + max(abs(low), 1.0) * 1e-6)


def colour(values: Values, low: float, high: float, count: int = 256) -> NDArray[np.uint8]:
    """Values to ``count`` colours, uint8 [N, 3] RGB; those beyond the ends get the colours of the ends."""
    share = np.clip((np.asarray(values, np.float64) - low) / (high - low), 0, 1)
    return _table(count)[np.round((count - 1) * share).astype(np.int64)]


def draw_heatmap(
    slide: Slide,
    grid: PatchGrid,
    values: Values,
    path: str | os.PathLike[str],
    title: str,
    *,
    unit: str = "",
    max_px: int = SIDE_PX,
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
        max_px: longest side of the picture without its legend.
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
    values = check_values(values, len(grid))
    raster = PatchRaster.of(grid)
    low, high = limits(values)
    x0, y0, x1, y1 = _around(raster, slide.size_l0)
    downsample = max((x1 - x0) / max_px, (y1 - y0) / max_px, max(slide.size_l0) / MOST_OVERVIEW_PX)
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


def check_values(values: Values, patches: int) -> Values:
    """Hold values to one finite number per patch.

    Raises:
        UsageError: they are not.
    """
    values = np.asarray(values)
    if values.shape != (patches,):
        raise UsageError(f"values are {list(values.shape)} for {patches} patches; give one per patch")
    if not np.isfinite(values).all():
        raise UsageError(f"the value of patch {int(np.argmin(np.isfinite(values)))} is not finite")
    return values


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
    picture.paste(Image.fromarray(_table()[None]).resize((bar_px, em)), (left, height + em * 3 // 4))
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


def _table(count: int = 256) -> NDArray[np.uint8]:
    """Viridis in so many steps, uint8 [count, 3] RGB."""
    steps = np.linspace(0, 255, count).round().astype(np.uint8)[:, None]
    return np.asarray(cv2.applyColorMap(steps, cv2.COLORMAP_VIRIDIS)[:, 0, ::-1], np.uint8)


def _stride(grid: PatchGrid) -> float:
    """From patch to patch in level-0 pixels."""
    return float(max(1, round(grid.patch_size_l0 * (grid.patch_px - grid.overlap_px) / grid.patch_px)))
