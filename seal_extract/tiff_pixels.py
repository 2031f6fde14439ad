"""What kind of pixels a TIFF holds, and the physical size that OME-XML gives them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from seal_extract.errors import SlideOpenError, UnsupportedSlideError
from seal_extract.tiff import (
    APERIO_YCBCR,
    BITS,
    COMPRESSION,
    DESCRIPTION,
    JPEGS,
    PHOTOMETRIC,
    SAMPLES,
    YCBCR,
    read_tiff,
)

_UM_PER_UNIT = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}


class OmeImage(NamedTuple):
    """An image of OME-XML.

    Attributes:
        name: its name, or its number.
        size_px: (width, height).
        channels: of all its planes together; an RGB plane has three.
        mpp: µm/px in x and y; None where it gives none.
    """

    name: str
    size_px: tuple[int, int]
    channels: int
    mpp: tuple[float, float] | None


def ome_images(path: Path) -> list[OmeImage]:
    """The images that the OME-XML of a TIFF describes; none where it has none that can be read."""
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
    width, height, channels = (int(pixels.get(key, 0)) for key in ("SizeX", "SizeY", "SizeC"))
    found = []
    for axis in "XY":
        size, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        if size is not None and unit in _UM_PER_UNIT:  # "pixel" and "reference frame" are no lengths
            found.append(float(size) * _UM_PER_UNIT[unit])
    mpp = (found[0], found[1]) if len(found) == 2 else None
    return OmeImage(image.get("Name") or number, (width, height), channels, mpp)


def ome_mpp(path: Path) -> list[tuple[str, float, float]]:
    """PhysicalSizeX and Y of the first image of OME-XML; their unit is µm unless it says otherwise."""
    return [("OME PhysicalSizeX", *image.mpp) for image in ome_images(path)[:1] if image.mpp is not None]


def refuse_unless_rgb8(path: Path, size_l0: tuple[int, int]) -> None:
    """Look at the directory of level 0 itself: libtiff squeezes 16-bit and grey images into RGB unasked.

    Raises:
        UnsupportedSlideError: it holds something else.
    """
    for directory in read_tiff(path).directories:
        if directory.size_px == size_l0:
            break
    else:
        return
    bits, samples = directory.number(BITS, 1), directory.number(SAMPLES, 1)
    planes = next((image.channels for image in ome_images(path)), 3)
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
    first = read_tiff(path).directories[0]
    compression = first.number(COMPRESSION, 1)
    if (first.number(PHOTOMETRIC) == YCBCR and compression != JPEGS[1]) or compression == APERIO_YCBCR:
        raise SlideOpenError(f"tiffslide would show its YCbCr of compression {compression} in false colours")


def has_jpeg_tiles(path: Path) -> bool:
    """Whether a directory of a TIFF is compressed as JPEG; False for files that are no TIFF."""
    return any(d.number(COMPRESSION) in JPEGS for d in read_tiff(path).directories)
