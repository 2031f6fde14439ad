"""The result of an evaluation: tables of contenders by folds, written as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from seal_extract.errors import OutputError
from seal_extract.names import cell
from seal_extract.publish import publish

MEAN_SD = "mean ± sd"
INTERVAL = "95 % interval"
VERSIONS = ("seal-extract", "torch", "timm", "numpy", "scikit-learn")
FEWEST = 3  # columns of which an interval can be told


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        name: what it is.
        values: of each fold.
        spread: standard deviation of each value, where it is a mean itself (over permutations).
        interval: 95 % interval of the mean, where it was found otherwise than over the folds, such as by
            bootstrap over patients.
    """

    name: str
    values: tuple[float, ...]
    spread: tuple[float, ...] | None = None
    interval: tuple[float, float] | None = None

    @property
    def mean(self) -> float:
        """Over the folds."""
        return float(np.mean(self.values))

    @property
    def sd(self) -> float:
        """Sample standard deviation over the folds; NaN for a single fold."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan

    def minus(self, other: Row) -> Row:
        """The paired difference to another row."""
        values = (a - b for a, b in zip(self.values, other.values, strict=True))
        return Row(f"{self.name} minus {other.name}", tuple(values))

    def interval_over_folds(self) -> tuple[float, float] | None:
        """95 % interval of the mean by Student's t, which takes folds as independent; None for 2 or fewer.

        It is not bootstrapped: with 4 folds, such an interval holds the true mean in 80 of 100 cases, and
        with 10 folds in 90.
        """
        if len(self.values) < FEWEST or not np.isfinite(self.values).all():
            return None
        from scipy.stats import t

        half = float(t.ppf(0.975, len(self.values) - 1)) * self.sd / math.sqrt(len(self.values))
        return self.mean - half, self.mean + half

    def cells(self, summary: str = MEAN_SD) -> list[str]:
        """As printed; see `Table.summary`."""
        spread = self.spread or (math.nan,) * len(self.values)
        last = [number(self.mean, self.sd if summary == MEAN_SD else math.nan)] if summary else []
        return [self.name, *map(number, self.values, spread), *last]


def number(value: float, sd: float = math.nan) -> str:
    """A number as tables print it, with its spread."""
    if math.isnan(value):
        return "-"
    digits = 1 if abs(value) >= 10 else 3
    return f"{value:.{digits}f}" + ("" if math.isnan(sd) else f" ± {sd:.{digits}f}")


@dataclass(frozen=True)
class Table:
    """Rows by folds.

    Attributes:
        title: what the numbers are.
        columns: names of the folds.
        rows: lines.
        note: what a reader has to know.
        summary: head of the last column: the mean of each row and its spread; ``"average"`` for the mean
            alone, where columns are tasks; empty without such a column, where columns are different figures.
        unit: what a column is, such as ``section``, where columns are independent of each other and rows are
            contenders: rows then have an interval, and the first one is compared with each of the others.
        paired: the first row minus others, where the intervals of these differences were found otherwise than
            over the folds.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    summary: str = MEAN_SD
    unit: str = ""
    paired: tuple[Row, ...] = ()

    def interval(self, row: Row) -> tuple[float, float] | None:
        """95 % interval of a row's mean; None where the columns are not independent, or too few."""
        return row.interval or (row.interval_over_folds() if self.unit else None)

    def differences(self) -> tuple[Row, ...]:
        """The first row minus each of the others, paired by column; none where that means nothing."""
        found = tuple(self.rows[0].minus(other) for other in self.rows[1:]) if self.unit else ()
        return self.paired or found

    def to_markdown(self) -> str:
        """Title, table and note; where rows have intervals, these and the differences too."""
        bounds = [INTERVAL] if any(map(self.interval, self.rows)) else []
        head = ["", *self.columns, *([self.summary] if self.summary else []), *bounds]
        rule = ["---", *["---:"] * (len(head) - 1)]
        rows = [
            [*row.cells(self.summary), *(" to ".join(map(number, self.interval(row) or ())) for _ in bounds)]
            for row in (*self.rows, *(self.differences() if bounds else ()))
        ]
        body = [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]
        return "\n".join([f"**{self.title}**", "", *body, *(["", self.note] if self.note else []), ""])

    def to_json(self) -> dict[str, Any]:
        """Numbers in full; null for NaN."""
        return {
            "title": self.title,
            "note": self.note,
            "unit": self.unit,
            "summary": self.summary,
            "rows": [self._row_to_json(row) for row in self.rows],
            "differences": [self._row_to_json(row) for row in self.differences()],
        }

    def _row_to_json(self, row: Row) -> dict[str, Any]:
        return {
            "line": row.name,
            "folds": dict(zip(self.columns, map(_defined, row.values), strict=True)),
            "spread": None if row.spread is None else dict(zip(self.columns, row.spread, strict=True)),
            "mean": _defined(row.mean if self.summary else math.nan),
            "sd": _defined(row.sd if self.summary == MEAN_SD else math.nan),
            "interval": self.interval(row),
        }


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def to_csv(tables: Sequence[Table]) -> str:
    """All tables as one, a line for each number: table, line, fold, value, spread."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "line", "fold", "value", "spread"])
    for table in tables:
        for row in (*table.rows, *table.differences()):
            spread = row.spread or ("",) * len(row.values)
            for fold, value, sd in zip(table.columns, row.values, spread, strict=True):
                names = map(cell, (table.title, row.name, fold))
                writer.writerow([*names, "" if math.isnan(value) else value, sd])
            if table.summary:
                writer.writerow([*map(cell, (table.title, row.name)), "mean", row.mean, row.sd])
            if interval := table.interval(row):
                for end, value in zip(("low", "high"), interval, strict=True):
                    writer.writerow([*map(cell, (table.title, row.name)), f"{INTERVAL}, {end}", value, ""])
    return text.getvalue()


@dataclass(frozen=True, eq=False)
class Report:
    """An evaluation that is ready to be written.

    Attributes:
        name: of its files, without suffix.
        tables: for reading.
        about: what was evaluated, and how, as JSON.
        warnings: what weakens the numbers, such as an encoder that saw held-out sections in training.
        details: further numbers, for JSON only.
        figure: of matplotlib; None without a picture.
    """

    name: str
    tables: list[Table]
    about: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    figure: Any = None

    def to_markdown(self) -> str:
        """Warnings, then all tables."""
        return "\n".join([*(f"**{w}**\n" for w in self.warnings), *(t.to_markdown() for t in self.tables)])

    def to_json(self) -> dict[str, Any]:
        """All numbers, including the details."""
        tables = [table.to_json() for table in self.tables]
        versions = {name: version(name) for name in VERSIONS}
        return {
            **self.about,
            "versions": versions,
            "warnings": self.warnings,
            "tables": tables,
            **self.details,
        }

    def write(self, folder: Path, *, overwrite: bool = False) -> list[Path]:
        """Write ``NAME.md``, ``.csv`` and ``.json``, and with a figure ``NAME.png``.

        Raises:
            OutputError: as `output_files`; or they cannot be written.
        """
        files = output_files(folder, overwrite, self.name)
        texts = (self.to_markdown(), to_csv(self.tables), json.dumps(self.to_json(), indent=1) + "\n")
        for file, text in zip(files, texts, strict=True):
            with publish(file) as part:
                part.write_text(text, encoding="utf-8")
        if self.figure is not None:
            files.append(folder / f"{self.name}.png")
            with publish(files[-1]) as part:
                self.figure.savefig(part, dpi=120, format="png")
        return files


def output_files(folder: Path, overwrite: bool, name: str) -> list[Path]:
    """The files of a report.

    Raises:
        OutputError: one of them exists and must not be replaced.
    """
    files = [folder / f"{name}{suffix}" for suffix in (".md", ".csv", ".json")]
    existing = [file for file in files if file.exists()]
    if existing and not overwrite:
        raise OutputError(f"{existing[0]} exists already; give --overwrite or another -o")
    return files
