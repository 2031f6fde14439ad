"""Sections in AnnData files with places in pixels."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError
from seal_extract.train.formats.matching import (
    checked_places,
    held_to_pitch,
    lattice_of,
    mpp_by_pitch,
    named_once,
    needed,
    slide_of,
    there,
)
from seal_extract.train.sections import Expression, Section


def read_anndata(
    folder: Path,
    name: str,
    *,
    slide: str | None = None,
    mpp: float | None = None,
    pitch_um: float | None = None,
    counts_are: str = "counts",
    layer: str | None = None,
    genes_column: str | None = None,
    duplicates: str = "refuse",
    lattice: str = "auto",
    obsm: str | None = None,
    patient: str | None = None,
    patient_column: str | None = None,
) -> Section:
    """A section of ``NAME.h5ad`` with ``obsm["spatial"]``, x and y in level-0 pixels of the slide.

    Columns ``pxl_col_in_fullres`` and ``pxl_row_in_fullres`` of ``obs`` stand in for it; ``array_row`` and
    ``array_col`` give the neighbours; spots whose ``in_tissue`` is 0 are left out.

    Args:
        folder: with the file.
        name: of the section.
        slide: image, from the folder if relative, ``{name}`` being the section; by default NAME.tif or so.
        mpp: µm/px; by default that of the pitch, else of the slide's file.
        pitch_um: between spots, to hold µm/px to.
        counts_are: ``"counts"`` or ``"log1p"``.
        layer: of ``layers``, in place of ``X``.
        genes_column: of ``var``, in place of its names.
        duplicates: ``"sum"`` adds genes of one name.
        lattice: ``"hexagonal"``, ``"square"``, ``"none"``; ``"auto"`` tells by rows and columns.
        obsm: key of another model's embeddings.
        patient: of all these sections.
        patient_column: of ``obs``; by default ``patient`` where there is one, else each section is a patient.

    Raises:
        UsageError: a file or entry is missing or malformed; a µm/px that the pitch contradicts.
    """
    data = open_h5ad(there(folder, f"{name}.h5ad"), name)
    array_rc = array_places(name, data)
    lattice = lattice_of(name, lattice, array_rc)
    xy_l0 = pixel_places(name, data)
    by_pitch = None
    if pitch_um is not None:
        by_pitch = None if array_rc is None else mpp_by_pitch(array_rc, lattice, pitch_um, xy_l0)
        if by_pitch is None:
            raise UsageError(
                f"{name}: pitch_um needs array_row and array_col of 3 spots or more; type mpp instead"
            )
    return section_of(
        data,
        name,
        slide=slide_of(folder, name, slide),
        mpp=None if mpp is None and by_pitch is None else held_to_pitch(name, mpp, by_pitch),
        mpp_source="mpp" if by_pitch is None else f"{pitch_um:g} µm between spots",
        patient=patient or _patient(name, data, patient_column) or name,
        lattice=lattice,
        counts_are=counts_are,
        layer=layer,
        genes_column=genes_column,
        duplicates=duplicates,
        obsm=obsm,
    )


def open_h5ad(path: Path, name: str) -> Any:
    """The AnnData of a file, in memory, spots on tissue alone.

    Raises:
        UsageError: anndata is not installed; the file cannot be read.
    """
    anndata = needed("anndata")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old files, and of names that `named_once` looks at
            data = anndata.read_h5ad(path)
            if "in_tissue" in data.obs:
                data = data[np.asarray(data.obs["in_tissue"]).astype(float) != 0].copy()
    except Exception as exc:  # of h5py, of anndata, of its registry of encodings: many kinds
        raise UsageError(f"{name}: {path} is no AnnData file that can be read: {_first_line(exc)}") from exc
    return data


def section_of(
    data: Any,
    name: str,
    *,
    slide: Path,
    mpp: float | None,
    mpp_source: str,
    patient: str,
    lattice: str,
    counts_are: str = "counts",
    layer: str | None = None,
    genes_column: str | None = None,
    duplicates: str = "refuse",
    obsm: str | None = None,
) -> Section:
    """The record of an AnnData whose geometry is settled."""
    counts = data.X if layer is None else _entry(name, data.layers, "layers", layer)
    if counts is None:
        raise UsageError(f'{name} has no X; type layer = "..." (layers: {", ".join(data.layers) or "none"})')
    genes = data.var_names if genes_column is None else _entry(name, data.var, "var", genes_column)
    advice = '; or give genes_column = "..." of var with unique names' if genes_column is None else ""
    named, counts = named_once(name, [str(g) for g in genes], _rows(counts), duplicates, counts_are, advice)
    return Section(
        name=name,
        patient=patient,
        slide=slide,
        mpp=mpp,
        mpp_source=mpp_source,
        genes=named,
        counts=counts,
        scale=counts_are,
        xy_l0=pixel_places(name, data),
        barcodes=tuple(str(b) for b in data.obs_names),
        array_rc=None if lattice == "none" else array_places(name, data),
        lattice=lattice,
        embeddings=None if obsm is None else _embeddings(name, data, obsm),
    )


def pixel_places(name: str, data: Any) -> NDArray[np.float64]:
    """Centres of the spots in level-0 pixels: float64 [N, 2].

    Raises:
        UsageError: there are none.
    """
    if "spatial" in data.obsm:
        return checked_places(name, data.obsm["spatial"])
    columns = ["pxl_col_in_fullres", "pxl_row_in_fullres"]
    if not set(columns) <= set(data.obs):
        raise UsageError(
            f'{name} has neither obsm["spatial"] nor {columns[0]} and {columns[1]} in obs; it needs x and '
            "y of each spot in pixels of the slide"
        )
    return checked_places(name, data.obs[columns])


def array_places(name: str, data: Any) -> NDArray[np.int64] | None:
    """Row and column of the spots on the array: int64 [N, 2], or None.

    Raises:
        UsageError: they are no numbers.
    """
    if not {"array_row", "array_col"} <= set(data.obs):
        return None
    try:
        places = np.asarray(data.obs[["array_row", "array_col"]], np.float64)
    except (TypeError, ValueError) as exc:
        raise UsageError(f"{name}: array_row and array_col are no numbers: {exc}") from exc
    return checked_places(name, places).round().astype(np.int64) if np.isfinite(places).all() else None


def _rows(counts: Any) -> Any:
    """Counts as they are, by rows if sparse."""
    return counts.tocsr() if hasattr(counts, "tocsr") else np.asarray(counts)


def _entry(name: str, entries: Any, what: str, key: str) -> Any:
    if key not in entries:
        raise UsageError(f"{name} has no {what}[{key!r}]; it has {', '.join(map(str, entries)) or 'none'}")
    return entries[key]


def _embeddings(name: str, data: Any, key: str) -> Expression:
    table = np.asarray(_entry(name, data.obsm, "obsm", key), np.float32)
    if table.ndim != 2 or not np.isfinite(table).all():
        raise UsageError(
            f"{name}: obsm[{key!r}] is {list(table.shape)} or holds NaN; it has to be N x E numbers"
        )
    return table


def _patient(name: str, data: Any, column: str | None) -> str | None:
    if column is None and "patient" not in data.obs:
        return None
    found = sorted({str(p) for p in _entry(name, data.obs, "obs", column or "patient")})
    if len(found) != 1:
        raise UsageError(
            f"{name} is of {len(found)} patients, {', '.join(found[:3])}; a section is of one: split the file"
        )
    return found[0]


def _first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]
