"""HTML from the jinja2 templates in ``web/``. Every text that is filled in is escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.names import shown

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

WEB = Path(__file__).with_name("web")


def render(template: str, **values: object) -> Iterator[str]:
    """A page in pieces, since it may be large.

    Args:
        template: file in ``web/``.
        values: what the template fills in, and functions that it calls; None becomes a dash.
    """
    return _environment().get_template(template).generate(**values)


def web_file(name: str) -> str:
    """The text of a file in ``web/``."""
    return (WEB / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:  # jinja2 is imported here because most commands write no page
    from jinja2 import (
        Environment,
        FileSystemLoader,
        StrictUndefined,
    )  # 0.1 s, and most commands write no page
    from markupsafe import Markup

    def printable(value: object) -> object:
        return value if isinstance(value, Markup) else "–" if value is None else shown(str(value))

    environment = Environment(
        loader=FileSystemLoader(WEB),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["own"] = lambda name: Markup(web_file(name))
    environment.filters["allowed"] = _allowed
    return environment


def _allowed(script: str) -> Markup:
    """A source of a Content-Security-Policy that allows one inline script and nothing else."""
    from markupsafe import Markup

    return Markup(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'")
