"""One class per reading library, which translates that library's errors and finds the file's µm/px.

OpenSlide reads the scanners' formats and DICOM. Tiffslide reads the TIFFs that OpenSlide refuses or opens
without µm/px, OME-TIFF above all. `seal_extract.slides.images` reads plain PNG and JPEG images.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openslide
from numpy.typing import NDArray
from openslide.lowlevel import OpenSlideError, OpenSlideUnsupportedFormatError
from PIL import Image

from seal_extract.errors import (
    ReadError,
    ResolutionError,
    SealExtractError,
    SlideOpenError,
    UnsupportedSlideError,
    first_line,
)
from seal_extract.slides.tiff import tiles_longer_than_the_file
from seal_extract.slides.tiff_pixels import (
    is_placed_by_xml,
    ome_mpp,
    refuse_alpha,
    refuse_other_pixels,
    refuse_what_tiffslide_gets_wrong,
)

PLAUSIBLE_MPP = (0.05, 20.0)  # finer than any brightfield scanner, coarser than any thumbnail
STATED_MPP = (0.1, 10.0)  # believed of a file: HEST's TIFFs state a tenth of the true µm/px
MPP_TOLERANCE = 0.05  # two statements of a µm/px that differ by less agree
MAX_ANISOTROPY = 0.05  # µm/px may differ this much between x and y
WARNED_ANISOTROPY = 0.01  # beyond it a warning is given
MOST_COARSEST_PX = 2**35  # 100 x 34 mm at 0.3 µm/px
PYRAMID = "vips tiffsave IN OUT.tif --tile --pyramid"

Array = NDArray[np.uint8]


@dataclass(frozen=True)
class Level:
    """One resolution of the pyramid."""

    size_px: tuple[int, int]  # (width, height)
    downsample: float  # level-0 px per px of this level
    faithful: bool  # False for thumbnails and the like that lie among the levels with another aspect ratio


def check_mpp(mpp: float, source: str, path: Path, allowed: tuple[float, float] = PLAUSIBLE_MPP) -> None:
    """Refuse a µm/px that no brightfield scan can have."""
    low, high = allowed
    if not low <= mpp <= high:  # also refuses NaN
        tenth = f" (files of HEST state a tenth of the true one, which would be {mpp * 10:.4g})"
        raise ResolutionError(
            f"{path}: {source} gives {mpp:.4g} µm/px, which cannot be true (allowed: {low} to {high})"
            f"{tenth if low <= mpp * 10 < 10 * low else ''}; look it up and type --slide-mpp VALUE"
        )


def same_mpp(one: float, other: float) -> bool:
    """Whether two statements of a µm/px agree."""
    return abs(one / other - 1) <= MPP_TOLERANCE


class Reader:
    """What the readers share: attributes, their checks, representation, closing; see `Slide`."""

    path: Path
    reader: str
    size_l0: tuple[int, int]
    bounds_l0: tuple[int, int, int, int]
    mpp: float
    mpp_source: str
    mpp_conflict: str = ""
    levels: tuple[Level, ...]

    def set_levels(self, sizes: list[tuple[int, int]], downsamples: list[float]) -> None:
        """Set the levels, finest first, by their (width, height) and the level-0 px per px of each."""
        self.size_l0 = sizes[0]
        self.bounds_l0 = (0, 0, *sizes[0])
        self.levels = tuple(
            Level(size, downsample, _same_shape(sizes[0], size))
            for size, downsample in zip(sizes, downsamples, strict=True)
        )
        width, height = min((level.size_px for level in self.levels if level.faithful), key=math.prod)
        if width * height > MOST_COARSEST_PX:
            raise UnsupportedSlideError(
                f"{self.path}: its coarsest level of {width} x {height} px is read whole to find tissue "
                f"(allowed: {MOST_COARSEST_PX / 1e9:.0f} Gpx); give it a pyramid: {PYRAMID}"
            )

    @property
    def sizes_px(self) -> list[tuple[int, int]]:
        """(width, height) of each level."""
        return [level.size_px for level in self.levels]

    def set_mpp(self, given: float | None, found: list[tuple[str, float, float]], hint: str = "") -> None:
        """Take the first plausible of ``found`` (source, µm/px in x, in y), or ``given`` in its place."""
        refusal: ResolutionError | None = None
        for source, x, y in found:
            stated = f"{source} gives {x:.4g} µm/px across and {y:.4g} down"
            try:
                check_mpp(x, source, self.path, STATED_MPP)
                if abs(x / y - 1) > MAX_ANISOTROPY:
                    raise ResolutionError(
                        f"{self.path}: {stated}; allowed: square pixels within {MAX_ANISOTROPY:.0%}; "
                        "find the true one and type --slide-mpp VALUE"
                    )
            except ResolutionError as exc:
                refusal = refusal or exc
                continue
            self.mpp, self.mpp_source = x, source
            if abs(x / y - 1) > WARNED_ANISOTROPY:
                self.mpp_conflict = f"{stated}; patches are cut by x"
            break
        if given is not None:
            file_says = f" (file: {self.mpp:.4g}, {self.mpp_source})" if hasattr(self, "mpp") else ""
            self.mpp, self.mpp_source, self.mpp_conflict = float(given), "given" + file_says, ""
        elif not hasattr(self, "mpp"):
            raise refusal or ResolutionError(
                f"{self.path}: the file does not say how many µm a pixel measures{hint}; "
                f"look it up and type --slide-mpp VALUE (20x is about 0.5, 40x about 0.25)"
            )

    def __repr__(self) -> str:
        w, h = self.size_l0
        return (
            f"Slide({self.path.name}: {w} x {h} px, {self.mpp:.4g} µm/px by {self.mpp_source}, "
            f"{len(self.levels)} level{'s' * (len(self.levels) > 1)}, {self.reader})"
        )

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        raise NotImplementedError

    def read_error(
        self, xy_l0: tuple[int, int], level: int, size_px: tuple[int, int], why: object
    ) -> ReadError:
        """The error of a region, which names its place and the reason."""
        return ReadError(
            f"{self.path}: {self.reader.split()[0]} cannot read {size_px[0]} x {size_px[1]} px of level "
            f"{level} at level-0 ({xy_l0[0]}, {xy_l0[1]}): {first_line(why)}; the file is damaged there: "
            "copy or scan it again"
        )


SAFE_OPENSLIDE = (4, 0, 1)


def openslide_danger() -> str | None:
    """A warning that the OpenSlide library of this machine is unsafe, with the remedy; None if it is safe."""
    found = openslide.__library_version__
    if tuple(map(int, re.findall(r"\d+", found)[:3])) >= SAFE_OPENSLIDE:
        return None
    return (
        f"the OpenSlide library here is {found}: below 4.0.1 a crafted BIF file writes into memory "
        '(CVE-2026-48977); type: pip install "openslide-bin>=4.0.1"'
    )


class OpenSlideReader(Reader):
    """A slide through OpenSlide."""

    def __init__(self, path: Path, mpp: float | None = None) -> None:
        self.path = path
        self.reader = f"openslide {openslide.__library_version__}"
        if danger := openslide_danger():
            warnings.warn(danger, RuntimeWarning, stacklevel=2)
        self._lock = threading.Lock()
        try:
            self._handle = openslide.OpenSlide(path)
        except OpenSlideUnsupportedFormatError as exc:
            raise SlideOpenError("OpenSlide does not know the format") from exc
        except OpenSlideError as exc:
            raise SlideOpenError(f"OpenSlide: {first_line(exc)}") from exc
        with closing_on_error(self._handle, "OpenSlide: damaged header"):
            self.set_levels(list(self._handle.level_dimensions), list(self._handle.level_downsamples))
            properties = self._handle.properties
            self.bounds_l0 = self._bounds()
            images = self._image_sizes()
            refuse_other_pixels(path, images)
            refuse_alpha(path, images)
            self._too_long = tiles_longer_than_the_file(path, self.sizes_px)  # none, as a rule
            power = properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)
            hint = f" (only that its objective was {power}x, which is no measure)" if power else ""
            stated = _mpp_of(properties, openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
            self.set_mpp(mpp, stated, hint)

    def _image_sizes(self) -> list[tuple[int, int]]:
        """Sizes of the images that level 0 is made of, as in SCN; else of the levels."""
        names = ("openslide.region[{}].width", "openslide.region[{}].height")
        found: list[tuple[int, int]] = []
        while all(name.format(len(found)) in self._handle.properties for name in names):
            width, height = (int(self._handle.properties[name.format(len(found))]) for name in names)
            found.append((width, height))
        return found or self.sizes_px

    def _bounds(self) -> tuple[int, int, int, int]:
        names = ("BOUNDS_X", "BOUNDS_Y", "BOUNDS_WIDTH", "BOUNDS_HEIGHT")
        values = [self._handle.properties.get(getattr(openslide, f"PROPERTY_NAME_{n}")) for n in names]
        numbers = [int(v) for v in values if v is not None]
        if len(numbers) < len(names):
            return (0, 0, *self.size_l0)
        x, y, w, h = numbers
        return (x, y, min(w, self.size_l0[0] - x), min(h, self.size_l0[1] - y))

    def read_region(self, xy_l0: tuple[int, int], level: int, size_px: tuple[int, int]) -> Array:
        """See `Slide.read_region`."""
        if self._too_long:
            self._refuse_too_long(xy_l0, level, size_px)
        handle = self._handle
        rgba: Image.Image | Exception | None = None
        with contextlib.suppress(OpenSlideError):
            rgba = handle.read_region(xy_l0, level, size_px)
        if rgba is None:
            rgba = self._read_afresh(handle, xy_l0, level, size_px)
        del handle  # an error keeps its frames, and they a handle with all its memory
        if isinstance(rgba, Exception):
            raise self.read_error(xy_l0, level, size_px, rgba) from rgba.with_traceback(None)
        return np.asarray(rgba.convert("RGB"))  # transparent becomes black, as in the field's other tools

    def _refuse_too_long(self, xy_l0: tuple[int, int], level: int, size_px: tuple[int, int]) -> None:
        begin = np.array(xy_l0) / self.levels[level].downsample
        tiles = self._too_long.get(self.levels[level].size_px, np.empty((0, 4), np.int64))
        if ((tiles[:, :2] < begin + size_px) & (tiles[:, 2:] > begin)).all(1).any():
            raise self.read_error(xy_l0, level, size_px, "a tile claims more bytes than the file has")

    def _read_afresh(
        self, failed: Any, xy_l0: tuple[int, int], level: int, size_px: tuple[int, int]
    ) -> Image.Image | Exception:
        """Once a read has failed its handle fails for ever, for other threads and other regions too."""
        try:
            fresh = openslide.OpenSlide(self.path)
        except (OpenSlideError, OSError) as exc:
            return exc
        try:
            rgba: Image.Image = fresh.read_region(xy_l0, level, size_px)
        except OpenSlideError as exc:
            fresh.close()
            with contextlib.suppress(OpenSlideError, OSError):  # gone meanwhile: every read will raise
                self._renew(failed, openslide.OpenSlide(self.path))
            return exc
        self._renew(failed, fresh)
        return rgba

    def _renew(self, failed: Any, fresh: Any) -> None:
        """Put another handle in the place of ``failed``, which closes itself when no thread uses it."""
        with self._lock:
            if self._handle is failed:
                self._handle = fresh
            else:
                fresh.close()

    def close(self) -> None:
        """Release the file."""
        self._handle.close()
        _give_back_memory()


def _give_back_memory() -> None:
    """Hand freed memory to the system: glibc would keep more and more of it from slide to slide."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another libc
            ctypes.CDLL(None).malloc_trim(0)


class TiffSlideReader(Reader):
    """A TIFF through tiffslide, with µm/px from OME-XML where there is some."""

    def __init__(self, path: Path, mpp: float | None = None) -> None:
        if is_placed_by_xml(path):
            raise SlideOpenError("tiffslide would show tiles elsewhere than its XML says")
        import tiffslide  # with zarr behind it: a second, which most slides need not wait for

        self.path = path
        self.reader = f"tiffslide {version('tiffslide')}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # "metadata parsing only partially implemented"
                self._handle = tiffslide.TiffSlide(path)
        except Exception as exc:  # tifffile, zarr and codecs raise errors of every kind
            raise SlideOpenError(f"tiffslide: {first_line(exc)}") from exc
        with closing_on_error(self._handle, "tiffslide: damaged header"):
            self.set_levels(list(self._handle.level_dimensions), list(self._handle.level_downsamples))
            refuse_other_pixels(path, self.sizes_px)
            refuse_what_tiffslide_gets_wrong(path, self.sizes_px)
            stated = _mpp_of(self._handle.properties, "tiffslide.mpp-x", "tiffslide.mpp-y")
            self.set_mpp(mpp, ome_mpp(path) + stated)

    def read_region(self, xy_l0: tuple[int, int], level: int, size_px: tuple[int, int]) -> Array:
        """See `Slide.read_region`."""
        try:
            region = self._handle.read_region(xy_l0, level, size_px, as_array=True)
        except Exception as exc:
            raise self.read_error(xy_l0, level, size_px, exc) from exc
        if region.shape[2] == 3:
            return np.ascontiguousarray(region)
        return np.where(region[..., 3:] > 0, region[..., :3], np.uint8(0))

    def close(self) -> None:
        """Release the file."""
        self._handle.close()


@contextmanager
def closing_on_error(opened: Any, what: str) -> Iterator[None]:
    """Close what was opened if the rest of opening fails, in which a library may raise anything.

    Raises:
        SlideOpenError: ``what`` and the reason, in place of the library's error.
    """
    try:
        yield
    except BaseException as exc:
        opened.close()
        if isinstance(exc, Exception) and not isinstance(exc, SealExtractError):
            raise SlideOpenError(f"{what}: {first_line(exc)}") from exc
        raise


def _same_shape(size_l0: tuple[int, int], size_px: tuple[int, int]) -> bool:
    (w0, h0), (w, h) = size_l0, size_px
    rounding = 2 / min(w, h)  # small levels are off by a pixel
    return abs((w0 / w) / (h0 / h) - 1) < 0.01 + rounding


def _mpp_of(properties: Any, x_key: str, y_key: str) -> list[tuple[str, float, float]]:
    x, y = properties.get(x_key), properties.get(y_key)
    if x is None:
        return []
    is_tag = properties.get(openslide.PROPERTY_NAME_VENDOR) == "generic-tiff"
    source = x_key + " (the TIFF's resolution tag)" * is_tag
    return [(source, float(x), float(x if y is None else y))]
