"""A predicted volume as one HTML file of at most 20 MB, to mail; the page says what was made smaller."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from seal_extract.errors import SlideError
from seal_extract.publish import publish
from seal_extract.view.collection import Collection
from seal_extract.view.pages import render_volume_report
from seal_extract.view.report import (
    COARSE_MPP,
    DEFAULT_GENES,
    GENERATOR,
    SIDE_PX,
    as_base64,
    check_side,
    foot_of,
    refuse_other,
)
from seal_extract.view.volume import NO_PICTURE, ShownVolume

MOST_BYTES = 14_500_000  # of maps and pictures; base64 makes 19.4 MB of them
MOST_CODES = 10_000_000  # of all maps, a byte each before they are compressed
MOST_PLANES = 128
BYTES_PER_PX = 0.1  # of a JPEG, at first; tissue takes up to three times as many


def write_volume_report(
    collection: Collection,
    path: str | os.PathLike[str],
    *,
    genes: Sequence[str] | None = None,
    max_px: int = SIDE_PX[1],
    overwrite: bool = False,
) -> Path | None:
    """Write the volume that the encoder of a collection predicted as one HTML file.

    Args:
        collection: its planes as slides.
        path: the HTML file; its folder is made.
        genes: by name; by default the 24 whose prediction varies most. An empty list has none.
        max_px: longest side of the pictures of planes, which are smaller where there are many.
        overwrite: replace a file that is no report of this package.

    Returns:
        ``path``; None if the folder holds no volume.

    Raises:
        UsageError: an unknown gene, or a size out of range.
        OutputError: a file of something else is there, it cannot be written, or the OME-Zarr is damaged.
    """
    check_side(max_px)
    path, maps = Path(path), 1 + (DEFAULT_GENES if genes is None else len(genes))
    volume = ShownVolume.find(collection, most_planes=MOST_PLANES, most_cells=MOST_CODES // maps)
    if volume is None:
        return None
    refuse_other(path, overwrite)
    held = volume.most_varying(DEFAULT_GENES) if genes is None else [*map(volume.gene, dict.fromkeys(genes))]
    inlined = {"genes": [_packed(volume, "genes", gene) for gene in held]}
    inlined["domains"] = [_packed(volume, "domains", "")] if volume.has_domains else []
    described = volume.describe(shareable=True)
    room = MOST_BYTES - sum(len(one["codes"]) * 3 // 4 for some in inlined.values() for one in some)
    pictures, size_px = _pictures(volume, described["planes"], room, max_px)
    mpp = described["size_um"][0] / size_px[0]
    coarse = ": too coarse to judge cells by" if mpp > COARSE_MPP else ""
    described["notes"] += [
        f"{len(held):,} of {len(volume.genes):,} genes are in this page"
        + (", those whose prediction varies most." if genes is None else ", chosen by whoever made it."),
        f"A plane is here as a picture of {size_px[0]:,} × {size_px[1]:,} px, {mpp:.3g} µm each{coarse}.",
    ]
    data = {"volume": described | {"genes": held, "slice_px": size_px}, "maps": inlined, "pictures": pictures}
    page = render_volume_report(
        generator=GENERATOR, name=volume.path.name, data=data, made_by=foot_of(volume.made)
    )
    with publish(path) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(page)
    return path


def _packed(volume: ShownVolume, kind: str, of: str) -> dict[str, Any]:
    legend, codes = volume.map(kind, of)
    return {"legend": legend, "codes": as_base64(zlib.compress(codes.tobytes(), 9))}


def _pictures(
    volume: ShownVolume, planes: list[dict[str, Any]], room: int, max_px: int
) -> tuple[list[str], list[int]]:
    """Pictures in base64 that have room together, and their size; an unreadable plane gets a problem."""
    longest = min(max_px, max(1, int(sqrt(room / len(planes) / BYTES_PER_PX))))
    while True:
        size_px = volume.side_px(longest)
        pictures: list[bytes] = []
        for i, plane in enumerate(planes):
            try:
                pictures.append(b"" if plane["problem"] else volume.picture(i, size_px))
            except SlideError:
                plane["problem"] = NO_PICTURE
                pictures.append(b"")
        needed = sum(map(len, pictures))
        if needed <= room or longest == 1:
            return [as_base64(picture) for picture in pictures], size_px
        longest = max(1, int(longest * sqrt(room / needed) * 0.95))
