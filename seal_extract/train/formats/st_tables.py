"""Sections of Spatial Transcriptomics in tables, as her2st's."""

from __future__ import annotations

import csv
import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError
from seal_extract.train.formats.matching import checked_places, held_to_pitch, matched, mpp_by_pitch, there
from seal_extract.train.sections import Section

ST_PITCH_UM = 200.0  # between spots of the first Spatial Transcriptomics arrays


def read_st_tables(
    folder: Path,
    name: str,
    *,
    mpp: float | None = None,
    counts_are: str = "counts",
    patient: str | None = None,
) -> Section:
    """A section of Spatial Transcriptomics in tables, as her2st's (Andersson et al. 2021).

    ``counts/NAME.tsv.gz`` has a row per spot, called ``{x}x{y}``, and a column per gene;
    ``spots/NAME_selection.tsv`` the places ``x y pixel_x pixel_y``; ``images/NAME.jpg`` is the slide. µm/px
    is that by which the spots lie 200 µm apart.

    Args:
        folder: with the three folders.
        name: of the section; its first letters are the patient.
        mpp: held to the pitch of the spots.
        counts_are: ``"counts"`` or ``"log1p"``.
        patient: in place of those letters.

    Raises:
        UsageError: a file is missing or malformed; no spot has counts and a place; a µm/px that the pitch
            contradicts.
    """
    barcodes, genes, counts = _table(there(folder, f"counts/{name}.tsv.gz", f"counts/{name}.tsv"))
    places = _places(there(folder, f"spots/{name}_selection.tsv"))
    slide = there(folder, *(f"images/{name}.{suffix}" for suffix in ("jpg", "jpeg", "png", "tif", "svs")))
    rows = matched(name, barcodes, places)
    kept = [barcodes[i] for i in rows]
    xy_l0 = checked_places(name, [places[b][2:] for b in kept])
    array_rc = checked_places(name, [places[b][1::-1] for b in kept]).round().astype(np.int64)
    by_pitch = mpp_by_pitch(array_rc, "square", ST_PITCH_UM, xy_l0)
    return Section(
        name=name,
        patient=patient or name.rstrip("0123456789") or name,
        slide=slide,
        mpp=held_to_pitch(name, mpp, by_pitch),
        mpp_source="mpp" if by_pitch is None else f"{ST_PITCH_UM:g} µm between spots",
        genes=genes,
        counts=counts[rows],
        scale=counts_are,
        xy_l0=xy_l0,
        barcodes=tuple(kept),
        array_rc=array_rc,
        lattice="square",
    )


def _table(path: Path) -> tuple[list[str], tuple[str, ...], NDArray[np.float32]]:
    """Row names, column names and numbers of a tab-separated table."""
    names, rows = [], []
    try:
        with (
            gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file,
            np.errstate(over="ignore"),  # infinity is refused with the other counts
        ):
            header = file.readline().rstrip("\n").split("\t")
            for line in file:
                name, _, rest = line.partition("\t")
                names.append(name)
                rows.append(np.array(rest.split("\t"), np.float32))
        counts = np.stack(rows) if rows else np.empty((0, len(header) - 1), np.float32)
    except (OSError, EOFError, ValueError, zlib.error) as exc:
        raise UsageError(
            f"{path} is no table of counts: {exc}; it needs a row per spot, tabs between"
        ) from exc
    genes = tuple(header[1:] if counts.shape[1] == len(header) - 1 else header)
    return names, genes, counts


def _places(path: Path) -> dict[str, tuple[float, float, float, float]]:
    try:
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file, delimiter="\t"))
        return {
            f"{float(r['x']):.0f}x{float(r['y']):.0f}": (
                *(float(r["x"]), float(r["y"])),
                *(float(r["pixel_x"]), float(r["pixel_y"])),
            )
            for r in lines
        }
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as exc:
        raise UsageError(f"{path} is no table of spots ({exc}); it needs x, y, pixel_x, pixel_y") from exc
