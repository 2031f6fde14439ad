"""Spots printed on arrays: the tables of Spatial Transcriptomics, the folders of Visium and Visium HD."""

from __future__ import annotations

import csv
import gzip
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError
from seal_extract.hdf5 import open_hdf5
from seal_extract.train.config import Count
from seal_extract.train.formats.source import (
    VISIUM_PITCH_UM,
    Source,
    checked_positions,
    existing,
    matched,
    needed,
    slide_of,
)
from seal_extract.train.sections import Section

ST_PITCH_UM = 200.0  # between spots of the first Spatial Transcriptomics arrays
MATRIX = "filtered_feature_bc_matrix.h5"
COLUMNS = ("in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
Positions = dict[str, tuple[float, ...]]  # barcode: row and column on the array, row and column in pixels


class StTables(Source, frozen=True):
    """``counts/NAME.tsv.gz``, ``spots/NAME_selection.tsv`` and ``images/NAME.jpg``, as in her2st.

    The table of counts has a row per spot, named ``{x}x{y}``, and a column per gene; the table of spots has
    the columns ``x``, ``y``, ``pixel_x``, ``pixel_y``. The patient is the letters that a name begins with.
    Source of her2st: Andersson et al. 2021.
    """

    def read(self, name: str) -> Section:
        """See `Source.read`."""
        table = existing(self.path, f"counts/{name}.tsv.gz", f"counts/{name}.tsv")
        barcodes, genes, counts = _tab_counts(table)
        positions = _tab_positions(existing(self.path, f"spots/{name}_selection.tsv"))
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
            pitch_um=ST_PITCH_UM,
            patient=name.rstrip("0123456789"),
        )


def _tab_counts(path: Path) -> tuple[list[str], tuple[str, ...], NDArray[np.float32]]:
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


def _tab_positions(path: Path) -> dict[str, list[float]]:
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


# --- Space Ranger --------------------------------------------------------------------------------------


class Visium(Source, frozen=True):
    """``filtered_feature_bc_matrix.h5`` and ``spatial/tissue_positions.csv``, as Space Ranger writes them.

    They lie in the folder itself, in its ``outs``, or in ``NAME`` or ``NAME/outs`` within it. The list
    without a header of Space Ranger 1 is read as well. The µm/px is computed from the 100 µm between spots.

    Attributes:
        slide: the full-resolution image that Space Ranger was given, relative to the folder; ``{name}``
            stands for the section.
        genes_by: ``"symbol"``, or ``"id"`` for Ensembl's.
    """

    slide: str | None = None
    genes_by: Literal["symbol", "id"] = "symbol"

    def read(self, name: str) -> Section:
        """See `Source.read`."""
        outs = self._outs(name, MATRIX)
        table = existing(outs, "spatial/tissue_positions.csv", "spatial/tissue_positions_list.csv")
        return self._section(name, outs / MATRIX, _csv_positions(table), VISIUM_PITCH_UM, "hexagonal")

    def _outs(self, name: str, file: str) -> Path:
        """The folder of Space Ranger's results that holds a file."""
        folder = self.path
        for outs in (folder / name / "outs", folder / name, folder / "outs", folder):
            if (outs / file).is_file():
                return outs
        raise UsageError(
            f"{folder} has no {file}, nor has {name} or outs in it; give the folder that Space Ranger wrote"
        )

    def _section(
        self, name: str, matrix: Path, positions: Positions, pitch_um: float, lattice: str
    ) -> Section:
        if self.slide is None:
            raise UsageError(
                f"{name}: Space Ranger's folder has no full-resolution image; type --slide FILE, the image "
                "that it was given, or slide = in a configuration"
            )
        barcodes, genes, counts = _read_matrix(matrix, self.genes_by)
        rows = matched(name, barcodes, positions)
        kept = [barcodes[i] for i in rows]
        where = np.array([positions[b] for b in kept], np.float64)  # [N, 4]
        return self.section(
            name,
            slide=slide_of(self.path, name, self.slide),
            genes=genes,
            counts=counts if len(rows) == len(barcodes) else counts[rows],
            barcodes=kept,
            xy_l0=where[:, :1:-1],
            array_rc=checked_positions(name, where[:, :2]).astype(np.int64),
            lattice=lattice,
            pitch_um=pitch_um,
            advice=', or genes_by = "id"' if self.genes_by == "symbol" else "",
        )


class VisiumHD(Visium, frozen=True):
    """The bins of one size, in ``binned_outputs/square_008um``; otherwise as `Visium`.

    Attributes:
        bin_um: side of the bins: Space Ranger makes bins of 2, 8 and 16 µm.
    """

    bin_um: Count = 8

    def read(self, name: str) -> Section:
        """See `Source.read`."""
        bins = f"binned_outputs/square_{self.bin_um:03}um"
        folder = self._outs(name, f"{bins}/{MATRIX}") / bins
        positions = _parquet_positions(existing(folder, "spatial/tissue_positions.parquet"))
        return self._section(name, folder / MATRIX, positions, float(self.bin_um), "square")


def _read_matrix(path: Path, genes_by: str) -> tuple[list[str], list[str], Any]:
    """Barcodes, genes and counts (CSR [N, G]) of a 10x HDF5 matrix, gene expression only."""
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


def _csv_positions(path: Path) -> Positions:
    """Positions on tissue, of a table with a header or of the list without one."""
    columns = ("barcode", *COLUMNS)
    try:
        with path.open(newline="") as file:
            given = None if file.readline().startswith("barcode") else columns
            file.seek(0)
            return {
                r["barcode"]: tuple(float(r[c]) for c in COLUMNS[1:])
                for r in csv.DictReader(file, given)
                if int(r["in_tissue"])
            }
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as exc:
        raise UsageError(f"{path} is no table of spots ({exc}); it needs {', '.join(columns)}") from exc


def _parquet_positions(path: Path) -> Positions:
    pandas = needed("pandas")
    needed("pyarrow", "type: pip install pyarrow")
    try:
        table = pandas.read_parquet(path, columns=["barcode", *COLUMNS], engine="pyarrow")
        table = table[table["in_tissue"] != 0]
        rows = table[list(COLUMNS[1:])].to_numpy(np.float64)
    except (OSError, KeyError, TypeError, ValueError) as exc:  # pyarrow's own errors are ValueErrors
        raise UsageError(
            f"{path} is no table of bins ({str(exc).splitlines()[0]}); it needs barcode, {', '.join(COLUMNS)}"
        ) from exc
    return dict(zip(table["barcode"].astype(str), map(tuple, rows.tolist()), strict=True))
