"""Sections in the folders that Space Ranger writes: Visium, and the bins of Visium HD."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from seal_extract.errors import UsageError
from seal_extract.hdf5 import open_hdf5
from seal_extract.train.formats.matching import (
    PLACES,
    checked_places,
    held_to_pitch,
    matched,
    mpp_by_pitch,
    named_once,
    needed,
    slide_of,
    there,
)
from seal_extract.train.sections import Section

VISIUM_PITCH_UM = 100.0
MATRIX = "filtered_feature_bc_matrix.h5"
Places = dict[str, tuple[float, ...]]  # barcode: array row and column, pixel row and column


def read_visium(
    folder: Path,
    name: str,
    *,
    slide: str | None = None,
    mpp: float | None = None,
    counts_are: str = "counts",
    genes_by: str = "symbol",
    duplicates: str = "refuse",
    patient: str | None = None,
) -> Section:
    """A section of Visium: ``filtered_feature_bc_matrix.h5`` and ``spatial/tissue_positions.csv``.

    They lie in the folder itself, in its ``outs``, or in ``NAME`` or ``NAME/outs`` within it. The list
    without a header of Space Ranger 1 is read as well. µm/px is that by which the spots lie 100 µm apart.

    Args:
        folder: of one section, or of several by their names.
        name: of the section.
        slide: the full-resolution image that Space Ranger was given, from the folder if relative, ``{name}``
            being the section.
        mpp: held to the pitch of the spots.
        counts_are: ``"counts"`` or ``"log1p"``.
        genes_by: ``"symbol"``, or ``"id"`` for Ensembl's.
        duplicates: ``"sum"`` adds genes of one symbol.
        patient: of all these sections; by default each is a patient.

    Raises:
        UsageError: a file is missing or malformed; genes twice; a µm/px that the pitch contradicts.
    """
    outs = _outs(folder, name, MATRIX)
    spatial = there(outs, "spatial/tissue_positions.csv", "spatial/tissue_positions_list.csv")
    return _section(
        outs / MATRIX,
        _csv_places(spatial),
        name,
        slide=_slide(folder, name, slide),
        mpp=mpp,
        pitch_um=VISIUM_PITCH_UM,
        lattice="hexagonal",
        counts_are=counts_are,
        genes_by=genes_by,
        duplicates=duplicates,
        patient=patient,
    )


def read_visium_hd(
    folder: Path,
    name: str,
    *,
    slide: str | None = None,
    bin_um: int = 8,
    mpp: float | None = None,
    counts_are: str = "counts",
    genes_by: str = "symbol",
    duplicates: str = "refuse",
    patient: str | None = None,
) -> Section:
    """A section of Visium HD: the bins of one size, in ``binned_outputs/square_008um``.

    Args:
        folder: of one section, or of several by their names.
        name: of the section.
        slide: as in `read_visium`.
        bin_um: side of the bins: those that Space Ranger made, 2, 8 and 16 as a rule.
        mpp: held to the pitch of the bins.
        counts_are: ``"counts"`` or ``"log1p"``.
        genes_by: ``"symbol"``, or ``"id"`` for Ensembl's.
        duplicates: ``"sum"`` adds genes of one symbol.
        patient: of all these sections; by default each is a patient.

    Raises:
        UsageError: pyarrow is not installed; and what `read_visium` raises.
    """
    bins = f"binned_outputs/square_{bin_um:03}um"
    outs = _outs(folder, name, f"{bins}/{MATRIX}") / bins
    return _section(
        outs / MATRIX,
        _parquet_places(there(outs, "spatial/tissue_positions.parquet")),
        name,
        slide=_slide(folder, name, slide),
        mpp=mpp,
        pitch_um=float(bin_um),
        lattice="square",
        counts_are=counts_are,
        genes_by=genes_by,
        duplicates=duplicates,
        patient=patient,
    )


def read_matrix(path: Path, genes_by: str = "symbol") -> tuple[list[str], list[str], Any]:
    """Barcodes, genes and counts (CSR [N, G]) of a 10x HDF5 matrix, features of gene expression alone.

    Raises:
        UsageError: scipy is not installed; not such a file; another ``genes_by``.
    """
    if genes_by not in ("symbol", "id"):
        raise UsageError(f"genes_by is {genes_by!r}; allowed: symbol, id")
    sparse = needed("scipy.sparse")
    try:
        with open_hdf5(path) as file:
            matrix = file["matrix"]  # columns are barcodes, so that its CSC is our CSR
            barcodes = [b.decode() for b in matrix["barcodes"][()]]
            genes = [g.decode() for g in matrix["features"]["name" if genes_by == "symbol" else "id"][()]]
            kinds = matrix["features"]["feature_type"][()]
            parts = tuple(matrix[key][()] for key in ("data", "indices", "indptr"))
        counts = sparse.csr_matrix(parts, shape=(len(barcodes), len(genes)))
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as exc:
        raise UsageError(
            f"{path} is no matrix of Space Ranger ({exc}); it needs matrix/barcodes, features, "
            "data, indices, indptr"
        ) from exc
    of_genes = np.flatnonzero(kinds == b"Gene Expression")
    if not len(of_genes):
        raise UsageError(f"{path} has no feature of type Gene Expression")
    return barcodes, [genes[i] for i in of_genes], counts[:, of_genes]


def _section(
    matrix: Path,
    places: Places,
    name: str,
    *,
    slide: Path,
    mpp: float | None,
    pitch_um: float,
    lattice: str,
    counts_are: str,
    genes_by: str,
    duplicates: str,
    patient: str | None,
) -> Section:
    barcodes, genes, counts = read_matrix(matrix, genes_by)
    advice = ', or genes_by = "id"' if genes_by == "symbol" else ""
    named, counts = named_once(name, genes, counts, duplicates, counts_are, advice)
    rows = matched(name, barcodes, places)
    kept = [barcodes[i] for i in rows]
    where = np.array([places[b] for b in kept], np.float64)  # [N, 4]
    array_rc = checked_places(name, where[:, :2]).astype(np.int64)
    xy_l0 = checked_places(name, where[:, :1:-1])
    by_pitch = mpp_by_pitch(array_rc, lattice, pitch_um, xy_l0)
    return Section(
        name=name,
        patient=patient or name,
        slide=slide,
        mpp=held_to_pitch(name, mpp, by_pitch),
        mpp_source="mpp" if by_pitch is None else f"{pitch_um:g} µm between spots",
        genes=named,
        counts=counts if len(rows) == len(barcodes) else counts[rows],
        scale=counts_are,
        xy_l0=xy_l0,
        barcodes=tuple(kept),
        array_rc=array_rc,
        lattice=lattice,
    )


def _outs(folder: Path, name: str, file: str) -> Path:
    """The folder of Space Ranger's results that holds a file."""
    for outs in (folder / name / "outs", folder / name, folder / "outs", folder):
        if (outs / file).is_file():
            return outs
    raise UsageError(
        f"{folder} has no {file}, nor has {name} or outs in it; give the folder that Space Ranger wrote"
    )


def _slide(folder: Path, name: str, slide: str | None) -> Path:
    if slide is None:
        raise UsageError(
            f"{name}: Space Ranger's folder has no full-resolution image; type --slide FILE, the one that "
            "it was given, or slide = in a config"
        )
    return slide_of(folder, name, slide)


def _csv_places(path: Path) -> Places:
    """Places on tissue, of a table with a header or of the list without one."""
    columns = ("barcode", *PLACES)
    try:
        with path.open(newline="") as file:
            given = None if file.readline().startswith("barcode") else columns
            file.seek(0)
            return {
                r["barcode"]: tuple(float(r[c]) for c in PLACES[1:])
                for r in csv.DictReader(file, given)
                if int(r["in_tissue"])
            }
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as exc:
        raise UsageError(f"{path} is no table of spots ({exc}); it needs {', '.join(columns)}") from exc


def _parquet_places(path: Path) -> Places:
    pandas = needed("pandas")
    needed("pyarrow", "type: pip install pyarrow")
    try:
        table = pandas.read_parquet(path, columns=["barcode", *PLACES], engine="pyarrow")
        table = table[table["in_tissue"] != 0]
        rows = table[list(PLACES[1:])].to_numpy(np.float64)
    except (OSError, KeyError, TypeError, ValueError) as exc:  # pyarrow's own errors are ValueErrors
        raise UsageError(
            f"{path} is no table of bins ({str(exc).splitlines()[0]}); it needs barcode, {', '.join(PLACES)}"
        ) from exc
    return dict(zip(table["barcode"].astype(str), map(tuple, rows.tolist()), strict=True))
