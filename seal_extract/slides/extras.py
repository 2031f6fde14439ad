"""Slides through libraries that are installed on demand, and through readers of installed plugins.

Zeiss CZI with JPEG XR and what else OpenSlide refuses of CZI, Philips iSyntax, KFB, and VSI. A third party
adds a reader by an entry point of the group ``seal_extract.readers``, which loads to a class such as
`KfbReader`: called with the path, and the µm/px or None, it gives a `Slide`; ``suffixes`` are those of its
files. In its ``pyproject.toml``::

    [project.entry-points."seal_extract.readers"]
    ours = "our_package.reader:OurReader"
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from seal_extract.errors import SlideOpenError, UnsupportedSlideError, how_to_install
from seal_extract.plugins import load_plugins
from seal_extract.slides.readers import Array, Reader, closing_on_error

GROUP = "seal_extract.readers"
CACHE_BYTES = 2**29  # of decoded blocks of a CZI: two rows of them over the widest slides
LEAST_COVERED = 0.99  # of the area of level 0, by a level of a CZI

Stated = list[tuple[str, float, float]]  # source, µm/px in x and in y


class ExtraReader(Reader):
    """A slide through a library of an optional part of this package.

    Attributes:
        suffixes: of its files.
        extra: the optional part.
        library: the module, and the package that has it.
    """

    suffixes: tuple[str, ...]
    extra: str
    library: tuple[str, str]

    def __init__(self, path: Path, mpp: float | None = None) -> None:
        module, package = self.library
        try:
            library = import_module(module)
        except ImportError as exc:
            raise MissingExtra(f"{package} reads it; {how_to_install(self.extra)}") from exc
        self.path, self.reader = path, f"{package} {version(package)}"
        self._lock = threading.Lock()  # none of them says that it may be asked by several threads
        self._handle: Any = None
        with closing_on_error(self, package):
            sizes_px, downsamples, stated = self._open(library)
            self.set_levels(sizes_px, downsamples)
            self.set_mpp(mpp, stated)

    def _open(self, library: Any) -> tuple[list[tuple[int, int]], list[float], Stated]:
        """Open the file as ``_handle``: sizes and downsamples of its levels, and what it states of µm/px."""
        raise NotImplementedError

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> Array:
        """Pixels inside a level, at ``x`` and ``y`` of it: uint8 [height, width, 3 or 4], RGB."""
        raise NotImplementedError

    def read_region(self, xy_l0: tuple[int, int], level: int, size_px: tuple[int, int]) -> Array:
        """See `Slide.read_region`."""
        x, y = (round(v / self.levels[level].downsample) for v in xy_l0)
        width, height = self.levels[level].size_px
        left, top = max(x, 0), max(y, 0)
        w, h = min(x + size_px[0], width) - left, min(y + size_px[1], height) - top
        region = np.zeros((size_px[1], size_px[0], 3), np.uint8)
        if w <= 0 or h <= 0:
            return region
        try:
            with self._lock:
                pixels = self._read(level, left, top, w, h)
            if pixels.shape[:2] != (h, w) or pixels.dtype != np.uint8:
                raise ValueError(f"{pixels.dtype} {list(pixels.shape)} came for {h} rows of {w}")
        except Exception as exc:
            raise self.read_error(xy_l0, level, size_px, exc) from exc
        if pixels.shape[2] == 4:
            pixels = np.where(pixels[..., 3:] > 0, pixels, 0)
        region[top - y : top - y + h, left - x : left - x + w] = pixels[..., :3]
        return region

    def close(self) -> None:
        """Release the file."""
        if self._handle is not None:
            self._handle.close()


class MissingExtra(SlideOpenError):
    """The library is not installed."""


class CziReader(ExtraReader):
    """A Zeiss CZI; OpenSlide reads some of them faster."""

    suffixes = (".czi",)
    extra = "czi"
    library = ("pylibCZIrw.czi", "pylibCZIrw")

    def _open(self, library: Any) -> tuple[list[tuple[int, int]], list[float], Stated]:
        cache = library.CacheOptions(max_memory_usage=CACHE_BYTES)
        self._handle = library.CziReader(str(self.path), library.ReaderFileInputTypes.Standard, cache)
        self._check()
        scenes = self._handle.scenes_bounding_rectangle_no_pyramid
        self._corner = self._handle.total_bounding_rectangle_no_pyramid[:2]
        width, height = self._handle.total_bounding_rectangle_no_pyramid[2:]
        if len(scenes) > 1:
            self._check_scenes(list(scenes.values()))
        areas: dict[int, int] = {}  # of the blocks of each downsample, in level-0 px

        def count(_: int, block: Any) -> bool:
            downsample = round(block.logicalRect.w / block.physicalSize.w)
            areas[downsample] = areas.get(downsample, 0) + block.logicalRect.w * block.logicalRect.h
            return True

        self._handle.enumerate_subblocks(count)
        steps = sorted(step for step, area in areas.items() if area >= LEAST_COVERED * areas.get(1, area))
        sizes = [(max(1, width // step), max(1, height // step)) for step in steps]
        return sizes, [float(step) for step in steps], self._stated()

    def _check(self) -> None:
        kinds = self._handle.pixel_types
        planes = {axis: end - begin for axis, (begin, end) in self._handle.total_bounding_box.items()}
        if {*kinds.values()} != {"Bgr24"} or len(kinds) != 1:
            raise UnsupportedSlideError(
                f"{self.path}: {len(kinds)} channels of {', '.join(sorted({*kinds.values()}))}, not one "
                "of Bgr24 (8-bit RGB brightfield); export it as 8-bit RGB if it is H&E"
            )
        if stack := [f"{axis} {count}" for axis, count in planes.items() if axis not in "XYC" and count > 1]:
            raise UnsupportedSlideError(
                f"{self.path}: it holds planes ({', '.join(stack)}); allowed: 1; export the one that you mean"
            )

    def _check_scenes(self, boxes: list[Any]) -> None:
        for i, (x, y, w, h) in enumerate(boxes):
            for x2, y2, w2, h2 in boxes[:i]:
                if x < x2 + w2 and x2 < x + w and y < y2 + h2 and y2 < y + h:
                    raise UnsupportedSlideError(
                        f"{self.path}: of its {len(boxes)} scenes some overlap, so that it is unclear which "
                        "pixels are meant; export the scene that you mean"
                    )
        warnings.warn(
            f"{self.path}: its {len(boxes)} scenes are read as one slide, each at its place", stacklevel=6
        )

    def _stated(self) -> Stated:
        items = self._handle.metadata["ImageDocument"]["Metadata"].get("Scaling", {}).get("Items", {})
        um = {one["@Id"]: float(one["Value"]) * 1e6 for one in items.get("Distance", ()) if one.get("Value")}
        return [("CZI Scaling", um["X"], um["Y"])] if um.get("X") and um.get("Y") else []

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> Array:
        step = round(self.levels[level].downsample)
        place = (self._corner[0] + x * step, self._corner[1] + y * step, width * step, height * step)
        pixels: Array = self._handle.read(roi=place, zoom=1 / step, pixel_type="Bgr24")
        return pixels[..., ::-1]


class ISyntaxReader(ExtraReader):
    """A Philips iSyntax."""

    suffixes = (".isyntax", ".i2syntax")
    extra = "isyntax"
    library = ("isyntax", "pyisyntax")

    def _open(self, library: Any) -> tuple[list[tuple[int, int]], list[float], Stated]:
        self._handle = library.ISyntax.open(self.path)
        stated = ("iSyntax", self._handle.mpp_x, self._handle.mpp_y)
        return self._handle.level_dimensions, [float(d) for d in self._handle.level_downsamples], [stated]

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> Array:
        return np.asarray(self._handle.read_region(x, y, width, height, level))


class KfbReader(ExtraReader):
    """A KFB of KFBio."""

    suffixes = (".kfb",)
    extra = "kfb"
    library = ("kfbslide", "kfbslide")

    def _open(self, library: Any) -> tuple[list[tuple[int, int]], list[float], Stated]:
        self._handle = library.OpenSlide(str(self.path))
        mpp = float(self._handle.properties.get("openslide.mpp-x") or 0)
        stated = [("KFB", mpp, mpp)] if mpp else []
        return list(self._handle.level_dimensions), list(self._handle.level_downsamples), stated

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> Array:
        downsample = self.levels[level].downsample
        xy_l0 = (round(x * downsample), round(y * downsample))
        return np.asarray(self._handle.read_region(xy_l0, level, (width, height)).convert("RGBA"))


class VsiReader(ExtraReader):
    """An Olympus or Evident VSI; its pixels lie in the folder ``_NAME_`` beside it."""

    suffixes = (".vsi",)
    extra = "vsi"
    library = ("slideio", "slideio")

    def _open(self, library: Any) -> tuple[list[tuple[int, int]], list[float], Stated]:
        self._handle = library.open_slide(str(self.path), "VSI")
        if self._handle.num_scenes != 1:
            raise UnsupportedSlideError(
                f"{self.path}: it holds {self._handle.num_scenes} scenes; export the one that you mean"
            )
        self._scene = scene = self._handle.get_scene(0)
        kinds = [str(np.dtype(scene.get_channel_data_type(i))) for i in range(scene.num_channels)]
        planes = scene.num_z_slices * scene.num_t_frames
        if kinds != ["uint8"] * 3 or planes != 1:
            raise UnsupportedSlideError(
                f"{self.path}: {len(kinds)} channels of {', '.join(sorted({*kinds}))} in {planes} planes, "
                "not three of 8 bits in one (RGB brightfield); export it as 8-bit RGB if it is H&E"
            )
        levels = [scene.get_zoom_level_info(i) for i in range(scene.num_zoom_levels)]
        x, y = (metres * 1e6 for metres in scene.resolution)
        stated = [("VSI", x, y)] if x and y else []
        return (
            [(one.size.width, one.size.height) for one in levels],
            [1 / one.scale for one in levels],
            stated,
        )

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> Array:
        return np.asarray(self._scene.read_block_from_level(level, (x, y, width, height)))


EXTRAS: tuple[type[ExtraReader], ...] = (CziReader, ISyntaxReader, KfbReader, VsiReader)


# --- plugins -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def plugin_readers() -> dict[str, Callable[..., Any]]:
    """The readers of all installed plugins by suffix; the plugins are asked once per process."""
    readers: dict[str, Callable[..., Any]] = {}
    for (suffix, reader), warn in load_plugins(GROUP, _suffixes_of):
        if suffix in readers:
            warn(f"another plugin reads {suffix}")
        else:
            readers[suffix] = reader
    return readers


def _suffixes_of(reader: Any) -> Iterable[tuple[str, Any]]:
    suffixes = reader.suffixes
    if not callable(reader) or isinstance(suffixes, str) or not all(s[:1] == "." for s in suffixes):
        raise TypeError(f"{reader!r} is no reader with suffixes such as ('.abc',)")
    return [(suffix.lower(), reader) for suffix in suffixes]
