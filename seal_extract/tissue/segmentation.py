"""Tissue segmentation: which pixels of a slide's overview are tissue.

Stages: `read_overview` -> `flag_pixels` (is a pixel textured, stained, inked?) -> connected pieces of tissue.

All tissue, even pale stroma and fat, has texture on the scale of cells: its optical density varies by 0.014
(rms) and more within about ten µm. Glass, a wash of eosin or a shadow is smooth there, below 0.004, however
dark or coloured it is. Three things have texture and are no tissue. Dust and the edges of glass are
colourless or small. Pen has colours that no stain has, and it is smooth, because ink lies on top of the cover
slip, out of focus.

Method and thresholds are this package's own, measured on her2st, TCGA and CMU slides; optical density after
Ruifrok and Johnston, Anal Quant Cytol Histol 23 (2001) 291.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from seal_extract.slides.overview import (
    Overview,
    percentile,
    read_overview,
    read_overview_and_picture,
)
from seal_extract.slides.readers import Array
from seal_extract.slides.slide import Slide
from seal_extract.tissue.geojson import Mask
from seal_extract.tissue.mask import TissueMask, work_resolution

Floats: TypeAlias = NDArray[np.float32]

DETAIL_UM = 12.0  # sigma: finer than this is texture (nuclei, fibres, walls of fat cells)
FINE_UM = 5.0  # sigma: finer than this is lost in ink out of focus, and not in tissue
WINDOW_UM = 36.0  # radius over which texture is pooled: reaches across fat cells
MASK_MPP = 8.0  # µm/px of masks
MIN_TEXTURE = 0.006  # rms optical density; glass below 0.004, the palest fat above 0.014
MIN_CHROMA = 0.15  # (max - min) / max over R, G, B of optical density: edges of glass below, stain above 0.3
SMOOTH_INK = 0.15  # fine texture / optical density: ink below, even over tissue; most tissue in focus above
SMOOTH_LIKE_STAIN = 0.1  # the same for inks whose colour is not far from eosin's or haematoxylin's
STRONG_INK = 0.15  # optical density where a stroke is sure, and ...
FAINT_INK = 0.08  # ... where it fades out
FAINT_BLUE = 0.04  # both for the green and blue inks farthest from any stain
STAINED = 0.1  # optical density of smooth tissue (colloid, mucin)
GREY = 0.03  # optical density from which on a lack of colour can be seen
DARKEST_GLASS = 0.25  # optical density of bare glass under a dim or coloured lamp
COLOUR_ONLY_MPP = 10.0  # µm/px above which texture is useless, because cells cannot be seen
STRIP_PX = 2_000_000  # pixels turned into floats at a time
GLASS_SAMPLE_PX = 2_000_000  # pixels that the glass is looked for among
HALO_UM = 12.0  # of the width that pooling adds to texture, this is left, in favour of pale borders
PEN_UM = 30.0  # half the width of the thinnest stroke
OUTLINE_UM = 12.0  # half the width of the threads that are trimmed off
SMOOTH_HOLES = 20  # smooth stained holes (colloid, mucin) are filled up to this many times the size of others

_OD = -np.log10(np.maximum(np.arange(256), 1) / 255).astype(np.float32)
_MEAN = np.full((1, 3), 1 / 3, np.float32)  # of R, G and B

# the flags of a pixel
TEXTURED, COLOURED, COLOURLESS, INK, FADING_INK, UNSCANNED = (np.uint8(1 << bit) for bit in range(6))


def find_tissue(
    slide: Slide,
    *,
    mpp: float = MASK_MPP,
    min_texture: float = MIN_TEXTURE,
    min_area_mm2: float = 0.0125,
    max_hole_mm2: float = 0.05,
    overview: Overview | None = None,
) -> TissueMask:
    """Find the tissue of a brightfield slide (H&E, or IHC with DAB), in bounded memory.

    Pale stroma and fat belong to it; bare glass, washes of stain, pen, dust, edges and what was never scanned
    do not. Pigment and blood are tissue too, unless in smooth pools wider than a pen stroke.

    Args:
        slide: an open slide.
        mpp: µm/px of the mask, 1 to 20; coarser where the slide itself is, or is very large.
        min_texture: optical density (rms, on the scale of cells) from which on something is tissue.
        min_area_mm2: smaller pieces are dropped; by default those below a patch of 224 px at 0.5 µm/px.
        max_hole_mm2: smaller holes are filled; by default lumina and clefts up to 250 µm across.
        overview: the slide at `work_resolution` of ``mpp``; read here by default.

    Raises:
        UsageError: a µm/px that no mask can have.
        UnsupportedSlideError: fluorescence, or an empty scan.
        ReadError: a region of the slide cannot be read.
    """
    work_mpp, factor = work_resolution(slide, mpp)
    overview = overview or read_overview(slide, work_mpp)
    flags = flag_pixels(overview, factor, min_texture)
    downsample = overview.downsample * factor
    px_per_mm2 = 1e6 / (slide.mpp * downsample) ** 2
    mask = _connect(flags, slide.mpp * downsample, min_area_mm2 * px_per_mm2, max_hole_mm2 * px_per_mm2)
    return TissueMask(mask, slide.mpp * downsample, downsample, slide.size_l0)


def find_tissue_and_picture(slide: Slide) -> tuple[TissueMask, Array]:
    """`find_tissue`, and the slide to be looked at as `read_picture` gives it, of one reading if possible."""
    overview, picture = read_overview_and_picture(slide, work_resolution(slide, MASK_MPP)[0])
    return find_tissue(slide, overview=overview), picture


def flag_pixels(
    overview: Overview, factor: int = 1, min_texture: float = MIN_TEXTURE, strip_px: int = STRIP_PX
) -> Array:
    """Flag the pixels of an overview, a strip at a time.

    Args:
        overview: the slide at 4 µm/px or so; finer adds nothing, coarser loses fat and the blur of ink.
        factor: this many of its pixels, squared, become one of the result.
        min_texture: rms optical density from which on texture is tissue's.
        strip_px: pixels turned into floats at a time.

    Returns:
        uint8 [h, w] of the bits ``TEXTURED`` (widened by ``WINDOW_UM`` onto its surroundings), ``COLOURED``,
        ``COLOURLESS``, ``INK``, ``FADING_INK`` and ``UNSCANNED``; h and w are rounded up.
    """
    glass = _glass_od(overview)
    height, width = (math.ceil(side / factor) for side in overview.scanned.shape)
    halo = math.ceil((WINDOW_UM + 4 * DETAIL_UM) / (overview.mpp * factor))
    rows = max(halo, strip_px // (width * factor**2))
    flags = np.empty((height, width), np.uint8)
    for top in range(0, height, rows):
        bottom, first = min(top + rows, height), max(0, top - halo)
        strip = slice(first * factor, (bottom + halo) * factor)
        rgb, unscanned = _padded(overview.rgb[strip], ~overview.scanned[strip], factor)
        found = _flags_of(rgb, unscanned, glass, overview.mpp, factor, min_texture)
        flags[top:bottom] = found[top - first : bottom - first]
    return flags


def _has(flags: Array, flag: np.uint8) -> Mask:
    return np.asarray(flags & flag != 0)


def _disc(radius_px: float) -> Array:
    """Pixels whose centre lies within the radius: uint8 [k, k]."""
    reach = int(radius_px + 0.5)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    within: Mask = np.hypot(x, y) <= radius_px
    return within.view(np.uint8)


def _glass_od(overview: Overview) -> Floats:
    """Optical density of bare glass, float32 [3]: that of the lightest 2 %.

    Where hardly any glass is to be seen these are pale tissue, which does not shift the colour of the rest.
    """
    step = math.ceil(math.sqrt(overview.scanned.size / GLASS_SAMPLE_PX))  # a sample is enough
    rgb = cv2.merge([overview.rgb[::step, ::step, i].copy() for i in range(3)])  # NumPy copies threes slowly
    scanned = np.ascontiguousarray(overview.scanned[::step, ::step]).view(np.uint8)
    if not scanned.any():
        return np.zeros(3, np.float32)
    counts = (cv2.calcHist([rgb], [i], scanned, [256], [0, 256]).ravel()[::-1] for i in range(3))
    return np.minimum([percentile(_OD[::-1], each, 2) for each in counts], DARKEST_GLASS).astype(np.float32)


def _padded(rgb: Array, unscanned: Mask, factor: int) -> tuple[Array, Mask]:
    """Repeat the last row and column until ``factor`` divides the sides."""
    bottom, right = (-side % factor for side in unscanned.shape)
    pad = ((0, bottom), (0, right))
    return np.pad(rgb, (*pad, (0, 0)), mode="edge"), np.pad(unscanned, pad, mode="edge")


def _flags_of(
    rgb: Array, unscanned: Mask, glass: Floats, mpp: float, factor: int, min_texture: float
) -> Array:
    """The flags of a strip at ``mpp``: uint8 [H / factor, W / factor]."""
    od = np.asarray(cv2.LUT(rgb, _OD[:, None, None] - glass), np.float32)  # [H, W, 3]
    if unscanned.any():
        rim = cv2.dilate(unscanned.view(np.uint8), np.ones((5, 5), np.uint8))
        od[rim > 0] = 0  # blended with the scanner's black
    density = _pooled(_shrunk(od, factor), mpp * factor)  # float32 [h, w, 3]
    channels = np.moveaxis(density, 2, 0).copy()  # float32 [3, h, w]
    low, high = channels.min(axis=0), channels.max(axis=0)  # float32 [h, w], as all that follows
    room = np.empty_like(od)  # reused, because new memory costs as much as the sums
    fine, texture = (_texture(od, um, mpp, factor, room) for um in (FINE_UM, DETAIL_UM))

    textured = texture > min_texture
    chroma = (high - low) / np.maximum(high, 1e-4)  # 0 for R, G, B alike, 1 where one of them is missing
    coloured = (high > STAINED) & (chroma > MIN_CHROMA)
    grey = (high > GREY) & (chroma < MIN_CHROMA)
    if mpp > COLOUR_ONLY_MPP:
        textured |= coloured
    overall = np.sqrt(cv2.transform(density * density, _MEAN))
    ink, fading = _ink(channels, low, high, np.asarray(fine / np.maximum(overall, 1e-4)))
    never = unscanned[factor // 2 :: factor, factor // 2 :: factor]

    flags = np.zeros(ink.shape, np.uint8)
    for where, bit in (
        (textured, TEXTURED),
        (coloured, COLOURED),
        (grey, COLOURLESS),
        (ink, INK),
        (fading, FADING_INK),
        (never, UNSCANNED),
    ):
        flags |= where * bit
    return flags


def _shrunk(values: Floats, factor: int) -> Floats:
    size = (values.shape[1] // factor, values.shape[0] // factor)
    return np.asarray(cv2.resize(values, size, interpolation=cv2.INTER_AREA), np.float32)


def _texture(od: Floats, sigma_um: float, mpp: float, factor: int, room: Floats) -> Floats:
    """Rms of what is denser than its surroundings, doubled for the half that is left out: float32 [h, w].

    That half, the lighter, would reach beyond the edge of the tissue onto the glass.
    """
    cv2.GaussianBlur(od, (0, 0), max(sigma_um / mpp, 0.8), dst=room)
    cv2.threshold(np.subtract(od, room, out=room), 0, 0, cv2.THRESH_TOZERO, dst=room)
    squares = np.asarray(cv2.transform(np.multiply(room, room, out=room), 2 * _MEAN), np.float32)
    # OpenCV filters by FFT, which may leave -1e-9
    return np.sqrt(np.maximum(_pooled(_shrunk(squares, factor), mpp * factor), 0))


def _pooled(values: Floats, mpp: float) -> Floats:
    """Mean over a disc of ``WINDOW_UM``."""
    kernel = _disc(WINDOW_UM / mpp).astype(np.float32)
    kernel /= kernel.sum()
    return np.asarray(cv2.filter2D(values, -1, kernel, borderType=cv2.BORDER_REFLECT), np.float32)


def _ink(channels: Floats, low: Floats, high: Floats, roughness: Floats) -> tuple[Mask, Mask]:
    """Where a pen was surely used, and where its strokes may fade out.

    Stains of H&E and IHC absorb green most, blue at 0.4 to 0.7 of that (DAB: 1.4), red at 0.13 to 1.2. Inks
    differ: black, grey and mixed ones absorb blue as much as green; green and blue ones absorb red far more
    than blue; red ones absorb next to no red (blood: 0.15 to 0.25 of green).
    """
    red, green, blue = channels
    brown = (blue > 1.1 * green) & (blue < 2 * green)
    greyish = (blue > 0.75 * green) & ~brown
    black_over_tissue = (low > 0.3) & (high - low < 0.45 * high)
    green_or_blue = red - blue > 0.75 * green
    foreign = (roughness < SMOOTH_INK) & (greyish | black_over_tissue | green_or_blue)
    faint = (roughness < SMOOTH_INK) & (red - blue > green) & (high > FAINT_BLUE)

    reddish, bluish = blue > 0.65 * green, red > 1.15 * green
    smooth = roughness < SMOOTH_LIKE_STAIN
    sure: Mask = foreign | (smooth & ((reddish & (red < 0.13 * green)) | bluish))
    fading: Mask = foreign | (smooth & ((reddish & (red < 0.25 * green)) | bluish))
    return faint | (sure & (high > STRONG_INK)), faint | (fading & (high > FAINT_INK))


def _connect(flags: Array, mpp: float, min_area_px: float, max_hole_px: float) -> Mask:
    """Flags at ``mpp`` -> bool [h, w]: textured and no ink, with holes filled, without threads and specks."""
    excluded = np.logical_or(_strokes(flags, mpp), _has(flags, UNSCANNED))
    tissue = _morph(cv2.MORPH_ERODE, _has(flags, TEXTURED), (WINDOW_UM - HALO_UM) / mpp)
    tissue = _morph(cv2.MORPH_OPEN, tissue & ~excluded, max(1, OUTLINE_UM / mpp))
    tissue |= _holes(tissue, excluded, _has(flags, COLOURED), max_hole_px)
    return _pieces(tissue, _has(flags, COLOURLESS), min(min_area_px, tissue.size / 4))


def _strokes(flags: Array, mpp: float) -> Mask:
    """Pen strokes: sure ink as wide as a pen, the fading ink connected to it, and their rims."""
    sure = _morph(cv2.MORPH_OPEN, _has(flags, INK), PEN_UM / mpp)
    count, label = cv2.connectedComponents((sure | _has(flags, FADING_INK)).view(np.uint8))
    keep = np.zeros(count, np.bool_)
    keep[label[sure]] = True
    return _morph(cv2.MORPH_DILATE, np.asarray(keep[label]), max(1, HALO_UM / mpp))


def _holes(tissue: Mask, excluded: Mask, coloured: Mask, max_px: float) -> Mask:
    """Holes to fill: enclosed, neither ink nor unscanned; small, or smooth and stained."""
    count, label, stats, _ = cv2.connectedComponentsWithStats((~tissue).view(np.uint8), connectivity=4)
    x, y, w, h, area = stats.T
    enclosed = (x > 0) & (y > 0) & (x + w < tissue.shape[1]) & (y + h < tissue.shape[0])
    clear = np.bincount(label[excluded], minlength=count) < 0.2 * area
    stained = np.bincount(label[coloured], minlength=count) > 0.5 * area
    fill = enclosed & clear & (area < np.where(stained, SMOOTH_HOLES, 1) * max_px)
    fill[0] = False  # the tissue itself
    return np.asarray(fill[label])


def _pieces(tissue: Mask, colourless: Mask, min_px: float) -> Mask:
    """Connected pieces that are large enough and not grey all over, as edges of glass and bubbles are."""
    count, label, stats, _ = cv2.connectedComponentsWithStats(tissue.view(np.uint8), connectivity=4)
    area = stats[:, cv2.CC_STAT_AREA]
    keep = (area >= min_px) & (np.bincount(label[colourless], minlength=count) < 0.5 * area)
    keep[0] = False  # the background
    return np.asarray(keep[label])


def _morph(operation: int, mask: Mask, radius_px: float) -> Mask:
    """Erode, open and so on by a disc; what lies outside the image changes nothing."""
    return np.asarray(cv2.morphologyEx(mask.view(np.uint8), operation, _disc(radius_px))).view(np.bool_)
