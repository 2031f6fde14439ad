"""The viewer's scripts and style in one HTML file that loads nothing and may load nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from seal_extract.errors import UsageError, how_to_install
from seal_extract.view.markup import Markup, fill_text

HERE = Path(__file__).parent
SCRIPTS = (  # in the order in which one needs the other
    *("viewer_parts.js", "viewer_figure.js", "viewer_legend.js", "viewer_combo.js", "viewer_map.js"),
    "report.js",
)
IMPORT, EXPORT = re.compile(r"^import\b[^;]*;\n", re.M), re.compile(r"^export (?=\w)", re.M)


def page_html(data: dict[str, Any], **values: object) -> str:
    """The page.

    Args:
        data: for its script.
        values: the ``{{names}}`` of ``report.html`` that are not said here.

    Raises:
        UsageError: Leaflet is not installed.
    """
    leaflet, leaflet_css = _leaflet()
    script = _script()
    template = (HERE / "report.html").read_text(encoding="utf-8")
    return fill_text(
        template,
        policy=_policy(leaflet, script),
        style=Markup(f"{leaflet_css}\n{_own('viewer.css')}\n{_own('report.css')}"),
        leaflet=Markup(leaflet),
        script=Markup(script),
        data=Markup(json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")),
        **values,
    )


def _policy(*scripts: str) -> str:
    """Nothing from anywhere, and of scripts those that are here."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; img-src data:; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )


@cache
def _script() -> str:
    """The modules as one: what they import from each other is all there."""
    return "\n".join(EXPORT.sub("", IMPORT.sub("", _own(name))) for name in SCRIPTS)


@cache
def _leaflet() -> tuple[str, str]:
    """Its script and style, without what they would load."""
    try:
        from xstatic.pkg import leaflet
    except ImportError as exc:
        raise UsageError(f"the report needs Leaflet; {how_to_install('view')}") from exc
    script, style = (
        (Path(leaflet.BASE_DIR) / name).read_text(encoding="utf-8") for name in ("leaflet.js", "leaflet.css")
    )
    script = re.sub(r"^//# sourceMappingURL=.*$", "", script, flags=re.M)
    return script, re.sub(r"url\(images/[^)]*\)", "none", style)


def _own(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
