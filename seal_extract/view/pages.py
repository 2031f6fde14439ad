"""HTML from the jinja2 templates in ``web/``, in which every text that is filled in is escaped.

The viewer and the report of a slide share one template, ``slide.html``, and the scripts for it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.errors import UsageError, how_to_install
from seal_extract.names import shown

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

WEB = Path(__file__).with_name("web")
HEAD_BYTES = 4096  # within which a page states by what it was made
SLIDE_SCRIPTS = ("parts.js", "figure.js", "legend.js", "combo.js", "map.js", "slide.js")
VIEWER_SCRIPTS = (*SLIDE_SCRIPTS, "server.js", "regions.js", "viewer.js")
REPORT_SCRIPTS = (*SLIDE_SCRIPTS, "inlined.js")
BOTH_VOLUME_SCRIPTS = ("parts.js", "legend.js", "combo.js", "box.js", "plane.js", "volume.js")
VOLUME_SCRIPTS = (*BOTH_VOLUME_SCRIPTS, "server.js", "volume_server.js")
VOLUME_REPORT_SCRIPTS = (*BOTH_VOLUME_SCRIPTS, "volume_inlined.js")


def render(template: str, **values: object) -> Iterator[str]:
    """A page in pieces, since it may be large.

    Args:
        template: file in ``web/``.
        values: what the template fills in, and functions that it calls; None becomes a dash.
    """
    return _environment().get_template(template).generate(**values)


def render_report(**values: object) -> Iterator[str]:
    """The page of a slide as a report, which loads nothing; ``values`` as for `render`.

    Raises:
        UsageError: Leaflet is not installed.
    """
    from markupsafe import Markup

    folder = leaflet_folder("report")
    leaflet, style = ((folder / f"leaflet.{end}").read_text(encoding="utf-8") for end in ("js", "css"))
    leaflet = re.sub(r"^//# sourceMappingURL=.*$", "", leaflet, flags=re.M)
    style = re.sub(r"url\(images/[^)]*\)", "none", style) + web_text("slide.css")
    script = web_text(*REPORT_SCRIPTS)
    return _render_whole("slide.html", (leaflet, script), style, leaflet=Markup(leaflet), **values)


def render_volume_report(**values: object) -> Iterator[str]:
    """The page of a volume as a report, which loads nothing; ``values`` as for `render`."""
    scripts = (web_text(*VOLUME_REPORT_SCRIPTS),)
    return _render_whole("volume.html", scripts, web_text("slide.css", "volume.css"), **values)


def _render_whole(template: str, scripts: Sequence[str], style: str, **values: object) -> Iterator[str]:
    """A page that holds its scripts, the last of which is the page's own, and allows these alone."""
    from markupsafe import Markup

    filled = {"allowed": _allowed(*scripts), "style": Markup(style), "script": Markup(scripts[-1])}
    return render(template, report=True, **filled, **values)


def _allowed(*scripts: str) -> Markup:
    """Sources of a Content-Security-Policy that allow these inline scripts and nothing else."""
    from markupsafe import Markup

    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    return Markup(" ".join(f"'sha256-{digest}'" for digest in digests))


def made_by(path: Path, generator: str) -> bool:
    """Whether a file is a page that ``generator`` wrote: its template states it in the head."""
    try:
        with path.open("rb") as file:
            return f'name="generator" content="{generator}"'.encode() in file.read(HEAD_BYTES)
    except OSError:
        return False


def web_text(*names: str) -> str:
    """The text of files in ``web/``, one after the other."""
    return "\n".join((WEB / name).read_text(encoding="utf-8") for name in names)


def leaflet_folder(what: str) -> Path:
    """Where the files of Leaflet lie, which draws the map of ``what``.

    Raises:
        UsageError: it is not installed.
    """
    try:
        from xstatic.pkg import leaflet
    except ImportError as exc:
        raise UsageError(f"the {what} needs Leaflet; {how_to_install('view')}") from exc
    return Path(leaflet.BASE_DIR)


@cache
def _environment() -> Environment:  # jinja2 is imported here because most commands write no page
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
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
    environment.filters["allowed"] = _allowed
    environment.globals["text_of"] = lambda *names: Markup(web_text(*names))
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment
