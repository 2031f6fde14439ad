"""The result of a slide, and ``status.csv``, with a row for each slide as soon as its result is known."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from seal_extract.errors import SealExtractError
from seal_extract.features.store import SlideFeatures
from seal_extract.names import cell, from_cell
from seal_extract.publish import publish, writing
from seal_extract.slides.entry import SlideEntry

Progress = Callable[[Path, int, int], None]  # slide, patches done, patches in all


@dataclass(frozen=True)
class SlideResult:
    """A slide's features, or the error that stopped it.

    Attributes:
        entry: the slide.
        features: one per encoder, in their order; empty if it failed.
        error: None if it went well.
        seconds: from the end of the previous slide to the end of this one.
        finished_before: a former run had made the features.
    """

    entry: SlideEntry
    features: tuple[SlideFeatures, ...]
    error: SealExtractError | None
    seconds: float
    finished_before: bool = False

    @property
    def path(self) -> Path:
        """Of the slide; see `SlideEntry`."""
        return self.entry.path

    @property
    def name(self) -> str:
        """Of the slide's results."""
        return self.entry.name


DONE, FAILED, IGNORED = "done", "failed", "ignored"


@dataclass(frozen=True)
class StatusRow:
    """One slide.

    Attributes:
        slide: path of the file, or URL.
        name: of its results.
        status: ``"done"``, ``"failed"``, or ``"ignored"`` for a file that is no slide.
        case_id: the patient, if a table states it.
        patches: how many were embedded.
        tissue_mm2: area of tissue found, in square millimetres.
        mpp: µm/px at level 0.
        mpp_source: where the µm/px comes from.
        reader: the library that opened the slide, and how its patches were decoded.
        seconds: time that the run spent on this slide.
        patches_per_s: patches embedded per second of that time.
        read_errors: patches that could not be read, whose features are zeros.
        grid: name of its grid, such as ``20x_224px_0px_overlap``; empty if unknown.
        uncovered: share of the tissue under no patch.
        padding: share of the area of all patches that lies beyond the slide.
        warning: a statement that contradicts the µm/px.
        reason: why it failed or was ignored.
    """

    slide: str
    name: str
    status: str
    case_id: str = ""
    patches: int | None = None
    tissue_mm2: float | None = None
    mpp: float | None = None
    mpp_source: str = ""
    reader: str = ""
    seconds: float | None = None
    patches_per_s: float | None = None
    read_errors: int | None = None
    grid: str = ""
    uncovered: float | None = None
    padding: float | None = None
    warning: str = ""
    reason: str = ""

    @classmethod
    def of(cls, result: SlideResult, grid: str = "") -> StatusRow:
        """The row of a result; of several encoders the first counts, as they share patches and errors.

        Args:
            result: of one slide.
            grid: name of the grid that was asked for, which a failed slide lacks.
        """
        entry = result.entry
        where: dict[str, Any] = {"slide": entry.source, "name": entry.name, "case_id": entry.case_id or ""}
        if result.error is not None:
            reason = " ".join(str(result.error).split())[:MOST_WORDS]
            return cls(**where, status=FAILED, grid=grid, seconds=round(result.seconds, 2), reason=reason)
        first = result.features[0]
        slide, tissue = first.provenance["slide"], first.provenance["tissue"]
        patches = len(first.grid)
        return cls(
            **where,
            status=DONE,
            grid=first.grid.name,
            patches=patches,
            tissue_mm2=round(tissue["area_mm2"], 3) if tissue else None,
            mpp=slide["mpp"],
            mpp_source=slide["mpp_source"],
            reader=f"{slide['reader']} ({slide['decoder']})",
            seconds=None if result.finished_before else round(result.seconds, 2),
            patches_per_s=None if result.finished_before else round(patches / max(result.seconds, 1e-3), 1),
            read_errors=max(f.provenance["read_errors"] for f in result.features),
            uncovered=_share(tissue and tissue.get("uncovered")),
            padding=_share(first.provenance.get("padding")),
            warning=slide.get("mpp_conflict", ""),
        )


def _share(value: float | None) -> float | None:
    """Rounded; None in files of an older version, which did not measure it."""
    return None if value is None else round(value, 4)


MOST_WORDS = 4_000  # characters of a reason
csv.field_size_limit(2**31 - 1)  # a table with a longer field than 131,072 bytes would be read as none
COLUMNS = tuple(field.name for field in fields(StatusRow))


class StatusFile:
    """The table of a run, which begins with the rows of former runs.

    Rows are appended, so that a killed run loses at most its last row. Of several rows of one slide and grid,
    the last one counts.
    """

    def __init__(self, path: Path, before: Iterable[StatusRow] = ()) -> None:
        """Write ``before`` afresh; rows that are added follow it.

        Raises:
            OutputError: it cannot be written.
        """
        self.path = path
        with publish(path) as part, part.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            table.writerows(map(_cells, before))

    def add(self, row: StatusRow) -> None:
        """Append a slide's line.

        Raises:
            OutputError: it cannot be written.
        """
        with writing(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow(_cells(row))


def read_status(path: str | os.PathLike[str]) -> dict[str, StatusRow]:
    """The last row of each slide, by its name; empty if there is no table."""
    return {row.name: row for row in read_status_rows(path)}


def read_status_rows(path: str | os.PathLike[str]) -> list[StatusRow]:
    """The last row of each slide and grid; empty if there is no table."""
    try:
        with Path(path).open(newline="", encoding="utf-8", errors="replace") as file:
            lines = list(csv.DictReader(file))
    except (OSError, csv.Error):
        return []
    rows = [row for cells in lines if (row := _row(cells)) is not None]
    return list({(row.name or row.slide, row.grid): row for row in rows}.values())


def _cells(row: StatusRow) -> dict[str, Any]:
    values = {key: "" if value is None else value for key, value in vars(row).items()}
    return {key: cell(value) if isinstance(value, str) else value for key, value in values.items()}


NUMBERS = {"patches": int, "read_errors": int} | dict.fromkeys(
    ("tissue_mm2", "mpp", "seconds", "patches_per_s", "uncovered", "padding"), float
)


def _row(cells: dict[str, Any]) -> StatusRow | None:
    """A row of the table; None for one that a killed run left incomplete."""
    try:
        values: dict[str, Any] = {
            name: (NUMBERS[name](cells[name]) if cells[name] else None)
            if name in NUMBERS
            else from_cell(cells[name])
            for name in COLUMNS
            if name in cells  # an older version had fewer
        }
        complete = values["status"] in (DONE, FAILED, IGNORED) and values["reason"] is not None
        return StatusRow(**values) if complete else None
    except (KeyError, TypeError, ValueError):
        return None
