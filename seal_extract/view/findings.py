"""What in a table of slides deserves a look: slides unlike the others, and failures of one kind."""

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

ENOUGH = 8  # slides, to call one of them unusual
STRIKING = 3.5  # robust z-score
SAME_MPP = 0.1  # relative difference within which two µm/px are of one kind
LOST_S = 60  # seconds that a slow slide has lost at least
RARE = 0.02  # share of the slides that a µm/px has at most to be unusual


@dataclass(frozen=True)
class Cohort:
    """A table of slides, sorted out.

    Attributes:
        slides: by name.
        ignored: files that are none.
        unusual: index of each slide that is done but looks unusual, and why; the most striking first.
    """

    slides: tuple[StatusRow, ...]
    ignored: tuple[StatusRow, ...]
    unusual: dict[int, tuple[str, ...]]

    @classmethod
    def of(cls, rows: Iterable[StatusRow]) -> Cohort:
        """Sort out the rows of ``status.csv``."""
        rows = sorted(rows, key=lambda row: _natural(row.name))
        slides = tuple(row for row in rows if row.status != IGNORED)
        return cls(slides, tuple(row for row in rows if row.status == IGNORED), find_unusual(slides))

    @cached_property
    def failed(self) -> tuple[int, ...]:
        """Indices of slides."""
        return tuple(i for i, row in enumerate(self.slides) if row.status == FAILED)


def _natural(name: str) -> tuple[str, str]:
    """A key by which ``s2`` comes before ``s10``."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(20), name.casefold()), name


@dataclass(frozen=True)
class Measure:
    """Something that slides of a cohort have in common, more or less.

    Attributes:
        of: its value, above zero, or None where a slide has none.
        words: for (value, median, row), as the report says it.
        factor: from the median, below which no difference counts.
        counts: whether a value far from the median is worth a look; from (value, median, row).
    """

    of: Callable[[StatusRow], float | None]
    words: Callable[[float, float, StatusRow], str]
    factor: float
    counts: Callable[[float, float, StatusRow], bool] = lambda value, median, row: True


def _density(row: StatusRow) -> float | None:
    return row.patches / row.tissue_mm2 if row.patches and row.tissue_mm2 else None


def _pace(row: StatusRow) -> float | None:
    """Seconds per patch, of 100 at least: a small slide's time is that of opening it."""
    return row.seconds / max(row.patches, 100) if row.seconds and row.patches else None


MEASURES = (
    Measure(
        lambda row: row.tissue_mm2 or None,
        lambda value, median, _: f"{number(value)} mm² of tissue; the cohort's median is {number(median)}",
        factor=4,
    ),
    Measure(
        _density,
        lambda value, median, _: (
            f"{number(value)} patches per mm² of tissue; the cohort's median is {number(median)}"
        ),
        factor=1.5,
    ),
    Measure(  # with coordinates of other tools there is no tissue
        lambda row: row.patches or None if row.tissue_mm2 is None else None,
        lambda value, median, _: f"{number(value)} patches; the cohort's median is {number(median)}",
        factor=4,
    ),
    Measure(
        _pace,
        lambda _, median, row: (
            f"{duration(row.seconds or 0)} for {count(row.patches or 0, 'patch', 'patches')}; "
            f"at the cohort's median pace about {duration(median * max(row.patches or 0, 100))}"
        ),
        factor=4,
        counts=lambda value, median, row: (value - median) * max(row.patches or 0, 100) > LOST_S,
    ),
)


def find_unusual(slides: Sequence[StatusRow]) -> dict[int, tuple[str, ...]]:
    """Slides that are done but differ from the others of their cohort, the most striking first.

    Values are compared as logarithms by the modified z-score, the distance from the median over 1.4826 times
    the median absolute deviation, of which more than 3.5 is unusual (Iglewicz and Hoaglin 1993, "How to
    detect and handle outliers"). µm/px comes in a few kinds: one that at most 2 % of the slides have is
    unusual.

    Returns:
        The reasons in words, by the slide's index.
    """
    found: dict[int, list[tuple[float, str]]] = defaultdict(list)
    done = [i for i, row in enumerate(slides) if row.status == DONE]
    for i in done:
        for weight, words in _in_itself(slides[i]):
            found[i].append((weight, words))
    whole = [i for i in done if slides[i].patches != 0]
    for measure in MEASURES:
        for i, score, words in _far_off(measure, slides, whole):
            found[i].append((score, words))
    for i, words in _rare_mpp(slides, done):
        found[i].append((10, words))
    strength = {i: max(weight for weight, _ in reasons) for i, reasons in found.items()}
    return {
        i: tuple(words for _, words in sorted(found[i], key=lambda reason: -reason[0]))
        for i in sorted(found, key=lambda i: -strength[i])
    }


def _in_itself(row: StatusRow) -> Iterator[tuple[float, str]]:
    """What needs no comparison."""
    if row.patches == 0:
        tissue = f"{number(row.tissue_mm2)} mm² of" if row.tissue_mm2 else "no"
        yield math.inf, f"No patches, with {tissue} tissue found"
    if row.warning:
        yield 1000, f"µm/px contradicted: {row.warning}"
    if row.grid and row.mpp and row.mpp > (1 + MPP_TOLERANCE) * (asked := mpp_of_name(row.grid)):
        yield (
            500,
            f"Enlarged {row.mpp / asked:.2g} times: the slide has {row.mpp:.3g} µm/px, asked are {asked:g}",
        )
    if row.read_errors:
        share = row.read_errors / max(row.patches or 0, row.read_errors)
        of = f"of {row.patches:,} patches" if row.patches else "patches"
        yield 100 + 1000 * share, f"{row.read_errors:,} {of} could not be read; their features are zeros"


def _far_off(
    measure: Measure, slides: Sequence[StatusRow], candidates: Iterable[int]
) -> Iterator[tuple[int, float, str]]:
    """Slides far from the median of a measure: index, robust z-score without its sign, words."""
    values = {i: value for i in candidates if (value := measure.of(slides[i])) and math.isfinite(value)}
    if len(values) < ENOUGH:
        return
    logs = np.log(list(values.values()))
    median = float(np.median(logs))
    spread = max(1.4826 * float(np.median(np.abs(logs - median))), math.log(measure.factor) / STRIKING)
    for (i, value), score in zip(values.items(), (logs - median) / spread, strict=True):
        if abs(score) > STRIKING and measure.counts(value, math.exp(median), slides[i]):
            yield i, abs(float(score)), measure.words(value, math.exp(median), slides[i])


def _rare_mpp(slides: Sequence[StatusRow], done: Sequence[int]) -> Iterator[tuple[int, str]]:
    values = {i: mpp for i in done if (mpp := slides[i].mpp)}
    if len(values) < ENOUGH:
        return
    ordered = np.sort(list(values.values()))
    median = float(np.median(ordered))
    for i, mpp in values.items():
        alike = int(np.diff(np.searchsorted(ordered, [mpp * (1 - SAME_MPP), mpp * (1 + SAME_MPP)]))[0])
        if alike <= max(1, RARE * len(ordered)):
            others = "no other slide" if alike == 1 else f"only {alike - 1} of {len(ordered) - 1} others"
            have = "has" if alike <= 2 else "have"
            yield i, f"{mpp:.4g} µm/px, which {others} {have}; the cohort's median is {median:.4g}"


# --- why slides failed --------------------------------------------------------------------------------

VARIABLE = re.compile(  # quoted, a path, or a word with a digit
    r"""((?<!\w)'[^']*'(?!\w)|"[^"]*"|[^\s(;,]*[\\/][^\s:;,)]*|[\w.+-]*\d[\w.+-]*)"""
)


def group_reasons(rows: Sequence[StatusRow]) -> list[tuple[str, list[int]]]:
    """Rows whose reasons differ in nothing but paths, quotes and numbers, the largest group first.

    Returns:
        What the reasons of a group have in common, with ``…`` where they differ; the indices of its rows.
    """
    groups: dict[tuple[str, ...], list[tuple[int, list[str]]]] = defaultdict(list)
    for i, row in enumerate(rows):
        pieces = VARIABLE.split(_without_own_name(row))
        groups[tuple(pieces[::2])].append((i, pieces))
    named = []
    for members in groups.values():
        columns = zip(*(pieces for _, pieces in members), strict=True)
        common = "".join(same[0] if len(set(same)) == 1 else "…" for same in columns)
        named.append((common.replace("\0", "…"), [i for i, _ in members]))
    return sorted(named, key=lambda group: -len(group[1]))


def _without_own_name(row: StatusRow) -> str:
    text = row.reason or "no reason was recorded"
    for own in (" ".join(row.slide.split()), Path(row.slide).name, row.name):
        if re.search(r"[\d./\\]", own):  # else it may be a word that the message has anyway
            text = text.replace(own, "\0")
    return re.sub(r"^\0:\s*", "", text)


# --- figures in words ---------------------------------------------------------------------------------


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
