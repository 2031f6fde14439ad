"""One page on a whole cohort: is it all there, why not, and which slides must be looked at.

The page is one file that loads nothing: it can be mailed, archived, printed. Its markup, style and script
stand in ``cohort_report.html``, in parts.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

from seal_extract.features.layouts import OVERLAYS, of_grid
from seal_extract.names import without_folders
from seal_extract.publish import publish
from seal_extract.run.status_table import FAILED, StatusRow
from seal_extract.slides.drawing import read_thumbnail
from seal_extract.view.cohort_summary import share, summary, verdict
from seal_extract.view.findings import Cohort, count, group_reasons, number
from seal_extract.view.markup import Markup, fill, fills, parts

MOST_PICTURES = 2000  # of a page
LONG_LIST = 12  # failures of one kind that are shown without a click
MOST_CARDS = 60  # unusual slides likewise
COLUMNS = (
    "Slide",
    "State",
    "Patches",
    "Tissue, mm²",
    "µm/px",
    "Read errors",
    "Patches/s",
    "Seconds",
    "Reader",
)


def write_report(
    rows: Sequence[StatusRow],
    out: Path,
    path: Path,
    *,
    title: str = "Cohort report",
    seconds: float | None = None,
) -> Path:
    """Write the page.

    Args:
        rows: one per slide and per ignored file, from `CohortReport.rows` or `read_status`.
        out: folder of the results; pictures are taken from ``overlays/GRID/NAME.jpg`` in it, where there are
            any.
        path: the HTML file; its folder is made. At most 40 kB a slide; pictures of 2,000 slides at most, the
            unusual and the failed first.
        title: above the verdict.
        seconds: that the run took, by the clock on the wall.

    Returns:
        ``path``.

    Raises:
        OutputError: it cannot be written.
    """
    cohort = Cohort.of([_shareable(row, out) for row in rows])
    pictures = Pictures(cohort, out, path)
    with publish(path) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(_page(cohort, pictures, out, title, seconds))
    return path


def _page(cohort: Cohort, pictures: Pictures, out: Path, title: str, seconds: float | None) -> Iterator[str]:
    """The page in pieces, since it is large."""
    sections = (
        ("failed", "Failed", len(cohort.failed)),
        ("unusual", "Unusual", len(cohort.unusual)),
        ("all", "All slides", len(cohort.slides)),
        ("ignored", "Ignored files", len(cohort.ignored)),
    )
    script = parts()["script"]
    yield fill(
        "page",
        script_hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        title=title,
        verdict=verdict(cohort),
        share=share(cohort),
        links=fills("link", ({"id": id, "name": name, "count": f"{n:,}"} for id, name, n in sections if n)),
    )
    if cohort.slides:
        yield summary(cohort, seconds)
    if cohort.failed:
        rows = [cohort.slides[i] for i in cohort.failed]
        groups = _groups(rows, "slide", lambda k: pictures.of(cohort.failed[k], none=Markup()))
        yield fill("failed", groups=groups)
    if cohort.unusual:
        yield fill("unusual", cards=_cards(cohort, pictures))
    if cohort.slides:
        yield from _all_slides(cohort, pictures)
    if cohort.ignored:
        yield fill("ignored", groups=_groups(cohort.ignored, "file", lambda _: Markup()))
    yield fill(
        "end",
        when=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=version("seal-extract"),
        out=out.resolve().name,
        script=Markup(script),
    )


def _shareable(row: StatusRow, out: Path) -> StatusRow:
    """What may be mailed: files by their names, no folder of this machine."""
    places = (" ".join(row.slide.split()).rpartition("/")[0], out, out.resolve())
    reason, warning = (without_folders(text, *places) for text in (row.reason, row.warning))
    return replace(row, slide=Path(row.slide).name, reason=reason, warning=warning)


# --- slides -------------------------------------------------------------------------------------------


class Pictures:
    """Thumbnails as parts of the page: each is in it once, and the script copies it to other places."""

    def __init__(self, cohort: Cohort, out: Path, path: Path) -> None:
        """Those of all slides, or if they are too many of the unusual and the failed."""
        self.of_all = len(cohort.slides) <= MOST_PICTURES
        self._wanted = frozenset(
            range(len(cohort.slides)) if self.of_all else [*cohort.unusual, *cohort.failed][:MOST_PICTURES]
        )
        self._slides, self._folder, self._page = cohort.slides, out / OVERLAYS, path.parent
        self._seen: dict[int, bool] = {}  # slides of which a picture was sought: whether there is one

    def of(self, index: int, *, none: Markup | None = None) -> Markup:
        """The picture of a slide; ``none``, or a few words, where there is no overlay."""
        jpeg = None
        if index in self._wanted and index not in self._seen:
            jpeg = read_thumbnail(self._file(index))
            self._seen[index] = jpeg is not None
        if not self._seen.get(index):
            why = "no overlay" if index in self._wanted else "picture left out"
            return fill("no_picture", why=why) if none is None else none
        row = self._slides[index]
        link = os.path.relpath(self._file(index), self._page)
        values = {"id": f"p{index}", "link": quote(os.fsencode(link))}
        if jpeg is None:
            return fill("picture_again", **values)
        return fill(
            "picture",
            data=base64.b64encode(jpeg).decode(),
            alt=f"{row.name}: tissue outline and {_or_dash(row.patches, '{:,}')} patches on the slide",
            **values,
        )

    def _file(self, index: int) -> Path:
        row = self._slides[index]
        return of_grid(self._folder, row.grid, f"{row.name}.jpg")


def _groups(rows: Sequence[StatusRow], what: str, picture: Callable[[int], Markup]) -> Markup:
    """Slides or files that have a reason in common; ``picture`` is called with a row's index."""

    def member(k: int) -> dict[str, object]:
        row = rows[k]
        return {"picture": picture(k), "name": row.name, "path": row.slide, "reason": _after(row)}

    return fills(
        "group",
        (
            {
                "what": what,
                "open": "open" if len(members) <= LONG_LIST else "",
                "count": count(len(members), what),
                "kind": kind,
                "slides": fills("group_slide", map(member, members)),
            }
            for kind, members in group_reasons(rows)
        ),
    )


def _after(row: StatusRow) -> str:
    """The reason without the path that stands above it."""
    return row.reason.removeprefix(f"{' '.join(row.slide.split())}: ") or "no reason was recorded"


def _cards(cohort: Cohort, pictures: Pictures) -> Markup:
    cards = [
        fill(
            "card",
            picture=pictures.of(i),
            name=cohort.slides[i].name,
            path=cohort.slides[i].slide,
            why=fills("why", ({"words": words} for words in reasons)),
            figures=_figures(cohort.slides[i]),
        )
        for i, reasons in cohort.unusual.items()
    ]
    shown = fill("cards", cards=Markup("".join(cards[:MOST_CARDS])))
    if len(cards) <= MOST_CARDS:
        return shown
    more = fill("cards", cards=Markup("".join(cards[MOST_CARDS:])))
    return Markup(shown + fill("more", count=f"{len(cards) - MOST_CARDS:,}", cards=more))


def _figures(row: StatusRow) -> str:
    figures = (
        (row.patches, "{:,} patches"),
        (None if row.tissue_mm2 is None else number(row.tissue_mm2), "{} mm²"),
        (row.mpp, "{:.4g} µm/px"),
    )
    return " · ".join(words.format(value) for value, words in figures if value is not None)


def _all_slides(cohort: Cohort, pictures: Pictures) -> Iterator[str]:
    view = "sheet" if pictures.of_all else "table"
    yield fill(
        "slides",
        intro="Blue: the outline of the tissue. Green: the patches. A picture opens the large one."
        if pictures.of_all
        else f"With more than {MOST_PICTURES:,} slides only the unusual and the failed have pictures.",
        view=view,
        sheet=str(view == "sheet").lower(),
        table=str(view == "table").lower(),
        options=fills("option", ({"index": i, "label": label} for i, label in enumerate(COLUMNS, 1))),
        heads=fills(
            "head",
            ({"index": i, "label": label, "kind": "n" * (3 <= i <= 8)} for i, label in enumerate(COLUMNS, 1)),
        ),
    )
    for i, row in enumerate(cohort.slides):
        yield _row(row, cohort.unusual.get(i, ()), pictures.of(i))
    yield fill("slides_end")


def _row(row: StatusRow, why: Sequence[str], picture: Markup) -> Markup:
    """A slide in the table that is the contact sheet too."""
    tag = "unusual" if why else row.status
    numbers = {
        "patches": (row.patches, "{:,}"),
        "tissue": (row.tissue_mm2, "{:,.4g}"),
        "mpp": (row.mpp, "{:.4g}"),
        "errors": (row.read_errors, "{:,}"),
        "pace": (row.patches_per_s, "{:,.4g}"),
        "seconds": (row.seconds, "{:,.4g}"),
    }
    return fill(
        "slide",
        picture=picture,
        name=row.name,
        case=fill("case", case=row.case_id) if row.case_id else Markup(),
        path=row.slide,
        state=f"{row.status} unusual" if why else row.status,
        colour={"unusual": "warn", FAILED: "bad"}.get(tag, "good"),
        tag=tag,
        reason="; ".join(why) or (_after(row) if row.status == FAILED else ""),
        mpp_source=row.mpp_source,
        uncovered="" if row.uncovered is None else f"{row.uncovered:.1%} uncovered",
        reader=row.reader,
        **{key: _or_dash(value, words) for key, (value, words) in numbers.items()},
        **{f"{key}_v": "" if value is None else value for key, (value, _) in numbers.items()},
    )


def _or_dash(value: float | None, words: str) -> str:
    return "–" if value is None else words.format(value)
