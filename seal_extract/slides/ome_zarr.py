"""OME-Zarr (NGFF) 0.4 and 0.5: a pyramid of arrays that are stored chunk by chunk, read without a copy.

A store is a folder, a zip file, or a folder at a URL. Source: https://ngff.openmicroscopy.org/0.4 and /0.5.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from seal_extract.errors import (
    ReadError,
    SealExtractError,
    SlideOpenError,
    UnsupportedSlideError,
    UsageError,
    first_line,
)
from seal_extract.slides import remote
from seal_extract.slides.ngff import METADATA, Pyramid, image_of
from seal_extract.slides.readers import Array, Reader

CACHE_BYTES = 2**27  # of tiles that `read_region` may need again
REQUESTS_AT_ONCE = 16  # to a storage, which answers slowly and many at a time
RETRY_AFTER_S = (1.0, 5.0)  # a run makes ten thousands of requests; one of them fails now and then
FORBIDDEN = 403  # of HTTP
SAMPLES, SAMPLE_PX = 4, 256  # squares along each side of a level whose pixels tell one store from another
CONTRADICTION = 16  # grey levels between a chunk that reads as empty and another level's pixels there
RGB_COLOURS = ["FF0000", "00FF00", "0000FF"]

T = TypeVar("T")
Place = tuple[int, int, int]  # level, column and row of a tile


def _remote_store(files: Any, folder: str) -> Any:
    """A store of zarr; the storages that it opens by itself have connections that nobody closes."""
    from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
    from zarr.storage import FsspecStore

    class Store(FsspecStore):
        async def get(self, key: str, *args: Any, **kwargs: Any) -> Any:
            try:
                return await super().get(key, *args, **kwargs)
            except Exception as exc:  # public buckets that may not be listed deny what they do not have
                denied = isinstance(exc, PermissionError) or getattr(exc, "status", None) == FORBIDDEN
                if denied and key.rpartition("/")[2] in (*METADATA, ".zmetadata"):
                    return None
                raise

    return Store(AsyncFileSystemWrapper(files, asynchronous=True), read_only=True, path=folder)


def _storage(where: Path | str) -> tuple[Any, str]:
    """What zarr reads a store from, and the folder in it.

    Raises:
        UsageError: a URL with a signature, or that this zarr reads wrongly.
    """
    import zarr

    if isinstance(where, str):
        if "?" in where and where.lower().startswith(remote.HTTP):
            raise UsageError(
                "is many files, and the signature of a URL is of one; download the folder and give that"
            )
        if zarr.__version__.startswith("2."):  # takes whatever a storage raises for a chunk left out
            raise UsageError(
                "is read where it is by zarr 3, on Python 3.11 or newer; download the folder and give that"
            )
        return _remote_store(*remote.storage_of(where.rstrip("/"))), ""
    if where.is_dir():
        return str(where), ""
    with zipfile.ZipFile(where) as file:
        tops = {name.partition("/")[0] for name in file.namelist()}
    folder = "" if tops.intersection(METADATA) else min(tops, default="")
    return zarr.storage.ZipStore(where, mode="r"), folder


class OmeZarrReader(Reader):
    """An OME-Zarr store through zarr; at a URL, chunk by chunk as they are needed."""

    def __init__(self, where: Path | str, mpp: float | None = None) -> None:
        self.path = remote.place(where) if isinstance(where, str) else where
        self.reader = f"zarr {version('zarr')}"
        self._where, self._is_failing = where, False
        self._pool = ThreadPoolExecutor(REQUESTS_AT_ONCE, "zarr") if isinstance(where, str) else None
        with ExitStack() as opened:
            self._pyramid = self._read_pyramid(opened)
            self.set_levels(self._pyramid.sizes_px, self._pyramid.downsamples)
            scale, (um_x, um_y) = self._pyramid.scales[0], self._pyramid.um
            stated = [("OME-Zarr scale", scale[0] * um_x, scale[1] * um_y)] if um_x and um_y else []
            self.set_mpp(mpp, stated, "" if stated else f" (only the scale {scale[0]:g}, without a unit)")
            self._opened = opened.pop_all()
        largest = max(3 * math.prod(self.tile_px(level)) for level in range(len(self.levels)))
        self._cached = lru_cache(max(4, CACHE_BYTES // largest))(self.read_tile)

    def _read_pyramid(self, opened: ExitStack) -> Pyramid:
        """The levels; ``opened`` gets what has to be closed."""
        import zarr  # seconds that other slides need not wait for

        try:
            store, folder = _storage(self._where)
            if hasattr(store, "close"):  # of a zip file
                opened.callback(store.close)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of files that are not zarr's
                image, group, attrs = image_of(zarr.open_group(store, mode="r", path=folder))
                pyramid = Pyramid(image, group)
            colours = [str(one.get("color")).upper() for one in attrs.get("omero", {}).get("channels", ())]
            if sorted(colours) == sorted(RGB_COLOURS) and colours != RGB_COLOURS:
                raise UnsupportedSlideError(
                    f"{self._shown}: its channels are {', '.join(colours)}; allowed: red, green, blue"
                )
            return pyramid
        except SealExtractError as exc:
            if not str(exc).startswith(self._shown):
                exc.args = (f"{self._shown} {exc}",)
            raise
        except Exception as exc:  # zarr, its codecs and storages raise errors of every kind
            why = self._reason(exc)
            if type(exc).__name__ == "GroupNotFoundError":
                why = "it holds no zarr.json and no .zgroup"
            if self.reader.startswith("zarr 2."):
                why += f"; {self.reader} reads 0.4, and zarr 3 also 0.5, on Python 3.11 or newer"
            raise SlideOpenError(f"{self._shown} is no OME-Zarr that can be read: {why}") from exc

    @property
    def _shown(self) -> str:
        return remote.public(self._where) if isinstance(self._where, str) else str(self.path)

    def _reason(self, exc: BaseException) -> str:
        return remote.reason_of(exc, self._where) if isinstance(self._where, str) else first_line(exc)

    def tile_px(self, level: int) -> tuple[int, int]:
        """(width, height) of the tiles of a level, each of one chunk or of several small ones."""
        return self._pyramid.tile_px(level)

    def read_tile(self, level: int, column: int, row: int) -> Array:
        """Read a tile, or the part of it that is inside the level: uint8 [h, w, 3].

        Raises:
            ReadError: its chunks are damaged or missing, or the storage does not answer.
        """
        x, y = self._span(level, column, row)
        try:
            pixels = self._read_patiently(level, x, y)
            is_missing = self._is_missing(pixels, level, x.start, y.start)
        except Exception as exc:
            advice = "check the network and run again" if self._pool else "copy or write it again"
            raise self._unreadable(level, x, y, f"cannot be read: {self._reason(exc)}; {advice}") from exc
        if is_missing:
            why = f"is missing, but the level beside level {level} has other pixels there; write it again"
            raise self._unreadable(level, x, y, why)
        return pixels

    def _span(self, level: int, column: int, row: int) -> tuple[slice, slice]:
        width, height = self.tile_px(level)
        return slice(column * width, (column + 1) * width), slice(row * height, (row + 1) * height)

    def _unreadable(self, level: int, x: slice, y: slice, why: str) -> ReadError:
        xy_l0 = tuple(round(at.start * self.levels[level].downsample) for at in (x, y))
        return ReadError(f"{self._shown}: the chunk of level {level} at level-0 {xy_l0} {why}")

    def _read_patiently(self, level: int, x: slice, y: slice) -> Array:
        for pause_s in RETRY_AFTER_S if self._pool and not self._is_failing else ():
            try:
                return self._pyramid.read(level, x, y)
            except Exception:
                time.sleep(pause_s)
        try:
            pixels = self._pyramid.read(level, x, y)
        except Exception:
            self._is_failing = True  # the next requests are not waited for
            raise
        self._is_failing = False
        return pixels

    def _is_missing(self, pixels: Array, level: int, x: int, y: int) -> bool:
        """Whether a chunk of a tile has only the value that stands for missing chunks, unlike another level.

        A chunk that is not stored is no damage by itself: writers leave out what the scanner did.
        """
        empty = int(self._pyramid.arrays[level].fill_value or 0)
        width, height = self._pyramid.chunk_px(level)
        if len(self.levels) > 1:
            for top in range(0, pixels.shape[0], height):
                for left in range(0, pixels.shape[1], width):
                    chunk = pixels[top : top + height, left : left + width]
                    if chunk[0, 0, 0] == empty and (chunk == empty).all():
                        place = (x + left, y + top, chunk.shape[1], chunk.shape[0])
                        if self._is_contradicted(level, place, empty):
                            return True
        return False

    def _is_contradicted(self, level: int, place: tuple[int, int, int, int], empty: int) -> bool:
        """Whether another level has other pixels than ``empty`` at (x, y, width, height) of ``level``."""
        other = level + 1 if level + 1 < len(self.levels) else level - 1
        scale = self.levels[level].downsample / self.levels[other].downsample
        across, down = (  # averages reach over the border by 2 px at most
            slice(math.ceil(begin * scale) + 2, math.floor((begin + length) * scale) - 2)
            for begin, length in (place[::2], place[1::2])
        )
        if across.start >= across.stop or down.start >= down.stop:
            return False
        theirs = self._read_patiently(other, across, down).astype(np.int16)
        return bool((abs(theirs - empty) > CONTRADICTION).any())

    def _each(self, work: Callable[[Place], T], places: list[Place]) -> Iterator[T]:
        """The results of ``work`` in order; many at a time where each has to wait for a storage."""
        return self._pool.map(work, places) if self._pool else map(work, places)

    def read_tiles(self, places: list[Place]) -> Iterator[Array | ReadError]:
        """Read tiles without keeping them; see `read_tile`."""

        def read(place: Place) -> Array | ReadError:
            try:
                return self.read_tile(*place)
            except ReadError as exc:
                return ReadError(str(exc))  # without the frames that it was raised through

        return self._each(read, places)

    def read_region(self, xy_l0: tuple[int, int], level: int, size_px: tuple[int, int]) -> Array:
        """See `Slide.read_region`."""
        (x, y), (w, h) = (round(v / self.levels[level].downsample) for v in xy_l0), size_px
        region = np.zeros((h, w, 3), np.uint8)
        (width, height), (tile_w, tile_h) = self.levels[level].size_px, self.tile_px(level)
        columns = range(max(x, 0) // tile_w, -(-min(x + w, width) // tile_w))
        rows = range(max(y, 0) // tile_h, -(-min(y + h, height) // tile_h))
        places = [(level, column, row) for row in rows for column in columns]
        tiles = self._each(lambda place: self._cached(*place), places)
        for (_, column, row), tile in zip(places, tiles, strict=True):
            left, top = column * tile_w - x, row * tile_h - y
            part = tile[max(0, -top) : h - top, max(0, -left) : w - left]
            top, left = max(top, 0), max(left, 0)
            region[top : top + part.shape[0], left : left + part.shape[1]] = part
        return region

    @cached_property
    def content(self) -> str:
        """A digest of the sizes, and of samples of the finest and the coarsest level.

        It is the same for every copy of the store, whether that is a folder, a zip file or at a URL, and
        however it is cut into chunks and compressed.
        """
        digest = hashlib.sha256(repr([(level.size_px, level.downsample) for level in self.levels]).encode())
        for level in (len(self.levels) - 1, 0):
            columns, rows = (
                sorted({max(0, size - SAMPLE_PX) * i // (SAMPLES - 1) for i in range(SAMPLES)})
                for size in self.levels[level].size_px
            )
            for pixels in self._each(self._sample, [(level, x, y) for y in rows for x in columns]):
                digest.update(pixels)
        return digest.hexdigest()

    def _sample(self, place: tuple[int, int, int]) -> bytes:
        level, x, y = place
        try:
            pixels = self._read_patiently(level, slice(x, x + SAMPLE_PX), slice(y, y + SAMPLE_PX))
        except Exception as exc:
            if self._pool:  # the network, as a rule
                raise ReadError(f"{self._shown} cannot be read: {self._reason(exc)}; run again") from exc
            return b"damaged"
        return pixels.tobytes()

    @property
    def size_bytes(self) -> int:
        """The size of a zip file, and of all pixels elsewhere."""
        if self.path.is_file():
            return self.path.stat().st_size
        return sum(3 * math.prod(level.size_px) for level in self.levels)

    def close(self) -> None:
        """Stop requests, and forget the tiles."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._cached.cache_clear()
        self._opened.close()
