"""Read patches out of JPEG tiles that the GPU decodes: a batch of compressed tiles goes there in one copy.

The pixels are those of `TileReader`, bit for bit. A tile that looks damaged on the GPU is decoded on the host
instead, where libjpeg and the slide's reader decide what becomes of it.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seal_extract.errors import ReadError, first_line, is_of_lost_device
from seal_extract.patches.codecs import EOI, JpegCodec, TileError
from seal_extract.patches.grid import PatchGrid
from seal_extract.patches.jpeg import JpegDecoder, header_bytes, read_frame
from seal_extract.patches.regions import HostPixels
from seal_extract.patches.resample import Resampling
from seal_extract.patches.tiled import PROBES, Unsuitable
from seal_extract.patches.tiles import TileReader
from seal_extract.slides.readers import Array
from seal_extract.slides.slide import Slide

ROWS_AT_ONCE = 256  # patches whose tiles are decoded together: each lane of the GPU reads a tile of its own
BYTES_AT_ONCE = 2**29  # of decoded tiles, so fewer patches where each lies over many or large tiles
LARGEST_TILE_PX = 1024  # one lane would read a larger tile for too long
AT_ONCE = threading.BoundedSemaphore(2)  # such decodings at a time: each may take half a gigabyte of the GPU
EOI_BYTES = np.frombuffer(EOI, np.uint8)

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class _Compressed:
    """Compressed tiles on the host.

    Attributes:
        tiles: their numbers in the level.
        memory: uint8, from which the device copies by itself; numbers for it fit behind the data.
        data: uint8, the bytes of all tiles, where the memory begins.
        first: where each begins in ``data``.
        count: its bytes; 0 if the file does not hold it.
    """

    tiles: Numbers
    memory: Tensor
    data: Array
    first: Numbers
    count: Numbers

    def bytes_of(self, i: int) -> bytes:
        """The bytes of one tile."""
        return self.data[self.first[i] : self.first[i] + self.count[i]].tobytes()


class GpuTileReader(TileReader):
    """Reads patches of whole batches; `read` gives them on the device."""

    def __init__(self, slide: Slide, grid: PatchGrid, resampling: Resampling, device: torch.device) -> None:
        """Open the tiles of the grid's level, and compare a sample that the device decodes with the host's.

        Args:
            slide: reads the tiles that cannot be decoded here.
            grid: rows to read.
            resampling: how regions become patches; bicubic, of which every device has the same pixels.
            device: on which Triton's kernels run.

        Raises:
            Unsuitable: the device does not decode these tiles, or not to the same pixels; the reason.
        """
        super().__init__(slide, grid, replace(resampling, early=True))
        self.name = f"{self.name} on the GPU"
        self._device = device
        self._streams = threading.local()
        self.to_patches = lambda pixels: pixels
        if resampling.filter != "bicubic":
            raise Unsuitable(f"--resample {resampling.filter}")
        if self._partly_outside:
            raise Unsuitable("patches reach beyond the scanned area")
        if max(self._tiled.tile_px) > LARGEST_TILE_PX:
            raise Unsuitable(f"tiles of more than {LARGEST_TILE_PX} px")
        over_one = int(self._count_uses().sum()) / len(grid) * math.prod(self._tile_shape)
        self.rows_at_once = max(1, min(ROWS_AT_ONCE, int(BYTES_AT_ONCE / over_one)))
        self._open_decoder()

    def read(self, rows: range, out: Array | None = None) -> HostPixels:
        """See `PatchReader.read`."""
        from seal_extract.patches.kernels import Cut, resample_cut

        tiles, slots = self._slots(rows)
        first = self._first[rows.start : rows.stop]
        corners = self._xy_px[rows.start : rows.stop] - first * self._tiled.tile_px
        with AT_ONCE, self._stream():
            read = self._compressed(tiles, slots.size + corners.size)
            pixels, on_device = self._decoded_on_device(read, slots, corners)
            problems = self._mend(read, pixels, on_device[-1])
            side, patch_px = self.grid.read_px, self.grid.patch_px
            patches = resample_cut(Cut(pixels, *on_device[:2], (side, side)), (patch_px, patch_px))
            unreadable = {}
            for i in np.flatnonzero(np.isin(slots, list(problems)).any((1, 2))).tolist():
                unreadable[rows[i]] = next(problems[slot] for slot in slots[i].flat if slot in problems)
                patches[i] = 0
        return HostPixels(patches, unreadable)

    def _choose_reduction(self, fast: bool) -> tuple[int, bool]:
        return 1, False

    def _slots(self, rows: range) -> tuple[Numbers, NDArray[np.int32]]:
        """The tiles under these patches, each once, and which of them lie where: int32 [B, down, across]."""
        first, last = (corner[rows.start : rows.stop, None, None] for corner in (self._first, self._last))
        across, down = (last - first).max((0, 1, 2)) + 1
        x, y = first[..., 0] + np.arange(across), first[..., 1] + np.arange(down)[:, None]
        under = (x <= last[..., 0]) & (y <= last[..., 1])
        tiles, places = np.unique((y * self._tiled.across + x)[under], return_inverse=True)
        slots = np.full(under.shape, -1, np.int32)
        slots[under] = places
        return tiles, slots

    # --- on the device --------------------------------------------------------------------------------

    def _open_decoder(self) -> None:
        codec = self._tiled.codec
        if not isinstance(codec, JpegCodec):
            raise Unsuitable(codec.name)
        sample = self._tiled.largest(np.flatnonzero(self._count_uses()))[:PROBES]
        read = self._compressed(sample, 0)
        try:
            data = read.bytes_of(0)
            self._header = data[: header_bytes(data)]
            self._decoder = JpegDecoder(read_frame(codec.complete(self._header)), self._device)
        except (TileError, IndexError) as exc:
            raise Unsuitable(str(exc) or "no tiles") from exc
        if self._decoder.frame.size_px != self._tiled.tile_px:
            raise Unsuitable("JPEG of another size than the tiles")
        nowhere = np.empty((0, 1, 1), np.int32), np.empty((0, 2), np.int64)
        try:
            with self._stream():
                pixels, (*_, odd) = self._decoded_on_device(read, *nowhere)
        except Exception as exc:  # whatever keeps Triton from compiling or running its kernels
            if is_of_lost_device(exc):
                raise
            raise Unsuitable(first_line(exc)) from exc
        for i in np.flatnonzero(odd == 0).tolist():
            ours = np.empty(self._tiled.tile_shape, np.uint8)
            codec.decode(read.bytes_of(i), ours)
            if not np.array_equal(ours, pixels[i].cpu().numpy()):
                raise Unsuitable("the GPU decodes its tiles to other pixels")
        if odd.all():
            raise Unsuitable("the GPU decodes none of a sample of its tiles")

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        """Work in a stream that belongs to this thread, and wait for its end without holding up others."""
        if self._device.type != "cuda":
            yield
            return
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._streams.own):
            yield
            self._streams.own.synchronize()

    def _empty(self, count: int, kind: torch.dtype = torch.uint8) -> Tensor:
        """Memory on the host, from which, and to which, the device copies by itself."""
        return torch.empty(count, dtype=kind, pin_memory=self._device.type == "cuda")

    def _compressed(self, tiles: Numbers, numbers: int) -> _Compressed:
        """Read tiles, with room for three numbers of each and ``numbers`` more."""
        memory = self._empty(0)

        def allocate(count: int) -> Array:
            nonlocal memory
            memory = self._empty(count + -count % 4 + 4 * (3 * len(tiles) + numbers))
            return np.asarray(memory[:count].numpy())

        data, first, count = self._tiled.read_into(tiles, allocate)
        return _Compressed(tiles, memory, data, first, count)

    def _decoded_on_device(
        self, read: _Compressed, slots: NDArray[np.int32], corners: Numbers
    ) -> tuple[Tensor, tuple[Tensor, Tensor, NDArray[np.int32]]]:
        """Decode tiles: their pixels, then slots and corners on the device, and on the host which are odd."""
        places, words = self._places(read)
        numbers = np.concatenate([part.ravel() for part in (places, slots, corners)]).astype(np.int32)
        begin = len(read.memory) - numbers.nbytes
        read.memory.numpy()[begin:] = numbers.view(np.uint8)
        there = read.memory.to(self._device, non_blocking=True)
        sizes = [places.size, slots.size, corners.size]
        parts = torch.split(there[begin:].view(torch.int32), sizes)
        pixels, odd = self._decoder.decode(there, parts[0].view(-1, 3), words)
        odd_here = self._empty(len(odd), torch.int32).copy_(odd, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return pixels, (parts[1].view(slots.shape), parts[2].view(-1, 2), odd_here.numpy())

    def _places(self, read: _Compressed) -> tuple[Numbers, int]:
        """See `JpegDecoder.decode`; a tile of another header, or without an end marker, has no bytes."""
        header = np.frombuffer(self._header, np.uint8)
        at = np.flatnonzero(read.count > len(header) + len(EOI))
        same = (read.data[read.first[at, None] + np.arange(len(header))] == header).all(1)
        ends = read.first[at, None] + read.count[at, None] + np.arange(-len(EOI), 0)
        at = at[same & (read.data[ends] == EOI_BYTES).all(1)]
        count = np.zeros_like(read.count)
        count[at] = read.count[at] - len(header) - len(EOI)
        words = -(-count // 4) + 2
        return np.stack([read.first + len(header), count, np.cumsum(words) - words], 1), int(words.sum())

    def _mend(self, read: _Compressed, pixels: Tensor, odd: NDArray[np.int32]) -> dict[int, str]:
        """Put the host's pixels in the places of odd tiles; or why a tile cannot be read."""
        problems = {}
        for i in np.flatnonzero(odd).tolist():
            here = self._decode(int(read.tiles[i]), read.bytes_of(i), np.empty(self._tile_shape, np.uint8))
            if isinstance(here, ReadError):
                problems[i] = str(here)
            else:
                pixels[i].copy_(torch.from_numpy(here))
        return problems
