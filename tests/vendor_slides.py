"""Small slides in the layouts of scanners, from the pixels of the bundled real slide.

What makes a layout is written as OpenSlide's sources read it (openslide-vendor-leica.c, -ventana.c,
-philips-tiff.c, -argos.c and -huron.c of 4.0.1): directories, their order, tags, XML. Each file is opened by
OpenSlide with that vendor's name.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from synthetic_slide import draw

from seal_extract.bench.large_slide import abbreviated_jpeg, jpeg_tags

Pixels = NDArray[np.uint8]
MPP = 0.25
TILE = 128
SIZE = (900, 660)  # of the picture, no whole number of tiles
XMLPACKET, MAKE, ARGOS = 700, 271, 65000


def write_vendor(path: Path, vendor: str) -> Path:
    """Write the slide of one of `VENDORS`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path, bigtiff=vendor == "leica") as tiff:
        VENDORS[vendor](tiff)
    with tifffile.TiffFile(path, mode="r+b") as tiff:  # a tile that is left out has no place either
        for page in tiff.pages:
            counts, offsets = (page.tags[name] for name in ("TileByteCounts", "TileOffsets"))
            if 0 in counts.value:
                offsets.overwrite([at if n else 0 for at, n in zip(offsets.value, counts.value, strict=True)])
    return path


def _halved(pixels: Pixels, times: int) -> Pixels:
    """The picture at 1/2, 1/4 ... of its size, which is made a whole number before."""
    height, width = (side >> times for side in pixels.shape[:2])
    return cv2.resize(
        pixels[: height << times, : width << times], (width, height), interpolation=cv2.INTER_AREA
    )


def _write(
    tiff: tifffile.TiffWriter,
    pixels: Pixels,
    text: str | None = None,
    *,
    tags: Iterable[Any] = (),
    missing: Iterable[int] = (),
    mpp: float | None = None,
    **more: Any,
) -> None:
    """One directory of JPEG tiles; those ``missing`` have no bytes."""
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((0, -height % TILE), (0, -width % TILE), (0, 0)), mode="edge")
    tiles = [
        abbreviated_jpeg(padded[y : y + TILE, x : x + TILE], "420", quality=60)
        for y in range(0, height, TILE)
        for x in range(0, width, TILE)
    ]
    if mpp is not None:
        more |= {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    left_out = set(missing)
    tiff.write(
        (b"" if i in left_out else data for i, (_, data) in enumerate(tiles)),
        shape=(height, width, 3),
        dtype=np.uint8,
        tile=(TILE, TILE),
        description=text,
        metadata=None,
        **{"software": False, **jpeg_tags("420", tiles[0][0]), **more},
        extratags=list(tags),
    )


# --- Leica SCN: images placed in a collection by nanometres --------------------------------------------


def _leica(tiff: tifffile.TiffWriter, offsets: tuple[tuple[int, int], ...] = ((130, 70),)) -> None:
    width, height = SIZE
    nm, collection = round(MPP * 1000), (round(MPP * 1000) * 2400, round(MPP * 1000) * 1100)
    images, directory = [_scn_image((0, 0), collection, [(0, 150, 69)])], 1
    for x, y in offsets:
        sizes = [(directory + level, width >> level, height >> level) for level in range(3)]
        images.append(_scn_image((x * nm, y * nm), (width * nm, height * nm), sizes))
        directory += 3
    text = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection name="a" sizeX="{collection[0]}" sizeY="{collection[1]}">{"".join(images)}</collection>'
        "</scn>"
    )
    _write(tiff, _halved(draw(SIZE, MPP, 9), 2)[:69, :150], text)
    for seed in range(len(offsets)):
        pixels = draw(SIZE, MPP, seed)
        for level in range(3):
            _write(tiff, _halved(pixels, level), mpp=MPP * 2**level)


def _scn_image(offset: tuple[int, int], size: tuple[int, int], levels: list[tuple[int, int, int]]) -> str:
    view = f'sizeX="{size[0]}" sizeY="{size[1]}" offsetX="{offset[0]}" offsetY="{offset[1]}"'
    dimensions = "".join(f'<dimension sizeX="{w}" sizeY="{h}" r="0" ifd="{ifd}"/>' for ifd, w, h in levels)
    return (
        '<image><creationDate>2026-01-01</creationDate><device model="SCN400" version="1"/><scanSettings>'
        "<objectiveSettings><objective>40</objective></objectiveSettings>"
        "<illuminationSettings><numericalAperture>0.75</numericalAperture>"
        "<illuminationSource>brightfield</illuminationSource></illuminationSettings>"
        f"</scanSettings><view {view}/><pixels>{dimensions}</pixels></image>"
    )


# --- Ventana: a TIFF of plain tiles, or a BIF whose tiles overlap --------------------------------------

ISCAN = f'<iScan Magnification="40" ScanRes="{MPP}" UnitNumber="1"/>'


def _ventana(tiff: tifffile.TiffWriter) -> None:
    pixels = draw(SIZE, MPP, 0)
    _write(tiff, _halved(pixels, 2), "Label Image", tags=[_xml(ISCAN)])
    for level in range(3):
        _write(tiff, _halved(pixels, level), f"level={level} mag={40 / 2**level:g} quality=90")


def _bif(tiff: tifffile.TiffWriter, overlap: int = 12, across: int = 6, down: int = 4) -> None:
    """The tiles hold the picture with ``overlap`` px twice at each seam; lower levels are made of them."""
    advance = TILE - overlap
    picture = draw((advance * across + overlap, advance * down + overlap), MPP, 0)
    canvas = np.zeros((down * TILE, across * TILE, 3), np.uint8)
    for row in range(down):
        for column in range(across):
            x, y = column * advance, row * advance
            tile = picture[y : y + TILE, x : x + TILE]
            canvas[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE] = tile
    _write(tiff, _halved(picture, 2), "Label_Image", tags=[_xml(ISCAN)])
    for level in range(3):
        areas = [((0, 0), (across, down), (0, 0))]
        tags = [_xml(_encode_info(areas, overlap))] if level == 0 else []
        _write(tiff, _halved(canvas, level), f"level={level} mag={40 / 2**level:g} quality=90", tags=tags)


def _bif_of_two(tiff: tifffile.TiffWriter) -> None:
    """Two areas without overlap; the right one lies 30 px lower than in the file, and its level no larger."""
    canvas = draw((8 * TILE, 5 * TILE), MPP, 3)
    areas = [((0, 0), (6, 5), (0, 0)), ((6 * TILE, 0), (2, 3), (6 * TILE, 2 * TILE - 30))]
    _write(tiff, _halved(canvas, 3), "Label_Image", tags=[_xml(ISCAN)])
    for level in range(2):
        tags = [_xml(_encode_info(areas, 0))] if level == 0 else []
        _write(tiff, _halved(canvas, level), f"level={level} mag={40 / 2**level:g} quality=90", tags=tags)


def _encode_info(areas: list[Any], overlap: int) -> str:
    """Areas by their corner in the file, tiles across and down, and place on the slide, counted upwards."""
    infos = "".join(_image_info(*tiles, *place, overlap) for _, tiles, place in areas)
    origins = "".join(f'<AOI{i} OriginX="{x}" OriginY="{y}"/>' for i, ((x, y), *_) in enumerate(areas))
    return (
        f"<EncodeInfo><SlideStitchInfo>{infos}</SlideStitchInfo><AoiOrigin>{origins}</AoiOrigin></EncodeInfo>"
    )


def _image_info(across: int, down: int, left: int, up: int, overlap: int) -> str:
    """Each seam between two tiles, which are counted from the bottom, every second row from the right."""

    def number(column: int, row: int) -> int:
        above = down - 1 - row
        return above * across + (across - 1 - column if above % 2 else column) + 1

    seams = []
    for row in range(down):
        for column in range(across):
            if column:
                pair = (number(column - 1, row), number(column, row))
                seams.append(_seam("RIGHT", *pair, overlap, 0))
            if row:
                seams.append(_seam("UP", number(column, row), number(column, row - 1), 0, overlap))
    place = f'NumRows="{down}" NumCols="{across}" Pos-X="{left}" Pos-Y="{up}"'
    info = f'AOIScanned="1" Width="{TILE}" Height="{TILE}" {place}'
    return f"<ImageInfo {info}>{''.join(seams)}</ImageInfo>"


def _seam(direction: str, one: int, other: int, x: int, y: int) -> str:
    tiles = f'Tile1="{one}" Tile2="{other}"'
    return f'<TileJointInfo Direction="{direction}" {tiles} OverlapX="{x}" OverlapY="{y}" Confidence="100"/>'


def _xml(text: str) -> tuple[Any, ...]:
    data = text.encode() + b"\0"
    return (XMLPACKET, 1, len(data), data, True)


# --- Philips: levels padded to whole tiles, tiles of glass left out -------------------------------------


def _philips(tiff: tifffile.TiffWriter) -> None:
    pixels = np.pad(draw(SIZE, MPP, 0), ((0, -SIZE[1] % TILE), (0, -SIZE[0] % TILE), (0, 0)), mode="edge")
    levels = "".join(
        '<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING">'
        f'"{MPP * 2**level / 1000:.6f}" "{MPP * 2**level / 1000:.6f}"</Attribute></DataObject>'
        for level in range(3)
    )
    text = (
        '<?xml version="1.0"?><DataObject ObjectType="DPUfsImport">'
        '<Attribute Name="PIM_DP_SCANNED_IMAGES"><Array>'
        '<DataObject ObjectType="DPScannedImage"><Attribute Name="PIM_DP_IMAGE_TYPE">WSI</Attribute>'
        f'<Attribute Name="DICOM_PIXEL_SPACING">"{MPP / 1000:.6f}" "{MPP / 1000:.6f}"</Attribute>'
        f'<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>{levels}</Array></Attribute>'
        "</DataObject></Array></Attribute></DataObject>"
    )
    for level in range(3):
        small = _halved(pixels, level)
        padded = np.pad(
            small, ((0, -small.shape[0] % TILE), (0, -small.shape[1] % TILE), (0, 0)), mode="edge"
        )
        more: dict[str, Any] = {"subfiletype": 1} if level else {"software": "Philips DP v1.0"}
        _write(tiff, padded, text if level == 0 else "", missing=(7, 9) if level == 0 else (), **more)


# --- Argos AVS and Huron --------------------------------------------------------------------------------


def _argos(tiff: tifffile.TiffWriter) -> None:
    power = b"<ObjectiveMagnification>40</ObjectiveMagnification>"
    data = b"<Argos.Scan.Metadata>" + power + b"<MinZ>0</MinZ><MaxZ>0</MaxZ></Argos.Scan.Metadata>\0"
    pixels = draw(SIZE, MPP, 0)
    for level in range(3):
        tags = [(ARGOS, 2, len(data), data, True)] if level == 0 else []
        _write(tiff, _halved(pixels, level), tags=tags, mpp=MPP * 2**level)


def _huron(tiff: tifffile.TiffWriter) -> None:
    pixels = draw(SIZE, MPP, 0)
    for level in range(3):
        tags = [(MAKE, 2, 6, b"Huron\0", True)] if level == 0 else []
        _write(
            tiff,
            _halved(pixels, level),
            "Scanner = TissueScope\nObjective = 40",
            tags=tags,
            mpp=MPP * 2**level,
        )


VENDORS = {
    "leica": _leica,
    "leica of two images": lambda tiff: _leica(tiff, ((130, 70), (1201, 83))),
    "ventana": _ventana,
    "ventana BIF": _bif,
    "ventana BIF of two areas": _bif_of_two,
    "philips": _philips,
    "argos": _argos,
    "huron": _huron,
}
