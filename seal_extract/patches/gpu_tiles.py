"""Read patches out of tiles that the GPU decodes, a batch of compressed tiles at a time.

The pixels of JPEG are those of `TileReader`, bit for bit; those of JPEG 2000 may be a few grey levels off. A
tile that looks damaged is decoded on the host instead, where its decoder and the slide's reader decide what
becomes of it.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seal_extract.errors import ReadError, first_line, is_of_lost_device
from seal_extract.patches.codecs import Jpeg2000Codec, JpegCodec, TileError
from seal_extract.patches.compressed import Compressed, DeviceDecoder, Numbers
from seal_extract.patches.grid import PatchGrid
from seal_extract.patches.jpeg import JpegTiles
from seal_extract.patches.regions import HostPixels
from seal_extract.patches.resample import Memory, Resampling
from seal_extract.patches.tiled import PROBES, Unsuitable
from seal_extract.patches.tiles import TileReader
from seal_extract.slides.readers import Array
from seal_extract.slides.slide import Slide

ROWS_AT_ONCE = 256  # patches whose tiles are decoded together: each lane of the GPU reads a tile of its own
BYTES_AT_ONCE = 2**29  # of decoded tiles, so fewer patches where each lies over many or large tiles
LARGEST_TILE_PX = 1024  # one lane would read a larger tile for too long
AT_ONCE = threading.BoundedSemaphore(2)  # such decodings at a time: each may take half a gigabyte of the GPU


class GpuTileReader(TileReader):
    """Reads patches of whole batches; `read` gives them on the device."""

    on_device = True

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
        largest, _ = self._decoder.tolerance
        self.name += " on the GPU" + (f", within {largest} grey levels" if largest else "")

    def read(self, rows: range, out: Memory | None = None) -> HostPixels:
        """See `PatchReader.read`."""
        from seal_extract.patches.kernels import Cut, resample_cut

        tiles, slots = self._slots(rows)
        first = self._first[rows.start : rows.stop]
        corners = self._xy_px[rows.start : rows.stop] - first * self._tiled.tile_px
        read = self._compressed(tiles, slots.size + corners.size)
        places = self._decoder.places(read)
        with AT_ONCE, self._stream():
            pixels, on_device = self._decoded_on_device(read, (places, slots, corners))
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
        tiled = self._tiled
        read = self._compressed(tiled.largest(np.flatnonzero(self._count_uses()))[:PROBES], 0)
        nowhere = np.empty((0, 1, 1), np.int32), np.empty((0, 2), np.int64)
        try:
            self._decoder = self._decoder_for(read.bytes_of(0))
            with self._stream():
                parts = (self._decoder.places(read), *nowhere)
                pixels, (*_, odd) = self._decoded_on_device(read, parts)
        except Unsuitable:
            raise
        except (TileError, IndexError) as exc:
            raise Unsuitable(str(exc) or "no tiles") from exc
        except Exception as exc:  # whatever keeps Triton or nvImageCodec from working there
            if is_of_lost_device(exc):
                raise
            raise Unsuitable(first_line(exc)) from exc
        largest, mean = self._decoder.tolerance
        for i in np.flatnonzero(odd == 0).tolist():
            ours = np.empty(tiled.tile_shape, np.uint8)
            tiled.codec.decode(read.bytes_of(i), ours)
            off = np.abs(pixels[i].cpu().numpy().astype(np.int16) - ours)
            if off.max() > largest or off.mean() > mean:
                raise Unsuitable("the GPU decodes its tiles to other pixels")
        if odd.all():
            raise Unsuitable("the GPU decodes none of a sample of its tiles")

    def _decoder_for(self, sample: bytes) -> DeviceDecoder:
        codec, size_px = self._tiled.codec, self._tiled.tile_px
        if isinstance(codec, JpegCodec):
            return JpegTiles(codec, size_px, sample, self._device)
        assert isinstance(codec, Jpeg2000Codec)
        from seal_extract.patches.nvimagecodec import Jpeg2000Tiles

        return Jpeg2000Tiles(codec, size_px, sample, self._device)

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

    def _compressed(self, tiles: Numbers, numbers: int) -> Compressed:
        """Read tiles, with room for three numbers of each and ``numbers`` more."""
        memory = self._empty(0)

        def allocate(count: int) -> Array:
            nonlocal memory
            memory = self._empty(count + -count % 4 + 4 * (3 * len(tiles) + numbers))
            return np.asarray(memory[:count].numpy())

        data, first, count = self._tiled.read_into(tiles, allocate)
        return Compressed(tiles, memory, data, first, count)

    def _decoded_on_device(
        self, read: Compressed, parts: tuple[Numbers, NDArray[np.int32], Numbers]
    ) -> tuple[Tensor, tuple[Tensor, Tensor, NDArray[np.int32]]]:
        """Decode tiles: their pixels, then slots and corners on the device, and on the host which are odd.

        ``parts`` are their places, the slots and the corners.
        """
        places, slots, _ = parts
        numbers = np.concatenate([part.ravel() for part in parts]).astype(np.int32)
        begin = len(read.memory) - numbers.nbytes
        read.memory.numpy()[begin:] = numbers.view(np.uint8)
        start = 0 if self._decoder.takes_bytes else begin
        there = read.memory[start:].to(self._device, non_blocking=True)
        ints = there[begin - start :].view(torch.int32)
        places_there, slots_there, corners_there = torch.split(ints, [part.size for part in parts])
        pixels, odd = self._decoder.decode(read, places, there, places_there.view(-1, 3))
        odd_here = self._empty(len(odd), torch.int32).copy_(odd, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return pixels, (slots_there.view(slots.shape), corners_there.view(-1, 2), odd_here.numpy())

    def _mend(self, read: Compressed, pixels: Tensor, odd: NDArray[np.int32]) -> dict[int, str]:
        """Put the host's pixels in the places of odd tiles; or why a tile cannot be read."""
        problems = {}
        for i in np.flatnonzero(odd).tolist():
            here = self._decode(int(read.tiles[i]), read.bytes_of(i), np.empty(self._tile_shape, np.uint8))
            if isinstance(here, ReadError):
                problems[i] = str(here)
            else:
                pixels[i].copy_(torch.from_numpy(here))
        return problems
