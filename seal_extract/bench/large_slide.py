"""The large slide that `bench` measures on if no slide is given: the bundled real slide, repeated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from seal_extract.demo import demo_slide
from seal_extract.errors import UsageError
from seal_extract.publish import publish

TILES = ("420-256", "420-240", "rgb-256", "rgb-240")  # chroma subsampling, and the side of a tile in pixels
DOWNSAMPLES = (1, 4, 16)
MPP = 0.25  # stated by the file, so that patches at 0.5 µm/px are resampled, as on a 40x scan
QUALITY = 70  # of tiles that are compressed here
CLASSIC_TIFF_PX = 7e9  # larger files need 64-bit offsets: a pixel takes at most 0.5 bytes
SOF0, DHT, DQT, SOS = 0xC0, 0xC4, 0xDB, 0xDA  # markers of a JPEG stream


def write_large_slide(path: Path, size_px: tuple[int, int], tiles: str = "420-256") -> Path:
    """Write an Aperio slide of any size by repeating one block of compressed tiles of the bundled slide.

    The tiles of ``"rgb-240"`` are bytes of the bundled slide. For others its pixels are compressed once.

    Args:
        path: The file to write, ``.svs``.
        size_px: (width, height) of level 0.
        tiles: One of `TILES`.

    Raises:
        UsageError: There is no such kind of tiles, or the slide would be smaller than 16 px.
    """
    if tiles not in TILES:
        raise UsageError(f"the kind of tiles is {tiles!r}; allowed: {', '.join(TILES)}")
    if min(size_px) < DOWNSAMPLES[-1]:
        raise UsageError(f"the slide would be {size_px[0]} x {size_px[1]} px; allowed: 16 px or more")
    colours, tile_px = tiles[:3], int(tiles[4:])
    with tifffile.TiffFile(demo_slide()) as demo:
        page = demo.pages[0]
        pixels = page.asarray()
        height, width = (side // tile_px * tile_px // 16 * 16 for side in pixels.shape[:2])
        own = (bytes(page.jpegtables), _tiles_of(demo, page, height // 240, width // 240))
    unit = pixels[:height, :width]
    with (
        publish(path) as part,
        tifffile.TiffWriter(part, bigtiff=math.prod(size_px) > CLASSIC_TIFF_PX) as tiff,
    ):
        for downsample in DOWNSAMPLES:
            level_px = (size_px[0] // downsample, size_px[1] // downsample)
            if tiles == "rgb-240" and downsample == 1:
                tables, block = own
            else:
                tables, block = _compressed(unit, downsample, tile_px, colours)
            tiff.write(
                _repeated(block, level_px, tile_px),
                shape=(level_px[1], level_px[0], 3),
                dtype=np.uint8,
                tile=(tile_px, tile_px),
                description=_description(size_px, level_px, tile_px),
                metadata=None,
                software=False,
                **jpeg_tags(colours, tables),
            )
    return path


def _tiles_of(tiff: tifffile.TiffFile, page: Any, down: int, across: int) -> list[list[bytes]]:
    """The compressed tiles of the first rows and columns of a page."""

    def read(tile: int) -> bytes:
        tiff.filehandle.seek(page.dataoffsets[tile])
        return bytes(tiff.filehandle.read(page.databytecounts[tile]))

    in_row = -(-page.imagewidth // page.tilewidth)
    return [[read(y * in_row + x) for x in range(across)] for y in range(down)]


def _compressed(
    unit: NDArray[np.uint8], downsample: int, tile_px: int, colours: str
) -> tuple[bytes, list[list[bytes]]]:
    """The JPEG tables and the different tiles of a level on which ``unit``, reduced, repeats."""
    height, width = (side // downsample for side in unit.shape[:2])
    small = np.asarray(cv2.resize(unit, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    down, across = math.lcm(height, tile_px), math.lcm(width, tile_px)
    picture = np.tile(small, (down // height, across // width, 1))
    encoded = [
        [
            abbreviated_jpeg(picture[y : y + tile_px, x : x + tile_px], colours)
            for x in range(0, across, tile_px)
        ]
        for y in range(0, down, tile_px)
    ]
    return encoded[0][0][0], [[stream for _, stream in row] for row in encoded]


def _repeated(block: list[list[bytes]], size_px: tuple[int, int], tile_px: int) -> Iterator[bytes]:
    across, down = (-(-side // tile_px) for side in size_px)
    for y in range(down):
        row = block[y % len(block)]
        yield from (row[x % len(row)] for x in range(across))


def _description(size_px: tuple[int, int], level_px: tuple[int, int], tile_px: int) -> str:
    """The text by which readers recognise an Aperio slide and its µm/px."""
    (width, height), reduced = size_px, "" if level_px == size_px else f" -> {level_px[0]}x{level_px[1]}"
    return (
        f"Aperio Image Library v12.0.16 \r\n{width}x{height} [0,0 {width}x{height}] ({tile_px}x{tile_px})"
        f"{reduced} JPEG Q={QUALITY}|AppMag = {10 / MPP:.0f}|MPP = {MPP}|Title = CMU-1-Small-Region, repeated"
    )


# --- JPEG as Aperio's scanners write it ----------------------------------------------------------------


def jpeg_tags(colours: str, tables: bytes) -> dict[str, Any]:
    """The arguments of ``TiffWriter.write`` for tiles of `abbreviated_jpeg`."""
    # the scanner's own RGB claims 2 x 2
    subsampling = {"420": (2, 2), "422": (2, 1), "444": (1, 1), "rgb": (2, 2)}
    return {
        "compression": 7,
        "compressionargs": {"outcolorspace": "rgb" if colours == "rgb" else "ycbcr"},
        "photometric": "rgb",
        "subsampling": subsampling[colours],
        "jpegtables": tables,
    }


def abbreviated_jpeg(pixels: NDArray[np.uint8], colours: str, quality: int = QUALITY) -> tuple[bytes, bytes]:
    """JPEG tables and the stream without them, of uint8 [h, w, 3]; neither has a JFIF or Adobe marker.

    Args:
        pixels: RGB.
        colours: ``"420"``, ``"422"``, ``"444"``: the chroma subsampling of YCbCr; or ``"rgb"``.
        quality: 1 to 100.
    """
    stream = imagecodecs.jpeg8_encode(
        np.ascontiguousarray(pixels),
        level=quality,
        colorspace="RGB",
        outcolorspace="RGB" if colours == "rgb" else "YCBCR",
        subsampling="444" if colours == "rgb" else colours,
        optimize=False,  # so that one set of Huffman tables serves all tiles
    )
    tables, frame, position, marker = b"", b"", 2, 0
    while marker != SOS:
        marker = stream[position + 1]
        end = position + 2 + int.from_bytes(stream[position + 2 : position + 4], "big")
        if marker in (DHT, DQT):
            tables += stream[position:end]
        elif marker in (SOF0, SOS):
            frame += _numbered(bytes(stream[position:end]))
        position = end
    return b"\xff\xd8" + tables + b"\xff\xd9", b"\xff\xd8" + frame + stream[position:]


def _numbered(segment: bytes) -> bytes:
    """A frame or scan header with its components called 0, 1, 2, which says nothing of their colour space."""
    first, step = (10, 3) if segment[1] == SOF0 else (5, 2)
    named = bytearray(segment)
    named[first : first + 3 * step : step] = b"\0\1\2"
    return bytes(named)
