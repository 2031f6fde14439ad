"""The small picture of an overlay: drawn with it and kept in its EXIF block, where file browsers look for it.

A report on 1,000 slides reads 1,000 heads of files and decodes none.
"""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path

from PIL import Image

SIDE_PX = 320  # longest side
MOST_BYTES = 24_000  # of its JPEG: 1,000 slides stay below 40 MB, and an EXIF block holds 64 kB
CAPTION_PX = 48  # at the foot of an overlay, illegible when it is small

# EXIF of nothing else: "upright" in one directory; in the next compression, place and length of a JPEG
_EXIF = struct.Struct("<6s 2sHL H HHLL L H HHLL HHLL HHLL L")


def make_thumbnail(picture: Image.Image) -> bytes:
    """A JPEG of at most 320 px and 24 kB, of a picture without its caption."""
    small = picture.copy()
    small.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    for quality in (72, 55, 35, 10):
        buffer = BytesIO()
        small.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= MOST_BYTES:
            break
    return buffer.getvalue()


def exif_of(thumbnail: bytes) -> bytes:
    """The EXIF block that holds a thumbnail, as Pillow's ``exif=`` takes it."""
    place, long, short = _EXIF.size - 6, 4, 3  # counted from the byte order mark; EXIF's types
    head = _EXIF.pack(
        *(b"Exif\0\0", b"II", 42, 8),
        *(1, 0x0112, short, 1, 1, 26),
        *(3, 0x0103, short, 1, 6, 0x0201, long, 1, place, 0x0202, long, 1, len(thumbnail), 0),
    )
    return head + thumbnail


def read_thumbnail(path: Path) -> bytes | None:
    """The thumbnail of an overlay, made now where it has none; None where there is no picture to be read."""
    try:
        with path.open("rb") as file:
            kept = _kept(file.read(2**17))  # an EXIF block comes first, and none is larger than 64 kB
        if kept is not None:
            return kept
        with Image.open(path) as overlay:
            return make_thumbnail(_uncaptioned(overlay))
    except (OSError, ValueError, SyntaxError):
        return None


def _kept(head: bytes) -> bytes | None:
    """The thumbnail in the first bytes of an overlay, found without parsing the picture."""
    start = head.find(b"Exif\0\0")
    length = int.from_bytes(head[start - 2 : start], "big") - 2  # of the block, which counts its own length
    exif = head[start : start + length]
    kept = exif[_EXIF.size :]
    return kept if start > 0 and kept and exif == exif_of(kept) else None


def _uncaptioned(overlay: Image.Image) -> Image.Image:
    """An overlay that carries no thumbnail, decoded no finer than one needs."""
    full = max(overlay.height, 10 * CAPTION_PX)
    overlay.draft("RGB", (2 * SIDE_PX, 2 * SIDE_PX))
    width, height = overlay.size
    return overlay.convert("RGB").crop((0, 0, width, height - round(CAPTION_PX * height / full)))
