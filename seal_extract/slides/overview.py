"""The whole slide at low resolution, on which tissue is found and pictures are drawn."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

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
PICTURE_PX = 2048  # longest side of a picture
LEAST_PICTURE_PX = 900  # a level with fewer pixels is too coarse for a picture

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


def read_picture(slide: Slide) -> Array:
    """Read the whole slide to be looked at: uint8 [h, w, 3], its longest side at most `PICTURE_PX`.

    It is read from a level that is as coarse as is still legible. Places that cannot be read are white.

    Raises:
        UnsupportedSlideError: see `read_overview`.
        ReadError: much of the slide cannot be read.
    """
    longest = max(slide.size_l0)
    level = coarsest_level(slide, longest / LEAST_PICTURE_PX)
    px = min(PICTURE_PX, max(slide.levels[level].size_px))
    return read_overview(slide, slide.mpp * longest / px, holes=True).rgb


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
    return _read(slide, mpp, holes=holes)[0]


def read_overview_and_picture(slide: Slide, mpp: float) -> tuple[Overview, Array]:
    """`read_overview` and `read_picture`, of one reading if that is fine enough for a picture."""
    overview, picture = _read(slide, mpp, picture_px=PICTURE_PX)
    height, width = picture.shape[:2]
    if max(width, height) < min(LEAST_PICTURE_PX, max(slide.size_l0)):
        return overview, read_picture(slide)
    scale = min(1.0, PICTURE_PX / max(width, height))
    return overview, _reduced(picture, *(max(1, round(side * scale)) for side in (width, height)))


def _read(slide: Slide, mpp: float, *, holes: bool = False, picture_px: int = 0) -> tuple[Overview, Array]:
    """The overview; and its pixels, finer if the level has more of the pixels that a picture may have."""
    downsample = max(1.0, mpp / slide.mpp)
    width, height = (max(1, round(side / downsample)) for side in slide.size_l0)
    rgb = np.empty((height, width, 3), np.uint8)
    scanned = np.empty((height, width), np.bool_)
    level = coarsest_level(slide, downsample)
    step = max(1, int(BLOCK_PX * slide.levels[level].downsample / downsample))  # overview px per block
    level_px = int(1.01 * downsample / slide.levels[level].downsample)  # per overview px, along a side
    finer = max(1, min(level_px, math.ceil(picture_px / max(width, height))))
    picture = np.empty((height * finer, width * finer, 3), np.uint8) if finer > 1 else rgb
    left_out: list[str] = []  # messages only; an error would keep its frames and all that they hold

    def fill(block: Box) -> None:  # no recursion: that cycle would keep the slide and the picture in memory
        to_read = [block]
        while to_read:
            x0, y0, x1, y1 = to_read.pop()
            part, fine = (np.s_[y0 * k : y1 * k, x0 * k : x1 * k] for k in (1, finer))
            try:
                region, unscanned = _read_block(slide, level, (x0, y0, x1, y1), downsample)
                if finer > 1:
                    picture[fine] = _reduced(region, finer * (x1 - x0), finer * (y1 - y0))
                rgb[part] = _reduced(region, x1 - x0, y1 - y0)
                scanned[part] = _reduced(unscanned, x1 - x0, y1 - y0) < 128
            except ReadError as exc:
                if not holes or len(left_out) == MOST_HOLES:
                    raise
                if max(x1 - x0, y1 - y0) <= max(1, step * HOLE_PX // BLOCK_PX):
                    left_out.append(str(exc))
                    picture[fine], rgb[part], scanned[part] = 255, 255, False
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
    return overview, picture


def _quarters(x0: int, y0: int, x1: int, y1: int) -> list[Box]:
    x, y = (x0 + x1) // 2, (y0 + y1) // 2
    parts = [(x0, y0, x, y), (x, y0, x1, y), (x0, y, x, y1), (x, y, x1, y1)]
    return [part for part in parts if part[0] < part[2] and part[1] < part[3]]


def _refuse_fluorescence(slide: Slide, overview: Overview) -> None:
    step = max(1, round((overview.scanned.size / SAMPLE_PX) ** 0.5))
    bright = np.maximum.reduce(cv2.split(np.ascontiguousarray(overview.rgb[::step, ::step])))
    scanned = np.ascontiguousarray(overview.scanned[::step, ::step]).view(np.uint8)
    counts = cv2.calcHist([bright], [0], scanned, [256], [0, 256]).ravel()
    median = percentile(np.arange(256), counts, 50) if counts.any() else 0.0
    if median < FLUORESCENCE_BELOW:
        why = f"its median brightness is {median:.0f} of 255" if counts.any() else "nothing in it was scanned"
        raise UnsupportedSlideError(
            f"{slide.path}: not a brightfield slide: {why} (fluorescence, or an empty scan); "
            f"allowed: 8-bit RGB brightfield, such as H&E"
        )


def percentile(values: NDArray[Any], counts: NDArray[Any], percent: float) -> float:
    """That of rising values of which each occurs so many times."""
    up_to = np.cumsum(counts, dtype=np.float64)
    rank = percent / 100 * (up_to[-1] - 1)
    low, high = values[np.searchsorted(up_to, (np.floor(rank), np.ceil(rank)), side="right")].tolist()
    return float(low + (high - low) * (rank % 1))


def _read_block(slide: Slide, level: int, box: Box, downsample: float) -> tuple[Array, Array]:
    """Overview pixels ``box`` -> uint8 [H, W, 3] of the level, white where its [H, W], unscanned, is 255."""
    per_px = downsample / slide.levels[level].downsample  # level px per overview px
    x0, y0, x1, y1 = (round(v * per_px) for v in box)
    xy_l0 = (round(box[0] * downsample), round(box[1] * downsample))
    region = slide.read_region(xy_l0, level, (max(1, x1 - x0), max(1, y1 - y0)))
    unscanned = cv2.inRange(region, (0, 0, 0), (UNSCANNED_BELOW - 1,) * 3)  # 255 there, 0 elsewhere
    if unscanned.any():
        region = np.asarray(cv2.bitwise_or(region, cv2.cvtColor(unscanned, cv2.COLOR_GRAY2RGB)), np.uint8)
    return region, np.asarray(unscanned, np.uint8)


def _reduced(pixels: Array, width: int, height: int) -> Array:
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
