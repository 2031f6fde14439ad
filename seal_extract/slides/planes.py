"""Planes of a volume as slides: a section seen through its transform, or one depth of a stack.

A plane is a `Slide` like any other. Its patches have to be read with `RegionReader`: the pixels in its file
are those of the section before the transform, or those of another plane.
"""

from __future__ import annotations

import hashlib
import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

from seal_extract.errors import SlideOpenError, UnsupportedSlideError, first_line
from seal_extract.slides.cache import LruCache
from seal_extract.slides.ngff import UM_PER_NAMED_UNIT, image_of, is_store
from seal_extract.slides.readers import Array, Reader
from seal_extract.slides.slide import Slide, coarsest_level, open_slide
from seal_extract.slides.tiff_pixels import ome_images

Affine = NDArray[np.float64]  # [2, 3], takes (x, y, 1) in level-0 px of a section to px of the volume's frame
WHITE = (255, 255, 255)  # of the frame beyond a section
MARGIN_PX = 3  # around what cubic interpolation needs
CACHE_BYTES = 2**28  # of decoded chunks
LEAST_VALUES = 2**18  # smaller chunks are decoded several at a time
SAMPLES, SAMPLE_PX = 4, 64  # of the planes and places that tell one stack from another
_AXES = {"Z": "z", "Y": "y", "X": "x", "C": "c", "S": "c", "T": "t", "I": "z", "Q": "z"}


def inverse(affine: Affine) -> Affine:
    """The transform back: float64 [2, 3]."""
    return np.asarray(np.linalg.inv(np.vstack([affine, [0.0, 0.0, 1.0]]))[:2])


def apply(affine: Affine, xy: NDArray[Any]) -> NDArray[np.float64]:
    """Move points: [N, 2] to float64 [N, 2]."""
    return np.asarray(xy @ affine[:, :2].T + affine[:, 2])


class AlignedSlide(Reader):
    """A section as it lies in the frame of a volume; what the section does not cover is white."""

    def __init__(self, slide: Slide, to_frame: Affine, size_px: tuple[int, int], mpp: float) -> None:
        """Wrap an open slide.

        Args:
            slide: the section; closed with this one.
            to_frame: where its level-0 pixels lie in the frame.
            size_px: (width, height) of the frame.
            mpp: µm/px of the frame.
        """
        self.path, self.reader = slide.path, f"{slide.reader}, aligned"
        self._slide, self._from_frame = slide, inverse(to_frame)
        self._scale = math.sqrt(abs(np.linalg.det(self._from_frame[:, :2])))  # level-0 px per px of the frame
        downsamples = [level.downsample / self._scale for level in slide.levels if level.faithful]
        downsamples = [1.0, *(d for d in downsamples if d > 1.5 and min(size_px) / d >= 1)]
        self.set_levels([_reduced(size_px, d) for d in downsamples], downsamples)
        self.mpp, self.mpp_source = mpp, "the frame of the volume"

    def read_region(self, xy_l0: tuple[int, int], level: int, size_px: tuple[int, int]) -> Array:
        """See `Slide.read_region`; cubic interpolation."""
        (w, h), downsample = size_px, self.levels[level].downsample
        theirs = coarsest_level(self._slide, downsample * self._scale)
        per_px = self._slide.levels[theirs].downsample
        # centres of pixels (u, v) of the region -> the frame -> pixels of the section's level
        x, y = (at + downsample / 2 for at in xy_l0)
        region = np.array([[downsample, 0, x], [0, downsample, y]])
        matrix = np.vstack([self._from_frame, [0, 0, 1]]) @ np.vstack([region, [0, 0, 1]])
        matrix = matrix[:2] / per_px - [[0, 0, 0.5]] * 2
        corners = apply(matrix, np.array([(0, 0), (w - 1, 0), (0, h - 1), (w - 1, h - 1)]))
        first = np.maximum(np.floor(corners.min(0)).astype(int) - MARGIN_PX, 0)
        last = np.ceil(corners.max(0)).astype(int) + MARGIN_PX
        last = np.minimum(last, self._slide.levels[theirs].size_px)
        if (last <= first).any():
            return np.full((h, w, 3), 255, np.uint8)
        begin_l0 = np.floor(first * per_px).astype(int)  # a level may begin between two level-0 pixels
        matrix[:, 2] -= begin_l0 / per_px
        left, top, width, height = map(int, (*begin_l0, *(last - first)))
        pixels = self._slide.read_region((left, top), theirs, (width, height))
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        warped = cv2.warpAffine(
            pixels, matrix, (w, h), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=WHITE
        )
        return np.asarray(warped, np.uint8)

    def close(self) -> None:
        """Release the section."""
        self._slide.close()


@dataclass(frozen=True, repr=False)
class Stack:
    """Planes in one array on the disk, of which regions are read; chunks of several planes are held.

    Attributes:
        path: the file or folder.
        reader: the library.
        axes: letters of ``t``, ``c``, ``z``, ``y`` and ``x``, one per axis of the arrays.
        levels: arrays of one depth each, finest first.
        mpp: µm/px (x, y) that it states.
        spacing_um: µm between planes that it states.
        window: values shown as black and as white; of grey stacks of more than 8 bits.
    """

    path: Path
    reader: str
    axes: str
    levels: Sequence[Any]
    mpp: tuple[float, float] | None
    spacing_um: float | None
    window: tuple[float, float] | None = None
    _tiles: LruCache[NDArray[Any]] = field(
        default_factory=lambda: LruCache(CACHE_BYTES, lambda tile: tile.nbytes), init=False, compare=False
    )

    def __post_init__(self) -> None:
        finest, channels = self.levels[0], self.side(0, "c")
        kept = [array for array in self.levels if array.shape[self.axes.find("z")] == self.side(0, "z")]
        object.__setattr__(self, "levels", kept)  # others are coarser in depth too
        if "z" not in self.axes or channels not in (1, 3) or self.side(0, "t") > 1:
            raise UnsupportedSlideError(
                f"{self.path}: axes {self.axes} of {list(finest.shape)}; allowed: z, y, x and "
                "1 or 3 channels, of one point in time"
            )
        if finest.dtype != np.uint8 and (channels == 3 or self.window is None):
            raise UnsupportedSlideError(
                f"{self.path}: {finest.dtype} in {channels} channels; allowed: 8 bits; or one channel, with "
                "the values for black and white: type --window LOW,HIGH"
            )

    @cached_property
    def content(self) -> str:
        """A digest of its shape and of pixels of some planes, spread over their middle; equal for a copy."""
        digest = hashlib.sha256(repr([(array.shape, str(array.dtype)) for array in self.levels]).encode())
        x, y = (self.side(0, axis) for axis in "xy")
        for z in sorted({i * (self.side(0, "z") - 1) // (SAMPLES - 1) for i in range(SAMPLES)}):
            for i in range(SAMPLES):
                x0, y0 = x * (i + 1) // (SAMPLES + 2), y * (i + 1) // (SAMPLES + 2)
                box = (x0, y0, min(x, x0 + SAMPLE_PX), min(y, y0 + SAMPLE_PX))
                digest.update(self.read(z, 0, box).tobytes())
        return digest.hexdigest()

    def side(self, level: int, axis: str) -> int:
        """Length of an axis; 1 for an axis that it does not have."""
        return int(self.levels[level].shape[self.axes.index(axis)]) if axis in self.axes else 1

    def read(self, z: int, level: int, box: tuple[int, int, int, int]) -> Array:
        """Read (x0, y0, x1, y1) of a plane: uint8 [h, w, 3]."""
        x0, y0, x1, y1 = box
        depth, height, width = self.tile(level)
        values = np.empty((y1 - y0, x1 - x0, self.side(0, "c")), self.levels[0].dtype)
        for y in range(y0 // height * height, y1, height):
            for x in range(x0 // width * width, x1, width):
                place = (level, z // depth * depth, y, x)
                tile = self._tiles.get(place, partial(self._decode, *place))[z % depth]
                part = tile[max(0, y0 - y) : y1 - y, max(0, x0 - x) : x1 - x]
                top, left = max(0, y - y0), max(0, x - x0)
                values[top : top + part.shape[0], left : left + part.shape[1]] = part
        if self.window is not None:
            low, high = self.window
            values = np.rint((values.astype(np.float32) - low).clip(0, high - low) * (255 / (high - low)))
        return np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:2], 3)), np.uint8)

    def tile(self, level: int) -> tuple[int, int, int]:
        """(depth, height, width) of what is decoded at a time: a chunk, or several that are small."""
        chunk = dict(zip(self.axes, self.levels[level].chunks, strict=True))
        times = max(1, math.isqrt(LEAST_VALUES // math.prod(chunk[axis] for axis in "zyx")))
        return chunk["z"], times * chunk["y"], times * chunk["x"]

    def _decode(self, level: int, z: int, y: int, x: int) -> NDArray[Any]:
        """The tile at this place, or the part of it that is inside: [depth, height, width, channels]."""
        tile = zip((z, y, x), self.tile(level), strict=True)
        place: dict[str, Any] = {"t": 0, "c": slice(None)}
        place |= {axis: slice(at, at + side) for axis, (at, side) in zip("zyx", tile, strict=True)}
        values = np.asarray(self.levels[level][tuple(place[axis] for axis in self.axes)])
        left = [axis for axis in self.axes if axis != "t"]
        values = values.transpose([left.index(axis) for axis in "zyxc" if axis in left])
        return np.asarray(values.reshape(*values.shape[:3], -1))


class StackPlane(Reader):
    """One depth of a stack; only the chunks under a region are read."""

    def __init__(self, stack: Stack, z: int, mpp: float | None) -> None:
        """Open a plane.

        Args:
            stack: it stays open.
            z: number of the plane.
            mpp: µm/px, where the stack does not state it.
        """
        self.path, self.reader, self._stack, self._z = stack.path, stack.reader, stack, z
        stated = [("its metadata", *stack.mpp)] if stack.mpp else []
        self.set_mpp(None if stated else mpp, stated)
        sizes = [(stack.side(i, "x"), stack.side(i, "y")) for i in range(len(stack.levels))]
        self.set_levels(sizes, [sizes[0][0] / width for width, _ in sizes])

    def read_region(self, xy_l0: tuple[int, int], level: int, size_px: tuple[int, int]) -> Array:
        """See `Slide.read_region`."""
        (w, h), place = size_px, self.levels[level]
        x, y = (round(at / place.downsample) for at in xy_l0)
        region = np.zeros((h, w, 3), np.uint8)
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, place.size_px[0]), min(y + h, place.size_px[1])
        if x0 < x1 and y0 < y1:
            try:
                pixels = self._stack.read(self._z, level, (x0, y0, x1, y1))
            except Exception as exc:  # tifffile, zarr and codecs raise errors of every kind
                raise self.read_error(xy_l0, level, size_px, exc) from exc
            region[y0 - y : y1 - y, x0 - x : x1 - x] = pixels
        return region

    def close(self) -> None:
        """Nothing: the stack is shared with the other planes."""


class StackPlanes(StackPlane):
    """All planes of a stack below each other: (x, y + z * height) is (x, y) of plane z, in level-0 pixels."""

    def read_region(self, xy_l0: tuple[int, int], level: int, size_px: tuple[int, int]) -> Array:
        """See `Slide.read_region`; the region lies in one plane."""
        z, y = divmod(xy_l0[1], self.size_l0[1])
        plane = StackPlane(self._stack, z, self.mpp)
        return plane.read_region((xy_l0[0], y), level, size_px)


def open_plane(path: Path, plane: Mapping[str, Any], mpp: float, size_px: tuple[int, int]) -> Slide:
    """Open one plane by itself, as the provenance of its features describes it.

    Args:
        path: the section, or the stack.
        plane: ``transform`` of the section, or ``z`` in the stack with its ``window``.
        mpp: µm/px of the volume's frame.
        size_px: (width, height) of the frame.

    Raises:
        SlideError: it cannot be opened.
    """
    if "transform" in plane:
        affine = np.array(plane["transform"], np.float64)
        return AlignedSlide(open_slide(path, mpp=mpp), affine, size_px, mpp)
    return StackPlane(open_stack(path, plane["window"]), plane["z"], mpp)


def open_stack(path: Path, window: tuple[float, float] | None = None) -> Stack:
    """Open an OME-Zarr, or a TIFF with z: an OME-TIFF or one of plain pages.

    Raises:
        SlideOpenError: it is neither, or damaged.
        UnsupportedSlideError: channels, points in time or values that are not taken.
    """
    import zarr  # seconds that other sources need not wait for

    if is_store(path):
        return _open_zarr(path, window)

    with ExitStack() as closing:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of tifffile, about metadata that are not needed
                series = closing.enter_context(tifffile.TiffFile(path)).series[0]
                axes = "".join(_AXES.get(axis, "?") for axis in series.axes)
                arrays = [zarr.open(series.aszarr(level=i), mode="r") for i in range(len(series.levels))]
        except Exception as exc:
            raise SlideOpenError(f"{path}: no TIFF stack that can be read ({first_line(exc)})") from exc
        image = next(iter(ome_images(path)), None)
        mpp, spacing_um = (image.mpp, image.spacing_um) if image else (None, None)
        stack = Stack(path, f"tifffile {tifffile.__version__}", axes, arrays, mpp, spacing_um, window)
        weakref.finalize(stack, closing.pop_all().close)
    return stack


def _open_zarr(path: Path, window: tuple[float, float] | None) -> Stack:
    import zarr

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of files that are not zarr's
            image, group, _ = image_of(zarr.open_group(str(path), mode="r"))
        arrays = [group[level["path"]] for level in image["datasets"]]
        axes = [str(axis["name"]) for axis in image["axes"]]
        units = {str(axis["name"]): UM_PER_NAMED_UNIT.get(axis.get("unit")) for axis in image["axes"]}
        um = dict.fromkeys(axes, 1.0)
        for of in (image, image["datasets"][0]):
            for one in of.get("coordinateTransformations") or ():
                if one["type"] == "scale":
                    um = {axis: um[axis] * float(by) for axis, by in zip(axes, one["scale"], strict=True)}
        x, y, z = (um[axis] * unit if (unit := units.get(axis)) else None for axis in "xyz")
    except Exception as exc:  # zarr, its codecs and strange metadata raise errors of every kind
        raise SlideOpenError(f"{path} is no OME-Zarr that can be read ({first_line(exc)})") from exc
    mpp = (x, y) if x and y else None
    return Stack(path, f"zarr {version('zarr')}", "".join(axes), arrays, mpp, z, window)


def _reduced(size_px: tuple[int, int], downsample: float) -> tuple[int, int]:
    width, height = (max(1, round(side / downsample)) for side in size_px)
    return width, height
