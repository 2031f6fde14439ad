"""Embeddings as colours: three principal components as red, green and blue, or k clusters.

Both are fitted to a sample of a whole cohort, so that a colour means the same on every slide.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError

CLUSTERS = (2, 12)  # fewest and most
COMPONENTS = 16  # in which clusters are sought
PERCENTILES = (2.0, 98.0)  # of a component, at the ends of its colour
SEED = 0

Rows = NDArray[np.float32]
Colours = NDArray[np.uint8]

_random = threading.Lock()  # OpenCV's random numbers are one stream for all


@dataclass(frozen=True)
class Components:
    """Principal components of a sample of embeddings.

    Attributes:
        mean: float32 [D].
        axes: float32 [D, C], orthonormal, the component of largest variance first.
        low: float32 [C], values of the components at the dark end of a colour.
        high: float32 [C], at the light end.
        sample: float32 [M, C], the sample's own components.
    """

    mean: Rows
    axes: Rows
    low: Rows
    high: Rows
    sample: Rows

    @classmethod
    def of(cls, rows: Rows, components: int = COMPONENTS) -> Components:
        """Fit to embeddings, float32 [M, D], by subspace iteration (Halko, Martinsson, Tropp 2011, 4.4)."""
        mean = rows.mean(0, dtype=np.float64).astype(np.float32)
        centred = rows - mean
        wanted = max(3, min(components, *rows.shape))
        start = np.random.default_rng(SEED).standard_normal((rows.shape[1], wanted + 8)).astype(np.float32)
        basis = np.linalg.qr(start)[0]
        for _ in range(6):
            basis = np.linalg.qr(centred.T @ (centred @ basis))[0]
        _, _, turn = np.linalg.svd(centred @ basis, full_matrices=False)
        axes = (basis @ turn.T)[:, :wanted]
        largest = np.abs(axes).argmax(0)
        axes = axes * np.where(axes[largest, np.arange(axes.shape[1])] < 0, -1, 1)  # a sign of its own choice
        sample = np.asarray(centred @ axes, np.float32)
        low, high = (np.percentile(sample, p, axis=0).astype(np.float32) for p in PERCENTILES)
        return cls(mean, np.asarray(axes, np.float32), low, np.maximum(high, low + 1e-6), sample)

    def project(self, features: Rows) -> Rows:
        """Embeddings [N, D] to components [N, C]."""
        return np.asarray((features - self.mean) @ self.axes, np.float32)

    def rgb(self, features: Rows) -> Colours:
        """Embeddings [N, D] to uint8 [N, 3]: the first three components as red, green and blue."""
        share = (self.project(features) - self.low) / (self.high - self.low)
        colours = np.full((len(features), 3), 128, np.uint8)  # a width below 3 leaves grey
        first = np.clip(share[:, :3], 0, 1)
        colours[:, : first.shape[1]] = np.round(255 * first)
        return colours


def cluster_centres(components: Components, k: int) -> Rows:
    """Centres of k clusters of the sample, float32 [k, C], the largest first: k-means++, best of three.

    Raises:
        UsageError: k outside 2 to 12, or more than there are embeddings.
    """
    most = min(CLUSTERS[1], len(components.sample))
    if not CLUSTERS[0] <= k <= most:
        raise UsageError(f"clusters is {k}; allowed: {CLUSTERS[0]} to {most}")
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 60, 1e-4)
    with _random:
        cv2.setRNGSeed(SEED)
        start = np.zeros((len(components.sample), 1), np.int32)
        _, labels, centres = cv2.kmeans(components.sample, k, start, stop, 3, cv2.KMEANS_PP_CENTERS)
    order = np.argsort(-np.bincount(np.asarray(labels).ravel(), minlength=k), kind="stable")
    return np.asarray(centres, np.float32)[order]


def nearest_centre(points: Rows, centres: Rows) -> NDArray[np.int64]:
    """Which of the centres [k, C] each of the points [N, C] is nearest to: int64 [N]."""
    distance = (centres**2).sum(1) - 2 * points @ centres.T
    return np.asarray(distance.argmin(1))


def cluster_colours(k: int) -> Colours:
    """Colours that are told apart, uint8 [k, 3]: hues around CIELAB's circle, in three lightnesses.

    Any two lie at least 30 apart in CIELAB.
    """
    hue = np.deg2rad(10 + 360 * ((np.arange(k) * 5) % CLUSTERS[1]) / CLUSTERS[1])
    lightness = np.array([55, 78, 38], np.float32)[np.arange(k) % 3]
    lab = np.stack([lightness, 64 * np.cos(hue), 64 * np.sin(hue)], axis=1).astype(np.float32)
    rgb = cv2.cvtColor(lab[None], cv2.COLOR_Lab2RGB)[0]
    return np.asarray(np.round(255 * np.clip(rgb, 0, 1)), np.uint8)
