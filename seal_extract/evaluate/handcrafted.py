"""Handcrafted colour and texture features of patches: the baseline for every encoder.

Neighbouring sections look alike, so that colour alone predicts some expression; an encoder must do better.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError

# optical densities of red, green, blue (Ruifrok and Johnston, Anal. Quant. Cytol. Histol. 2001, 23: 291-299)
STAINS = {"haematoxylin": (0.650, 0.704, 0.286), "eosin": (0.072, 0.990, 0.105)}
SCALES = (1, 2, 4, 8)  # px: sides of the squares that are averaged before gradients are taken
NUCLEAR_OD = 0.5  # of haematoxylin, above: nucleus
GLASS_OD = 0.06  # of the mean of red, green and blue, below: glass
TEXTURE_PX = 4  # side of the squares that are averaged before patterns are counted

Plane = NDArray[Any]  # float32 [S, S]
_DENSITY = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)  # float32 [256], optical density of a byte
_UNMIX = np.linalg.pinv(np.array(list(STAINS.values()), np.float64).T).astype(np.float32)  # [2, 3]


def _uniform_patterns() -> NDArray[np.uint8]:
    """Bin of each 8-bit ring of comparisons (Ojala et al., TPAMI 2002, 24: 971-987).

    Rings with at most two changes fall by how many bits are set, 0 to 8; all others into bin 9.
    """
    bins = np.empty(256, np.uint8)
    for code in range(256):
        bits = [code >> i & 1 for i in range(8)]
        changes = sum(a != b for a, b in zip(bits, bits[1:] + bits[:1], strict=True))
        bins[code] = sum(bits) if changes <= 2 else 9
    return bins


_PATTERNS = _uniform_patterns()
_RING = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))  # (dy, dx), around once

FEATURES: tuple[str, ...] = (
    *(f"{channel} {s}" for channel in ("red", "green", "blue", *STAINS) for s in ("mean", "sd")),
    *(f"{stain} gradient at {scale} px" for stain in STAINS for scale in SCALES),
    "nuclear share",
    "glass share",
    "correlation of the stains",
    *(f"pattern {bits} of 8" for bits in range(9)),
)  # the best on her2st of about a dozen lists, tried on all folds: a strong baseline


def handcrafted_features(patches: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Describe patches by the numbers that `FEATURES` names.

    Mean and standard deviation of red, green, blue and of the optical densities of haematoxylin and eosin
    (colour deconvolution); the logarithm of each stain's mean gradient at four scales; shares of nuclei and
    glass; the correlation of the stains; the histogram of local binary patterns of grey. Lengths are in
    pixels, so that only patches of one µm/px can be compared.

    Args:
        patches: uint8 [N, 3, S, S], RGB.

    Returns:
        float32 [N, F], finite, F the length of `FEATURES`.

    Raises:
        UsageError: another dtype or shape, or patches smaller than 32 px.
    """
    if patches.dtype != np.uint8 or patches.ndim != 4 or patches.shape[1] != 3 or min(patches.shape[2:]) < 32:
        raise UsageError(
            f"patches are {patches.dtype} {list(patches.shape)}; allowed: uint8 [N, 3, S, S], S 32 or more"
        )
    features = np.empty((len(patches), len(FEATURES)), np.float32)
    for row, patch in enumerate(patches):
        features[row] = _describe(np.ascontiguousarray(patch.transpose(1, 2, 0)))
    return features


def _describe(pixels: NDArray[np.uint8]) -> list[float]:
    """The numbers of one patch, uint8 [S, S, 3]."""
    density = _DENSITY[pixels]  # float32 [S, S, 3]
    stains = cv2.transform(density, _UNMIX)  # float32 [S, S, 2]
    haematoxylin: Plane = stains[..., 0]
    eosin: Plane = stains[..., 1]
    planes = [*(pixels[..., i].astype(np.float32) for i in range(3)), haematoxylin, eosin]
    numbers = [float(number) for plane in planes for number in (plane.mean(), plane.std())]
    numbers += [_gradient(plane, scale) for plane in (haematoxylin, eosin) for scale in SCALES]
    numbers += [float((haematoxylin > NUCLEAR_OD).mean()), float((density.mean(2) < GLASS_OD).mean())]
    numbers.append(_correlation(haematoxylin, eosin))
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    return numbers + _patterns(_shrunk(grey, TEXTURE_PX))


def _gradient(plane: Plane, scale: int) -> float:
    """Log of the mean length of the gradient, after squares of ``scale`` px were averaged."""
    small = _shrunk(plane, scale)
    dx, dy = cv2.Sobel(small, cv2.CV_32F, 1, 0), cv2.Sobel(small, cv2.CV_32F, 0, 1)
    return float(np.log(cv2.magnitude(dx, dy).mean() + 1e-3))


def _shrunk(plane: NDArray[Any], scale: int) -> NDArray[Any]:
    if scale == 1:
        return plane
    height, width = plane.shape
    return cv2.resize(plane, (width // scale, height // scale), interpolation=cv2.INTER_AREA)


def _correlation(a: Plane, b: Plane) -> float:
    """Pearson r of two planes; 0 where one is constant."""
    spread = float(a.std() * b.std())
    return float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread > 1e-9 else 0.0


def _patterns(grey: NDArray[np.uint8]) -> list[float]:
    """Shares of the nine uniform local binary patterns."""
    height, width = grey.shape
    middle = grey[1:-1, 1:-1]
    codes = np.zeros(middle.shape, np.uint8)
    for bit, (dy, dx) in enumerate(_RING):
        neighbour = grey[1 + dy : height - 1 + dy, 1 + dx : width - 1 + dx]
        codes |= (neighbour >= middle).astype(np.uint8) << np.uint8(bit)
    shares = np.bincount(_PATTERNS[codes].ravel(), minlength=10) / codes.size
    return [float(share) for share in shares[:9]]
