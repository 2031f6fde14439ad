"""Tiles compressed the ways scanners compress them, with the tags that go with each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import imagecodecs
import numpy as np

from seal_extract.errors import UsageError
from seal_extract.synthetic.texture import Bytes

SUBSAMPLINGS = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2)}
APERIO_YCBCR, APERIO_RGB = 33003, 33005  # Aperio's own numbers for JPEG 2000
SOF0, DHT, DQT, SOS = 0xC0, 0xC4, 0xDB, 0xDA


@dataclass(frozen=True)
class Codec:
    """How tiles are compressed: ``compression`` "jpeg" or "jpeg2000", ``photometric`` "ycbcr" or "rgb"."""

    compression: str
    photometric: str
    subsampling: str
    quality: int

    @classmethod
    def checked(
        cls, compression: str, photometric: str | None, subsampling: str | None, quality: int
    ) -> Codec:
        """Fill in what was left open and refuse what no scanner writes."""
        if compression not in ("jpeg", "jpeg2000"):
            raise UsageError(f'compression={compression!r}: give "jpeg" or "jpeg2000"')
        jpeg = compression == "jpeg"
        photometric = photometric or ("ycbcr" if jpeg else "rgb")
        if photometric not in ("ycbcr", "rgb"):
            raise UsageError(f'photometric={photometric!r}: give "ycbcr" or "rgb"')
        full = photometric == "rgb" or not jpeg
        subsampling = subsampling or ("4:4:4" if full else "4:2:0")
        if subsampling not in SUBSAMPLINGS:
            raise UsageError(f"subsampling={subsampling!r}: give one of {', '.join(SUBSAMPLINGS)}")
        if full and subsampling != "4:4:4":
            raise UsageError(
                f'{subsampling} with RGB or JPEG 2000 tiles: give "4:4:4" or photometric="ycbcr"'
            )
        if not 1 <= quality <= 100:
            raise UsageError(f"jpeg_quality={quality}: give 1 to 100")
        return cls(compression, photometric, subsampling, quality)

    @property
    def label(self) -> str:
        """What Aperio calls it in an ImageDescription."""
        family = ("JPEG/YCC", "JPEG/RGB") if self.compression == "jpeg" else ("J2K/YUV16", "J2K/KDU")
        return family[self.photometric == "rgb"]

    def encode(self, rgb: Bytes) -> bytes:
        """One tile or strip, uint8 [h, w, 3]; of a JPEG all but the tables."""
        return self._jpeg(rgb)[1] if self.compression == "jpeg" else self._jpeg2000(rgb)

    def tags(self) -> dict[str, Any]:
        """What ``tifffile.TiffWriter.write`` needs to describe such tiles."""
        if self.compression == "jpeg2000":
            number = APERIO_RGB if self.photometric == "rgb" else APERIO_YCBCR
            return {"compression": number, "photometric": "rgb"}
        # the scanner's own RGB files claim 2 x 2 here although nothing is subsampled
        claimed = (2, 2) if self.photometric == "rgb" else SUBSAMPLINGS[self.subsampling]
        return {
            "compression": 7,
            "compressionargs": {"outcolorspace": self.photometric},
            "photometric": "rgb",
            "subsampling": claimed,
            "jpegtables": self._jpeg(np.zeros((16, 16, 3), np.uint8))[0],
        }

    def _jpeg(self, rgb: Bytes) -> tuple[bytes, bytes]:
        """(JPEGTables, abbreviated stream): no JFIF or Adobe marker in either, as Aperio writes them."""
        stream = imagecodecs.jpeg8_encode(
            rgb,
            level=self.quality,
            colorspace="RGB",
            outcolorspace=self.photometric.upper(),
            subsampling=self.subsampling.replace(":", ""),
            optimize=False,  # so that one set of Huffman tables serves all tiles
        )
        tables, frame, position = b"", b"", 2
        while True:
            marker = stream[position + 1]
            end = position + 2 + int.from_bytes(stream[position + 2 : position + 4], "big")
            if marker in (DHT, DQT):
                tables += stream[position:end]
            elif marker in (SOF0, SOS):
                frame += _numbered(bytes(stream[position:end]))
            position = end
            if marker == SOS:
                return b"\xff\xd8" + tables + b"\xff\xd9", b"\xff\xd8" + frame + stream[position:]

    def _jpeg2000(self, rgb: Bytes) -> bytes:
        as_rgb = self.photometric == "rgb"
        planes = rgb if as_rgb else cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
        return bytes(
            imagecodecs.jpeg2k_encode(
                np.ascontiguousarray(planes),
                level=32 + self.quality // 5,  # dB: 46 at quality 70
                codecformat="j2k",
                reversible=False,
                mct=as_rgb,
                numthreads=1,
            )
        )


def _numbered(segment: bytes) -> bytes:
    """A frame or scan header with its components called 0, 1, 2, which tells nobody their colour space."""
    first, step = (10, 3) if segment[1] == SOF0 else (5, 2)
    named = bytearray(segment)
    named[first : first + 3 * step : step] = b"\0\1\2"
    return bytes(named)
