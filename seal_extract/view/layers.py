"""A colour for each patch of a slide, by embedding, cluster or number, with the legend that explains it.

Principal components and clusters are fitted to a sample of a whole cohort, so that a colour means the same on
every slide. Numbers are drawn in viridis: of even lightness steps, and told apart without red and green.
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

from seal_extract.errors import GeometryError, UsageError
from seal_extract.hdf5 import DAMAGED, open_hdf5
from seal_extract.patches.grid import PatchGrid
from seal_extract.slides.readers import Array

FINER = 8  # cells a patch is wide where patches do not lie on one grid
MOST_CELLS = 2**26  # of a raster; an overview of a 100,000 px slide in 224 px patches has 200,000
VALUE_PERCENTILES = (1.0, 99.0)  # at the ends of the colours: a few outliers do not dim the rest
CLUSTERS = (2, 12)  # fewest and most
COMPONENTS = 16  # in which clusters are sought
COMPONENT_PERCENTILES = (2.0, 98.0)  # at the ends of its colour
SEED = 0
STOPS = 17  # colours of a legend's bar
PALETTE = 255  # colours that a PNG's palette holds beside the transparent one

Values = NDArray[np.floating]
Rows = NDArray[np.float32]
Colours = NDArray[np.uint8]

_random = threading.Lock()  # OpenCV has one stream of random numbers for all threads


# --- where colours lie ---------------------------------------------------------------------------


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
        first = grid.xy_l0.min(0)
        stride_px = grid.patch_px - grid.overlap_px
        step = float(max(1, round(grid.patch_size_l0 * stride_px / grid.patch_px)))
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
    low, high = (float(v) for v in np.percentile(values, VALUE_PERCENTILES))
    return (low, high) if high > low else (low, low + max(abs(low), 1.0) * 1e-6)


def colour(values: Values, low: float, high: float, count: int = 256) -> NDArray[np.uint8]:
    """Values to ``count`` colours, uint8 [N, 3] RGB; those beyond the ends get the colours of the ends."""
    share = np.clip((np.asarray(values, np.float64) - low) / (high - low), 0, 1)
    return viridis(count)[np.round((count - 1) * share).astype(np.int64)]


def viridis(count: int = 256) -> NDArray[np.uint8]:
    """Viridis in so many steps, uint8 [count, 3] RGB."""
    steps = np.linspace(0, 255, count).round().astype(np.uint8)[:, None]
    return np.asarray(cv2.applyColorMap(steps, cv2.COLORMAP_VIRIDIS)[:, 0, ::-1], np.uint8)


def png(rgba: Array) -> bytes:
    """uint8 [h, w, 4] as PNG."""
    return cv2.imencode(".png", cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGRA))[1].tobytes()


# --- layers --------------------------------------------------------------------------------------


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
    legend = scale_legend(title, unit, values)
    rgb = colour(values, legend["low"], legend["high"], PALETTE)
    return Layer(rgb, legend, values.astype(np.float32, copy=False))


def scale_legend(title: str, unit: str, values: Rows) -> dict[str, Any]:
    """The legend of numbers, as the page draws it."""
    low, high = limits(values)
    return {
        "kind": "scale",
        "title": title,
        "unit": unit,
        "low": low,
        "high": high,
        "least": float(values.min()),
        "most": float(values.max()),
        "colours": _hex(colour(np.linspace(low, high, STOPS), low, high)),
    }


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
        low, high = (np.percentile(sample, p, axis=0).astype(np.float32) for p in COMPONENT_PERCENTILES)
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
    centres = _cluster_centres(components, k)
    distance = (centres**2).sum(1) - 2 * components.project(features) @ centres.T
    labels = np.asarray(distance.argmin(1))  # int64 [N]
    unit = "k-means of the embeddings" + (f"; the same on all {slides} slides" if slides > 1 else "")
    legend = cluster_legend(f"{k} clusters", unit, np.bincount(labels, minlength=k))
    return Layer(_cluster_colours(k)[labels], legend, labels.astype(np.float32))


def cluster_legend(title: str, unit: str, counts: NDArray[np.int64]) -> dict[str, Any]:
    """The legend of clusters with so many patches each, int64 [k]; beyond 12 the colours repeat."""
    colours = _hex(_cluster_colours(len(counts)))
    return {"kind": "clusters", "title": title, "unit": unit, "colours": colours, "counts": counts.tolist()}


def _cluster_centres(components: Components, k: int) -> Rows:
    """Centres of k clusters of the sample, float32 [k, C], the largest first: k-means++, best of three."""
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


def _cluster_colours(k: int) -> Colours:
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
