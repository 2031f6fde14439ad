"""Noise, fibres, grain, nuclei and stains: what a synthetic section is made of, all periodic or hashed."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Float = npt.NDArray[np.floating[Any]]
Axis = Float
Index = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

GLASS_RGB = (239, 238, 240)
EOSIN_OD = (0.080, 0.405, 0.225)  # optical density of one unit of stain in R, G, B
HAEMATOXYLIN_OD = (0.590, 0.680, 0.320)
EOSIN_UNITS, HAEMATOXYLIN_UNITS = 1.8, 1.3  # what a coverage of 255 stands for
FIBRE_PERIOD_UM = 512.0
NUCLEUS_ANGLES = 16  # in which each nucleus is drawn, over half a turn


class Noise:
    """Smooth noise of unit variance for any number of named fields.

    One periodic lattice of band-passed white noise serves them all, each from an offset of its own. The
    period is 32 wavelengths, and nothing is drawn from one field alone.
    """

    SIDE, SAMPLES = 512, 16  # nodes of the lattice, nodes per wavelength

    def __init__(self, seed: int) -> None:
        self._seed = seed
        across = np.fft.fftfreq(self.SIDE, 1 / self.SAMPLES)
        frequency = np.hypot(across[:, None], across[: self.SIDE // 2 + 1])
        white = np.fft.rfft2(np.random.default_rng(seed).standard_normal((self.SIDE, self.SIDE)))
        lattice = np.fft.irfft2(white * np.exp(-(((frequency - 0.9) / 0.45) ** 2)))
        self._lattice: Float = (lattice / lattice.std()).astype(np.float32)

    def __call__(self, field: str, x_um: Axis, y_um: Axis, wavelength_um: float) -> Float:
        """The field over the grid of ``x_um`` [w] and ``y_um`` [h], both evenly spaced: [h, w]."""
        scale = self.SAMPLES / wavelength_um
        shift = np.random.default_rng([self._seed, *field.encode()]).uniform(0, self.SIDE, 2)
        columns, column_weights = _spline(x_um * scale + shift[0])
        rows, row_weights = _spline(y_um * scale + shift[1])
        band = self._lattice[np.arange(rows[0], rows[-1] + 4) % self.SIDE]
        taps = (w * band[:, (columns + k) % self.SIDE] for k, w in enumerate(column_weights))
        band = functools.reduce(operator.iadd, taps)
        return functools.reduce(
            operator.iadd, (w[:, None] * band[rows - rows[0] + k] for k, w in enumerate(row_weights))
        )


def _spline(at: Axis) -> tuple[Index, list[Float]]:
    """The first of the four nodes a cubic B-spline needs at each position, and the four weights."""
    node = np.floor(at).astype(np.int64)
    t = (at - node).astype(np.float32)
    weights = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]
    return node - 1, [w / 6 for w in weights]


def hashed(x: Index, y: Index, salt: int) -> Axis:
    """A number in [0, 1) for each lattice cell, unrelated between cells and salts (SplitMix64)."""
    z = x.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + y.astype(np.uint64)
    z = z * np.uint64(0xD1342543DE82EF95) + np.uint64(salt * 0xA0761D6478BD642F % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    z = (z ^ (z >> np.uint64(31))) >> np.uint64(11)
    return np.asarray(z / 2.0**53, np.float64)


def ramp(value: Float, width: float) -> Float:
    """0 below ``-width``, 1 above ``width``, straight between."""
    return np.asarray(np.clip(value * np.float32(0.5 / width) + np.float32(0.5), 0, 1))


@functools.cache
def stain_table() -> npt.NDArray[np.uint32]:
    """RGB of every pair of coverages, four bytes each at ``eosin << 8 | haematoxylin``."""
    unit = (np.arange(256) / 255) ** 2  # squared: fine steps where stain is faint and the eye keen
    eosin, haematoxylin = unit * EOSIN_UNITS, unit * HAEMATOXYLIN_UNITS
    density = eosin[:, None, None] * EOSIN_OD + haematoxylin[:, None] * HAEMATOXYLIN_OD
    table = np.zeros((256, 256, 4), np.uint8)
    table[..., :3] = np.rint(GLASS_RGB * 10**-density)
    return table.reshape(-1, 4).view(np.uint32).ravel()


def filtered(
    side: int, mpp: float, rng: np.random.Generator, response: Callable[[Axis, Axis], Axis]
) -> Float:
    """White noise through ``response``, a function of frequencies per µm, of unit variance: [side, side]."""
    across = np.fft.fftfreq(side, mpp)
    white = np.fft.rfft2(rng.standard_normal((side, side)))
    noise = np.fft.irfft2(white * response(across[: side // 2 + 1], across[:, None]))
    return np.asarray(noise / noise.std(), np.float32)


@functools.lru_cache(maxsize=2)
def fibre_texture(mpp: float) -> Bytes:
    """Wavy fibres along x, from bundles of 6 µm down to fibrils: 0 between them, 255 in the densest."""
    side = int(np.clip(2 ** round(math.log2(FIBRE_PERIOD_UM / mpp)), 256, 2048))
    rng = np.random.default_rng(1)
    texture = np.zeros((side, side), np.float32)
    for weight, long_um, thick_um in ((0.55, 60, 6.0), (0.6, 40, 2.2), (0.55, 22, 1.0), (0.25, 3, 0.7)):
        fibrous = functools.partial(_fibrous, long_um=long_um, thick_um=thick_um)
        texture += weight * filtered(side, mpp, rng, fibrous)
    wave = filtered(side, mpp, rng, lambda fx, fy: np.exp(-(((np.hypot(fx, fy) * 28 - 1) / 0.5) ** 2)))
    y, x = np.mgrid[:side, :side].astype(np.float32)
    bent = cv2.remap(texture, x, y + wave * (2.2 / mpp), cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    return np.asarray(np.clip(132 + 48 * bent / bent.std(), 0, 255), np.uint8)


def _fibrous(fx: Axis, fy: Axis, long_um: float, thick_um: float) -> Axis:
    """Long along x, thin along y, and nothing thicker than 40 µm, which would show the period."""
    thin = np.exp(-((fx * long_um) ** 2) - (fy * thick_um) ** 2)
    return np.asarray(thin * (1 - np.exp(-((fy * 40) ** 2))))


@functools.lru_cache(maxsize=4)
def grain_texture(side: int, mpp: float) -> tuple[Bytes, Bytes]:
    """Cytoplasm's unevenness in eosin and in haematoxylin, about 128; on glass, the sensor's noise."""

    def grain(rng: np.random.Generator) -> Bytes:
        fine = filtered(side, mpp, rng, lambda fx, fy: _band(np.hypot(fx, fy), 0.7, 5))
        coarse = filtered(side, mpp, rng, lambda fx, fy: _band(np.hypot(fx, fy), 4, 14))
        noise = rng.standard_normal((side, side))
        return np.asarray(np.clip(128 + 22 * fine + 16 * coarse + 4 * noise, 0, 255), np.uint8)

    return grain(np.random.default_rng(2)), grain(np.random.default_rng(3))


def _band(frequency: Axis, short_um: float, long_um: float) -> Axis:
    low, high = np.exp(-((frequency * short_um) ** 2)), np.exp(-((frequency * long_um) ** 2))
    return np.asarray(low * (1 - high))


@functools.lru_cache(maxsize=4)
def nucleus_stamps(mpp: float) -> tuple[tuple[tuple[Bytes, ...], ...], ...]:
    """Haematoxylin of single nuclei, as ``[kind][shape][angle]`` -> [s, s].

    Kinds: 0 epithelial (6-10 µm, vesicular, with a rim), 1 spindle (12 x 3 µm), 2 lymphocyte (6 µm, dark).
    """
    rng = np.random.default_rng(4)
    kinds = ((4.2, 3.2, 150, 24, 0.22), (5.8, 1.4, 180, 0, 0.25), (3.0, 2.8, 200, 0, 0.10))
    return tuple(tuple(_nucleus(mpp, rng, *kind) for _ in range(8)) for kind in kinds)


def _nucleus(
    mpp: float, rng: np.random.Generator, a_um: float, b_um: float, tone: float, rim: float, spread: float
) -> tuple[Bytes, ...]:
    """One nucleus, an uneven ellipse with semi-axes of about ``a_um`` and ``b_um``, at every angle."""
    a, b = a_um * (1 + spread * rng.uniform(-1, 1)), b_um * (1 + spread * rng.uniform(-1, 1))
    tone += rng.uniform(-28, 28)
    depth, phase = rng.normal(0, 0.05, 3) / (1, 1.5, 2.5), rng.uniform(0, 2 * math.pi, 3)
    along = np.arange(-math.ceil(8.5 / mpp), math.ceil(8.5 / mpp) + 1) * mpp
    chromatin = cv2.GaussianBlur(rng.standard_normal((len(along), len(along))), (0, 0), 0.55 / mpp)
    chromatin *= (17 if rim else 10) / chromatin.std()
    stamps = []
    for angle in np.arange(NUCLEUS_ANGLES) * (math.pi / NUCLEUS_ANGLES):
        u = along * math.cos(angle) + along[:, None] * math.sin(angle)
        v = along[:, None] * math.cos(angle) - along * math.sin(angle)
        around = np.arctan2(v / b, u / a)
        bulge = sum(depth[k] * np.cos((k + 2) * around + phase[k]) for k in range(3))
        radius = np.hypot(u / a, v / b) / (1 + bulge)
        body = tone + rim * np.exp(-(((radius - 0.88) / 0.14) ** 2)) + chromatin
        stamps.append(np.clip(np.clip((1 - radius) * b / 0.7 + 0.5, 0, 1) * body, 0, 255).astype(np.uint8))
    return tuple(stamps)
