"""Sections out of the files of others: one function for each kind, chosen by ``kind`` in a configuration."""

from __future__ import annotations

import csv
import gzip
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError
from seal_extract.train.sections import Section

ST_PITCH_UM = 200.0  # between spots of the first Spatial Transcriptomics arrays
MPP_TOLERANCE = 0.05  # share by which a µm/px and the pitch of the spots may differ


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
    ``spots/NAME_selection.tsv`` the places ``x y pixel_x pixel_y``; ``images/NAME.jpg`` is the slide. µm/px is
    that by which the spots lie 200 µm apart.

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
    barcodes, genes, counts = _table(_there(folder, f"counts/{name}.tsv.gz", f"counts/{name}.tsv"))
    places = _places(_there(folder, f"spots/{name}_selection.tsv"))
    slide = _there(folder, *(f"images/{name}.{suffix}" for suffix in ("jpg", "jpeg", "png", "tif", "svs")))
    rows = matched(name, barcodes, places)
    kept = [barcodes[i] for i in rows]
    xy_l0 = np.array([places[b][2:] for b in kept], np.float64).reshape(-1, 2)
    array_xy = np.array([places[b][:2] for b in kept], np.float64).reshape(-1, 2)
    by_pitch = ST_PITCH_UM / _step_px(array_xy, xy_l0) if len(kept) > 2 else None
    return Section(
        name=name,
        patient=patient or name.rstrip("0123456789") or name,
        slide=slide,
        mpp=held_to_pitch(name, mpp, by_pitch),
        mpp_source=f"{ST_PITCH_UM:g} µm between spots",
        genes=genes,
        counts=counts[rows],
        scale=counts_are,
        xy_l0=xy_l0,
        barcodes=tuple(kept),
        array_rc=array_xy[:, ::-1].astype(np.int64),
        lattice="square",
    )


READERS: dict[str, Callable[..., Section]] = {"st-tables": read_st_tables}


def load_sections(sources: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Sections of a configuration: each source has ``kind``, ``folder``, ``names``, and options of its reader.

    Raises:
        UsageError: an unknown kind or option, a section twice; and what the readers raise.
    """
    sections: list[Section] = []
    for source in sources:
        options = dict(source)
        kind, names = options.pop("kind", None), options.pop("names", None)
        folder = options.pop("folder", None)
        if kind not in READERS:
            raise UsageError(f"kind of sections is {kind!r}; allowed: {', '.join(READERS)}")
        if folder is None or not isinstance(names, list):
            raise UsageError(f'sections of kind {kind} need folder = "..." and names = ["..."]')
        allowed = [
            n for n, p in inspect.signature(READERS[kind]).parameters.items() if p.kind is p.KEYWORD_ONLY
        ]
        for option in options:
            if option not in allowed:
                raise UsageError(
                    f"sections of kind {kind} have no option {option!r}; allowed: {', '.join(allowed)}"
                )
        sections += [READERS[kind](Path(folder).expanduser(), name, **options) for name in names]
    names_all = [s.name for s in sections]
    if len(set(names_all)) < len(names_all):
        raise UsageError(f"sections {', '.join(names_all)}: one stands twice; name each once")
    if not sections:
        raise UsageError("no sections are named")
    return sections


def matched(name: str, barcodes: Sequence[str], places: Mapping[str, Any]) -> list[int]:
    """Rows of the counts that have a place; what has only one of both is left out, and said once."""
    rows = [i for i, barcode in enumerate(barcodes) if barcode in places]
    without_place, without_counts = len(barcodes) - len(rows), len(places.keys() - set(barcodes))
    if not rows:
        raise UsageError(
            f"{name}: no spot has both counts ({barcodes[0] if barcodes else 'none'}, ...) and a place "
            f"({next(iter(places), 'none')}, ...); the names have to agree"
        )
    if without_place or without_counts:
        warnings.warn(
            f"{name}: {without_counts} spots without counts and {without_place} counts without a spot are left "
            f"out, {len(rows)} stay",
            stacklevel=2,
        )
    return rows


def held_to_pitch(name: str, mpp: float | None, by_pitch: float | None) -> float | None:
    """The µm/px given, which must be that of the spots' pitch; or that.

    Raises:
        UsageError: they differ by more than 5 %, or there is neither.
    """
    if mpp is None and by_pitch is None:
        raise UsageError(f"{name}: µm/px is unknown; type mpp = 0.5, or whatever it is, with the sections")
    if mpp is not None and by_pitch is not None and abs(mpp / by_pitch - 1) > MPP_TOLERANCE:
        raise UsageError(
            f"{name}: mpp is {mpp:.4g}, but by the pitch of its spots it is {by_pitch:.4g} µm/px; correct mpp, or "
            "leave it out"
        )
    return mpp if by_pitch is None else by_pitch


def _step_px(array_xy: NDArray[np.float64], xy_l0: NDArray[np.float64]) -> float:
    """Pixels from one array position to the next, by least squares over all spots: they lie unevenly."""
    centred_a, centred_p = array_xy - array_xy.mean(0), xy_l0 - xy_l0.mean(0)
    return float((centred_a * centred_p).sum() / (centred_a**2).sum())


def _there(folder: Path, *names: str) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UsageError(f"{folder} has no {' or '.join(names)}; check folder and names of the sections")
    return found


def _table(path: Path) -> tuple[list[str], tuple[str, ...], NDArray[np.float32]]:
    """Row names, column names and numbers of a tab-separated table."""
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
    names, rows = [], []
    try:
        with opened as file:
            header = file.readline().rstrip("\n").split("\t")
            for line in file:
                name, _, rest = line.partition("\t")
                names.append(name)
                rows.append(np.array(rest.split("\t"), np.float32))
        counts = np.stack(rows) if rows else np.empty((0, len(header) - 1), np.float32)
    except (OSError, EOFError, UnicodeDecodeError, ValueError) as exc:
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
    except (OSError, KeyError, TypeError, ValueError) as exc:
        raise UsageError(f"{path} is no table of spots ({exc}); it needs x, y, pixel_x, pixel_y") from exc
