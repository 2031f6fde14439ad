"""A cohort in a sentence, in a few figures, and by µm/px and reader."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import median

from seal_extract.run.status_table import DONE, StatusRow
from seal_extract.view.findings import ENOUGH, Cohort, count, duration, number
from seal_extract.view.markup import Markup, fill, fills

MOST_LINES = 12  # of a tally


def verdict(cohort: Cohort) -> str:
    """The whole report in a sentence."""
    total, failed, unusual = len(cohort.slides), len(cohort.failed), len(cohort.unusual)
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


def share(cohort: Cohort) -> Markup:
    """The verdict as a bar."""
    failed, unusual = len(cohort.failed), len(cohort.unusual)
    lengths = (("good", len(cohort.slides) - failed - unusual), ("warn", unusual), ("bad", failed))
    return fills("share", ({"colour": colour, "n": n} for colour, n in lengths if n))


def summary(cohort: Cohort, seconds: float | None) -> Markup:
    """The figures of the cohort, and histograms of µm/px and readers.

    Args:
        cohort: has slides.
        seconds: that the run took by the clock; without it the slides' own add up.
    """
    done = [row for row in cohort.slides if row.status == DONE]
    patches = [row.patches for row in done if row.patches is not None]
    timed = [row for row in done if row.seconds]
    spent = sum(row.seconds or 0 for row in cohort.slides)
    clock = seconds or spent
    bad = [row.read_errors for row in done if row.read_errors]
    areas = [row.tissue_mm2 for row in done if row.tissue_mm2 is not None]
    before = len(done) - len(timed)
    figures = (
        ("Slides done", f"{len(done):,}", f"of {len(cohort.slides):,}"),
        ("Patches", f"{sum(patches):,}", f"median {number(median(patches))} a slide" if patches else ""),
        ("Tissue", f"{number(sum(areas))} mm²", f"median {number(median(areas))} a slide") if areas else None,
        ("Could not be read", count(sum(bad), "patch", "patches"), f"in {count(len(bad), 'slide')}"),
        (
            "Time",
            duration(clock),
            f"{duration(spent)} of it on slides" if clock > spent else f"{duration(spent)} of all workers",
        ),
        (
            "Patches a second",
            number(sum(row.patches or 0 for row in timed) / clock) if clock and timed else None,
            f"{count(before, 'slide')} finished before" if before else "",
        ),
    )
    return fill(
        "summary",
        figures=fills(
            "figure", (dict(zip(("label", "value", "note"), f, strict=True)) for f in figures if f)
        ),
        tallies=Markup(_mpp_found(done) + _readers(done)),
    )


def _mpp_found(done: Sequence[StatusRow]) -> Markup:
    """Histogram by two digits and by where the number was read."""
    bins: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in done:
        if row.mpp:
            bins[f"{row.mpp:.2g}", row.mpp_source.split(" (")[0]].append(row.mpp)
    lines = [
        (f"{min(v):.4g}" + f" to {max(v):.4g}" * (f"{min(v):.4g}" != f"{max(v):.4g}"), source, len(v))
        for (_, source), v in bins.items()
    ]
    return _tally("µm/px found", ("µm/px", "read from"), lines)


def _readers(done: Sequence[StatusRow]) -> Markup:
    counts = Counter(tuple(row.reader.removesuffix(")").split(" (", 1)) for row in done if row.reader)
    return _tally(
        "Readers", ("reader", "decoded as"), [(key[0], "".join(key[1:]), n) for key, n in counts.items()]
    )


def _tally(heading: str, columns: tuple[str, str], lines: list[tuple[str, str, int]]) -> Markup:
    """Value, second column, count with a bar; the most frequent first."""
    lines = sorted(lines, key=lambda line: -line[2])
    if len(lines) > MOST_LINES:
        rest = lines[MOST_LINES - 1 :]
        lines = [*lines[: MOST_LINES - 1], (f"{len(rest)} others", "", sum(n for _, _, n in rest))]
    most = max((n for _, _, n in lines), default=1)
    return (
        fill(
            "tally",
            heading=heading,
            first=columns[0],
            second=columns[1],
            lines=fills(
                "tally_line",
                (
                    {"value": value, "source": source, "count": f"{n:,}", "percent": round(70 * n / most, 1)}
                    for value, source, n in lines
                ),
            ),
        )
        if lines
        else Markup()
    )
