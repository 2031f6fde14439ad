"""One level of a slide as its file stores it: compressed tiles at their offsets.

The slide's reader decides: a level is taken only if its directory in the TIFF has the size that the reader
states, and if a sample of this file's tiles, decoded here, equals the reader's pixels in each value.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from seal_extract.errors import ReadError, SlideError
from seal_extract.patches.codecs import Codec, DecodedCodec, Jpeg2000Codec, JpegCodec, TileError
from seal_extract.patches.regions import read_exactly
from seal_extract.slides.ome_zarr import OmeZarrReader
from seal_extract.slides.readers import Array
from seal_extract.slides.slide import Slide
from seal_extract.slides.tiff import TIFF_HEADS
from seal_extract.slides.tiff_pixels import is_placed_by_xml

PROBES = 4  # tiles that are compared with the reader's pixels
MERGE_GAP = 2**14  # bytes between two tiles that are read along rather than skipped
MERGE_BYTES = 2**22  # of one read


class Unsuitable(Exception):
    """The reason why a level is left to the slide's reader."""


class TiledLevel:
    """One level of a tiled TIFF, opened for reading by any number of threads.

    Attributes:
        size_px: (width, height) of the level, as the reader states it.
        tile_px: (width, height) of a tile.
        across: tiles in a row.
        codec: decodes a tile; `probe` chooses it from ``candidates``.
    """

    close: Callable[[], None]

    def __init__(
        self,
        path: Path,
        size_px: tuple[int, int],
        tile_px: tuple[int, int],
        offsets: NDArray[np.int64],
        counts: NDArray[np.int64],
        candidates: tuple[Codec, ...],
    ) -> None:
        self.path, self.size_px, self.tile_px = path, size_px, tile_px
        self.candidates, self.codec = candidates, candidates[0]
        self.across = -(-size_px[0] // tile_px[0])
        self._offsets, self._counts = offsets, counts
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.close = weakref.finalize(self, os.close, self._file)
        largest = 4 * math.prod(self.tile_shape) + 2**16
        sane = (offsets > 0) & (counts > 0) & (counts <= largest)
        sane &= counts <= os.fstat(self._file).st_size - offsets
        self._ends = offsets + counts * sane  # no byte of a tile of which the table cannot be right

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """(height, width, 3) of a decoded tile."""
        return (self.tile_px[1], self.tile_px[0], 3)

    def corner_px(self, tile: int) -> tuple[int, int]:
        """(x, y) of a tile in pixels of the level."""
        return (tile % self.across * self.tile_px[0], tile // self.across * self.tile_px[1])

    def read(self, tiles: list[int]) -> Iterator[tuple[int, bytes]]:
        """Yield each tile's number and bytes in the order of the file; neighbours are read together.

        The bytes are empty if the file does not hold the whole tile.
        """
        for run in self._runs(tiles):
            start, end = run[0][1], run[-1][2]
            piece = self._read_at(start, end - start) if end > start else b""
            for tile, first, last in run:
                data = piece[first - start : last - start]
                yield tile, data if len(data) == last - first else b""

    def read_into(
        self, tiles: NDArray[np.int64], allocate: Callable[[int], Array]
    ) -> tuple[Array, NDArray[np.int64], NDArray[np.int64]]:
        """Read tiles into one piece of memory, neighbours together.

        Args:
            tiles: their numbers.
            allocate: gives memory of so many bytes, uint8.

        Returns:
            data: the memory.
            first: where each tile begins in it, int64 [T].
            count: its bytes, int64 [T]; 0 if the file does not hold the whole tile.
        """
        runs = [(run, run[0][1], run[-1][2]) for run in self._runs(tiles.tolist())]
        data = allocate(sum(max(0, end - start) for _, start, end in runs))
        places, at = {}, 0
        for run, start, end in runs:
            piece = data[at : at + max(0, end - start)]
            held = self._fill(piece, start)
            for tile, first, last in run:
                places[tile] = (at + first - start, last - first if last - start <= held else 0)
            at += len(piece)
        first_and_count = np.array([places[tile] for tile in tiles.tolist()], np.int64).reshape(-1, 2)
        return data, first_and_count[:, 0], first_and_count[:, 1]

    def is_left_out(self, tile: int) -> bool:
        """Whether the file states by a zero offset that the tile is empty, as some scanners do for glass."""
        return not (self._offsets[tile] or self._counts[tile])

    def _runs(self, tiles: list[int]) -> list[list[tuple[int, int, int]]]:
        """Tiles in the order of the file, in runs that are each read as one piece.

        With each tile stand its first byte and the one after its last.
        """
        runs: list[list[tuple[int, int, int]]] = []
        end = start = 0
        spans = zip(self._offsets[tiles].tolist(), self._ends[tiles].tolist(), tiles, strict=True)
        for first, last, tile in sorted(spans):
            if not runs or not end <= first <= end + MERGE_GAP or last - start > MERGE_BYTES:
                runs.append([])
                start = first
            runs[-1].append((tile, first, last))
            end = last
        return runs

    def _read_at(self, offset: int, count: int) -> bytes:
        try:
            if hasattr(os, "pread"):
                return os.pread(self._file, count, offset)
            with self._lock:  # Windows
                os.lseek(self._file, offset, os.SEEK_SET)
                return os.read(self._file, count)
        except OSError:  # a bad sector or a lost share: treated as tiles that are not in the file
            return b""

    def _fill(self, memory: Array, offset: int) -> int:
        """Read from the file into memory: the number of bytes that it holds."""
        if hasattr(os, "preadv") and len(memory):
            try:
                return os.preadv(self._file, [memory.data], offset)
            except OSError:  # see `_read_at`
                return 0
        data = self._read_at(offset, len(memory)) if len(memory) else b""
        memory[: len(data)] = np.frombuffer(data, np.uint8)
        return len(data)

    def largest(self, tiles: NDArray[np.int64]) -> NDArray[np.int64]:
        """The larger half of ``tiles`` by compressed size: tissue rather than glass."""
        counts = self._counts[tiles]
        return tiles[counts >= np.median(counts)] if len(tiles) else tiles


class ChunkedLevel(TiledLevel):
    """One level of an OME-Zarr store; what is read is decoded already."""

    def __init__(self, slide: OmeZarrReader, level: int) -> None:
        self.path, self.size_px, self.tile_px = slide.path, slide.levels[level].size_px, slide.tile_px(level)
        self.codec = DecodedCodec()
        self.candidates = (self.codec,)
        self.across = -(-self.size_px[0] // self.tile_px[0])
        self._slide, self._level = slide, level
        self._tiles = self.across * -(-self.size_px[1] // self.tile_px[1])
        self.close = lambda: None  # the slide's reader has the store

    def __len__(self) -> int:
        return self._tiles

    def read(self, tiles: list[int]) -> Iterator[tuple[int, bytes]]:
        """Yield each tile's number and pixels; no bytes if they cannot be read."""
        places = [(self._level, tile % self.across, tile // self.across) for tile in tiles]
        for tile, pixels in zip(tiles, self._slide.read_tiles(places), strict=True):
            if isinstance(pixels, ReadError):
                yield tile, b""
                continue
            if pixels.shape != self.tile_shape:
                inside, pixels = pixels, np.zeros(self.tile_shape, np.uint8)
                pixels[: inside.shape[0], : inside.shape[1]] = inside
            yield tile, pixels.tobytes()

    def largest(self, tiles: NDArray[np.int64]) -> NDArray[np.int64]:
        """All of ``tiles``: their compressed sizes are unknown."""
        return tiles


def open_level(slide: Slide, level: int) -> TiledLevel:
    """Find the tiles of a level in the slide's file or store.

    Raises:
        Unsuitable: the level is not made of tiles that this package decodes.
    """
    if isinstance(slide, OmeZarrReader):
        return ChunkedLevel(slide, level)
    size_px = slide.levels[level].size_px
    try:
        with slide.path.open("rb") as file:
            if file.read(4) not in TIFF_HEADS:
                raise Unsuitable("no TIFF")
        if is_placed_by_xml(slide.path):
            raise Unsuitable("its XML says where tiles lie")
        with tifffile.TiffFile(slide.path) as tif:
            if tif.is_ndpi:
                raise Unsuitable("NDPI")
            pages = (page for top in tif.pages for page in (top, *(getattr(top, "pages", None) or ())))
            tiled = [page for page in pages if page.is_tiled]
            for page in tiled:
                if (page.imagewidth, page.imagelength) == size_px:
                    return _level_of(slide.path, page, size_px)
            if tif.is_philips and len(tiled) == len(slide.levels):  # directories are padded to whole tiles
                page = tiled[level]
                if -(-page.imagewidth // page.tilewidth) == -(-size_px[0] // page.tilewidth):
                    return _level_of(slide.path, page, size_px)
        raise Unsuitable("no tiled directory of the level's size")
    except Unsuitable:
        raise
    except Exception as exc:  # tifffile raises errors of every kind for damaged directories
        raise Unsuitable(f"its directories are damaged ({type(exc).__name__})") from exc


def _level_of(path: Path, page: Any, size_px: tuple[int, int]) -> TiledLevel:
    channels = (page.samplesperpixel, page.bitspersample, page.planarconfig, page.imagedepth)
    if channels != (3, 8, tifffile.PLANARCONFIG.CONTIG, 1) or page.sampleformat != 1:
        raise Unsuitable("not three interleaved 8-bit channels")
    tile_px = (page.tilewidth, page.tilelength)
    if not 16 <= min(tile_px) <= max(tile_px) <= 4096:
        raise Unsuitable(f"tiles of {tile_px[0]} x {tile_px[1]} px")
    tiles = -(-size_px[0] // tile_px[0]) * -(-size_px[1] // tile_px[1])
    offsets, counts = (np.asarray(v, np.int64) for v in (page.dataoffsets, page.databytecounts))
    if not len(offsets) == len(counts) == tiles:
        raise Unsuitable(f"a table of {len(offsets)} tiles for {tiles}")
    return TiledLevel(path, size_px, tile_px, offsets, counts, _codecs_of(page))


def _codecs_of(page: Any) -> tuple[Codec, ...]:
    """The codec that the tags state first; Bio-Formats, for one, tags whole JPEGs in YCbCr as RGB."""
    photometric, compression = page.photometric, page.compression
    rgb, ycbcr = (photometric == p for p in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR))
    if compression == tifffile.COMPRESSION.JPEG and (rgb or ycbcr):
        tables = bytes(page.jpegtables or b"")
        return (JpegCodec(tables, bool(ycbcr)), JpegCodec(tables, None))
    if compression == tifffile.COMPRESSION.APERIO_JP2000_YCBC and (rgb or ycbcr):  # the tag says RGB
        return (Jpeg2000Codec(ycbcr=True),)
    if compression in (tifffile.COMPRESSION.APERIO_JP2000_RGB, tifffile.COMPRESSION.JPEG2000) and rgb:
        return (Jpeg2000Codec(),)
    raise Unsuitable(f"{compression.name} in {photometric.name}")


def probe(slide: Slide, level: int, tiled: TiledLevel, tiles: NDArray[np.int64]) -> None:
    """Choose the codec that gives exactly the reader's pixels on a sample of ``tiles``, always the same one.

    Raises:
        Unsuitable: every candidate gives other pixels, or no tile can be compared.
    """
    large = tiled.largest(tiles)
    order = np.random.default_rng(0).permutation(len(large))[: 4 * PROBES]
    refusal = Unsuitable("no tile could be compared with the reader's pixels")
    for codec in tiled.candidates:
        tiled.codec = codec
        try:
            if _compare(slide, level, tiled, large[order].tolist()) or not len(tiles):
                return
        except Unsuitable as exc:
            refusal = exc
    raise refusal


def _compare(slide: Slide, level: int, tiled: TiledLevel, tiles: list[int]) -> int:
    """The number of tiles that equal the reader's; damaged ones are skipped."""
    compared = 0
    for tile, data in tiled.read(tiles):
        ours = np.empty(tiled.tile_shape, np.uint8)
        try:
            tiled.codec.decode(data, ours)
            theirs = read_tile(slide, level, tiled, tile)
        except (TileError, SlideError):
            continue
        if not np.array_equal(ours[: theirs.shape[0], : theirs.shape[1]], theirs):
            raise Unsuitable(f"its {tiled.codec.name} decode to other pixels than {slide.reader}'s")
        compared += 1
        if compared == PROBES:
            break
    return compared


def read_tile(slide: Slide, level: int, tiled: TiledLevel, tile: int) -> Array:
    """The part of a tile inside the level, through the slide's reader: uint8 [h, w, 3]."""
    (x, y), (width, height), (w, h) = tiled.corner_px(tile), tiled.size_px, tiled.tile_px
    downsample = slide.levels[level].downsample
    xy_l0 = (round(x * downsample), round(y * downsample))
    return read_exactly(slide, xy_l0, level, (min(w, width - x), min(h, height - y)))
