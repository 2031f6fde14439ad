"""What is written on pictures: text, scale bars, and what an encoder is for.

Pillow's own font has neither µ nor ², ≤ nor ≥: they are put together from what it has.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from PIL import ImageDraw, ImageFont

INK, FAINT = (40, 40, 40), (100, 100, 100)
FOR_TRYING = {
    "seal-tiny": "seal-tiny is for trying the tool: it was trained on four sections of one breast cancer. "
    "Draw no conclusions about patients from it."
}
_BUILT = re.compile("([µμ²≤≥])")
_PLAIN = str.maketrans({"×": "x", "–": "-", "−": "-", "…": "..."})

Font = ImageFont.FreeTypeFont


def encoder_words(name: str) -> str:
    """The encoder, with a warning where it is not for science."""
    return f"{name}: for trying" if name in FOR_TRYING else name


def caption_font(size: int) -> Font:
    """Pillow's own font."""
    font = ImageFont.load_default(size)
    assert isinstance(font, Font), "Pillow was built without FreeType"
    return font


def fitting_font(text: str, width: float, largest: int = 22) -> Font:
    """The largest font in which the text is at most ``width`` wide, but never below 10 px."""
    for size in range(largest, 10, -1):
        font = caption_font(size)
        if text_width(text, font) <= width:
            return font
    return caption_font(10)


def shortened(text: str, font: Font, width: float) -> str:
    """The text, with its end cut off where it is wider than ``width``."""
    if text_width(text, font) <= width:
        return text
    while text and text_width(f"{text}...", font) > width:
        text = text[:-1]
    return f"{text}..."


def text_width(text: str, font: Font) -> float:
    """Width of a line in pixels."""
    return sum(_advance(part, font) for part in _parts(text))


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
        x += _advance(part, font)


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
    power = 10.0 ** np.floor(np.log10(um))
    return float(max(step for step in (1, 2, 5) if step * power <= um * (1 + 1e-9)) * power)


def _parts(text: str) -> list[str]:
    return [part for part in _BUILT.split(text.translate(_PLAIN)) if part]


def _small(font: Font) -> Font:
    return caption_font(max(7, round(0.62 * font.size)))


def _advance(part: str, font: Font) -> float:
    if part == "²":
        return _small(font).getlength("2")
    return font.getlength({"µ": "u", "μ": "u", "≤": "<", "≥": ">"}.get(part, part))


def _draw_part(draw: ImageDraw.ImageDraw, x: float, base: float, part: str, font: Font, ink: Any) -> None:
    stroke = max(1, round(0.08 * font.size))
    if part == "²":
        draw.text((x, base - 0.36 * font.size), "2", ink, _small(font), anchor="ls")
    elif part in "µμ":
        left, foot = round(x + 0.08 * font.size), round(base)  # of the left stem, which goes on downwards
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
