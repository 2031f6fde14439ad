"""One compressed tile in, its pixels out, exactly those that OpenSlide shows.

Tiles of a TIFF are JPEG streams without their tables, and without a word on their colours: real Aperio
files hold RGB whose only sign is the TIFF's own tag. So the stream is put together with the tables, and
with a marker that says what the tag says.
"""

from __future__ import annotations

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
_centred = np.arange(-128, 128)
RED_OF_CR, BLUE_OF_CB = (np.rint(share * _centred).astype(np.int16) for share in (1.402, 1.772))
GREEN_OF_CB = np.rint(2**16 * (0.5 - 0.34414 * _centred)).astype(np.int32)  # rounds once both are added
GREEN_OF_CR = np.rint(2**16 * -0.71414 * _centred).astype(np.int32)
REDUCTIONS = (8, 4, 2)  # that libjpeg decodes at directly


class TileError(Exception):
    """A tile does not hold what its file says."""


class Codec(Protocol):
    """How the tiles of a level are compressed.

    Attributes:
        name: for the record.
        reduces: whether it decodes at reduced scale by itself.
        channels: that it decodes to: 3, or 4 of which the last means nothing.
    """

    name: str
    reduces: bool

    @property
    def channels(self) -> int: ...  # noqa: D102

    def decode(self, data: bytes, out: Array, lenient: bool = False) -> None:
        """Decode a tile into ``out``, uint8 [h, w, channels]; where lenient, whatever damage it has.

        Raises:
            TileError: damaged, or of another size.
        """
        ...

    def decode_reduced(self, data: bytes, out: Array, factor: int) -> None:
        """Decode at 1 / ``factor`` of the size, one of `REDUCTIONS`, into ``out``."""
        ...


@dataclass(frozen=True)
class JpegCodec:
    """Baseline JPEG of three 8-bit channels.

    Attributes:
        tables: the TIFF's JPEGTables, empty where each tile carries its own.
        ycbcr: whether the TIFF says that the channels are YCbCr, not RGB; None to believe the tile itself.
    """

    tables: bytes
    ycbcr: bool | None
    name = "JPEG tiles"
    reduces = True

    @property
    def channels(self) -> int:
        """Four where colours have to be converted, which libjpeg-turbo does a fifth faster to four bytes."""
        return 3 if self.ycbcr is False else 4

    @cached_property
    def _head(self) -> bytes:
        tables = self.tables.removeprefix(SOI).removesuffix(EOI)
        if self.ycbcr is None:
            return SOI + tables
        return SOI + ADOBE + (YCBCR if self.ycbcr else RGB) + tables

    def decode(self, data: bytes, out: Array, lenient: bool = False) -> None:
        """See `Codec.decode`."""
        self._decode(data, out, 1, lenient)

    def decode_reduced(self, data: bytes, out: Array, factor: int) -> None:
        """See `Codec.decode_reduced`."""
        self._decode(data, out, factor, False)

    def _decode(self, data: bytes, out: Array, factor: int, lenient: bool) -> None:
        height, width = out.shape[:2]
        start = _after_applications(data) if self.ycbcr is not None else len(SOI)
        _check_frame(data, start, (width * factor, height * factor))
        stream = self._head + data[start:]
        least = (0, 0) if factor == 1 else (height, width)
        # new memory for each tile would cost half as much again as decoding it
        try:
            pixels = simplejpeg.decode_jpeg(
                stream,
                "RGBX" if self.channels == 4 else "RGB",
                *(False, False, *least),
                min_factor=factor,
                buffer=out,
                strict=not lenient,
            )
        except ValueError as exc:
            raise TileError(str(exc)) from exc
        if pixels.shape != out.shape:
            raise TileError(f"{pixels.shape[1]} x {pixels.shape[0]} px instead of {width} x {height}")


def _after_applications(data: bytes) -> int:
    """Where a stream goes on after SOI and the applications' own markers, which may lie about colours."""
    if data[:2] != SOI:
        raise TileError(f"begins with the bytes {data[:2].hex(' ')}, not as a JPEG")
    at = 2
    while data[at : at + 1] == b"\xff" and b"\xe0" <= data[at + 1 : at + 2] <= b"\xef":
        at += _segment_bytes(data, at)
    return at


def _check_frame(data: bytes, at: int, size_px: tuple[int, int]) -> None:
    """Refuse another size or number of channels, which a decoder asked for a scale would adapt to."""
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
            return
        # any number of FF may come before a marker
        at += 1 if marker == b"\xff" else _segment_bytes(data, at)
    raise TileError("has no header of a frame")


def _segment_bytes(data: bytes, at: int) -> int:
    return 2 + int.from_bytes(data[at + 2 : at + 4], "big")


@dataclass(frozen=True)
class Jpeg2000Codec:
    """JPEG 2000 of three 8-bit channels.

    Attributes:
        ycbcr: whether they are YCbCr, not RGB; Aperio's own tag says so, the stream does not.
    """

    ycbcr: bool = False
    channels = 3
    name = "JPEG 2000 tiles"
    reduces = False

    def decode(self, data: bytes, out: Array, lenient: bool = False) -> None:
        """See `Codec.decode`; OpenJPEG knows no leniency."""
        try:
            pixels = imagecodecs.jpeg2k_decode(data)
        except Exception as exc:  # beside its own error of all that NumPy says to absurd sizes
            raise TileError(str(exc) or type(exc).__name__) from exc
        if pixels.shape != out.shape or pixels.dtype != np.uint8:
            raise TileError(f"{pixels.dtype} {list(pixels.shape)} instead of uint8 {list(out.shape)}")
        if self.ycbcr:
            _ycbcr_to_rgb(pixels, out)
        else:
            out[:] = pixels

    def decode_reduced(self, data: bytes, out: Array, factor: int) -> None:
        """Not offered."""
        raise NotImplementedError


def _ycbcr_to_rgb(pixels: Array, out: Array) -> None:
    """OpenSlide's arithmetic for JPEG 2000: libjpeg's, with each entry of the tables rounded by itself."""
    y, cb, cr = (pixels[..., channel] for channel in range(3))
    luma = y.astype(np.int16)
    for channel, chroma in enumerate(
        (RED_OF_CR[cr], GREEN_OF_CB[cb] + GREEN_OF_CR[cr] >> 16, BLUE_OF_CB[cb])
    ):
        out[..., channel] = np.clip(luma + chroma, 0, 255)


def copy_rgb(pixels: Array, out: Array) -> None:
    """Copy pixels of three or four channels to ``out``, of three."""
    if pixels.shape[2] == 3:
        out[:] = pixels
    elif pixels.size:
        cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB, dst=out)


def shrink(pixels: Array, out: Array) -> None:
    """Average whole blocks of ``pixels`` into ``out``."""
    cv2.resize(pixels, (out.shape[1], out.shape[0]), dst=out, interpolation=cv2.INTER_AREA)
