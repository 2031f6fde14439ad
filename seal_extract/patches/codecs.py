"""Decode one compressed tile to exactly the pixels that OpenSlide shows.

Tiles of a TIFF are JPEG streams without their tables, and they do not reliably state their colours: only the
TIFF's photometric tag marks Aperio's RGB. So the stream is completed with the tables and with a marker that
states what the tag states.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import cv2
import imagecodecs
import numpy as np
import simplejpeg

from seal_extract.slides.readers import Array

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"  # APP14; its last byte is the colour transform
RGB, YCBCR = b"\x00", b"\x01"
FRAMES = frozenset(bytes([marker]) for marker in {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # SOFn
REDUCTIONS = (8, 4, 2)  # factors at which libjpeg decodes directly
ENDS = EOI * 2**11  # libjpeg-turbo's fast loop stops so far before the end of what it is given
_centred = np.arange(-128, 128)
RED_OF_CR, BLUE_OF_CB = (np.rint(share * _centred).astype(np.int16) for share in (1.402, 1.772))
GREEN_OF_CB = np.rint(2**16 * (0.5 - 0.34414 * _centred)).astype(np.int32)  # rounds once both are added
GREEN_OF_CR = np.rint(2**16 * -0.71414 * _centred).astype(np.int32)


class TileError(Exception):
    """The data of a tile are damaged, or are not what the file states."""


class Codec(Protocol):
    """How the tiles of a level are compressed.

    Attributes:
        name: as recorded in the results.
        reduces: whether it decodes at reduced scale by itself.
    """

    name: str
    reduces: bool

    def decode(self, data: bytes, out: Array, factor: int = 1, lenient: bool = False) -> None:
        """Decode a tile into ``out``, uint8 [h, w, 3].

        Args:
            data: the compressed tile.
            out: as large as the tile, divided by ``factor``; best of `memory_for_pixels`.
            factor: 1, or one of `REDUCTIONS` if the codec reduces.
            lenient: accept damaged data as far as the codec can.

        Raises:
            TileError: the tile is damaged or has another size.
        """
        ...


@dataclass(frozen=True)
class JpegCodec:
    """Baseline JPEG of three 8-bit channels.

    Attributes:
        tables: the TIFF's JPEGTables; empty if each tile carries its own.
        ycbcr: whether the TIFF states YCbCr (True) or RGB (False); None to believe the tile itself.
    """

    tables: bytes
    ycbcr: bool | None
    name = "JPEG tiles"
    reduces = True

    @cached_property
    def _head(self) -> bytes:
        tables = self.tables.removeprefix(SOI).removesuffix(EOI)
        if self.ycbcr is None:
            return SOI + tables
        return SOI + ADOBE + (YCBCR if self.ycbcr else RGB) + tables

    def _start(self, data: bytes) -> int:
        return len(SOI) if self.ycbcr is None else _after_applications(data)

    def complete(self, data: bytes) -> bytes:
        """A tile with the tables that it lacks, and a marker of its colours in place of those it may have."""
        return self._completed(data, self._start(data))

    def _completed(self, data: bytes, start: int) -> bytes:
        ends = ENDS if data.endswith(EOI) else b""
        return b"".join((self._head, memoryview(data)[start:], ends))

    @cached_property
    def _checked(self) -> dict[tuple[int, int], tuple[bytes, int]]:
        """For a size in px, how the last checked tile begins, and its `_start`: most tiles begin alike."""
        return {}

    def decode(self, data: bytes, out: Array, factor: int = 1, lenient: bool = False) -> None:
        """See `Codec.decode`."""
        height, width, _ = out.shape
        size_px = (width * factor, height * factor)
        begins, start = self._checked.get(size_px, (b"", 0))
        if not (begins and data.startswith(begins)):
            start = self._start(data)
            self._checked[size_px] = (data[: _check_frame(data, start, size_px)], start)
        scale = {} if factor == 1 else {"min_height": height, "min_width": width, "min_factor": factor}
        try:
            # into existing memory: allocating for each tile would cost half as much again as decoding it
            pixels = simplejpeg.decode_jpeg(
                self._completed(data, start), "RGB", buffer=out, strict=not lenient, **scale
            )
        except ValueError as exc:
            raise TileError(str(exc)) from exc
        if pixels.shape != out.shape:
            raise TileError(f"{pixels.shape[1]} x {pixels.shape[0]} px instead of {width} x {height}")


def _after_applications(data: bytes) -> int:
    """Where a stream continues after SOI and the application markers, which may be wrong about colours."""
    if data[:2] != SOI:
        raise TileError(f"begins with the bytes {data[:2].hex(' ')}, not as a JPEG")
    at = 2
    while data[at : at + 1] == b"\xff" and b"\xe0" <= data[at + 1 : at + 2] <= b"\xef":
        at += _segment_bytes(data, at)
    return at


def _check_frame(data: bytes, at: int, size_px: tuple[int, int]) -> int:
    """Refuse another size or number of channels, to which a decoder asked for a scale would adapt.

    Returns:
        Where the header has stated them.
    """
    while data[at : at + 1] == b"\xff":
        marker = data[at + 1 : at + 2]
        if marker in FRAMES:
            if len(data) < at + 10:
                break
            height, width, channels = struct.unpack_from(">HHB", data, at + 5)
            if (width, height, channels) != (*size_px, 3):
                raise TileError(
                    f"{width} x {height} px x {channels} instead of {size_px[0]} x {size_px[1]} x 3"
                )
            return at + 10
        at += 1 if marker == b"\xff" else _segment_bytes(data, at)  # FF may be repeated before a marker
    raise TileError("has no header of a frame")


def _segment_bytes(data: bytes, at: int) -> int:
    return 2 + int.from_bytes(data[at + 2 : at + 4], "big")


@dataclass(frozen=True)
class Jpeg2000Codec:
    """JPEG 2000 of three 8-bit channels.

    Attributes:
        ycbcr: whether they are YCbCr instead of RGB; Aperio's own tag states it, the stream does not.
    """

    ycbcr: bool = False
    name = "JPEG 2000 tiles"
    reduces = False

    def decode(self, data: bytes, out: Array, factor: int = 1, lenient: bool = False) -> None:
        """See `Codec.decode`; OpenJPEG is never lenient."""
        try:
            pixels = imagecodecs.jpeg2k_decode(data)
        except Exception as exc:  # its own error, and any error of NumPy for absurd sizes
            raise TileError(str(exc) or type(exc).__name__) from exc
        if pixels.shape != out.shape or pixels.dtype != np.uint8:
            raise TileError(f"{pixels.dtype} {list(pixels.shape)} instead of uint8 {list(out.shape)}")
        if self.ycbcr:
            _ycbcr_to_rgb(pixels, out)
        else:
            out[:] = pixels


@dataclass(frozen=True)
class DecodedCodec:
    """Pixels that the slide's reader has decoded already."""

    name = "Zarr chunks"
    reduces = False

    def decode(self, data: bytes, out: Array, factor: int = 1, lenient: bool = False) -> None:
        """See `Codec.decode`."""
        if not data:
            raise TileError("its chunks cannot be read")
        out[:] = np.frombuffer(data, np.uint8).reshape(out.shape)


def _ycbcr_to_rgb(pixels: Array, out: Array) -> None:
    """OpenSlide's arithmetic for JPEG 2000: libjpeg's, with each entry of the tables rounded by itself."""
    y, cb, cr = cv2.split(pixels)
    green = np.asarray(cv2.LUT(cb, GREEN_OF_CB) + cv2.LUT(cr, GREEN_OF_CR), np.int32) >> 16
    chroma = (cv2.LUT(cr, RED_OF_CR), green, cv2.LUT(cb, BLUE_OF_CB))
    cv2.merge([cv2.add(y, one, dtype=cv2.CV_8U) for one in chroma], dst=out)  # add saturates


def memory_for_pixels(*shape: int) -> Array:
    """Allocate uint8 of ``shape`` that begins at an odd address.

    Where a row of pixels begins at a multiple of 32 bytes, libjpeg-turbo writes past the caches of an x86
    processor: decoding 4:2:0 takes longer by up to a third, and reading the pixels afterwards three times as
    long. Rows of an even number of bytes, as all tiles of a TIFF have, never begin there after an odd start.
    """
    size = math.prod(shape)
    memory = np.empty(size + 1, np.uint8)
    start = 1 - memory.ctypes.data % 2
    return memory[start : start + size].reshape(shape)


def shrink(pixels: Array, out: Array) -> None:
    """Average whole blocks of ``pixels`` into ``out``."""
    cv2.resize(pixels, (out.shape[1], out.shape[0]), dst=out, interpolation=cv2.INTER_AREA)
