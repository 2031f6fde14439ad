"""A predicted volume as its page shows it: pictures of its planes, and maps of genes and of domains.

Pictures and maps are made when they are asked for, at a bounded size. Of a volume with more planes or patches
than that, planes and patches between are left out evenly, and the page says so.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import OutputError, UsageError, first_line
from seal_extract.features.scverse import read_store_provenance
from seal_extract.names import shown
from seal_extract.slides.readers import Array
from seal_extract.slides.slide import Slide, coarsest_level
from seal_extract.view.collection import Collection, ShownSlide, jpeg
from seal_extract.view.layers import CLUSTERS, cluster_legend, scale_legend

MOST_PLANES = 512  # of a page
MOST_CELLS = 2**24  # of a map; a byte each
PICTURE_PX = 2048  # longest side of the picture of a plane
MOST_BOX_PX = 2**24  # pixels of the slices of the box together
STRIP_PX = 2**22  # pixels of a slide that are read at a time
STEPS = 254  # in which a map tells values apart; code 0 is no patch
GENES_AT_ONCE = 16
GONE = "it has no features any more"
NO_PICTURE = "their pictures were not found, or cannot be read"

Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class ShownVolume:
    """The OME-Zarr that `predict_volume` wrote, with the slides of its planes.

    Attributes:
        path: the OME-Zarr.
        origin: its provenance.
        slides: of each plane that is shown, with its number in the collection; None if it has no features.
        every: of so many planes one is shown.
        thin: of so many patches across and down one is shown.
        shape: (z, y, x) of the whole expression.
        um: µm of a cell of it along z, y and x.
    """

    path: Path
    origin: dict[str, Any]
    slides: tuple[tuple[int, ShownSlide] | None, ...]
    every: int
    thin: int
    shape: tuple[int, int, int]
    um: tuple[float, float, float]

    @classmethod
    def find(
        cls, collection: Collection, *, most_planes: int = MOST_PLANES, most_cells: int = MOST_CELLS
    ) -> ShownVolume | None:
        """The volume that the encoder of a collection predicted; None if there is none in its folder.

        Args:
            collection: the planes as slides.
            most_planes: more are thinned out.
            most_cells: of a map; patches are thinned out likewise.

        Raises:
            OutputError: the OME-Zarr is damaged, or its planes are not in the collection.
        """
        path = collection.out / f"{collection.encoder}.ome.zarr"
        origin = read_store_provenance(path)
        if origin is None or "planes" not in origin:
            return None
        try:
            (image,) = json.loads((path / ".zattrs").read_text(encoding="utf-8"))["multiscales"]
            _, *um = image["datasets"][0]["coordinateTransformations"][0]["scale"]
            _, *shape = _array(path / "0").shape
        except Exception as exc:  # zarr and damaged metadata raise errors of every kind
            raise _damaged(path, exc) from exc
        every = ceil(shape[0] / most_planes)
        numbered = {slide.name: (i, slide) for i, slide in enumerate(collection.slides)}
        slides = tuple(numbered.get(name) for name in origin["planes"][::every])
        if not any(slides):
            raise OutputError(f"{path}: none of its planes has features in {collection.out}; give its own -o")
        thin = ceil(sqrt(len(slides) * shape[1] * shape[2] / most_cells))
        return cls(path, origin, slides, every, max(1, thin), tuple(shape), tuple(um))

    @property
    def genes(self) -> list[str]:
        """The genes that were predicted."""
        return list(self.origin["genes"])

    @cached_property
    def has_domains(self) -> bool:
        """Whether spatial domains were found."""
        return (self.path / "labels" / "domains" / ".zattrs").exists()

    @cached_property
    def made(self) -> dict[str, Any]:
        """The provenance of the first plane that has features."""
        return next(slide.provenance for _, slide in filter(None, self.slides))

    def gene(self, typed: str) -> str:
        """A gene as it is spelled, from any case of letters.

        Raises:
            UsageError: it is none of the volume's; the message names the nearest.
        """
        spelled = {name.upper(): name for name in self.genes}
        if typed in self.genes:
            return typed
        if typed.upper() not in spelled:
            near = get_close_matches(typed.upper(), spelled, n=3, cutoff=0.5) or list(spelled)[:3]
            names = ", ".join(spelled[name] for name in near)
            raise UsageError(
                f"{typed} is not among the {len(spelled)} genes of {self.path.name}; allowed: {names}, ..."
            )
        return spelled[typed.upper()]

    # --- what the page is told ------------------------------------------------------------------------

    def describe(self, *, shareable: bool = False) -> dict[str, Any]:
        """All that the page needs beside pictures and maps; lengths are in µm.

        With ``shareable`` it tells nothing of this machine.
        """
        made, (z_um, y_um, x_um) = self.made, self.um
        size_um = [side * made["slide"]["mpp"] for side in made["slide"]["size_l0"]]
        _, rows, columns = self.cells
        return {
            "name": shown(self.path.name),
            "encoder": made["encoder"]["name"],
            "size_l0": made["slide"]["size_l0"],
            "mpp": made["slide"]["mpp"],
            "size_um": [*size_um, z_um * self.shape[0]],
            "spacing_um": z_um * self.every,
            "cells": [columns, rows],
            "cell_um": [x_um * self.thin, y_um * self.thin],
            "patches": [self.shape[2], self.shape[1]],
            "patch_um": x_um,
            "planes": [self._plane(i, shareable) for i in range(len(self.slides))],
            "depths": self.shape[0],
            "slice_px": self.slice_px,
            "genes": self.genes,
            "domains": self.has_domains,
            "notes": list(self._notes()),
        }

    def _plane(self, i: int, shareable: bool) -> dict[str, Any]:
        number, slide = self.slides[i] or (None, None)
        problem = GONE if slide is None else slide.problem
        name = self.origin["planes"][i * self.every]
        return {
            "name": shown(name),
            "slide": number,
            "problem": problem and (NO_PICTURE if shareable else shown(problem)),
        }

    def _notes(self) -> Iterator[str]:
        yield f"Genes are predicted from pictures by {self.made['encoder']['name']}. Nothing was measured."
        if self.every > 1:
            yield f"{len(self.slides):,} of {self.shape[0]:,} planes are shown, one of every {self.every}."
        if self.thin > 1:
            yield f"Of every {self.thin} × {self.thin} patches one is shown, as large as all of them."

    # --- pictures -------------------------------------------------------------------------------------

    def side_px(self, longest: int) -> list[int]:
        """Width and height of a picture whose longest side has at most so many pixels."""
        size = self.made["slide"]["size_l0"]
        scale = min(1.0, longest / max(size))
        return [max(1, round(side * scale)) for side in size]

    @property
    def slice_px(self) -> list[int]:
        """Width and height of a slice of the box."""
        return self.side_px(min(PICTURE_PX, int(sqrt(MOST_BOX_PX / len(self.slides)))))

    def picture(self, plane: int, size_px: Sequence[int]) -> bytes:
        """A shown plane as a JPEG of (width, height).

        Raises:
            UsageError: there is no such plane.
            SlideError: its file has moved, is another, or cannot be read.
        """
        if not 0 <= plane < len(self.slides):
            raise UsageError(f"there is no plane {plane}; there are {len(self.slides)}, counted from 0")
        found = self.slides[plane]
        if found is None:
            raise OutputError(f"plane {self.origin['planes'][plane * self.every]}: {GONE}")
        with _one_at_a_time, closing(found[1].open()) as slide:
            return jpeg(_read_plane(slide, (size_px[0], size_px[1])))

    # --- maps -----------------------------------------------------------------------------------------

    @property
    def cells(self) -> tuple[int, int, int]:
        """(z, y, x) of a map."""
        return len(self.slides), ceil(self.shape[1] / self.thin), ceil(self.shape[2] / self.thin)

    def map(self, kind: str, of: str) -> tuple[dict[str, Any], Codes]:
        """The legend of ``"genes"`` (``of`` one) or of ``"domains"``, and a code for each cell of `cells`.

        Code 0 is no patch. Domain k has code k; the values from low to high have codes 1 to 255.

        Raises:
            UsageError: an unknown gene or kind.
            OutputError: the OME-Zarr is damaged.
        """
        if kind == "domains" and self.has_domains:
            labels = self._read("labels/domains/0", ())
            counts = np.bincount(labels.ravel())[1:]
            repeat = f"; colours repeat after {CLUSTERS[1]}" if len(counts) > CLUSTERS[1] else ""
            unit = f"k-means of the embeddings of all planes{repeat}"
            return cluster_legend(f"{len(counts)} domains", unit, counts), labels.astype(np.uint8)
        if kind != "genes":
            raise UsageError(f"the map is {kind!r}; allowed: genes{', domains' * self.has_domains}")
        gene = self.gene(of)
        values = self._read("0", (self.genes.index(gene),))
        there = np.isfinite(values)
        known = values[there] if there.any() else np.zeros(1, np.float32)
        legend = scale_legend(gene, self.origin["unit"], known)
        low, high = legend["low"], legend["high"]
        codes = np.zeros(values.shape, np.uint8)
        for plane, mask, code in zip(values, there, codes, strict=True):
            code[mask] = 1 + np.rint(STEPS * np.clip((plane[mask] - low) / (high - low), 0, 1))
        return legend, codes

    def most_varying(self, count: int) -> list[str]:
        """The genes whose prediction varies most over the volume."""
        some = range(0, len(self.genes), GENES_AT_ONCE)
        parts = [self._read("0", (slice(c, c + GENES_AT_ONCE),)) for c in some]  # float32 (z, gene, y, x)
        variance = np.concatenate([np.nanvar(part, axis=(0, 2, 3)) for part in parts])
        return [self.genes[i] for i in np.argsort(-variance, kind="stable")[:count]]

    def _read(self, array: str, before: tuple[Any, ...]) -> NDArray[Any]:
        """What is shown of an array, plane by plane: [z, ..., y, x]."""
        places = [(*before, z) for z in range(0, self.shape[0], self.every)]
        try:
            whole, step = _array(self.path / array), self.thin
            return np.stack([np.asarray(whole[place])[..., ::step, ::step] for place in places])
        except Exception as exc:  # zarr and its codecs raise errors of every kind
            raise _damaged(self.path, exc) from exc


_one_at_a_time = threading.Lock()  # of planes that are read: a plain image is decoded whole


def _array(path: Path) -> Any:
    import zarr

    return zarr.open_array(str(path), mode="r")


def _damaged(path: Path, exc: Exception) -> OutputError:
    return OutputError(f"{path} is damaged ({first_line(exc)}); predict the volume again")


def _read_plane(slide: Slide, size_px: tuple[int, int]) -> Array:
    """The whole of a plane at (width, height), by area averages, strip by strip: uint8 [h, w, 3]."""
    width, height = size_px
    downsample = slide.size_l0[1] / height
    number = coarsest_level(slide, downsample)
    level = slide.levels[number]
    step = max(1, int(STRIP_PX / level.size_px[0] * level.downsample / downsample))
    picture = np.empty((height, width, 3), np.uint8)
    for y in range(0, height, step):
        rows = min(step, height - y)
        y0, y1 = round(y * downsample), round((y + rows) * downsample)
        part = (level.size_px[0], max(1, round((y1 - y0) / level.downsample)))
        region = slide.read_region((0, y0), number, part)
        picture[y : y + rows] = cv2.resize(region, (width, rows), interpolation=cv2.INTER_AREA)
    return picture
