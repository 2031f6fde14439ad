"""What a TIFF says of itself: its physical size in OME-XML, its kind of pixels, its missing end."""

from __future__ import annotations

import logging
import struct
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree

import tifffile

from seal_extract.errors import SlideOpenError, UnsupportedSlideError

# what tifffile logs of a damaged file reaches an application's handlers, not the terminal: we tell it once
logging.getLogger("tifffile").addHandler(logging.NullHandler())

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
    """Look at the TIFF page of level 0 itself: libtiff squeezes 16-bit and grey images into RGB unasked."""
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


def _directories_end(file: BinaryIO) -> bool:
    """Follow the chain of directories to its end; False if it leads out of the file or in a circle."""
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    big = struct.unpack(order + "H", head[2:4])[0] == 43
    count, entry, offset = ("Q", 20, "Q") if big else ("H", 12, "I")
    (at,) = struct.unpack_from(order + offset, head, 8 if big else 4)
    seen = set()
    while at:
        file.seek(at)
        entries = file.read(struct.calcsize(count))
        if at in seen or len(entries) < struct.calcsize(count):
            return False
        seen.add(at)
        file.seek(struct.unpack(order + count, entries)[0] * entry, 1)
        following = file.read(struct.calcsize(offset))
        if len(following) < struct.calcsize(offset):
            return False
        (at,) = struct.unpack(order + offset, following)
    return True
