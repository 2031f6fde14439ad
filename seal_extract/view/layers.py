"""A colour for each patch of a slide, by embedding, cluster or number, with the legend that explains it.

Principal components and clusters are fitted to a sample of a whole cohort, so that a colour means the same on
every slide.
"""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from seal_extract.errors import UsageError
from seal_extract.hdf5 import DAMAGED, open_hdf5
from seal_extract.view.heatmap import PatchRaster, colour, limits
from seal_extract.view.tiles import png

CLUSTERS = (2, 12)  # fewest and most
COMPONENTS = 16  # in which clusters are sought
PERCENTILES = (2.0, 98.0)  # of a component, at the ends of its colour
SEED = 0
STOPS = 17  # colours of a legend's bar
PALETTE = 255  # colours that a PNG's palette holds beside the transparent one

Rows = NDArray[np.float32]
Colours = NDArray[np.uint8]

_random = threading.Lock()  # OpenCV has one stream of random numbers for all threads


@dataclass(frozen=True)
class Layer:
    """A colour for each patch.

    Attributes:
        rgb: uint8 [N, 3].
        legend: as the page draws it.
        values: float32 [N], what the colours stand for; None if they stand for three numbers at once.
    """

    rgb: Colours
    legend: dict[str, Any]
    values: Rows | None = None

    def png(self, raster: PatchRaster) -> bytes:
        """A picture of one pixel per cell, transparent where no patch is, with a palette if possible."""
        numbers = self.rgb.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
        colours, index = np.unique(numbers, return_inverse=True)
        if len(colours) > PALETTE:
            return png(raster.paint(self.rgb))
        number = np.repeat(index.reshape(-1, 1).astype(np.uint8) + 1, 3, axis=1)  # 0 is no patch
        picture = Image.fromarray(np.ascontiguousarray(raster.paint(number)[..., 0]))
        picture.putpalette(b"\0\0\0" + b"".join(int(c).to_bytes(3, "big") for c in colours))
        file = io.BytesIO()
        picture.save(file, "PNG", transparency=0, optimize=True)
        return file.getvalue()


def scale_layer(title: str, unit: str, values: Rows) -> Layer:
    """Numbers of patches, float32 [N], from dark to light."""
    low, high = limits(values)
    legend = {
        "kind": "scale",
        "title": title,
        "unit": unit,
        "low": low,
        "high": high,
        "least": float(values.min()),
        "most": float(values.max()),
        "colours": _hex(colour(np.linspace(low, high, STOPS), low, high)),
    }
    return Layer(colour(values, low, high, PALETTE), legend, values.astype(np.float32, copy=False))


# --- embeddings -----------------------------------------------------------------------------------


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
    def of(cls, rows: Rows) -> Components:
        """Fit to embeddings, float32 [M, D], by subspace iteration (Halko, Martinsson, Tropp 2011, 4.4)."""
        mean = rows.mean(0, dtype=np.float64).astype(np.float32)
        centred = rows - mean
        wanted = max(3, min(COMPONENTS, *rows.shape))
        start = np.random.default_rng(SEED).standard_normal((rows.shape[1], wanted + 8)).astype(np.float32)
        basis = np.linalg.qr(start)[0]
        for _ in range(6):
            basis = np.linalg.qr(centred.T @ (centred @ basis))[0]
        _, _, turn = np.linalg.svd(centred @ basis, full_matrices=False)
        axes = (basis @ turn.T)[:, :wanted]
        largest = np.abs(axes).argmax(0)
        axes = axes * np.where(axes[largest, np.arange(axes.shape[1])] < 0, -1, 1)  # the sign is arbitrary
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


def embedding_layer(components: Components, features: Rows, slides: int) -> Layer:
    """The first three principal components as red, green and blue."""
    shared = f"; the same colours on all {slides} slides" if slides > 1 else ""
    unit = f"three principal components as red, green, blue{shared}"
    return Layer(components.rgb(features), {"kind": "embedding", "title": "Embedding", "unit": unit})


def cluster_layer(components: Components, features: Rows, k: int, slides: int) -> Layer:
    """K clusters of the cohort's sample, each patch in the nearest.

    Raises:
        UsageError: k outside 2 to 12, or more than there are embeddings.
    """
    labels = nearest_centre(components.project(features), cluster_centres(components, k))
    legend = {
        "kind": "clusters",
        "title": f"{k} clusters",
        "unit": "k-means of the embeddings" + (f"; the same on all {slides} slides" if slides > 1 else ""),
        "colours": _hex(cluster_colours(k)),
        "counts": np.bincount(labels, minlength=k).tolist(),
    }
    return Layer(cluster_colours(k)[labels], legend, labels.astype(np.float32))


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
    """Index of the nearest of the centres [k, C] for each of the points [N, C]: int64 [N]."""
    distance = (centres**2).sum(1) - 2 * points @ centres.T
    return np.asarray(distance.argmin(1))


def cluster_colours(k: int) -> Colours:
    """Distinct colours, uint8 [k, 3]: hues around CIELAB's circle, in three lightnesses.

    Any two are at least 30 apart in CIELAB.
    """
    hue = np.deg2rad(10 + 360 * ((np.arange(k) * 5) % CLUSTERS[1]) / CLUSTERS[1])
    lightness = np.array([55, 78, 38], np.float32)[np.arange(k) % 3]
    lab = np.stack([lightness, 64 * np.cos(hue), 64 * np.sin(hue)], axis=1).astype(np.float32)
    rgb = cv2.cvtColor(lab[None], cv2.COLOR_Lab2RGB)[0]
    return np.asarray(np.round(255 * np.clip(rgb, 0, 1)), np.uint8)


def _hex(rgb: Colours) -> list[str]:
    return ["#{:02x}{:02x}{:02x}".format(*row) for row in rgb.tolist()]


# --- attention ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """Attention of one class in a slide-level file.

    Attributes:
        path: the file; its dataset ``attention`` is float [C, N].
        column: the class, counted from 0.
        title: what a list shows.
    """

    path: Path
    column: int
    title: str

    def layer(self, xy_l0: NDArray[np.int64]) -> Layer:
        """One number per patch, at int64 [N, 2], in multiples of the slide's mean, as the weights add to 1.

        Raises:
            UsageError: the file has another count of patches, or cannot be read.
        """
        try:
            with open_hdf5(self.path) as file:
                values = np.asarray(file["attention"][self.column], np.float32)
                same = "coords" not in file or np.array_equal(file["coords"][()], xy_l0)
        except DAMAGED as exc:
            raise UsageError(f"the attention in {self.path.name} cannot be read; write it again") from exc
        if not same or values.shape != (len(xy_l0),) or not np.isfinite(values).all():
            raise UsageError(
                f"{self.path} holds attention over other patches than the {len(xy_l0)} of these features; "
                "write it again from them"
            )
        mean = float(values.mean())
        unit = "attention, in multiples of the slide's mean"
        return scale_layer(self.title, unit, values / mean if mean > 0 else values)


def find_attention(files: tuple[Path, ...]) -> tuple[Attention, ...]:
    """All classes of all files that have a dataset ``attention``."""
    found: list[Attention] = []
    for path in files:
        try:
            with open_hdf5(path) as file:
                shape: tuple[int, ...] = file["attention"].shape if "attention" in file else ()
        except DAMAGED:
            continue
        if len(shape) == 2:
            name = path.parent.name.removeprefix("slide_features_")
            titles = [f"{name}, class {c + 1}" if shape[0] > 1 else name for c in range(shape[0])]
            found += [Attention(path, column, title) for column, title in enumerate(titles)]
    return tuple(found)
