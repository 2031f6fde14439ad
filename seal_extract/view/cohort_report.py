"""One page about a whole cohort: whether every slide is done, why some failed, and which to look at.

The page is one file that loads nothing. It can be mailed, archived and printed.
"""

from __future__ import annotations

import base64
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from urllib.parse import quote

from seal_extract.features.layouts import OVERLAYS, of_grid
from seal_extract.names import without_folders
from seal_extract.publish import publish
from seal_extract.run.status_table import DONE, StatusRow
from seal_extract.slides.drawing import read_thumbnail
from seal_extract.view.outliers import ENOUGH, Cohort, count, duration, group_reasons, number
from seal_extract.view.pages import render

MOST_PICTURES = 2000  # of a page
LONG_LIST = 12  # failures of one kind that are shown without a click
MOST_CARDS = 60  # unusual slides that are shown without a click
MOST_LINES = 12  # of a tally

Tally = list[tuple[str, str, int]]  # a value, a note on it, and how many slides have it


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
        out: folder of the results; pictures are taken from ``overlays/GRID/NAME.jpg`` in it, if they exist.
        path: the HTML file; its folder is made. At most 40 kB a slide; pictures of 2,000 slides at most, the
            unusual and the failed first.
        title: above the headline.
        seconds: that the run took, by the clock on the wall.

    Returns:
        ``path``.

    Raises:
        OutputError: it cannot be written.
    """
    cohort = Cohort.of([_shareable(row, out) for row in rows])
    done = [row for row in cohort.slides if row.status == DONE]
    failures = group_reasons([cohort.slides[i] for i in cohort.failed])
    page = render(
        "cohort.html",
        title=title,
        headline=headline(cohort),
        cohort=cohort,
        pictures=Pictures(cohort, out, path),
        summary=_summary(cohort, done, seconds),
        tallies=[
            ("µm/px found", "µm/px", "read from", _mpp_tally(done)),
            ("Readers", "reader", "decoded as", _reader_tally(done)),
        ],
        failures=[(reason, [cohort.failed[k] for k in members]) for reason, members in failures],
        ignored=group_reasons(cohort.ignored),
        when=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=version("seal-extract"),
        folder=out.resolve().name,
        count=count,
        figure=_figure,
        figures_of=_figures,
        reason_of=_reason,
        long_list=LONG_LIST,
        most_cards=MOST_CARDS,
        most_pictures=MOST_PICTURES,
    )
    with publish(path) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(page)
    return path


def _shareable(row: StatusRow, out: Path) -> StatusRow:
    """What may be mailed: files by their names, no folder of this machine."""
    places = (" ".join(row.slide.split()).rpartition("/")[0], out, out.resolve())
    reason, warning = (text and without_folders(text, *places) for text in (row.reason, row.warning))
    return replace(row, slide=Path(row.slide).name, reason=reason, warning=warning)


# --- pictures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """The thumbnail of a slide at one place of the page.

    Attributes:
        link: URL of the overlay; empty if there is none.
        jpeg: base64; empty if the page has this thumbnail already.
        why: the reason why there is no picture.
    """

    link: str = ""
    jpeg: str = ""
    why: str = ""


class Pictures:
    """Thumbnails of slides: each stands once in the page, and the script copies it to other places."""

    def __init__(self, cohort: Cohort, out: Path, path: Path) -> None:
        """Those of all slides; if there are too many, of the unusual and the failed."""
        slides = cohort.slides
        self.of_all = len(slides) <= MOST_PICTURES
        striking = [*cohort.outliers, *cohort.failed][:MOST_PICTURES]
        self._wanted = frozenset(range(len(slides)) if self.of_all else striking)
        self._files = [of_grid(out / OVERLAYS, row.grid, f"{row.name}.jpg") for row in slides]
        self._page = path.parent
        self._links: dict[int, str] = {}  # of slides whose picture was looked for

    def of(self, index: int) -> Picture:
        """The picture of a slide."""
        if index not in self._wanted:
            return Picture(why="picture left out")
        jpeg = None
        if index not in self._links:
            jpeg = read_thumbnail(self._files[index])
            link = quote(os.fsencode(os.path.relpath(self._files[index], self._page)))
            self._links[index] = "" if jpeg is None else link
        encoded = "" if jpeg is None else base64.b64encode(jpeg).decode()
        return Picture(self._links[index], encoded, "no overlay")


# --- words and figures ----------------------------------------------------------------------------


def headline(cohort: Cohort) -> str:
    """The whole report in a sentence."""
    total, failed, unusual = len(cohort.slides), len(cohort.failed), len(cohort.outliers)
    if not total:
        ignored = count(len(cohort.ignored), "ignored file")
        return f"No slides, {ignored}." if cohort.ignored else "No slides: there is nothing to report yet."
    if failed == total:
        return f"{count(total, 'slide')}: {'all' if total > 1 else 'it'} failed."
    done = f"{total - failed:,} of {count(total, 'slide')} done, {failed:,} failed"
    if not failed:
        done = f"All {total:,} slides done" if total > 1 else "The one slide is done"
    if unusual:
        return f"{done}; {unusual:,} done {'slide looks' if unusual == 1 else 'slides look'} unusual."
    return f"{done}; none looks unusual." if total - failed >= ENOUGH else f"{done}."


def _summary(
    cohort: Cohort, done: Sequence[StatusRow], seconds: float | None
) -> list[tuple[str, str | None, str]]:
    """Label, figure, note; without ``seconds`` of the clock the slides' own add up."""
    patches = [row.patches for row in done if row.patches is not None]
    areas = [row.tissue_mm2 for row in done if row.tissue_mm2 is not None]
    unread = [row.read_errors for row in done if row.read_errors]
    timed = [row for row in done if row.seconds]
    spent = sum(row.seconds or 0 for row in cohort.slides)
    clock = seconds or spent
    pace = number(sum(row.patches or 0 for row in timed) / clock) if clock and timed else None
    before = len(done) - len(timed)
    on_slides = f"{duration(spent)} of it on slides" if clock > spent else f"{duration(spent)} of all workers"
    area = f"{number(sum(areas))} mm²", f"median {number(median(areas))} a slide" if areas else ""
    return [
        ("Slides done", f"{len(done):,}", f"of {len(cohort.slides):,}"),
        ("Patches", f"{sum(patches):,}", f"median {number(median(patches))} a slide" if patches else ""),
        *([("Tissue", *area)] if areas else []),
        ("Could not be read", count(sum(unread), "patch", "patches"), f"in {count(len(unread), 'slide')}"),
        ("Time", duration(clock), on_slides),
        ("Patches a second", pace, f"{count(before, 'slide')} finished before" if before else ""),
    ]


def _mpp_tally(done: Sequence[StatusRow]) -> Tally:
    """µm/px by two digits and by the place where the number was read."""
    bins: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in done:
        if row.mpp:
            bins[f"{row.mpp:.2g}", row.mpp_source.split(" (")[0]].append(row.mpp)
    ends = {key: (f"{min(found):.4g}", f"{max(found):.4g}") for key, found in bins.items()}
    return _most_frequent(
        [
            (low if low == high else f"{low} to {high}", key[1], len(bins[key]))
            for key, (low, high) in ends.items()
        ]
    )


def _reader_tally(done: Sequence[StatusRow]) -> Tally:
    counts = Counter(row.reader.removesuffix(")").partition(" (")[::2] for row in done if row.reader)
    return _most_frequent([(reader, decoder, n) for (reader, decoder), n in counts.items()])


def _most_frequent(lines: Tally) -> Tally:
    lines = sorted(lines, key=lambda line: -line[2])
    rest = lines[MOST_LINES - 1 :]
    if len(rest) < 2:
        return lines
    return [*lines[: MOST_LINES - 1], (f"{len(rest)} others", "", sum(n for _, _, n in rest))]


def _reason(row: StatusRow) -> str:
    """The reason without the path, which stands above it on the page."""
    return row.reason.removeprefix(f"{' '.join(row.slide.split())}: ") or "no reason was recorded"


def _figures(row: StatusRow) -> str:
    area = None if row.tissue_mm2 is None else number(row.tissue_mm2)
    figures = ((row.patches, "{:,} patches"), (area, "{} mm²"), (row.mpp, "{:.4g} µm/px"))
    return " · ".join(words.format(value) for value, words in figures if value is not None)


def _figure(value: float | None, words: str) -> str:
    return "–" if value is None else words.format(value)
