"""The metadata of OME-Zarr (NGFF) 0.4 and 0.5: which folders are images, and the levels of an image.

Source: Moore et al. 2023, doi.org/10.1007/s00418-023-02209-1; https://ngff.openmicroscopy.org/0.4 and /0.5.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from seal_extract.errors import SlideOpenError, UnsupportedSlideError
from seal_extract.slides import remote
from seal_extract.slides.readers import Array
from seal_extract.slides.tiff import MOST_TILE_PX
from seal_extract.slides.tiff_pixels import BESIDE_THE_SLIDE, UM_PER_UNIT

METADATA = ("zarr.json", ".zattrs", ".zgroup", ".zarray")
IMAGES = {"multiscales", "bioformats2raw.layout", "plate", "well"}  # attributes, one of which a slide has
ZIPPED = (".ozx", ".zarr.zip")
LEAST_TILE_PX = 512  # smaller chunks are read several at a time
UM_PER_NAMED_UNIT = UM_PER_UNIT | {
    "angstrom": 1e-4, "nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6
}  # fmt: skip

Transform = tuple[list[float], list[float]]  # scale and shift, each along x and y


# --- which folders, files and URLs are stores -----------------------------------------------------------


def is_store(where: Path | str) -> bool:
    """Whether a path or URL is of an OME-Zarr store, by its name; or a folder, by what lies in it."""
    path = remote.place(where) if isinstance(where, str) else where
    if path.name.lower().endswith(ZIPPED):
        return isinstance(where, Path)  # a file: it is copied before it is read
    if isinstance(where, Path) and not where.is_dir():
        return False
    return is_inside_store(path) or (isinstance(where, Path) and any((where / n).exists() for n in METADATA))


def has_image(folder: Path) -> bool:
    """Whether the attributes of a store in a folder describe images; True if they cannot be read."""
    try:
        texts = [file.read_text("utf-8") for name in METADATA[:2] if (file := folder / name).is_file()]
        attrs = json.loads(texts[0]) if texts else {}
        attrs = attrs.get("attributes", attrs)
        return not IMAGES.isdisjoint(attrs.get("ome", attrs))
    except (OSError, ValueError, AttributeError, TypeError):
        return True


def is_inside_store(path: Path) -> bool:
    """Whether a folder is named as a store, or lies in one: ``slide.zarr`` or ``slide.zarr/0``."""
    return any(part.lower().endswith(".zarr") for part in path.parts)


# --- what the metadata state ------------------------------------------------------------------------------


class Pyramid:
    """The levels of an image by its metadata, finest first."""

    def __init__(self, image: Mapping[str, Any], group: Any) -> None:
        axes = image.get("axes")
        if not isinstance(axes, list) or not all(isinstance(axis, dict) for axis in axes):
            raise SlideOpenError(
                f"is OME-Zarr {image.get('version', 'of unknown version')}; allowed: 0.4 and 0.5; convert it"
            )
        self.axes = [str(axis["name"]) for axis in axes]
        self.arrays = [group[level["path"]] for level in image["datasets"]]
        self._check_pixels()
        whole, _ = self._transform(image)
        per_level = [self._transform(level) for level in image["datasets"]]
        self.scales = [[a * b for a, b in zip(scale, whole, strict=True)] for scale, _ in per_level]
        units = {axis["name"]: axis.get("unit") for axis in axes}
        self.um = [UM_PER_NAMED_UNIT.get(units[axis]) for axis in "xy"]
        self.sizes_px = [(a.shape[self.axes.index("x")], a.shape[self.axes.index("y")]) for a in self.arrays]
        self.downsamples = [self._downsample(level) for level in range(len(self.arrays))]
        beside = [self._beside(per_level[0], of) for of in per_level]
        if max(beside) > 1.01:  # half a pixel where they are aligned by their corners
            raise UnsupportedSlideError(
                f"has levels that do not agree: level {np.argmax(beside)} lies {max(beside):.4g} of its "
                "pixels beside level 0; write its metadata again"
            )

    def _transform(self, of: Mapping[str, Any]) -> Transform:
        found = {"scale": [1.0] * len(self.axes), "translation": [0.0] * len(self.axes)}
        for one in of.get("coordinateTransformations") or ():
            kind = one["type"]
            if kind in found and isinstance(one.get(kind), list) and len(one[kind]) == len(self.axes):
                found[kind] = one[kind]
            elif kind != "identity":
                raise UnsupportedSlideError(f"has a transformation of type {kind!r}; allowed: scale")
        scale, shift = ([float(v[self.axes.index(axis)]) for axis in "xy"] for v in found.values())
        if min(scale) <= 0:
            raise UnsupportedSlideError(f"has a scale of {min(scale):g}; allowed: more than 0")
        return scale, shift

    def _check_pixels(self) -> None:
        for array in self.arrays:
            length = dict(zip(self.axes, array.shape, strict=True))
            kept = ", ".join(f"{axis} {length[axis]}" for axis in length)
            if not {"x", "y"} <= length.keys() or length.get("c") != 3 or array.dtype != np.uint8:
                raise UnsupportedSlideError(
                    f"holds {array.dtype} of {kept}; allowed: uint8 of c 3, 8-bit RGB"
                )
            if stack := [axis for axis in length if axis not in "xyc" and length[axis] > 1]:
                raise UnsupportedSlideError(
                    f"holds {length[stack[0]]} planes along {stack[0]} ({kept}); allowed: 1; write the one "
                    "that you mean as an OME-Zarr of its own"
                )
            if 0 in array.shape or math.prod(array.chunks) > 4 * MOST_TILE_PX:
                raise UnsupportedSlideError(
                    f"has chunks of {' x '.join(map(str, array.chunks))} for {kept}; allowed: "
                    f"{MOST_TILE_PX / 1e6:.0f} Mpx a chunk; write it in smaller chunks"
                )

    @staticmethod
    def _beside(first: Transform, other: Transform) -> float:
        """How far a level is shifted against level 0, in its pixels."""
        return max(abs(a - b) / px for a, b, px in zip(first[1], other[1], other[0], strict=True))

    def _downsample(self, level: int) -> float:
        """Level-0 px per px of a level, by its scale, which its size has to agree with."""
        x, y = (one / first for one, first in zip(self.scales[level], self.scales[0], strict=True))
        (width, height), (w, h) = self.sizes_px[0], self.sizes_px[level]
        apart = max(abs(width / x - w) / max(2, 0.01 * w), abs(height / y - h) / max(2, 0.01 * h))
        if apart > 1 or abs(x / y - 1) > 0.01 or x < 1:
            raise UnsupportedSlideError(
                f"has levels that do not agree: by its scale level {level} of {w} x {h} px is "
                f"{x:.4g} x {y:.4g} times coarser than {width} x {height} px; write its metadata again"
            )
        return float(round(x)) if abs(round(x) / x - 1) < 1e-3 else x

    def tile_px(self, level: int) -> tuple[int, int]:
        """(width, height) of what is read at a time: a chunk, or several small ones."""
        x, y = (side * max(1, LEAST_TILE_PX // side) for side in self.chunk_px(level))
        return x, y

    def chunk_px(self, level: int) -> tuple[int, int]:
        """(width, height) of the chunks of a level."""
        chunk = dict(zip(self.axes, self.arrays[level].chunks, strict=True))
        return chunk["x"], chunk["y"]

    def read(self, level: int, x: slice, y: slice) -> Array:
        """Pixels of a level: uint8 [h, w, 3]."""
        import cv2

        wanted = {"x": x, "y": y, "c": slice(None)}
        pixels: Array = np.asarray(self.arrays[level][tuple(wanted.get(axis, 0) for axis in self.axes)])
        kept = [axis for axis in self.axes if axis in "xyc"]
        pixels = np.transpose(pixels, [kept.index(axis) for axis in "yxc"])
        if pixels.flags.c_contiguous:
            return pixels
        planes = [np.ascontiguousarray(pixels[..., i]) for i in range(3)]
        return np.asarray(cv2.merge(planes), np.uint8)  # NumPy takes several times as long


def image_of(group: Any) -> tuple[Mapping[str, Any], Any, Mapping[str, Any]]:
    """The only image of a store: its ``multiscales``, its group, and the attributes beside.

    Raises:
        UnsupportedSlideError: there are several images.
        SlideOpenError: there is none.
    """
    attrs = group.attrs.asdict()
    attrs = attrs.get("ome", attrs)
    if "plate" in attrs or "well" in attrs:
        kind, parts = ("plate", "wells") if "plate" in attrs else ("well", "images")
        named = [one.get("path", "?") for one in attrs[kind].get(parts, ())]
        raise UnsupportedSlideError(
            f"is a {kind} of {len(named)} {parts} ({', '.join(named[:4])}); give one image in it, such as "
            f"{'A/1/0' if kind == 'plate' else '0'}"
        )
    if "bioformats2raw.layout" in attrs and "multiscales" not in attrs:
        images = [(name, image_of(one)) for name, one in sorted(group.groups()) if name != "OME"]
        slides = [one for one in images if not BESIDE_THE_SLIDE.search(str(one[1][0].get("name", "")))]
        if len(slides) != 1:
            raise UnsupportedSlideError(
                f"holds {len(images)} images ({', '.join(name for name, _ in images[:9])}); give one, such "
                "as the folder 0 in it"
            )
        return slides[0][1]
    several = attrs.get("multiscales")
    if not isinstance(several, list) or not several:
        raise SlideOpenError("is a Zarr store whose metadata describe no image (multiscales)")
    if len(several) > 1:
        raise UnsupportedSlideError(f"describes {len(several)} images in one group; allowed: 1")
    return several[0], group, attrs
