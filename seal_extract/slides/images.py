"""Plain PNG and JPEG images, which are decoded whole and strictly, so that damage is an error."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import imagecodecs
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from seal_extract.errors import SlideOpenError, UnsupportedSlideError, first_line
from seal_extract.slides.readers import PYRAMID, Array, Reader
from seal_extract.slides.tiff_pixels import ORIENTATION, refuse_orientation

MAX_IMAGE_PX = 600_000_000  # 3 bytes a pixel, 4 with alpha


class ImageReader(Reader):
    """A plain PNG or JPEG, decoded whole at the first read; its dpi says nothing about µm."""

    def __init__(self, path: Path, mpp: float | None = None) -> None:
        self.path = path
        self.reader = f"pillow {version('pillow')}"
        self._lock = threading.Lock()
        with _opened(path) as image:
            size, mode, self._format = image.size, image.mode, image.format
            stored = str(getattr(image, "tile", ""))  # the mode is RGB for 16 bits, too
            orientation = Image.Image.getexif(image).get(ORIENTATION, 1)  # the PNG's own would decode it
        if mode not in ("RGB", "RGBA") or ";16" in stored:
            raise UnsupportedSlideError(
                f"{path}: an image of mode {mode}{' in 16 bits' * (';16' in stored)}; allowed: 8-bit RGB; "
                "convert it with the tool that made it"
            )
        refuse_orientation(path, orientation)
        if size[0] * size[1] > MAX_IMAGE_PX:
            raise UnsupportedSlideError(
                f"{path}: a plain image of {size[0]} x {size[1]} px has to be decoded whole "
                f"(allowed: {MAX_IMAGE_PX // 10**6} Mpx); convert it to a tiled TIFF: {PYRAMID}"
            )
        self.set_levels([size], [1.0])
        self.set_mpp(mpp, [], " (a dpi in a plain image is the printer's, not the scanner's)")

    @cached_property
    def _pixels(self) -> Array | str:
        """uint8 [H, W, 3], or a message that says why it cannot be decoded."""
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                if self._format == "PNG":
                    pixels = imagecodecs.png_decode(data)
                else:
                    pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True)
            except (ValueError, RuntimeError, MemoryError) as exc:  # RuntimeError is imagecodecs' own
                return first_line(exc)
        if pixels.shape[:2] != self.size_l0[::-1] or pixels.dtype != np.uint8:
            return (
                f"{pixels.dtype} {list(pixels.shape)} instead of {self.size_l0[1]} rows of {self.size_l0[0]}"
            )
        if pixels.shape[2] == 4:
            pixels[pixels[..., 3] == 0] = 0
        return np.asarray(pixels[..., :3])

    def read_region(self, xy_l0: tuple[int, int], level: int, size_px: tuple[int, int]) -> Array:
        """See `Slide.read_region`."""
        (x, y), (w, h) = xy_l0, size_px
        try:
            with self._lock:
                pixels = self._pixels
        except OSError as exc:
            raise self.read_error(xy_l0, level, size_px, exc) from exc
        if isinstance(pixels, str):
            raise self.read_error(xy_l0, level, size_px, pixels)
        region = np.zeros((h, w, 3), np.uint8)
        inside = pixels[max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)]
        top, left = max(-y, 0), max(-x, 0)
        region[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        return region

    def close(self) -> None:
        """Forget the decoded image."""
        self.__dict__.pop("_pixels", None)


_pillow_lock = threading.Lock()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The header of an image, opened without Pillow's limit on its size, which is a global of the module."""
    with _pillow_lock:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                yield image
        except Exception as exc:  # a damaged header makes Pillow raise errors of every kind
            unknown = isinstance(exc, UnidentifiedImageError)
            raise SlideOpenError(f"Pillow: {'neither PNG nor JPEG' if unknown else first_line(exc)}") from exc
        finally:
            Image.MAX_IMAGE_PIXELS = before
