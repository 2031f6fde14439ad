"""A comparison as tables: contenders by folds, the mean and its spread; as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from seal_extract.evaluate.compare import KS, Comparison, Ranks, Retrieval
from seal_extract.names import cell


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

    def cells(self) -> list[str]:
        """As printed."""
        spread = self.spread or (math.nan,) * len(self.values)
        return [self.name, *map(_number, self.values, spread), _number(self.mean, self.sd)]


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
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""

    def to_markdown(self) -> str:
        """Title, table and note."""
        head = ["", *self.columns, "mean ± sd"]
        rule = ["---", *["---:"] * (len(head) - 1)]
        body = [f"| {' | '.join(cells)} |" for cells in (head, rule, *(row.cells() for row in self.rows))]
        return "\n".join([f"**{self.title}**", "", *body, *(["", self.note] if self.note else []), ""])

    def to_json(self) -> dict[str, Any]:
        """Numbers in full; null for NaN."""
        rows = [
            {
                "line": row.name,
                "folds": dict(zip(self.columns, map(_defined, row.values), strict=True)),
                "spread": None if row.spread is None else dict(zip(self.columns, row.spread, strict=True)),
                "mean": _defined(row.mean),
                "sd": _defined(row.sd),
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
            writer.writerow([*map(cell, (table.title, row.name)), "mean", row.mean, row.sd])
    return text.getvalue()


def tables(found: Comparison) -> list[Table]:
    """Expression by each probe, then retrieval: through the predicted expression, and in the joint space."""
    made = [_expression(found, probe) for probe in found.permuted]
    for where, retrieval in (
        ("through predicted expression", found.predicted_retrieval),
        ("in the space of the alignment", found.joint_retrieval),
    ):
        if not retrieval:
            continue
        for k in KS:
            made.append(_retrieval(found, retrieval, f"Recall at {k}, {where}", lambda r, k=k: r.recall[k]))  # type: ignore[misc]
        made.append(_retrieval(found, retrieval, f"Median rank, {where}", lambda r: r.median_rank))
    return made


def _expression(found: Comparison, probe: str) -> Table:
    scores = {name: folds for (name, by), folds in found.scores.items() if by == probe}
    rows = [Row(name, tuple(score.mean for score in folds)) for name, folds in scores.items()]
    permuted = found.permuted[probe]
    spread = tuple(permuted.std(0, ddof=1)) if len(permuted) > 1 else None
    rows.insert(1, Row(f"{found.permuted_name}, rows permuted", tuple(permuted.mean(0)), spread))
    folds = next(iter(scores.values()))
    constant = [f"{score.fold} {score.constant}" for score in folds if score.constant]
    note = (
        f"Mean over {len(folds[0].panel)} genes, without those that are constant in the held-out rows and "
        f"have no r ({', '.join(constant) or 'none'}). Rows permuted: mean ± sd of {len(permuted)} orders."
    )
    return Table(f"Pearson r of predicted expression, ridge: {probe}", found.folds, tuple(rows), note)


def _retrieval(
    found: Comparison,
    retrievals: dict[str, list[list[Retrieval]]],
    title: str,
    number: Callable[[Ranks], float],
) -> Table:
    """Both directions of each contender, and chance; a fold of several sections has their mean."""
    rows = []
    for name, folds in retrievals.items():
        rows += [
            Row(f"{name}, image to expression", _means(folds, number, "to_expression")),
            Row(f"{name}, expression to image", _means(folds, number, "to_image")),
        ]
    rows.append(Row("chance", _means(folds, number, "chance")))
    return Table(title, found.folds, tuple(rows), "Within a section.")


def _means(
    folds: list[list[Retrieval]], number: Callable[[Ranks], float], direction: str
) -> tuple[float, ...]:
    """Of each fold, over its sections."""
    return tuple(float(np.mean([number(getattr(r, direction)) for r in sections])) for sections in folds)
