"""The whole slide at low resolution, on which tissue is found and pictures are drawn."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import ReadError, UnsupportedSlideError
from seal_extract.slides.readers import Array
from seal_extract.slides.slide import Slide, coarsest_level

UNSCANNED_BELOW = 9  # brightest channel of the black that scanners leave around the scanned area
FLUORESCENCE_BELOW = 80  # median of the brightest channel: glass lies above 200, dense tissue above 110
SAMPLE_PX = 1_000_000  # enough for a median
BLOCK_PX = 2048  # side of the squares read at a time
HOLE_PX = 256  # side of the squares left out where nothing can be read, if holes are allowed
MOST_HOLES = 64  # each costs opening the file again

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels of the overview


@dataclass(frozen=True)
class Overview:
    """The whole slide at low resolution.

    Attributes:
        rgb: uint8 [h, w, 3]; what was never scanned is white.
        scanned: bool [h, w]; False where the file has no pixels or the scanner's black filling.
        mpp: µm/px of `rgb`, by the slide's own µm/px.
        downsample: level-0 px per px of `rgb`.
    """

    rgb: Array
    scanned: NDArray[np.bool_]
    mpp: float
    downsample: float

    def __repr__(self) -> str:
        h, w = self.scanned.shape
        return f"Overview({w} x {h} px, {self.mpp:.4g} µm/px, {self.scanned.mean():.0%} scanned)"


def read_overview(slide: Slide, mpp: float, *, holes: bool = False) -> Overview:
    """Read the whole slide at ``mpp`` by area averages, block by block, in bounded memory.

    Args:
        slide: an open slide.
        mpp: µm/px wanted; not finer than level 0.
        holes: leave some places that cannot be read white, as if never scanned; enough for a picture.

    Raises:
        UnsupportedSlideError: the slide is dark where it was scanned: fluorescence, not brightfield.
        ReadError: a region cannot be read.
    """
    downsample = max(1.0, mpp / slide.mpp)
    width, height = (max(1, round(side / downsample)) for side in slide.size_l0)
    rgb = np.empty((height, width, 3), np.uint8)
    scanned = np.empty((height, width), np.bool_)
    level = coarsest_level(slide, downsample)
    step = max(1, int(BLOCK_PX * slide.levels[level].downsample / downsample))  # overview px per block
    left_out: list[str] = []  # messages only; an error would keep its frames and all that they hold

    def fill(block: Box) -> None:  # no recursion: that cycle would keep the slide and the picture in memory
        to_read = [block]
        while to_read:
            x0, y0, x1, y1 = to_read.pop()
            part = np.s_[y0:y1, x0:x1]
            try:
                rgb[part], scanned[part] = _read_block(slide, level, (x0, y0, x1, y1), downsample)
            except ReadError as exc:
                if not holes or len(left_out) == MOST_HOLES:
                    raise
                if max(x1 - x0, y1 - y0) <= max(1, step * HOLE_PX // BLOCK_PX):
                    left_out.append(str(exc))
                    rgb[part], scanned[part] = 255, False
                else:
                    to_read += reversed(_quarters(x0, y0, x1, y1))

    blocks = [
        (x, y, min(x + step, width), min(y + step, height))
        for y in range(0, height, step)
        for x in range(0, width, step)
    ]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(fill, blocks))
    if left_out and not scanned.any():
        raise ReadError(left_out[0])
    overview = Overview(rgb, scanned, slide.mpp * downsample, downsample)
    _refuse_fluorescence(slide, overview)
    return overview


def _quarters(x0: int, y0: int, x1: int, y1: int) -> list[Box]:
    x, y = (x0 + x1) // 2, (y0 + y1) // 2
    parts = [(x0, y0, x, y), (x, y0, x1, y), (x0, y, x, y1), (x, y, x1, y1)]
    return [part for part in parts if part[0] < part[2] and part[1] < part[3]]


def _refuse_fluorescence(slide: Slide, overview: Overview) -> None:
    step = max(1, round((overview.scanned.size / SAMPLE_PX) ** 0.5))
    channels = cv2.split(np.ascontiguousarray(overview.rgb[::step, ::step]))
    bright = np.maximum.reduce(channels)[overview.scanned[::step, ::step]]
    median = float(np.median(bright)) if bright.size else 0.0
    if median < FLUORESCENCE_BELOW:
        why = f"its median brightness is {median:.0f} of 255" if bright.size else "nothing in it was scanned"
        raise UnsupportedSlideError(
            f"{slide.path}: not a brightfield slide: {why} (fluorescence, or an empty scan); "
            f"allowed: 8-bit RGB brightfield, such as H&E"
        )


def _read_block(slide: Slide, level: int, box: Box, downsample: float) -> tuple[Array, NDArray[np.bool_]]:
    """Overview pixels ``box`` -> uint8 [h, w, 3] and bool [h, w]."""
    per_px = downsample / slide.levels[level].downsample  # level px per overview px
    x0, y0, x1, y1 = (round(v * per_px) for v in box)
    xy_l0 = (round(box[0] * downsample), round(box[1] * downsample))
    region = slide.read_region(xy_l0, level, (max(1, x1 - x0), max(1, y1 - y0)))
    size = (box[2] - box[0], box[3] - box[1])
    unscanned = cv2.inRange(region, (0, 0, 0), (UNSCANNED_BELOW - 1,) * 3)  # 255 there, 0 elsewhere
    if unscanned.any():
        region = np.where(unscanned[..., None] > 0, np.uint8(255), region)
    rgb = cv2.resize(region, size, interpolation=cv2.INTER_AREA)
    share = cv2.resize(unscanned, size, interpolation=cv2.INTER_AREA)
    return np.asarray(rgb, np.uint8), np.asarray(share < 128)
