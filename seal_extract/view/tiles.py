"""Tiles for a viewer, made as they are asked for: squares of 256 px at powers of two of the slide's size.

Zoom 0 is level 0, zoom 1 half of it, and so on until the slide is smaller than a tile. A tile is read from
the coarsest level that is at least as fine and averaged over areas; where that would be much to read, because
the slide has few levels, it is cut out of one overview of the whole slide.
"""

from __future__ import annotations

import threading
from math import ceil, log2

import cv2
import numpy as np

from seal_extract.errors import UsageError
from seal_extract.slides.overview import Overview, read_overview
from seal_extract.slides.readers import Array
from seal_extract.slides.slide import Slide, coarsest_level

TILE_PX = 256
JPEG_QUALITY = 85
OVERVIEW_PX = 4096  # longest side it may have
MOST_READ_PX = 1_500_000  # pixels of a level; more are taken from the overview if it is fine enough

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in level-0 pixels


class SlideTiles:
    """The tiles of one open slide; safe to use from several threads."""

    def __init__(self, slide: Slide) -> None:
        self.slide = slide
        self.zooms = zooms_of(slide)
        self._overview_downsample = max(self._first_large(), max(slide.size_l0) / OVERVIEW_PX)
        self._overview: Overview | None = None
        self._lock = threading.Lock()

    def tile(self, zoom: int, column: int, row: int) -> tuple[bytes, str]:
        """A tile as a file and its media type: JPEG, or PNG where it reaches over the slide's edge.

        Args:
            zoom: 0 is level 0, each further one half the size.
            column: counted from the left.
            row: counted from the top.

        Raises:
            UsageError: there is no such tile.
            ReadError: the slide is damaged there.
        """
        width, height = self.slide.size_l0
        side_l0 = TILE_PX << zoom if 0 <= zoom < self.zooms else 0
        x0, y0 = column * side_l0, row * side_l0
        if not side_l0 or not (0 <= x0 < width and 0 <= y0 < height):
            raise UsageError(
                f"there is no tile {zoom}/{column}/{row}; allowed: zooms 0 to {self.zooms - 1}, on the slide"
            )
        box = (x0, y0, min(x0 + side_l0, width), min(y0 + side_l0, height))
        size = (ceil((box[2] - x0) / (1 << zoom)), ceil((box[3] - y0) / (1 << zoom)))
        return _encoded(self.picture(box, size))

    def picture(self, box: Box, size_px: tuple[int, int]) -> Array:
        """A part of the slide at ``size_px`` (width, height), by area averages: uint8 [h, w, 3].

        Pixels that the file does not have are white.

        Raises:
            ReadError: the slide is damaged there.
        """
        downsample = min((box[2] - box[0]) / size_px[0], (box[3] - box[1]) / size_px[1])
        level = coarsest_level(self.slide, downsample)
        per_px = self.slide.levels[level].downsample
        w, h = (max(1, round(side / per_px)) for side in (box[2] - box[0], box[3] - box[1]))
        if w * h > MOST_READ_PX and downsample >= self._overview_downsample:
            part = _cut(self.overview(), box)
        else:
            part = self.slide.read_region((box[0], box[1]), level, (w, h))
            part = _unread_to_white(part)
        shrinks = part.shape[0] >= size_px[1]
        way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        return np.asarray(cv2.resize(part, size_px, interpolation=way), np.uint8)

    def overview(self) -> Overview:
        """The whole slide, no finer than tiles are cut from it; read once.

        Raises:
            ReadError: much of the slide cannot be read.
        """
        with self._lock:
            if self._overview is None:
                mpp = self.slide.mpp * self._overview_downsample
                self._overview = read_overview(self.slide, mpp, holes=True)
            return self._overview

    def _first_large(self) -> int:
        """Level-0 pixels per pixel of the finest tiles that would be much to read."""
        for zoom in range(self.zooms):
            level = self.slide.levels[coarsest_level(self.slide, 1 << zoom)]
            if (TILE_PX * (1 << zoom) / level.downsample) ** 2 > MOST_READ_PX:
                return 1 << zoom
        return 1 << self.zooms


def zooms_of(slide: Slide) -> int:
    """How many times a slide is there, each half as large as the one before."""
    return 1 + max(0, ceil(log2(max(slide.size_l0) / TILE_PX)))


def jpeg(rgb: Array, quality: int = JPEG_QUALITY) -> bytes:
    """uint8 [h, w, 3] as JPEG."""
    return cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def png(rgba: Array) -> bytes:
    """uint8 [h, w, 4] as PNG."""
    return cv2.imencode(".png", cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGRA))[1].tobytes()


def _encoded(rgb: Array) -> tuple[bytes, str]:
    height, width = rgb.shape[:2]
    if (height, width) == (TILE_PX, TILE_PX):
        return jpeg(rgb), "image/jpeg"
    rgba = np.zeros(
        (TILE_PX, TILE_PX, 4), np.uint8
    )  # beyond the slide: transparent, whatever the page's ground
    rgba[:height, :width, :3], rgba[:height, :width, 3] = rgb, 255
    return png(rgba), "image/png"


def _cut(overview: Overview, box: Box) -> Array:
    height, width = overview.scanned.shape
    x0, y0, x1, y1 = (v / overview.downsample for v in box)
    left, top = min(int(x0), width - 1), min(int(y0), height - 1)
    return overview.rgb[top : max(top + 1, round(y1)), left : max(left + 1, round(x1))]


def _unread_to_white(rgb: Array) -> Array:
    """Exactly black is what readers put where a file has nothing."""
    unread = cv2.inRange(rgb, (0, 0, 0), (0, 0, 0))
    return np.where(unread[..., None] > 0, np.uint8(255), rgb) if unread.any() else rgb
