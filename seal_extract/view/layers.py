"""What a viewer lays over a slide: a colour per patch, with the legend that explains it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError
from seal_extract.hdf5 import DAMAGED, open_hdf5
from seal_extract.view.colours import (
    Components,
    cluster_centres,
    cluster_colours,
    nearest_centre,
)
from seal_extract.view.heatmap import colour, limits

STOPS = 17  # colours of a legend's bar


@dataclass(frozen=True)
class Layer:
    """A colour per patch.

    Attributes:
        rgb: uint8 [N, 3].
        legend: as the page draws it.
        values: float32 [N], what the colours stand for; None where they stand for three numbers at once.
    """

    rgb: NDArray[np.uint8]
    legend: dict[str, Any]
    values: NDArray[np.float32] | None = None


def scale_layer(title: str, unit: str, values: NDArray[np.float32]) -> Layer:
    """Numbers of patches, float32 [N], from dark to light."""
    low, high = limits(values)
    bar = colour(np.linspace(low, high, STOPS), low, high)
    legend = {
        "kind": "scale",
        "title": title,
        "unit": unit,
        "low": low,
        "high": high,
        "least": float(values.min()),
        "most": float(values.max()),
        "colours": _hex(bar),
    }
    return Layer(colour(values, low, high), legend, values.astype(np.float32, copy=False))


def embedding_layer(components: Components, features: NDArray[np.float32], slides: int) -> Layer:
    """The first three principal components as red, green and blue."""
    shared = f"; the same colours on all {slides} slides" if slides > 1 else ""
    legend = {
        "kind": "embedding",
        "title": "Embedding",
        "unit": f"three principal components as red, green, blue{shared}",
    }
    return Layer(components.rgb(features), legend)


def cluster_layer(components: Components, features: NDArray[np.float32], k: int, slides: int) -> Layer:
    """K clusters of the cohort's sample, each patch in the nearest."""
    labels = nearest_centre(components.project(features), cluster_centres(components, k))
    counts = np.bincount(labels, minlength=k)
    legend = {
        "kind": "clusters",
        "title": f"{k} clusters",
        "unit": "k-means of the embeddings" + (f"; the same on all {slides} slides" if slides > 1 else ""),
        "colours": _hex(cluster_colours(k)),
        "counts": counts.tolist(),
    }
    return Layer(cluster_colours(k)[labels], legend, labels.astype(np.float32))


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
            found += [
                Attention(path, c, f"{name}, class {c + 1}" if shape[0] > 1 else name)
                for c in range(shape[0])
            ]
    return tuple(found)


def _hex(rgb: NDArray[np.uint8]) -> list[str]:
    return ["#{:02x}{:02x}{:02x}".format(*row) for row in rgb.tolist()]
