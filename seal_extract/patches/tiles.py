"""Read patches out of compressed tiles; each tile is decoded once although neighbouring patches share it."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import ReadError
from seal_extract.patches.codecs import REDUCTIONS, TileError, memory_for_pixels, shrink
from seal_extract.patches.grid import PatchGrid
from seal_extract.patches.regions import ROWS_AT_ONCE, HostPixels
from seal_extract.patches.resample import Memory, Resampling
from seal_extract.patches.tiled import Unsuitable, open_level, probe, read_tile
from seal_extract.slides.readers import Array
from seal_extract.slides.slide import Slide

HELD_BYTES = 512 * 2**20  # of shared tiles; beyond, as for patches in random order, tiles are decoded again

Part = tuple[tuple[int, slice, slice], tuple[slice, slice]]  # a place in the regions of a job, and in a tile
Users = Mapping[int, list[Part]]  # tile -> its parts that belong to the patches of a job
Pixels = Array | ReadError  # of a tile: uint8 [h, w, 3], or the reason why it cannot be read


class TileReader:
    """Reads patches out of compressed tiles; see `PatchReader`."""

    rows_at_once = ROWS_AT_ONCE
    on_device = False

    def __init__(self, slide: Slide, grid: PatchGrid, resampling: Resampling, fast: bool = False) -> None:
        """Open the tiles of the grid's level and compare a sample with the reader's pixels.

        Args:
            slide: reads the tiles that cannot be decoded here.
            grid: rows to read.
            resampling: how regions become patches.
            fast: decode JPEG at reduced scale if patches shrink by a multiple of 2.

        Raises:
            Unsuitable: these patches are better read through the slide's reader.
        """
        self.grid, self._slide, self._resampling = grid, slide, resampling
        self._xy_px = _on_level(slide, grid)
        self._tiled = open_level(slide, grid.level)
        outside = (self._xy_px < 0) | (self._xy_px + grid.read_px > self._tiled.size_px)
        self._partly_outside = bool(outside.any() or grid.padding.any())
        self._first, self._last = self._tiles_of_rows()
        uses = self._count_uses()
        probe(slide, grid.level, self._tiled, np.flatnonzero(uses))
        self._reduction, self._by_codec = self._choose_reduction(fast)
        self._region_px = grid.read_px // self._reduction
        height, width, _ = self._tiled.tile_shape
        self._tile_shape = (height // self._reduction, width // self._reduction, 3)  # as decoded
        self._shrinks = self._reduction > 1 and not self._by_codec
        self._shared = SharedTiles(uses, self._tile_shape)
        self._buffers = threading.local()
        self.name = self._tiled.codec.name + (f" at 1/{self._reduction}" if self._by_codec else "")
        self.side_px = grid.patch_px if resampling.early else self._region_px
        self.close = self._tiled.close
        self.to_patches = resampling.on_device

    def read(self, rows: range, out: Memory | None = None) -> HostPixels:
        """See `PatchReader.read`; a damaged tile is tried again through the slide's reader."""
        regions = self._new_regions(len(rows), out)
        users = self._users(rows)
        unreadable: dict[int, str] = {}
        for tile, pixels in self._decoded(users, regions):
            for put, cut in users[tile]:
                if isinstance(pixels, ReadError):
                    unreadable[rows[put[0]]] = str(pixels)
                elif pixels is not None:
                    regions[put] = pixels[cut]
        if self._partly_outside:
            for region, row in zip(regions, rows, strict=True):
                self.grid.whiten(region, row, self._slide)
        for row in unreadable:
            regions[row - rows.start] = 0
        return HostPixels(self._resampling.in_thread(regions, out), unreadable)

    # --- which tiles ----------------------------------------------------------------------------------

    def _choose_reduction(self, fast: bool) -> tuple[int, bool]:
        """By how much tiles shrink as they are decoded, and whether the codec does it by itself."""
        grid, tiled = self.grid, self._tiled
        factor, rest = divmod(grid.read_px, grid.patch_px)
        if rest or self._partly_outside:
            return 1, False
        aligned = [
            n
            for n in (factor, *REDUCTIONS)
            if n > 1 and not (factor % n or (self._xy_px % n).any() or any(s % n for s in tiled.tile_px))
        ]
        by_codec = [n for n in aligned if n in REDUCTIONS] if fast and tiled.codec.reduces else []
        if by_codec:
            return max(by_codec), True
        return (factor, False) if self._resampling.filter == "area" and factor in aligned else (1, False)

    def _tiles_of_rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and last tile (column, row) under each patch: two int64 [N, 2]; last < first if none."""
        begin, end = (
            np.clip(xy, 0, self._tiled.size_px) for xy in (self._xy_px, self._xy_px + self.grid.read_px)
        )
        first, last = begin // self._tiled.tile_px, (end - 1) // self._tiled.tile_px
        return first, np.where((begin < end).all(1, keepdims=True), last, first - 1)

    def _count_uses(self) -> NDArray[np.int64]:
        """The number of patches over each tile: int64 [tiles]."""
        uses = np.zeros(len(self._tiled), np.int64)
        spans = self._last - self._first + 1
        for dy in range(spans[:, 1].max(initial=0)):
            for dx in range(spans[:, 0].max(initial=0)):
                tiles = (self._first + np.array([dx, dy]))[(spans > [dx, dy]).all(1)]
                uses += np.bincount(tiles @ [1, self._tiled.across], minlength=len(uses))
        return uses

    def _users(self, rows: range) -> Users:
        """The tiles under ``rows``, and what each gives to the patches."""
        users: dict[int, list[Part]] = {}
        which = slice(rows.start, rows.stop)
        corners = self._xy_px[which] // self._reduction
        ends = (of.tolist() for of in (corners, self._first[which], self._last[which]))
        (width, height), (high, wide, _) = self._tiled.size_px, self._tile_shape
        for i, ((x, y), (left, top), (right, bottom)) in enumerate(zip(*ends, strict=True)):
            across = _spans(x, left, right, wide, self._region_px, width)
            for row, put_y, cut_y in _spans(y, top, bottom, high, self._region_px, height):
                for column, put_x, cut_x in across:
                    part = ((i, put_y, put_x), (cut_y, cut_x))
                    users.setdefault(row * self._tiled.across + column, []).append(part)
        return users

    # --- decoding -------------------------------------------------------------------------------------

    def _decoded(self, users: Users, regions: Array) -> Iterator[tuple[int, Pixels | None]]:
        """Each tile once, valid until the next is asked for; None if it was decoded in its place.

        Tiles that other threads may wait for come first, so that no two threads wait for each other.
        """
        claim = self._shared.claim(users)
        try:
            for tile, data in self._tiled.read(list(claim.mine)):
                claim.mine[tile].pixels.set_result(self._decode(tile, data, self._shared.buffer()))
            buffer = self._own_buffer("tile", self._tile_shape)
            for tile, data in self._tiled.read(claim.alone):
                (put, _), *others = users[tile]
                place = regions[put]
                fits = not others and place.shape == self._tile_shape
                in_place = fits and (self._shrinks or place.flags.c_contiguous)
                pixels = self._decode(tile, data, place if in_place else buffer)
                yield tile, None if in_place and not isinstance(pixels, ReadError) else pixels
            for tile, held in claim.shared.items():
                yield tile, held.pixels.result()
        finally:
            self._shared.release(users, claim)

    def _decode(self, tile: int, data: bytes, out: Array) -> Pixels:
        codec = self._tiled.codec
        try:
            if not data:
                raise TileError("its data are not in the file")
            if self._shrinks:
                whole = self._own_buffer("whole", self._tiled.tile_shape)
                codec.decode(data, whole)
                shrink(whole, out)
            else:
                codec.decode(data, out, self._reduction)
        except TileError as exc:
            return self._rescue(tile, data, out, exc)
        return out

    def _rescue(self, tile: int, data: bytes, out: Array, error: TileError) -> Pixels:
        """The tile through the slide's reader, unless that shows the damage as if it were tissue."""
        try:
            theirs = read_tile(self._slide, self.grid.level, self._tiled, tile)
        except ReadError as exc:
            return ReadError(str(exc))  # without the frames that it was raised through
        if not (data or theirs.any() or self._tiled.is_left_out(tile)):
            return self._damaged(tile, error)
        whole = np.zeros(self._tiled.tile_shape, np.uint8)
        inside = whole[: theirs.shape[0], : theirs.shape[1]]
        with contextlib.suppress(TileError):
            self._tiled.codec.decode(data, whole, lenient=True)
            if np.array_equal(inside, theirs):
                return self._damaged(tile, error)
        whole[:], inside[:] = 0, theirs
        shrink(whole, out)
        return out

    def _damaged(self, tile: int, error: TileError) -> ReadError:
        downsample = self._slide.levels[self.grid.level].downsample
        x, y = (round(px * downsample) for px in self._tiled.corner_px(tile))
        return ReadError(
            f"{self._slide.path}: the tile of level {self.grid.level} at level-0 ({x}, {y}) is damaged "
            f"({error}); copy or scan it again"
        )

    # --- memory is used again and again, because new memory costs a page fault per 4 KiB -----------------

    def _new_regions(self, rows: int, out: Memory | None) -> Array:
        """The regions of a job, uint8 [rows, side, side, 3], black where nothing will be copied."""
        if self._resampling.early and self._region_px != self.grid.patch_px:
            regions = self._own_buffer("regions", (rows, self._region_px, self._region_px, 3))
        else:
            regions = self._resampling.regions(rows, self._region_px, out)
        if self._partly_outside:
            regions[:] = 0
        return regions

    def _own_buffer(self, name: str, shape: tuple[int, ...]) -> Array:
        """The buffer of that name that belongs to this thread."""
        buffer: Array | None = getattr(self._buffers, name, None)
        if buffer is None or buffer.shape != shape:
            buffer = memory_for_pixels(*shape)
            setattr(self._buffers, name, buffer)
        return buffer


@lru_cache(maxsize=2**12)  # neighbouring patches share columns or rows
def _spans(
    corner: int, first: int, last: int, side: int, region_px: int, size: int
) -> list[tuple[int, slice, slice]]:
    """The columns or rows of tiles, ``first`` to ``last``, under a region; places in it and in the tile."""
    spans = []
    for at in range(first, last + 1):
        begin = at * side
        low, high = max(begin, corner), min(begin + side, corner + region_px, size)
        spans.append((at, slice(low - corner, high - corner), slice(low - begin, high - begin)))
    return spans


def _on_level(slide: Slide, grid: PatchGrid) -> NDArray[np.int64]:
    """The corners of the patches in pixels of the level, int64 [N, 2], if they are whole numbers."""
    downsample = slide.levels[grid.level].downsample
    if downsample != round(downsample):
        raise Unsuitable(f"level {grid.level} is {downsample:.6g} times coarser, no whole number")
    if (grid.xy_l0 % round(downsample)).any():
        raise Unsuitable(f"patches lie between the pixels of level {grid.level}")
    return grid.xy_l0 // round(downsample)


# --- tiles that several jobs need: decoded by the first that comes, kept until the last has copied --------


@dataclass
class _Shared:
    pixels: Future[Pixels] = field(default_factory=Future)
    pins: int = 0  # jobs that may be copying from it


@dataclass(frozen=True)
class Claim:
    """The tiles of a job: those to decode at once for others, those for itself alone, and all shared ones."""

    mine: dict[int, _Shared]
    alone: list[int]
    shared: dict[int, _Shared]


class SharedTiles:
    """Counts for each tile the patches that still need it, and keeps the tiles that are needed again."""

    def __init__(self, uses: NDArray[np.int64], shape: tuple[int, int, int]) -> None:
        self._uses, self._shape = uses.tolist(), shape
        self._most = HELD_BYTES // math.prod(shape)
        self._held: dict[int, _Shared] = {}
        self._spare: list[Array] = []
        self._lock = threading.Lock()

    def claim(self, users: Users) -> Claim:
        """Divide the tiles of a job; it has to release the claim with the same ``users``."""
        claim = Claim({}, [], {})
        with self._lock:
            for tile, patches in users.items():
                if tile not in self._held:
                    if self._uses[tile] <= len(patches) or len(self._held) >= self._most:
                        claim.alone.append(tile)
                        continue
                    claim.mine[tile] = self._held[tile] = _Shared()
                claim.shared[tile] = self._held[tile]
                claim.shared[tile].pins += 1
        return claim

    def release(self, users: Users, claim: Claim) -> None:
        """The job has copied what it needs, or has failed."""
        for shared in claim.mine.values():  # no other thread may wait for ever
            if not shared.pixels.done():
                shared.pixels.set_exception(RuntimeError("the thread that decoded this tile has failed"))
        with self._lock:
            for shared in claim.shared.values():
                shared.pins -= 1
            for tile, patches in users.items():
                self._uses[tile] -= len(patches)
                if self._uses[tile] <= 0 and tile in self._held and not self._held[tile].pins:
                    pixels = self._held.pop(tile).pixels
                    if pixels.exception() is None and isinstance(buffer := pixels.result(), np.ndarray):
                        self._spare.append(buffer)

    def buffer(self) -> Array:
        """Memory for a shared tile, if possible some that was used before."""
        with self._lock:
            if self._spare:
                return self._spare.pop()
        return memory_for_pixels(*self._shape)
