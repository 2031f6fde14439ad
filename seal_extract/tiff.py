"""What a TIFF says of itself: its physical size in OME-XML, its kind of pixels, its missing end."""

from __future__ import annotations

import contextlib
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from xml.etree import ElementTree

import tifffile

from seal_extract.errors import SlideOpenError, UnsupportedSlideError

# what tifffile logs of a damaged file reaches an application's handlers, not the terminal: we tell it once
logging.getLogger("tifffile").addHandler(logging.NullHandler())

TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
IMAGE_WIDTH, IMAGE_LENGTH = 256, 257
TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_BYTE_COUNTS = 322, 323, 324, 325
WHOLE = {3: "H", 4: "I", 16: "Q"}  # SHORT, LONG, LONG8
MOST_TILE_PX = 2**26  # of one tile; 256 MB decoded
JPEG = (tifffile.COMPRESSION.JPEG, tifffile.COMPRESSION.OJPEG)
_UM_PER_UNIT = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}


def ome_mpp(path: Path) -> list[tuple[str, float, float]]:
    """PhysicalSizeX and Y of the first image of OME-XML; their unit is µm unless it says otherwise."""
    with tifffile.TiffFile(path) as tif:
        xml = tif.ome_metadata
    if not xml:
        return []
    try:
        pixels = next(e for e in ElementTree.fromstring(xml).iter() if e.tag.rpartition("}")[2] == "Pixels")
    except (ElementTree.ParseError, StopIteration):
        return []
    sizes = []
    for axis in "XY":
        value, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        if value is None or unit not in _UM_PER_UNIT:  # "pixel" and "reference frame" are no lengths
            return []
        sizes.append(float(value) * _UM_PER_UNIT[unit])
    return [("OME PhysicalSizeX", sizes[0], sizes[1])]


def refuse_unless_rgb8(path: Path, size_l0: tuple[int, int]) -> None:
    """Look at the TIFF page of level 0 itself: libtiff squeezes 16-bit and grey images into RGB unasked.

    Raises:
        UnsupportedSlideError: it holds something else.
    """
    try:
        tif = tifffile.TiffFile(path)
    except Exception:  # not a TIFF: OpenSlide's other formats are 8-bit RGB by their own definition
        return
    with tif:
        page = next((p for p in tif.pages if (p.imagewidth, p.imagelength) == size_l0), None)  # type: ignore[union-attr]
        if page is None:
            return
        bits, samples = page.bitspersample, page.samplesperpixel  # type: ignore[union-attr]
        planes = tif.series[0].sizes.get("channel", 1) if tif.is_ome else 1
    if bits != 8 or samples not in (3, 4) or planes not in (1, 3, 4):
        raise UnsupportedSlideError(
            f"{path}: {samples} channel{'s' * (samples != 1)} of {bits} bits, not 8-bit RGB brightfield; "
            f"fluorescence and 16-bit images are not supported: export it as 8-bit RGB if it is H&E"
        )


def refuse_ycbcr_shown_as_rgb(path: Path) -> None:
    """Refuse the TIFFs whose YCbCr tifffile hands out as if it were RGB: all but JPEG's own.

    Raises:
        SlideOpenError: level 0 is such a page.
    """
    with tifffile.TiffFile(path) as tif:
        page = tif.pages.first
    ycbcr = page.photometric == tifffile.PHOTOMETRIC.YCBCR and page.compression != tifffile.COMPRESSION.JPEG
    if ycbcr or page.compression == tifffile.COMPRESSION.APERIO_JP2000_YCBC:
        raise SlideOpenError(f"tiffslide would show its {page.compression.name} YCbCr in false colours")


def has_jpeg_tiles(path: Path) -> bool:
    """Whether a directory of a TIFF is compressed as JPEG; False for files that are no TIFF."""
    try:
        with tifffile.TiffFile(path) as tif:
            return any(p.compression in JPEG for p in tif.pages if isinstance(p, tifffile.TiffPage))
    except Exception:  # tifffile raises errors of every kind
        return False


def refuse_truncated(path: Path) -> None:
    """Refuse a TIFF that ends before its directories or tiles do: tiffslide would give what is left of it.

    Does nothing to files that are no TIFF.

    Raises:
        SlideOpenError: the file is shorter than it says.
    """
    try:
        tif = tifffile.TiffFile(path)
    except Exception:  # not a TIFF
        return
    size = path.stat().st_size
    try:
        with tif, path.open("rb") as file:
            pages = [p for p in tif.pages if isinstance(p, tifffile.TiffPage)]
            ends = [o + n for p in pages for o, n in zip(p.dataoffsets, p.databytecounts, strict=False)]
            # NDPI keeps the upper halves of its offsets elsewhere
            missing = max(ends, default=0) > size or not (tif.is_ndpi or _directories_end(file))
    except Exception as exc:  # tifffile raises errors of every kind over damaged directories
        raise SlideOpenError(
            f"{path} is a damaged TIFF ({type(exc).__name__}: {exc}); copy it again"
        ) from exc
    if missing:
        raise SlideOpenError(f"{path} is truncated: {size} bytes are there and it needs more; copy it again")


def refuse_impossible_tiles(path: Path) -> None:
    """Refuse what OpenSlide and libtiff take on trust, with a crash or with black pixels for an answer.

    They divide by sides of zero, ask for the memory of any tile and end the process if there is none, and
    show black, which is taken for glass, where a table of tiles has ended. Files that are no TIFF pass.

    Raises:
        SlideOpenError: a directory is of such tiles.
    """
    with path.open("rb") as file:
        if file.read(4) not in TIFF_HEADS:
            return
        with contextlib.suppress(EOFError):  # what comes before the end counts
            for tags in _directories(file):
                if tags.keys() & {TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_BYTE_COUNTS}:
                    _check_tiles(tags)


def _check_tiles(tags: Tags) -> None:
    width, length, tile_width, tile_length = (
        tags.get(tag, Tag(0, 0)).value for tag in (IMAGE_WIDTH, IMAGE_LENGTH, TILE_WIDTH, TILE_LENGTH)
    )
    if not (0 < tile_width * tile_length <= MOST_TILE_PX and width and length):
        raise SlideOpenError(
            f"its directory of {width} x {length} px has tiles of {tile_width} x {tile_length} px"
        )
    tiles = -(-width // tile_width) * -(-length // tile_length)
    known = min(tags.get(tag, Tag(0, 0)).values for tag in (TILE_OFFSETS, TILE_BYTE_COUNTS))
    if known < tiles:
        raise SlideOpenError(f"its directory of {width} x {length} px knows {known} of {tiles} tiles")


def _directories_end(file: BinaryIO) -> bool:
    """Follow the chain of directories to its end; False if it leads out of the file or in a circle."""
    try:
        for _ in _directories(file):
            pass
    except EOFError:
        return False
    return True


class Tag(NamedTuple):
    """An entry of a directory: how many values, and its value if it is a single whole number, else 0."""

    values: int
    value: int


Tags = dict[int, Tag]


def _directories(file: BinaryIO) -> Iterator[Tags]:
    """The tags of one directory after the other.

    Raises:
        EOFError: the chain leads out of the file or in a circle.
    """
    file.seek(0)
    head = file.read(16).ljust(16, b"\0")
    order = "<" if head[:2] == b"II" else ">"
    big = struct.unpack(order + "H", head[2:4])[0] == 43
    count, entry, offset = ("Q", "HHQ", "Q") if big else ("H", "HHI", "I")
    (at,) = struct.unpack_from(order + offset, head, 8 if big else 4)
    seen = set()
    while at:
        if at in seen or at >= 2**63:
            raise EOFError
        seen.add(at)
        file.seek(at)
        tags: Tags = {}
        for _ in range(_take(file, order + count)[0]):
            tag, kind, values = _take(file, order + entry)
            value = _take(file, f"{struct.calcsize('<' + offset)}s")[0]
            single = values == 1 and kind in WHOLE and struct.calcsize(WHOLE[kind]) <= len(value)
            tags[tag] = Tag(values, struct.unpack_from(order + WHOLE[kind], value)[0] if single else 0)
        yield tags
        (at,) = _take(file, order + offset)


def _take(file: BinaryIO, form: str) -> tuple[Any, ...]:
    data = file.read(struct.calcsize(form))
    if len(data) < struct.calcsize(form):
        raise EOFError
    return struct.unpack(form, data)
