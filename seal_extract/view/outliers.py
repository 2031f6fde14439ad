"""Slides that are unlike the others of their cohort, and failures grouped by their reason."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from seal_extract.patches.grid import MPP_TOLERANCE, mpp_of_name
from seal_extract.run.status_table import DONE, FAILED, IGNORED, StatusRow

ENOUGH = 8  # slides, to call one of them an outlier
LEAST_SCORE = 3.5  # robust z-score of an outlier
SAME_MPP = 0.1  # relative difference within which two µm/px are of one kind
RARE = 0.02  # largest share of the slides that may have an unusual µm/px
LOST_S = 60  # least time that a slow slide has lost
SMALL = 100  # patches; a smaller slide's time is that of opening it

Reason = tuple[float, str]  # how striking it is, and the words for it
Measured = list[tuple[int, float]]  # index of a slide, and a value of it


@dataclass(frozen=True)
class Cohort:
    """The rows of ``status.csv``, sorted.

    Attributes:
        slides: by name.
        ignored: files that are no slides.
        outliers: index of each slide that is done but looks unusual, with the reasons; the most striking
            first.
    """

    slides: tuple[StatusRow, ...]
    ignored: tuple[StatusRow, ...]
    outliers: dict[int, tuple[str, ...]]

    @classmethod
    def of(cls, rows: Iterable[StatusRow]) -> Cohort:
        """Sort the rows; ``s2`` comes before ``s10``."""

        def key(row: StatusRow) -> tuple[str, str]:
            return re.sub(r"\d+", lambda digits: digits[0].zfill(20), row.name.casefold()), row.name

        rows = sorted(rows, key=key)
        slides = tuple(row for row in rows if row.status != IGNORED)
        return cls(slides, tuple(row for row in rows if row.status == IGNORED), find_outliers(slides))

    @cached_property
    def failed(self) -> tuple[int, ...]:
        """Indices of slides."""
        return tuple(i for i, row in enumerate(self.slides) if row.status == FAILED)


def find_outliers(slides: Sequence[StatusRow]) -> dict[int, tuple[str, ...]]:
    """Slides that are done but differ from the others of their cohort, the most striking first.

    Values are compared as logarithms by the modified z-score, the distance from the median over 1.4826 times
    the median absolute deviation, of which more than 3.5 is unusual (Iglewicz and Hoaglin 1993, "How to
    detect and handle outliers"). µm/px comes in a few kinds: one that at most 2 % of the slides have is
    unusual.

    Returns:
        The reasons in words, by the slide's index.
    """
    found: dict[int, list[Reason]] = defaultdict(list)
    done = [i for i, row in enumerate(slides) if row.status == DONE]
    for i in done:
        found[i].extend(_by_itself(slides[i]))
    for measure in MEASURES:
        values = [(i, value) for i in done if slides[i].patches != 0 and (value := measure.of(slides[i]))]
        for i, reason in _far_from_median(measure, values, slides):
            found[i].append(reason)
    for i, reason in _rare_mpp([(i, mpp) for i in done if (mpp := slides[i].mpp)]):
        found[i].append(reason)
    ordered = {i: sorted(reasons, key=lambda reason: -reason[0]) for i, reasons in found.items() if reasons}
    return {
        i: tuple(words for _, words in reasons)
        for i, reasons in sorted(ordered.items(), key=lambda item: -item[1][0][0])
    }


def _by_itself(row: StatusRow) -> Iterator[Reason]:
    """Reasons that need no comparison with other slides."""
    if row.patches == 0:
        tissue = f"{number(row.tissue_mm2)} mm² of" if row.tissue_mm2 else "no"
        yield math.inf, f"No patches, with {tissue} tissue found"
    if row.warning:
        yield 1000, f"µm/px contradicted: {row.warning}"
    if row.grid and row.mpp and row.mpp > (1 + MPP_TOLERANCE) * (asked := mpp_of_name(row.grid)):
        enlarged = f"Enlarged {row.mpp / asked:.2g} times"
        yield 500, f"{enlarged}: the slide has {row.mpp:.3g} µm/px, asked are {asked:g}"
    if row.read_errors:
        share = row.read_errors / max(row.patches or 0, row.read_errors)
        of = f"of {row.patches:,} patches" if row.patches else "patches"
        yield 100 + 1000 * share, f"{row.read_errors:,} {of} could not be read; their features are zeros"


# --- compared with the others ---------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """A property of slides that is alike in a cohort.

    Attributes:
        of: its value, above zero; None if a slide has none.
        words: for (value, median, row), as the report says it.
        factor: from the median, below which no difference counts.
        counts: whether a value far from the median is worth a look; from (value, median, row).
    """

    of: Callable[[StatusRow], float | None]
    words: Callable[[float, float, StatusRow], str]
    factor: float
    counts: Callable[[float, float, StatusRow], bool] = lambda value, median, row: True


def _compared(what: str) -> Callable[[float, float, StatusRow], str]:
    return lambda value, median, _: f"{number(value)} {what}; the cohort's median is {number(median)}"


def _patches(row: StatusRow) -> int:
    return max(row.patches or 0, SMALL)


def _slow_words(_: float, median: float, row: StatusRow) -> str:
    took = f"{duration(row.seconds or 0)} for {count(row.patches or 0, 'patch', 'patches')}"
    return f"{took}; at the cohort's median pace about {duration(median * _patches(row))}"


MEASURES = (
    Measure(lambda row: row.tissue_mm2, _compared("mm² of tissue"), factor=4),
    Measure(
        lambda row: row.patches / row.tissue_mm2 if row.patches and row.tissue_mm2 else None,
        _compared("patches per mm² of tissue"),
        factor=1.5,
    ),
    Measure(  # with coordinates of other tools there is no tissue
        lambda row: row.patches if row.tissue_mm2 is None else None, _compared("patches"), factor=4
    ),
    Measure(
        lambda row: row.seconds / _patches(row) if row.seconds and row.patches else None,
        _slow_words,
        factor=4,
        counts=lambda value, median, row: (value - median) * _patches(row) > LOST_S,
    ),
)


def _far_from_median(
    measure: Measure, values: Measured, slides: Sequence[StatusRow]
) -> Iterator[tuple[int, Reason]]:
    values = [(i, value) for i, value in values if math.isfinite(value)]
    if len(values) < ENOUGH:
        return
    logs = np.log([value for _, value in values])
    median = float(np.median(logs))
    spread = max(1.4826 * float(np.median(np.abs(logs - median))), math.log(measure.factor) / LEAST_SCORE)
    for (i, value), score in zip(values, (np.abs(logs - median) / spread).tolist(), strict=True):
        if score > LEAST_SCORE and measure.counts(value, math.exp(median), slides[i]):
            yield i, (score, measure.words(value, math.exp(median), slides[i]))


def _rare_mpp(values: Measured) -> Iterator[tuple[int, Reason]]:
    if len(values) < ENOUGH:
        return
    ordered = np.sort([mpp for _, mpp in values])
    for i, mpp in values:
        alike = int(np.diff(np.searchsorted(ordered, [mpp * (1 - SAME_MPP), mpp * (1 + SAME_MPP)]))[0])
        if alike <= max(1, RARE * len(ordered)):
            others = "no other slide" if alike == 1 else f"only {alike - 1} of {len(ordered) - 1} others"
            have = "has" if alike <= 2 else "have"
            median = f"the cohort's median is {float(np.median(ordered)):.4g}"
            yield i, (10, f"{mpp:.4g} µm/px, which {others} {have}; {median}")


# --- why slides failed ----------------------------------------------------------------------------

VARIABLE = re.compile(  # quoted, a path, or a word with a digit
    r"""((?<!\w)'[^']*'(?!\w)|"[^"]*"|[^\s(;,]*[\\/][^\s:;,)]*|[\w.+-]*\d[\w.+-]*)"""
)


def group_reasons(rows: Sequence[StatusRow]) -> list[tuple[str, list[int]]]:
    """Rows whose reasons differ in nothing but paths, quotes and numbers, the largest group first.

    Returns:
        The common part of a group's reasons, with ``…`` where they differ; the indices of its rows.
    """
    groups: dict[tuple[str, ...], list[tuple[int, list[str]]]] = defaultdict(list)
    for i, row in enumerate(rows):
        parts = VARIABLE.split(_without_own_name(row))
        groups[tuple(parts[::2])].append((i, parts))
    named = []
    for members in groups.values():
        columns = zip(*(parts for _, parts in members), strict=True)
        common = "".join(same[0] if len(set(same)) == 1 else "…" for same in columns)
        named.append((common.replace("\0", "…"), [i for i, _ in members]))
    return sorted(named, key=lambda group: -len(group[1]))


def _without_own_name(row: StatusRow) -> str:
    text = row.reason or "no reason was recorded"
    for own in (" ".join(row.slide.split()), Path(row.slide).name, row.name):
        if re.search(r"[\d./\\]", own):  # else it may be a word that the message has anyway
            text = text.replace(own, "\0")
    return re.sub(r"^\0:\s*", "", text)


# --- figures in words -----------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def count(n: int, one: str, many: str | None = None) -> str:
    """``1 slide``, ``2,000 slides``."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    """In the unit that keeps it short."""
    units = (("days", 86400, 4), ("h", 3600, 2), ("min", 60, 2))
    unit, length = next(((u, n) for u, n, least in units if seconds >= least * n), ("s", 1))
    return f"{number(seconds / length)} {unit}"
