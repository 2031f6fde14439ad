"""Spatial Transcriptomics in tables, as in her2st (Andersson et al. 2021)."""

from __future__ import annotations

import csv
import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError
from seal_extract.train.formats.source import Source, checked_positions, existing, matched
from seal_extract.train.sections import Section

PITCH_UM = 200.0  # between spots of the first Spatial Transcriptomics arrays


class StTables(Source, frozen=True):
    """``counts/NAME.tsv.gz``, ``spots/NAME_selection.tsv`` and ``images/NAME.jpg``.

    The table of counts has a row per spot, named ``{x}x{y}``, and a column per gene; the table of spots has
    the columns ``x``, ``y``, ``pixel_x``, ``pixel_y``. The patient is the letters that a name begins with.
    """

    def read(self, name: str) -> Section:
        """See `Source.read`."""
        barcodes, genes, counts = _counts(existing(self.path, f"counts/{name}.tsv.gz", f"counts/{name}.tsv"))
        positions = _positions(existing(self.path, f"spots/{name}_selection.tsv"))
        suffixes = ("jpg", "jpeg", "png", "tif", "svs")
        slide = existing(self.path, *(f"images/{name}.{suffix}" for suffix in suffixes))
        rows = matched(name, barcodes, positions)
        kept = [barcodes[i] for i in rows]
        array_rc = checked_positions(name, [positions[b][1::-1] for b in kept])
        return self.section(
            name,
            slide=slide,
            genes=genes,
            counts=counts[rows],
            barcodes=kept,
            xy_l0=[positions[b][2:] for b in kept],
            array_rc=array_rc.round().astype(np.int64),
            lattice="square",
            pitch_um=PITCH_UM,
            patient=name.rstrip("0123456789"),
        )


def _counts(path: Path) -> tuple[list[str], tuple[str, ...], NDArray[np.float32]]:
    """Row names, column names and numbers of a tab-separated table."""
    names, rows = [], []
    try:
        with (
            gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file,
            np.errstate(over="ignore"),  # `Section` refuses infinity
        ):
            header = file.readline().rstrip("\n").split("\t")
            for line in file:
                name, _, rest = line.partition("\t")
                names.append(name)
                rows.append(np.array(rest.split("\t"), np.float32))
        counts = np.stack(rows) if rows else np.empty((0, len(header) - 1), np.float32)
    except (OSError, EOFError, ValueError, zlib.error) as exc:
        raise UsageError(
            f"{path} is no table of counts: {exc}; it needs a row per spot, separated by tabs"
        ) from exc
    genes = tuple(header[1:] if counts.shape[1] == len(header) - 1 else header)
    return names, genes, counts


def _positions(path: Path) -> dict[str, list[float]]:
    """X and y on the array, x and y in pixels, of each spot."""
    try:
        with path.open(newline="") as file:
            rows = [
                [float(row[column]) for column in ("x", "y", "pixel_x", "pixel_y")]
                for row in csv.DictReader(file, delimiter="\t")
            ]
        return {f"{row[0]:.0f}x{row[1]:.0f}": row for row in rows}
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as exc:
        raise UsageError(f"{path} is no table of spots ({exc}); it needs x, y, pixel_x, pixel_y") from exc
