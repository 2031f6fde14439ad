"""What each place of an overview looks like: structured, stained, inked.

Whatever is in the section is structured on the scale of cells, even pale stroma and fat: its optical density
varies by 0.014 (rms) and more within some ten µm. Glass, a wash of eosin or a shadow is smooth there, below
0.004, as dark or as coloured as it may be. Three things are structured and no tissue: dust and the edges of
glass, which are colourless or small, and pen, told by colours that no stain has and by its smoothness: ink is
out of focus, for it lies on top of the cover slip.

Method and thresholds are this package's own, measured on her2st, TCGA and CMU slides; optical density after
Ruifrok and Johnston, Anal Quant Cytol Histol 23 (2001) 291.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from seal_extract.slides.overview import Overview
from seal_extract.slides.readers import Array
from seal_extract.tissue.geojson import Mask

Floats: TypeAlias = NDArray[np.float32]

DETAIL_UM = 12.0  # sigma: finer than this is texture (nuclei, fibres, walls of fat cells)
FINE_UM = 5.0  # sigma: finer than this is lost in ink out of focus, and not in tissue
WINDOW_UM = 36.0  # radius over which texture is pooled: reaches across fat cells
MIN_TEXTURE = 0.006  # rms optical density; glass below 0.004, the palest fat above 0.014
MIN_CHROMA = 0.15  # (max - min) / max over R, G, B of optical density: edges of glass below, stain above 0.3
SMOOTH_INK = 0.15  # fine texture / optical density: ink below, even over tissue; most tissue in focus above
SMOOTH_LIKE_STAIN = 0.1  # the same for inks whose colour is not far from eosin's or haematoxylin's
STRONG_INK = 0.15  # optical density where a stroke is sure, and ...
FAINT_INK = 0.08  # ... where it fades out
FAINT_BLUE = 0.04  # both for the green and blue inks farthest from any stain
STAINED = 0.1  # optical density of smooth tissue (colloid, mucin)
GREY = 0.03  # optical density from which on a lack of colour can be told
DARKEST_GLASS = 0.25  # optical density of bare glass under a dim or coloured lamp
COLOUR_ONLY_MPP = 10.0  # µm/px above which texture tells nothing, for cells cannot be seen
STRIP_PX = 2_000_000  # pixels turned into floats at a time

_OD = -np.log10(np.maximum(np.arange(256), 1) / 255).astype(np.float32)

# bits of the evidence
TEXTURED, COLOURED, COLOURLESS, INK, FADING_INK, UNSCANNED = (np.uint8(1 << bit) for bit in range(6))


def gather_evidence(overview: Overview, factor: int = 1, min_texture: float = MIN_TEXTURE) -> Array:
    """Judge an overview, a strip at a time.

    Args:
        overview: the slide at 4 µm/px or so; finer tells nothing new, coarser loses fat and the blur of ink.
        factor: this many of its pixels, squared, become one of the result.
        min_texture: rms optical density from which on texture is tissue's.

    Returns:
        uint8 [h, w] of the bits ``TEXTURED`` (widened by ``WINDOW_UM`` onto its surroundings), ``COLOURED``,
        ``COLOURLESS``, ``INK``, ``FADING_INK`` and ``UNSCANNED``; h and w are rounded up.
    """
    glass = _glass_od(overview)
    height, width = (math.ceil(side / factor) for side in overview.scanned.shape)
    halo = math.ceil((WINDOW_UM + 4 * DETAIL_UM) / (overview.mpp * factor))
    rows = max(halo, STRIP_PX // (width * factor**2))
    evidence = np.empty((height, width), np.uint8)
    for top in range(0, height, rows):
        bottom, first = min(top + rows, height), max(0, top - halo)
        strip = slice(first * factor, (bottom + halo) * factor)
        rgb, unscanned = _padded(overview.rgb[strip], ~overview.scanned[strip], factor)
        judged = _judge(rgb, unscanned, glass, overview.mpp, factor, min_texture)
        evidence[top:bottom] = judged[top - first : bottom - first]
    return evidence


def has(evidence: Array, bit: np.uint8) -> Mask:
    """Where a bit of the evidence is set: bool [h, w]."""
    return np.asarray(evidence & bit != 0)


def disc(radius_px: float) -> Array:
    """Pixels whose centre lies within the radius: uint8 [k, k]."""
    reach = int(radius_px + 0.5)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    within: Mask = np.hypot(x, y) <= radius_px
    return within.view(np.uint8)


def _glass_od(overview: Overview) -> Floats:
    """Optical density of bare glass, float32 [3]: that of the lightest 2 %.

    Where hardly any glass is to be seen these are pale tissue, which does not shift the colour of the rest.
    """
    step = math.ceil(math.sqrt(overview.scanned.size / STRIP_PX))  # a sample is enough
    rgb = overview.rgb[::step, ::step][overview.scanned[::step, ::step]]
    if not len(rgb):
        return np.zeros(3, np.float32)
    return np.minimum(np.percentile(_OD[rgb], 2, axis=0), DARKEST_GLASS).astype(np.float32)


def _padded(rgb: Array, unscanned: Mask, factor: int) -> tuple[Array, Mask]:
    """Repeat the last row and column until ``factor`` divides the sides."""
    bottom, right = (-side % factor for side in unscanned.shape)
    pad = ((0, bottom), (0, right))
    return np.pad(rgb, (*pad, (0, 0)), mode="edge"), np.pad(unscanned, pad, mode="edge")


def _judge(rgb: Array, unscanned: Mask, glass: Floats, mpp: float, factor: int, min_texture: float) -> Array:
    """Evidence for a strip at ``mpp``: uint8 [H / factor, W / factor]."""
    od = _OD[rgb] - glass  # float32 [H, W, 3]
    rim = cv2.dilate(unscanned.view(np.uint8), np.ones((5, 5), np.uint8))  # blended with the scanner's black
    od[rim > 0] = 0
    small = _shrunk(od, factor)  # float32 [h, w, 3], as all that follows
    density = _pooled(small, mpp * factor)
    fine = _root_mean(_shrunk(_denser(od, FINE_UM / mpp), factor), mpp * factor)
    texture = _root_mean(_shrunk(_denser(od, DETAIL_UM / mpp), factor), mpp * factor)

    textured = _rms(texture) > min_texture
    high, chroma = _highest(density), _chroma(density)
    coloured = (high > STAINED) & (chroma > MIN_CHROMA)
    grey = (high > GREY) & (chroma < MIN_CHROMA)
    if mpp > COLOUR_ONLY_MPP:
        textured |= coloured
    ink, fading = _ink(density, np.asarray(_rms(fine) / np.maximum(_rms(density), 1e-4)))
    never = unscanned[factor // 2 :: factor, factor // 2 :: factor]

    evidence = np.zeros(ink.shape, np.uint8)
    for where, bit in (
        (textured, TEXTURED),
        (coloured, COLOURED),
        (grey, COLOURLESS),
        (ink, INK),
        (fading, FADING_INK),
        (never, UNSCANNED),
    ):
        evidence[where] |= bit
    return evidence


def _shrunk(values: Floats, factor: int) -> Floats:
    size = (values.shape[1] // factor, values.shape[0] // factor)
    return np.asarray(cv2.resize(values, size, interpolation=cv2.INTER_AREA), np.float32)


def _denser(od: Floats, sigma_px: float) -> Floats:
    """Square of what is denser than its surroundings, doubled for the half that is left out.

    That half, the lighter, would reach beyond the edge of the tissue onto the glass.
    """
    difference = np.maximum(od - cv2.GaussianBlur(od, (0, 0), max(sigma_px, 0.8)), 0)
    return np.asarray(2 * difference * difference, np.float32)


def _pooled(values: Floats, mpp: float) -> Floats:
    """Mean over a disc of ``WINDOW_UM``."""
    kernel = disc(WINDOW_UM / mpp).astype(np.float32)
    kernel /= kernel.sum()
    return np.asarray(cv2.filter2D(values, -1, kernel, borderType=cv2.BORDER_REFLECT), np.float32)


def _root_mean(squares: Floats, mpp: float) -> Floats:
    return np.sqrt(np.maximum(_pooled(squares, mpp), 0))  # OpenCV filters by FFT, which may leave -1e-9


def _rms(values: Floats) -> Floats:
    return np.asarray(np.sqrt(np.einsum("hwc,hwc->hw", values, values) / 3))


def _highest(values: Floats) -> Floats:
    return np.asarray(np.maximum.reduce(cv2.split(values)))  # numpy is slow along an axis of 3


def _lowest(values: Floats) -> Floats:
    return np.asarray(np.minimum.reduce(cv2.split(values)))


def _chroma(values: Floats) -> Floats:
    """0 where R, G and B are alike, 1 where one of them is missing."""
    high = _highest(values)
    return np.asarray((high - _lowest(values)) / np.maximum(high, 1e-4))


def _ink(density: Floats, roughness: Floats) -> tuple[Mask, Mask]:
    """Where a pen was surely used, and where its strokes may fade out.

    Stains of H&E and IHC absorb green most, blue at 0.4 to 0.7 of that (DAB: 1.4), red at 0.13 to 1.2. Inks
    differ: black, grey and mixed ones absorb blue as much as green; green and blue ones absorb red far more
    than blue; red ones absorb next to no red (blood: 0.15 to 0.25 of green).
    """
    red, green, blue = cv2.split(density)
    low, high = _lowest(density), _highest(density)
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
