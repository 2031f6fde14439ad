"""One page about an encoder: all evaluations of a folder as tables, dot plots and pictures, in one file.

The page is made of the ``NAME.json`` of the folder, so that its numbers are theirs. It loads nothing, has no
script, and can be mailed, archived and printed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import takewhile
from math import ceil, floor, isnan, log10, nan
from pathlib import Path
from statistics import fmean
from typing import Any

from seal_extract.errors import OutputError
from seal_extract.evaluate.table import number
from seal_extract.names import without_folders
from seal_extract.publish import publish
from seal_extract.view.pages import made_by, render

PAGE = "evaluation.html"
GENERATOR = "seal-extract evaluate"  # in the page, by which it is known
HEADINGS = {  # of the evaluations by the name of their files up to a hyphen, in the order of the page
    "slides": "Slides and patients",
    "hest": "HEST-Benchmark",
    "evaluation": "Expression by the held-out ridge",
    "spot_classes": "Classes of spots",
    "robustness": "Scanners and stains",
}
MOST_GENES = 1000  # of a plot
NAMED_GENES = 8  # at each end of it
EDGE = 3.0  # percent of a plot's width beyond its first and its last tick


def write_evaluation_page(folder: Path) -> Path:
    """Write ``evaluation.html`` of all evaluations in a folder.

    Args:
        folder: with ``NAME.json`` as `evaluate.table.Report.write` makes them, and ``NAME.png`` of those that
            have a picture; other files of JSON are passed over.

    Returns:
        The page.

    Raises:
        OutputError: as `check_page`, or it cannot be written.
    """
    path = check_page(folder)
    found = [part for file in folder.glob("*.json") if (part := Part.read(file))]
    order = list(HEADINGS)
    parts = sorted(found, key=lambda p: (order.index(p.kind) if p.kind in order else len(order), p.name))
    page = render(
        "evaluation.html",
        generator=GENERATOR,
        parts=parts,
        contenders=dict.fromkeys(part.tables[0]["rows"][0]["line"].split(", ")[0] for part in parts),
        differences=differences(parts),
        axis_of=Axis.over,
        values_of=values_of,
        genes=genes,
        number=number,
        nan=nan,
        version=version("seal-extract"),
    )
    with publish(path) as new, new.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(page)
    return path


def check_page(folder: Path) -> Path:
    """The path of a folder's page.

    Raises:
        OutputError: a file of something else is there.
    """
    path = folder / PAGE
    if path.exists() and not made_by(path, GENERATOR):
        raise OutputError(f"{path} exists and is no page of {GENERATOR}; move it, or type another -o")
    return path


@dataclass(frozen=True)
class Part:
    """One evaluation.

    Attributes:
        name: of its files.
        data: its JSON.
        picture: the PNG beside it, base64; empty without one.
    """

    name: str
    data: dict[str, Any]
    picture: str

    @classmethod
    def read(cls, file: Path) -> Part | None:
        """None for a file of something else."""
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            tables = [_complete(table) for table in data["tables"] if table["rows"]]
            data["warnings"], data["tables"] = list(map(str, data["warnings"])), tables
        except (OSError, ValueError, KeyError, TypeError):
            return None
        picture = file.with_suffix(".png")
        encoded = base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else ""
        return cls(file.stem, data, encoded) if tables else None

    @property
    def kind(self) -> str:
        """The name without the label of slides."""
        return self.name.partition("-")[0]

    @property
    def heading(self) -> str:
        """Of its section."""
        label = self.name.removeprefix(self.kind).replace("-", ": ", 1)
        return HEADINGS.get(self.kind, self.kind) + label

    @property
    def tables(self) -> list[dict[str, Any]]:
        """As `evaluate.table.Table.to_json` makes them."""
        tables: list[dict[str, Any]] = self.data["tables"]
        return tables

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What was evaluated, and how: what stands before the warnings of a file, without folders."""
        about = takewhile(lambda item: item[0] != "warnings", self.data.items())
        return [(key, without_folders(_words(value))) for key, value in about if value is not None]


def _complete(table: dict[str, Any]) -> dict[str, Any]:
    """A table with what older files lack; where rows have intervals, its columns are folds by default."""
    rows = [{"interval": None} | row for row in table["rows"]]
    unit = table.get("unit") or ("fold" if any(row["interval"] for row in rows) else "")
    summary = "" if all(row["mean"] is None for row in rows) else "mean"
    return {"differences": [], "summary": summary} | table | {"rows": rows, "unit": unit}


def _words(value: Any) -> str:
    """A fact in a line; a long list is counted."""
    if not isinstance(value, (dict, list)):
        return str(value)
    items = value.items() if isinstance(value, dict) else ((one, None) for one in value)
    names = [f"{k} {v}" if isinstance(v, (str, int, float)) else str(k) for k, v in items]
    return ", ".join(names) if len(names) <= 24 else f"{len(names)}, from {names[0]} to {names[-1]}"


@dataclass(frozen=True)
class Difference:
    """A paired difference with its table, both as JSON."""

    table: dict[str, Any]
    row: dict[str, Any]

    @property
    def side(self) -> str:
        """``above`` or ``below`` where the interval leaves out 0; else empty."""
        low, high = self.row["interval"] or (0, 0)
        return "above" if low > 0 else "below" if high < 0 else ""


def differences(parts: Sequence[Part]) -> dict[str, list[Difference]]:
    """Paired differences by what is compared; those to permuted rows come last."""
    found: dict[str, list[Difference]] = {}
    for table in (table for part in parts for table in part.tables):
        for row in table["differences"]:
            found.setdefault(row["line"], []).append(Difference(table, row))
    return dict(sorted(found.items(), key=lambda item: "permuted" in item[0]))


# --- plots --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """Where numbers lie between the first and the last tick."""

    ticks: tuple[float, ...]
    digits: int

    @classmethod
    def over(cls, values: Iterable[float | None]) -> Axis:
        """With four to nine round ticks around all values."""
        known = [value for value in values if value is not None]
        low, high = min(known, default=0.0), max(known, default=1.0)
        span = max(high - low, 1e-3)
        power = floor(log10(span / 4))
        step = max(s * 10.0**power for s in (1, 2, 5) if s * 10.0**power <= span / 4)
        first, last = floor(low / step + 1e-9), max(ceil(high / step - 1e-9), floor(low / step + 1e-9) + 1)
        return cls(tuple(i * step for i in range(first, last + 1)), max(0, -power))

    def at(self, value: float) -> float:
        """In percent of the whole length."""
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return round(EDGE + share * (100 - 2 * EDGE), 2)

    def text(self, tick: float) -> str:
        """A tick as printed."""
        return f"{tick + 0.0:.{self.digits}f}"


def values_of(rows: Sequence[dict[str, Any]]) -> list[float | None]:
    """All numbers that a plot of rows shows."""
    return [v for row in rows for v in (*row["folds"].values(), *(row["interval"] or ()))]


@dataclass(frozen=True)
class Genes:
    """Pearson's r of each gene, the mean over the folds that have it.

    Attributes:
        title: of the probe or task.
        names: of the genes, by falling r of the first line.
        r: of each gene by line; NaN where it has none.
    """

    title: str
    names: tuple[str, ...]
    r: dict[str, list[float]]

    @property
    def drawn(self) -> range:
        """Which genes are drawn: every one, or evenly spaced ones."""
        return range(0, len(self.names), ceil(len(self.names) / MOST_GENES))

    def values(self) -> list[float]:
        """All numbers that are drawn, and 0."""
        return [0.0, *(r for by_gene in self.r.values() for r in by_gene if not isnan(r))]

    def describe(self, i: int) -> str:
        """A gene with r of each line."""
        return "; ".join([self.names[i], *(f"{line}: {number(r[i])}" for line, r in self.r.items())])

    def ends(self) -> list[tuple[str, list[tuple[str, float]]]]:
        """The genes of highest and lowest r, and those that gained most against the second line."""
        first, *others = self.r
        own = list(zip(self.names, self.r[first], strict=True))
        found = [("Highest", own[:NAMED_GENES]), ("Lowest", own[: -NAMED_GENES - 1 : -1])]
        for other in others[:1]:
            gained = [(g, a - b) for (g, a), b in zip(own, self.r[other], strict=True) if not isnan(b)]
            ranked = sorted(gained, key=lambda pair: -pair[1])
            found.append((f"Highest above {other}", ranked[:NAMED_GENES]))
        return found


def genes(part: Part) -> list[Genes]:
    """The plots of genes of an evaluation, by probe or task."""
    lines = {row["line"] for table in part.tables for row in table["rows"]}
    groups: dict[str, dict[str, dict[str, float]]] = {}
    for key, folds in part.data.get("pearson_r_per_gene", {}).items():
        line = max((line for line in lines if key.startswith(f"{line}, ")), key=len)
        values: dict[str, list[float]] = {}
        for fold in folds.values():
            for gene, r in fold.items():
                values.setdefault(gene, []).extend([] if r is None else [r])
        means = {gene: fmean(r) if r else nan for gene, r in values.items()}
        groups.setdefault(key[len(line) + 2 :], {})[line] = means
    made = []
    for title, by_line in groups.items():
        first = next(iter(by_line.values()))
        names = tuple(sorted((g for g in first if not isnan(first[g])), key=lambda g: -first[g]))
        made.append(Genes(title, names, {line: [r[g] for g in names] for line, r in by_line.items()}))
    return made
