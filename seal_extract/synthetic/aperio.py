"""A synthetic section written as Aperio's scanners write theirs: one TIFF, JPEG tiles, a pyramid.

The picture streams through once, in square blocks of level 0. Each block is rendered, its tiles are
encoded, and its area averages are handed to the lower levels, whose tiles wait in files without a name
until level 0 is complete. Memory therefore grows with the slide's width, not its area.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import cv2
import numpy as np
import tifffile

from seal_extract.errors import UsageError
from seal_extract.publish import publish
from seal_extract.synthetic.anatomy import Window
from seal_extract.synthetic.codec import Codec
from seal_extract.synthetic.section import Section
from seal_extract.synthetic.texture import Bytes

BLOCK_PX = 1024  # about the side of a block
THUMBNAIL_PX = 1024
CLASSIC_TIFF_BYTES = 3.5e9  # from here on 64-bit offsets
Work = TypeVar("Work")
Done = TypeVar("Done")


def write_synthetic_slide(
    path: str | os.PathLike[str],
    size_px: tuple[int, int],
    *,
    mpp: float = 0.25,
    tile_px: int = 256,
    downsamples: tuple[int, ...] = (1, 4, 16),
    compression: str = "jpeg",
    photometric: str | None = None,
    subsampling: str | None = None,
    jpeg_quality: int = 70,
    seed: int = 0,
    pen: bool = False,
    dust: bool = False,
    workers: int | None = None,
) -> Path:
    """Write an H&E-like slide that OpenSlide and tiffslide read as Aperio's.

    With the same libraries the file depends on the arguments alone, and not on ``workers``. It appears
    under its name only when it is complete. 40,000 x 40,000 px at 0.25 µm/px take some 45 s of CPU time,
    0.25 GB of memory with two workers, and 120 MB of disk.

    Args:
        path: The file to write, by custom ``.svs``; its folder is made if missing.
        size_px: (width, height) of level 0 in pixels.
        mpp: µm/px of level 0. Structures keep their size in µm.
        tile_px: Side of the tiles, a multiple of 16; scanners use 256 and 240.
        downsamples: Of the levels, whole numbers from 1 upwards; each level averages the pixels of level 0.
        compression: ``"jpeg"``, or ``"jpeg2000"`` as of Aperio's 33003 and 33005 (five times slower).
        photometric: ``"ycbcr"`` or ``"rgb"``; by default YCbCr for JPEG, RGB for JPEG 2000. JPEG in RGB
            carries no sign of it but the TIFF's own tag, as in real files.
        subsampling: ``"4:2:0"`` (default), ``"4:2:2"`` or ``"4:4:4"`` for JPEG in YCbCr, else ``"4:4:4"``.
        jpeg_quality: 1 to 100; for JPEG 2000 turned into a signal-to-noise ratio.
        seed: Any other seed gives another specimen.
        pen: Draw an arc with a felt pen.
        dust: Strew specks of dust.
        workers: Threads; by default one per core, at most 4.

    Returns:
        ``path``.

    Raises:
        UsageError: An argument out of range, or two that contradict.
        OutputError: The file cannot be written; nothing is left behind.
    """
    codec = Codec.checked(compression, photometric, subsampling, jpeg_quality)
    layout = Layout.checked(size_px, mpp, tile_px, downsamples)
    section = Section(layout.size_px, layout.mpp, cell_px=layout.tile_px, seed=seed, pen=pen, dust=dust)
    workers = min(4, os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise UsageError(f"workers={workers}: give 1 or more threads, or None for one per core")
    path = Path(path)
    with publish(path) as part:
        Writer(layout, codec, section, f"seed {seed}").write(part, workers)
    return path


@dataclass(frozen=True)
class Layout:
    """The pyramid: what is a tile, a level, and a block that is rendered in one go."""

    size_px: tuple[int, int]
    mpp: float
    tile_px: int
    downsamples: tuple[int, ...]

    @classmethod
    def checked(
        cls, size_px: tuple[int, int], mpp: float, tile_px: int, downsamples: tuple[int, ...]
    ) -> Layout:
        """Refuse what makes no pyramid."""
        if len(size_px) != 2 or not all(isinstance(side, (int, np.integer)) and side > 0 for side in size_px):
            raise UsageError(f"size_px={size_px}: give (width, height) in pixels, as (4096, 3072)")
        if not 0.05 <= mpp <= 10:
            raise UsageError(f"mpp={mpp}: give µm/px from 0.05 to 10, as 0.25")
        if tile_px < 16 or tile_px % 16 or tile_px > 2048:
            raise UsageError(f"tile_px={tile_px}: give a multiple of 16 up to 2048, as 256")
        rising = all(a < b for a, b in itertools.pairwise(downsamples))
        if not downsamples or downsamples[0] != 1 or not rising or any(d != int(d) for d in downsamples):
            raise UsageError(f"downsamples={downsamples}: give rising whole numbers from 1, as (1, 4, 16)")
        if downsamples[-1] > min(size_px):
            raise UsageError(f"{size_px} is too small for downsamples={downsamples}: give a larger size_px")
        size_px, downsamples = (int(size_px[0]), int(size_px[1])), tuple(int(d) for d in downsamples)
        layout = cls(size_px, float(mpp), int(tile_px), downsamples)
        if layout.unit_px > 4 * BLOCK_PX:
            raise UsageError(
                f"downsamples={downsamples} and tile_px={tile_px} do not go together: use powers of 2"
            )
        return layout

    @property
    def unit_px(self) -> int:
        """The smallest square of whole tiles that every level can average."""
        return math.lcm(self.tile_px, *self.downsamples)

    @property
    def block_px(self) -> int:
        """Side of a block at level 0."""
        return self.unit_px * max(1, BLOCK_PX // self.unit_px)

    @property
    def thumbnail_downsample(self) -> int:
        """The smallest divisor of ``unit_px`` that brings the slide down to a thumbnail."""
        divisors = (d for d in range(1, self.unit_px + 1) if self.unit_px % d == 0)
        small = (d for d in divisors if max(self.size_px) <= d * THUMBNAIL_PX)
        return next(small, self.unit_px)

    def level_px(self, downsample: int) -> tuple[int, int]:
        """(width, height) of a level; what does not fill a pixel is cut off, as Aperio does."""
        return max(1, self.size_px[0] // downsample), max(1, self.size_px[1] // downsample)

    def blocks(self) -> Iterator[list[Window]]:
        """The blocks that cover level 0, a list per row; the last ones end with the last tile."""
        width, height = (math.ceil(side / self.unit_px) * self.unit_px for side in self.size_px)
        size = self.block_px
        for y in range(0, height, size):
            yield [Window(x, y, min(size, width - x), min(size, height - y)) for x in range(0, width, size)]


class LowerLevel:
    """A level below the first: rows of pixels come in, encoded tiles wait in a file for their turn."""

    def __init__(self, size_px: tuple[int, int], tile_px: int, codec: Codec, file: IO[bytes]) -> None:
        self.size_px, self._tile_px, self._codec, self._file = size_px, tile_px, codec, file
        self._pending: Bytes = np.empty((0, math.ceil(size_px[0] / tile_px) * tile_px, 3), np.uint8)
        self._lengths: list[int] = []

    def push(self, rows: Bytes) -> None:
        """Take the next rows of the level, uint8 [n, w, 3]."""
        width = self._pending.shape[1]
        padding = ((0, 0), (0, max(0, width - rows.shape[1])), (0, 0))
        rows = np.pad(rows[:, :width], padding, mode="edge")
        self._pending = np.concatenate([self._pending, rows])
        while len(self._pending) >= self._tile_px:
            self._encode(self._pending[: self._tile_px])
            self._pending = self._pending[self._tile_px :]

    def _encode(self, row: Bytes) -> None:
        for tile in np.split(row, row.shape[1] // self._tile_px, axis=1):
            self._lengths.append(self._file.write(self._codec.encode(np.ascontiguousarray(tile))))

    def tiles(self) -> Iterator[bytes]:
        """All tiles in order, once every row has come in."""
        if len(self._pending):
            missing = self._tile_px - len(self._pending)
            self._encode(np.pad(self._pending, ((0, missing), (0, 0), (0, 0)), mode="edge"))
        self._file.seek(0)
        for length in self._lengths:
            yield self._file.read(length)


@dataclass(frozen=True)
class Block:
    """A rendered block: encoded tiles as ``tiles[row][column]``, and its average at each reduction."""

    tiles: list[list[bytes]]
    reduced: list[Bytes]


class Writer:
    """Writes one section in one layout."""

    def __init__(self, layout: Layout, codec: Codec, section: Section, title: str) -> None:
        self.layout, self.codec, self.section, self.title = layout, codec, section, title
        self._reductions = (*layout.downsamples[1:], layout.thumbnail_downsample)
        self._known_glass: dict[tuple[int, ...], bytes] = {}
        self._thumbnail: list[Bytes] = []

    def write(self, path: Path, workers: int) -> None:
        """Write the whole file: level 0, the thumbnail, the lower levels, as Aperio orders them."""
        layout, tile_px = self.layout, self.layout.tile_px
        with contextlib.ExitStack() as stack:
            tiff = stack.enter_context(tifffile.TiffWriter(path, bigtiff=self._needs_64_bits()))
            lower = [
                LowerLevel(
                    layout.level_px(downsample),
                    tile_px,
                    self.codec,
                    stack.enter_context(tempfile.TemporaryFile(dir=path.parent)),
                )
                for downsample in layout.downsamples[1:]
            ]
            pool = stack.enter_context(ThreadPoolExecutor(workers))
            self._page(tiff, self._level_0(pool, 2 * workers, lower), layout.size_px)
            self._thumbnail_page(tiff)
            for level in lower:
                self._page(tiff, level.tiles(), level.size_px)

    def _page(self, tiff: tifffile.TiffWriter, tiles: Iterator[bytes], size_px: tuple[int, int]) -> None:
        tiff.write(
            tiles,
            shape=(size_px[1], size_px[0], 3),
            dtype=np.uint8,
            tile=(self.layout.tile_px, self.layout.tile_px),
            description=self._description(size_px),
            metadata=None,
            software=False,
            **self.codec.tags(),
        )

    def _thumbnail_page(self, tiff: tifffile.TiffWriter) -> None:
        width, height = self.layout.level_px(self.layout.thumbnail_downsample)
        picture = np.concatenate(self._thumbnail)[:height, :width]
        codec = Codec("jpeg", "ycbcr", "4:2:0", self.codec.quality)
        strips = (np.ascontiguousarray(picture[top : top + 16]) for top in range(0, height, 16))
        tiff.write(
            (codec.encode(strip) for strip in strips),
            shape=picture.shape,
            dtype=np.uint8,
            rowsperstrip=16,
            description=self._description((width, height), thumbnail=True),
            metadata=None,
            software=False,
            **codec.tags(),
        )

    def _level_0(self, pool: ThreadPoolExecutor, ahead: int, lower: list[LowerLevel]) -> Iterator[bytes]:
        """The tiles of level 0 in order; on the way, feed the lower levels and the thumbnail."""
        across, down = (math.ceil(side / self.layout.tile_px) for side in self.layout.size_px)
        rows = list(self.layout.blocks())
        done = in_order(pool, self._block, itertools.chain.from_iterable(rows), ahead)
        for windows in rows:
            blocks = [next(done) for _ in windows]
            parts = zip(*(block.reduced for block in blocks), strict=True)
            *averages, small = (np.concatenate(part, axis=1) for part in parts)
            for level, average in zip(lower, averages, strict=True):
                level.push(average)
            self._thumbnail.append(small)
            tile_rows = list(zip(*(block.tiles for block in blocks), strict=True))[:down]
            down -= len(tile_rows)
            for row in tile_rows:
                yield from itertools.islice(itertools.chain.from_iterable(row), across)

    def _block(self, window: Window) -> Block:
        """Render a block, encode its tiles, average it."""
        pixels = self.section.render(window)
        encode = self._glass if self.section.is_glass(window) else self._tile
        size = self.layout.tile_px
        columns, rows = range(0, window.width, size), range(0, window.height, size)
        tiles = [[encode(pixels, window, left, top) for left in columns] for top in rows]
        return Block(tiles, [_averaged(pixels, times) for times in self._reductions])

    def _tile(self, pixels: Bytes, window: Window, left: int, top: int) -> bytes:
        size = self.layout.tile_px
        return self.codec.encode(np.ascontiguousarray(pixels[top : top + size, left : left + size]))

    def _glass(self, pixels: Bytes, window: Window, left: int, top: int) -> bytes:
        """As ``_tile``, but each kind of empty tile once: noise repeats, the lamp has a few levels."""
        period = self.section.period_px
        kind = ((window.x + left) % period, (window.y + top) % period, *pixels[top, left].tolist())
        if kind not in self._known_glass:
            self._known_glass[kind] = self._tile(pixels, window, left, top)
        return self._known_glass[kind]

    def _needs_64_bits(self) -> bool:
        uncompressed = 3 * math.prod(self.layout.size_px)
        return uncompressed > CLASSIC_TIFF_BYTES and self._bytes() > CLASSIC_TIFF_BYTES

    def _bytes(self) -> float:
        """No less than the file will take: all of it as costly as the costliest of some tiles."""
        size, (width, height) = self.layout.tile_px, self.layout.size_px
        places = [(width * i // 6, height * j // 6) for i in range(1, 6) for j in range(1, 6)]
        tiles = (self.section.render(Window(x, y, size, size)) for x, y in places)
        costliest = max(len(self.codec.encode(tile)) for tile in tiles) / size**2
        return costliest * width * height * sum(1.5 / times**2 for times in self.layout.downsamples)

    def _description(self, size_px: tuple[int, int], *, thumbnail: bool = False) -> str:
        """Aperio's ImageDescription of a page; readers take the µm/px from that of level 0."""
        (width, height), tile, layout = size_px, self.layout.tile_px, self.layout
        text = "Aperio Image Library v12.0.16 \r\n{0}x{1} [0,0 {0}x{1}]".format(*layout.size_px)
        tiled = "" if thumbnail else f" ({tile}x{tile})"
        reduced = "" if size_px == layout.size_px and not thumbnail else f" -> {width}x{height}"
        kind = "-" if thumbnail else f"{self.codec.label} Q={self.codec.quality}"
        mpp = f"{layout.mpp:.4f}" if float(f"{layout.mpp:.4f}") == layout.mpp else repr(layout.mpp)
        facts = (
            f"AppMag = {10 / layout.mpp:.0f}",
            "ScanScope ID = seal_extract",
            f"Title = {self.title}",
            f"MPP = {mpp}",
        )
        return "|".join((f"{text}{tiled}{reduced} {kind}", *facts))


def in_order(
    pool: ThreadPoolExecutor, work: Callable[[Work], Done], items: Iterable[Work], ahead: int
) -> Iterator[Done]:
    """``map(work, items)`` on a pool that never runs more than ``ahead`` items ahead of its reader."""
    waiting: deque[Future[Done]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _averaged(pixels: Bytes, times: int) -> Bytes:
    """The mean of each ``times`` x ``times`` square."""
    size = (pixels.shape[1] // times, pixels.shape[0] // times)
    return pixels if times == 1 else np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
