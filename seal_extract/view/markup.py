"""Parts of a page filled with text, which is escaped unless it is markup itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from html import escape
from pathlib import Path

from seal_extract.names import shown


class Markup(str):
    """HTML; every other text is escaped when it is filled into a part of the page."""

    __slots__ = ()


@cache
def parts() -> dict[str, str]:
    """The parts of ``cohort_report.html``, by name."""
    text = Path(__file__).with_name("cohort_report.html").read_text(encoding="utf-8")
    page, *others = re.split(r"<!-- part (\w+) -->\n", text)
    return {"page": page} | {name: part.strip() for name, part in zip(others[::2], others[1::2], strict=True)}


def fill(part: str, **values: object) -> Markup:
    """A part with its ``{{names}}`` filled in; None is a dash.

    Raises:
        KeyError: a name without a value, or no such part.
    """
    return fill_text(parts()[part], **values)


def fill_text(template: str, **values: object) -> Markup:
    """Any text with ``{{names}}``, as `fill` fills a part.

    Raises:
        KeyError: a name without a value.
    """

    def value(name: re.Match[str]) -> str:
        text = values[name[1]]
        return text if isinstance(text, Markup) else escape("–" if text is None else shown(str(text)))

    return Markup(re.sub(r"{{(\w+)}}", value, template))


def fills(part: str, rows: Iterable[dict[str, object]]) -> Markup:
    """The part once per row."""
    return Markup("".join(fill(part, **row) for row in rows))
