"""The kind of pixels that a TIFF holds, and the images and sizes that its OME-XML describes."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from seal_extract.errors import SlideOpenError, UnsupportedSlideError
from seal_extract.slides.tiff import (
    DESCRIPTION,
    MOST_TILE_PX,
    STRIP_BYTE_COUNTS,
    STRIP_OFFSETS,
    TILE_WIDTH,
    Directory,
    counted,
    read_tiff,
)

SUBFILE_TYPE, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION, SAMPLES = 254, 258, 259, 262, 274, 277
ROWS_PER_STRIP, PLANAR, EXTRA_SAMPLES, SAMPLE_FORMAT, XML_PACKET = 278, 284, 338, 339, 700
MASK, RGB, YCBCR, SEPARATE, UNASSOCIATED = 4, 2, 6, 2, 2
OLD_JPEG, JPEG, APERIO_YCBCR = 6, 7, 33003
OWN_YCBCR = (OLD_JPEG, JPEG, APERIO_YCBCR, 33005, 34712)  # JPEG, and JPEG 2000 by three numbers
PHOTOMETRICS = {0: "WhiteIsZero", 1: "BlackIsZero", 3: "a palette", 5: "CMYK", 8: "CIELAB", 9: "ICCLAB"}
CONVERT = "vips colourspace IN OUT.tif[tile,pyramid] srgb"
FLATTEN = "vips flatten IN OUT.tif[tile,pyramid]"
TURN = "vips autorot IN OUT.tif[tile,pyramid]"
BESIDE_THE_SLIDE = re.compile("label|macro|overview|thumbnail|barcode", re.IGNORECASE)
UM_PER_UNIT = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}


def refuse_other_pixels(path: Path, sizes_px: Collection[tuple[int, int]]) -> None:
    """Refuse images that libtiff or tifffile would show in other colours or places than their writer meant.

    They convert 16-bit, grey and CIELAB images to RGB unasked, mirror each tile by itself if the image is to
    be mirrored, and disagree on a fourth channel.

    Args:
        path: the file; anything but a TIFF passes.
        sizes_px: (width, height) of the levels; directories of other sizes are labels and the like.

    Raises:
        UnsupportedSlideError: a level is not RGB of 8 bits.
    """
    for level in _levels(path, sizes_px):
        why = _why_not_rgb8(level)
        if why:
            raise UnsupportedSlideError(f"{path}: {why}")
        refuse_orientation(path, level.number(ORIENTATION, 1))


def _levels(path: Path, sizes_px: Collection[tuple[int, int]]) -> list[Directory]:
    """Directories of these sizes; if the largest has none, as in BIF whose tiles overlap, all tiled ones."""
    directories = [d for d in read_tiff(path).directories if not d.number(SUBFILE_TYPE) & MASK]
    largest = max(sizes_px, key=math.prod)
    by_size = any(directory.size_px == largest for directory in directories)
    return [d for d in directories if d.size_px in sizes_px or (not by_size and TILE_WIDTH in d)]


def _why_not_rgb8(directory: Directory) -> str:
    samples, bits = directory.number(SAMPLES, 1), directory.numbers(BITS, 1)
    photometric, compression = directory.number(PHOTOMETRIC, RGB), directory.number(COMPRESSION, 1)
    if {*bits} != {8} or samples not in (3, 4):
        return (
            f"{samples} channel{'s' * (samples != 1)} of {max(bits)} bits, not 8-bit RGB brightfield; "
            f"fluorescence and 16-bit images are not supported: export it as 8-bit RGB if it is H&E"
        )
    why = ""
    if photometric not in (RGB, YCBCR):
        why = f"its colours are {PHOTOMETRICS.get(photometric, f'number {photometric}')}, not RGB or YCbCr"
    elif photometric == YCBCR and compression not in OWN_YCBCR:
        why = f"YCbCr without JPEG (compression {compression}), which readers show differently"
    elif not {*directory.numbers(SAMPLE_FORMAT, 1)} <= {1, 4}:
        why = "its numbers are signed or floating-point, not whole from 0 to 255"
    elif samples == 4 and directory.number(EXTRA_SAMPLES) != UNASSOCIATED:
        return f"its fourth channel is no unassociated alpha, so that readers differ; convert it: {FLATTEN}"
    return why and f"{why}; convert it: {CONVERT}"


def refuse_orientation(path: Path, orientation: int) -> None:
    """Refuse an image that is to be shown turned or mirrored, by its TIFF tag or EXIF.

    Raises:
        UnsupportedSlideError: the orientation is another one than upright.
    """
    if orientation in range(2, 9):
        raise UnsupportedSlideError(
            f"{path}: it is to be shown turned or mirrored (Orientation {orientation}), which some tools do, "
            f"and then a coordinate means another place; turn its pixels: {TURN}"
        )


def refuse_alpha(path: Path, sizes_px: Collection[tuple[int, int]]) -> None:
    """Refuse four channels: OpenSlide multiplies colours by the fourth, divides them again, and rounds.

    Raises:
        SlideOpenError: a level has four channels.
    """
    if any(level.number(SAMPLES, 1) == 4 for level in _levels(path, sizes_px)):
        raise SlideOpenError("OpenSlide would round the colours under its alpha channel")


def refuse_what_tiffslide_gets_wrong(path: Path, sizes_px: Collection[tuple[int, int]]) -> None:
    """Refuse YCbCr other than JPEG's, which tifffile returns as RGB, and strips that are missing.

    Raises:
        SlideOpenError: a level is of such a kind.
    """
    for level in _levels(path, sizes_px):
        compression = level.number(COMPRESSION, 1)
        if (level.number(PHOTOMETRIC) == YCBCR and compression != JPEG) or compression == APERIO_YCBCR:
            raise SlideOpenError(
                f"tiffslide would show its YCbCr of compression {compression} in false colours"
            )
        if TILE_WIDTH not in level:
            _check_strips(level)


def is_placed_by_xml(path: Path) -> bool:
    """Whether XML says where images or tiles of a TIFF lie, so that directories are not levels: SCN, BIF."""
    tiff = read_tiff(path)
    descriptions = (tiff.text(directory.get(DESCRIPTION)) for directory in tiff.directories[:1])
    packets = (tiff.text(directory.get(XML_PACKET)) for directory in tiff.directories)
    return any("leica-microsystems.com/scn" in text for text in descriptions) or any(
        "<EncodeInfo" in packet for packet in packets
    )


def _check_strips(directory: Directory) -> None:
    width, height = directory.size_px
    rows = max(1, min(directory.number(ROWS_PER_STRIP, height), height))
    if rows * width > MOST_TILE_PX:
        raise SlideOpenError(
            f"it is not cut into tiles, and its strips of {width} x {rows} px are too large to be read "
            f"(allowed: {MOST_TILE_PX / 1e6:.0f} Mpx); convert it: {CONVERT}"
        )
    planes = directory.number(SAMPLES, 1) if directory.number(PLANAR, 1) == SEPARATE else 1
    needed, known = -(-height // rows) * planes, counted(directory, STRIP_OFFSETS, STRIP_BYTE_COUNTS)
    if known < needed:
        raise SlideOpenError(f"its directory of {width} x {height} px knows {known} of {needed} strips")


def has_jpeg_tiles(path: Path) -> bool:
    """Whether a directory of a TIFF is compressed as JPEG; False for files that are no TIFF."""
    return any(d.number(COMPRESSION) in (OLD_JPEG, JPEG) for d in read_tiff(path).directories)


# --- OME-XML ------------------------------------------------------------------------------------------


class OmeImage(NamedTuple):
    """An image of OME-XML.

    Attributes:
        name: its name, or its number.
        size_px: (width, height).
        channels: of all its planes together; an RGB plane has three.
        planes: focal planes times points in time.
        mpp: µm/px in x and y; None where it gives none.
        spacing_um: µm between focal planes; None where it gives none.
    """

    name: str
    size_px: tuple[int, int]
    channels: int
    planes: int
    mpp: tuple[float, float] | None
    spacing_um: float | None


def ome_images(path: Path) -> list[OmeImage]:
    """The images that the OME-XML of a TIFF describes; none if it cannot be read."""
    tiff = read_tiff(path)
    xml = tiff.text(tiff.directories[0].get(DESCRIPTION)) if tiff.directories else ""
    if not xml.rstrip().endswith("OME>") or "<!ENTITY" in xml:  # entities grow without bounds
        return []
    try:
        images = [e for e in ElementTree.fromstring(xml).iter() if _name(e) == "Image"]
        return [_image_of(e, f"image {i}") for i, e in enumerate(images)]
    except (ElementTree.ParseError, StopIteration, ValueError):
        return []


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _image_of(image: ElementTree.Element, number: str) -> OmeImage:
    pixels = next(e for e in image if _name(e) == "Pixels")
    width, height, channels, z, t = (int(pixels.get(f"Size{axis}", 1)) for axis in "XYCZT")
    found = {}
    for axis in "XYZ":
        size, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        if size is not None and unit in UM_PER_UNIT:  # "pixel" and "reference frame" are no lengths
            found[axis] = float(size) * UM_PER_UNIT[unit]
    mpp = (found["X"], found["Y"]) if {"X", "Y"} <= found.keys() else None
    name = image.get("Name") or number
    return OmeImage(name, (width, height), channels, z * t, mpp, found.get("Z"))


def ome_mpp(path: Path) -> list[tuple[str, float, float]]:
    """PhysicalSizeX and Y of the first image; their unit is µm unless it says otherwise."""
    return [("OME PhysicalSizeX", *image.mpp) for image in ome_images(path)[:1] if image.mpp is not None]


def check_ome(path: Path) -> None:
    """Refuse stacks and files whose first image is not the largest; warn of other images that are not read.

    Raises:
        UnsupportedSlideError: it is unclear which plane or image is meant.
    """
    images = ome_images(path)
    if not images:
        return
    first, *others = images
    if first.channels not in (1, 3, 4) or first.planes > 1:
        raise UnsupportedSlideError(
            f"{path}: {first.channels} channels in {first.planes} planes, not 8-bit RGB brightfield of one; "
            "export the plane that you mean: bfconvert -z 0 -timepoint 0 IN OUT.ome.tif"
        )
    others = [image for image in others if not BESIDE_THE_SLIDE.search(image.name)]
    shown = ", ".join(f"{image.name!r} ({image.size_px[0]} x {image.size_px[1]} px)" for image in others[:5])
    if any(math.prod(image.size_px) > math.prod(first.size_px) for image in others):
        raise UnsupportedSlideError(
            f"{path}: its first image, {first.name!r}, is smaller than others: {shown}; "
            "export the one that you mean: bfconvert -series NUMBER IN OUT.ome.tif"
        )
    if others:
        warnings.warn(
            f"{path}: of its {len(images)} images only the first, {first.name!r}, is read, and not {shown}; "
            "export the others: bfconvert -series NUMBER IN OUT.ome.tif",
            stacklevel=3,
        )
