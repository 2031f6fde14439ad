"""The result of an evaluation: tables of contenders by folds, written as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from seal_extract.errors import OutputError
from seal_extract.names import cell
from seal_extract.publish import publish

MEAN_SD = "mean ± sd"


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        name: what it is.
        values: of each fold.
        spread: standard deviation of each value, where it is a mean itself (over permutations).
    """

    name: str
    values: tuple[float, ...]
    spread: tuple[float, ...] | None = None

    @property
    def mean(self) -> float:
        """Over the folds."""
        return float(np.mean(self.values))

    @property
    def sd(self) -> float:
        """Sample standard deviation over the folds; NaN for a single fold."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else math.nan

    def cells(self, summary: str = MEAN_SD) -> list[str]:
        """As printed; see `Table.summary`."""
        spread = self.spread or (math.nan,) * len(self.values)
        last = [_number(self.mean, self.sd if summary == MEAN_SD else math.nan)] if summary else []
        return [self.name, *map(_number, self.values, spread), *last]


def _number(value: float, sd: float = math.nan) -> str:
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
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    summary: str = MEAN_SD

    def to_markdown(self) -> str:
        """Title, table and note."""
        head = ["", *self.columns, *([self.summary] if self.summary else [])]
        rule = ["---", *["---:"] * (len(head) - 1)]
        rows = (row.cells(self.summary) for row in self.rows)
        body = [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]
        return "\n".join([f"**{self.title}**", "", *body, *(["", self.note] if self.note else []), ""])

    def to_json(self) -> dict[str, Any]:
        """Numbers in full; null for NaN."""
        rows = [
            {
                "line": row.name,
                "folds": dict(zip(self.columns, map(_defined, row.values), strict=True)),
                "spread": None if row.spread is None else dict(zip(self.columns, row.spread, strict=True)),
                "mean": _defined(row.mean if self.summary else math.nan),
                "sd": _defined(row.sd if self.summary == MEAN_SD else math.nan),
            }
            for row in self.rows
        ]
        return {"title": self.title, "note": self.note, "rows": rows}


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def to_csv(tables: Sequence[Table]) -> str:
    """All tables as one, a line for each number: table, line, fold, value, spread."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "line", "fold", "value", "spread"])
    for table in tables:
        for row in table.rows:
            spread = row.spread or ("",) * len(row.values)
            for fold, value, sd in zip(table.columns, row.values, spread, strict=True):
                names = map(cell, (table.title, row.name, fold))
                writer.writerow([*names, "" if math.isnan(value) else value, sd])
            if table.summary:
                writer.writerow([*map(cell, (table.title, row.name)), "mean", row.mean, row.sd])
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
    """

    name: str
    tables: list[Table]
    about: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def to_markdown(self) -> str:
        """Warnings, then all tables."""
        return "\n".join([*(f"**{w}**\n" for w in self.warnings), *(t.to_markdown() for t in self.tables)])

    def to_json(self) -> dict[str, Any]:
        """All numbers, including the details."""
        tables = [table.to_json() for table in self.tables]
        return {**self.about, "warnings": self.warnings, "tables": tables, **self.details}

    def write(self, folder: Path, *, overwrite: bool = False) -> list[Path]:
        """Write ``NAME.md``, ``.csv`` and ``.json``.

        Raises:
            OutputError: as `output_files`; or they cannot be written.
        """
        files = output_files(folder, overwrite, self.name)
        texts = (self.to_markdown(), to_csv(self.tables), json.dumps(self.to_json(), indent=1) + "\n")
        for file, text in zip(files, texts, strict=True):
            with publish(file) as part:
                part.write_text(text, encoding="utf-8")
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
