"""Text, scale bars and thumbnails for the pictures that this package draws.

Pillow's own font has no µ, ², ≤ and ≥. They are composed of the characters that it has.
"""

from __future__ import annotations

import re
import struct
from io import BytesIO
from math import floor, log10
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

INK, FAINT = (40, 40, 40), (100, 100, 100)
FOR_TRYING = {
    "seal-tiny": "seal-tiny is for trying the tool: it was trained on four sections of one breast cancer. "
    "Draw no conclusions about patients from it."
}
_COMPOSED = re.compile("([µμ²≤≥])")
_PLAIN = str.maketrans({"×": "x", "–": "-", "−": "-", "…": "..."})

Font = ImageFont.FreeTypeFont


def encoder_words(name: str) -> str:
    """The name of an encoder, with a warning if it is not meant for science."""
    return f"{name}: for trying" if name in FOR_TRYING else name


# --- text and scale bars --------------------------------------------------------------------------


def caption_font(size: int) -> Font:
    """Pillow's own font."""
    font = ImageFont.load_default(size)
    assert isinstance(font, Font), "Pillow was built without FreeType"
    return font


def fitting_font(text: str, width: float, largest: int = 22) -> Font:
    """The largest font in which the text is at most ``width`` wide, but never below 10 px."""
    fonts = map(caption_font, range(largest, 10, -1))
    return next((font for font in fonts if text_width(text, font) <= width), caption_font(10))


def shortened(text: str, font: Font, width: float) -> str:
    """The text; its end is replaced by dots if it is wider than ``width``."""
    if text_width(text, font) <= width:
        return text
    while text and text_width(f"{text}...", font) > width:
        text = text[:-1]
    return f"{text}..."


def text_width(text: str, font: Font) -> float:
    """Width of a line in pixels."""
    return sum(_part_width(part, font) for part in _parts(text))


def draw_text(
    draw: ImageDraw.ImageDraw,
    xy: tuple[float, float],
    text: str,
    font: Font,
    *,
    ink: tuple[int, int, int] = INK,
    anchor: str = "la",
) -> None:
    """Draw a line of text; ``anchor`` is Pillow's: ``l``, ``m`` or ``r``, and ``a`` or ``m``."""
    ascent, descent = font.getmetrics()
    x = xy[0] - text_width(text, font) * {"l": 0.0, "m": 0.5, "r": 1.0}[anchor[0]]
    base = xy[1] + (ascent if anchor[1] == "a" else (ascent - descent) / 2)
    for part in _parts(text):
        _draw_part(draw, x, base, part, font, ink)
        x += _part_width(part, font)


def draw_fitting_text(
    draw: ImageDraw.ImageDraw,
    xy: tuple[float, float],
    text: str,
    width: float,
    largest: int = 22,
    *,
    ink: tuple[int, int, int] = INK,
    anchor: str = "la",
) -> None:
    """Draw a line of text at most ``width`` wide: in a smaller font, or shortened."""
    font = fitting_font(text, width, largest)
    draw_text(draw, xy, shortened(text, font, width), font, ink=ink, anchor=anchor)


def draw_scale_bar(
    draw: ImageDraw.ImageDraw, right: float, y: float, um_per_px: float, most_px: float, font: Font
) -> None:
    """A bar of 1, 2 or 5 times a power of ten that ends at ``right``, with its length above ``y``."""
    um = round_length(most_px * um_per_px)
    left = right - um / um_per_px
    length = f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} µm"
    draw.line([(left, y), (right, y)], INK, 3)
    draw_text(draw, ((left + right) / 2, y - 0.75 * font.size), length, font, anchor="mm")


def round_length(um: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that is not above ``um``."""
    power = 10.0 ** floor(log10(um))
    return max(step for step in (1, 2, 5) if step * power <= um * (1 + 1e-9)) * power


def _parts(text: str) -> list[str]:
    return [part for part in _COMPOSED.split(text.translate(_PLAIN)) if part]


def _small(font: Font) -> Font:
    return caption_font(max(7, round(0.62 * font.size)))


def _part_width(part: str, font: Font) -> float:
    if part == "²":
        return _small(font).getlength("2")
    return font.getlength({"µ": "u", "μ": "u", "≤": "<", "≥": ">"}.get(part, part))


def _draw_part(
    draw: ImageDraw.ImageDraw, x: float, base: float, part: str, font: Font, ink: tuple[int, int, int]
) -> None:
    stroke = max(1, round(0.08 * font.size))
    if part == "²":
        draw.text((x, base - 0.36 * font.size), "2", ink, _small(font), anchor="ls")
    elif part in "µμ":
        left, foot = round(x + 0.08 * font.size), round(base)  # the left stem of the u is made longer
        draw.text((round(x), foot), "u", ink, font, anchor="ls")
        draw.rectangle([left, foot - 0.3 * font.size, left + stroke - 1, foot + 0.22 * font.size], ink)
    elif part in "≤≥":
        sign = "<" if part == "≤" else ">"
        start, _, stop, bottom = font.getbbox(sign, anchor="ls")
        draw.text((x, base - 0.08 * font.size), sign, ink, font, anchor="ls")
        line = base + bottom + 0.04 * font.size
        draw.rectangle([x + start, line, x + stop - 1, line + stroke - 1], ink)
    else:
        draw.text((x, base), part, ink, font, anchor="ls")


# --- thumbnails: each overlay carries its own in its EXIF block, so that a report decodes no overlay -------

THUMBNAIL_PX = 320  # longest side
THUMBNAIL_BYTES = 24_000  # at most: 1,000 slides stay below 40 MB, and an EXIF block holds 64 kB
CAPTION_PX = 48  # at the foot of an overlay; it is illegible in a thumbnail

# EXIF with two directories: "upright" in the first; place and length of a JPEG in the second
_EXIF = struct.Struct("<6s 2sHL H HHLL L H HHLL HHLL HHLL L")


def make_thumbnail(picture: Image.Image) -> bytes:
    """A JPEG of at most 320 px and 24 kB, of a picture without its caption."""
    scale = min(1.0, THUMBNAIL_PX / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    small = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=1.0)
    for quality in (72, 55, 35, 10):
        buffer = BytesIO()
        small.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= THUMBNAIL_BYTES:
            break
    return buffer.getvalue()


def exif_of(thumbnail: bytes) -> bytes:
    """The EXIF block that holds a thumbnail, as Pillow's ``exif=`` takes it."""
    place, long, short = _EXIF.size - 6, 4, 3  # counted from the byte order mark; types of EXIF
    head = _EXIF.pack(
        *(b"Exif\0\0", b"II", 42, 8),
        *(1, 0x0112, short, 1, 1, 26),
        *(3, 0x0103, short, 1, 6, 0x0201, long, 1, place, 0x0202, long, 1, len(thumbnail), 0),
    )
    return head + thumbnail


def read_thumbnail(path: Path) -> bytes | None:
    """The thumbnail of an overlay, made if the file has none; None if there is no readable picture."""
    try:
        with path.open("rb") as file:
            held = _held_thumbnail(file.read(2**17))  # an EXIF block comes first and has at most 64 kB
        if held is not None:
            return held
        with Image.open(path) as overlay:
            return make_thumbnail(_without_caption(overlay))
    except (OSError, ValueError, SyntaxError):
        return None


def _held_thumbnail(head: bytes) -> bytes | None:
    """The thumbnail in the first bytes of an overlay, found without parsing the picture."""
    start = head.find(b"Exif\0\0")
    length = int.from_bytes(head[start - 2 : start], "big") - 2  # the block counts its own length
    exif = head[start : start + length]
    held = exif[_EXIF.size :]
    return held if start > 0 and held and exif == exif_of(held) else None


def _without_caption(overlay: Image.Image) -> Image.Image:
    """An overlay that carries no thumbnail, decoded no finer than one needs."""
    full = max(overlay.height, 10 * CAPTION_PX)
    overlay.draft("RGB", (2 * THUMBNAIL_PX, 2 * THUMBNAIL_PX))
    width, height = overlay.size
    return overlay.convert("RGB").crop((0, 0, width, height - round(CAPTION_PX * height / full)))
