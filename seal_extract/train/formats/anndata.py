"""AnnData files with positions in pixels of the slide, and the folders of HEST-1k, which hold such files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError
from seal_extract.slides.slide import read_metadata, stated_mpp
from seal_extract.train.config import Positive
from seal_extract.train.formats.source import (
    VISIUM_PITCH_UM,
    Lattice,
    Source,
    checked_positions,
    existing,
    lattice_of,
    needed,
    slide_of,
)
from seal_extract.train.sections import Expression, Section


class AnnData(Source, frozen=True):
    """``NAME.h5ad`` with ``obsm["spatial"]``, x and y of each spot in level-0 pixels of the slide.

    Columns ``pxl_col_in_fullres`` and ``pxl_row_in_fullres`` of ``obs`` are read where ``spatial`` is
    missing; ``array_row`` and ``array_col`` give the neighbours; spots whose ``in_tissue`` is 0 are left out.

    Attributes:
        slide: the image, relative to the folder; ``{name}`` stands for the section. The default is NAME.tif
            or another suffix of images.
        pitch_um: distance between spots, from which the µm/px is computed. Without it and without ``mpp``
            the slide's file has to state the µm/px.
        layer: of ``layers``, in place of ``X``.
        genes_column: of ``var``, in place of its index.
        lattice: ``"auto"`` recognises the lattice by rows and columns.
        obsm: key of another model's embeddings.
        patient_column: of ``obs``; default: ``patient`` where there is one.
        label_column: of ``obs``, with the class of each spot.
    """

    slide_states_mpp: ClassVar[bool] = True

    slide: str | None = None
    pitch_um: Positive | None = None
    layer: str | None = None
    genes_column: str | None = None
    lattice: Lattice = "auto"
    obsm: str | None = None
    patient_column: str | None = None
    label_column: str | None = None

    def read(self, name: str) -> Section:
        """See `Source.read`."""
        data = open_h5ad(existing(self.path, f"{name}.h5ad"), name)
        array_rc = _array_rc(name, data)
        lattice = lattice_of(name, self.lattice, array_rc)
        if self.pitch_um is not None and lattice == "none":
            raise UsageError(f"{name}: pitch_um needs array_row and array_col on a lattice; type mpp instead")
        genes, advice = data.var_names, '; or give genes_column = "..." of var with unique names'
        if self.genes_column is not None:
            genes, advice = _entry(name, data.var, "var", self.genes_column), ""
        return self.section(
            name,
            slide=slide_of(self.path, name, self.slide),
            genes=[str(gene) for gene in genes],
            counts=_counts(name, data, self.layer),
            barcodes=[str(barcode) for barcode in data.obs_names],
            xy_l0=_xy_l0(name, data),
            array_rc=array_rc,
            lattice=lattice,
            pitch_um=self.pitch_um,
            patient=None if self.patient else _patient(name, data, self.patient_column),
            advice=advice,
            embeddings=None if self.obsm is None else _embeddings(name, data, self.obsm),
            labels=None if self.label_column is None else _labels(name, data, self.label_column),
        )


class Hest(Source, frozen=True):
    """HEST-1k (Jaume et al. 2024): ``st/NAME.h5ad``, ``wsis/NAME.tif``, ``metadata/NAME.json``.

    The µm/px is ``pixel_size_um_estimated`` of the metadata; for Visium it is computed from the 100 µm
    between spots and has to agree. Without the slide, the patches of ``patches/NAME.h5`` are used. Every data
    set numbers its own patients.

    Attributes:
        lattice: ``"auto"`` recognises the lattice by rows and columns.
        obsm: key of another model's embeddings.
        label_column: of ``obs``, with the class of each spot.
    """

    lattice: Lattice = "auto"
    obsm: str | None = None
    label_column: str | None = None

    def read(self, name: str) -> Section:
        """See `Source.read`."""
        slide = existing(self.path, f"wsis/{name}.tif", f"patches/{name}.h5")
        meta = read_metadata(self.path / "metadata" / f"{name}.json")
        data = open_h5ad(existing(self.path, f"st/{name}.h5ad"), name)
        array_rc = _array_rc(name, data)
        lattice = lattice_of(name, self.lattice, array_rc)
        visium = lattice == "hexagonal" and meta.get("st_technology") in ("Visium", None)
        key, stated = stated_mpp(meta) or ("", None)
        patient, study = meta.get("patient"), meta.get("dataset_title")
        if patient is None or patient != patient or not str(patient).strip():  # pandas wrote NaN
            patient = None
        elif isinstance(study, str) and study:
            patient = f"{patient} of {study}"
        return self.section(
            name,
            slide=slide,
            genes=[str(gene) for gene in data.var_names],
            counts=_counts(name, data),
            barcodes=[str(barcode) for barcode in data.obs_names],
            xy_l0=_xy_l0(name, data),
            array_rc=array_rc,
            lattice=lattice,
            pitch_um=VISIUM_PITCH_UM if visium else None,
            patient=patient and str(patient),
            stated=None if self.mpp or stated is None else (stated, f"{key} of its metadata"),
            embeddings=None if self.obsm is None else _embeddings(name, data, self.obsm),
            labels=None if self.label_column is None else _labels(name, data, self.label_column),
        )


def open_h5ad(path: Path, name: str, *, on_tissue: bool = True) -> Any:
    """The AnnData of a file, in memory.

    Args:
        path: the file.
        name: of the sample, for messages.
        on_tissue: whether spots whose ``in_tissue`` is 0 are left out.

    Raises:
        UsageError: it cannot be read.
    """
    anndata = needed("anndata")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old files, and about names that occur twice
            data = anndata.read_h5ad(path)
            if on_tissue and "in_tissue" in data.obs:
                data = data[np.asarray(data.obs["in_tissue"]).astype(float) != 0].copy()
    except Exception as exc:  # of h5py, of anndata, of its registry of encodings: many kinds
        reason = (str(exc).splitlines() or [type(exc).__name__])[0]
        raise UsageError(f"{name}: {path} is no AnnData file that can be read: {reason}") from exc
    return data


def _counts(name: str, data: Any, layer: str | None = None) -> Any:
    """[N, G], compressed by rows if they are sparse."""
    counts = data.X if layer is None else _entry(name, data.layers, "layers", layer)
    if counts is None:
        raise UsageError(f'{name} has no X; type layer = "..." (layers: {", ".join(data.layers) or "none"})')
    return counts.tocsr() if hasattr(counts, "tocsr") else np.asarray(counts)


def _xy_l0(name: str, data: Any) -> Any:
    """Centres of the spots in level-0 pixels: [N, 2]."""
    if "spatial" in data.obsm:
        return data.obsm["spatial"]
    columns = ["pxl_col_in_fullres", "pxl_row_in_fullres"]
    if not set(columns) <= set(data.obs):
        raise UsageError(
            f'{name} has neither obsm["spatial"] nor {columns[0]} and {columns[1]} in obs; it needs x and '
            "y of each spot in pixels of the slide"
        )
    return data.obs[columns]


def _array_rc(name: str, data: Any) -> NDArray[np.int64] | None:
    """Row and column of the spots on the array: int64 [N, 2], or None."""
    if not {"array_row", "array_col"} <= set(data.obs):
        return None
    try:
        array_rc = np.asarray(data.obs[["array_row", "array_col"]], np.float64)
    except (TypeError, ValueError) as exc:
        raise UsageError(f"{name}: array_row and array_col are no numbers: {exc}") from exc
    return checked_positions(name, array_rc).round().astype(np.int64) if np.isfinite(array_rc).all() else None


def _entry(name: str, entries: Any, what: str, key: str) -> Any:
    if key not in entries:
        raise UsageError(f"{name} has no {what}[{key!r}]; it has {', '.join(map(str, entries)) or 'none'}")
    return entries[key]


def _embeddings(name: str, data: Any, key: str) -> Expression:
    table = np.asarray(_entry(name, data.obsm, "obsm", key), np.float32)
    if table.ndim != 2 or not np.isfinite(table).all():
        raise UsageError(
            f"{name}: obsm[{key!r}] is {list(table.shape)} or holds NaN; it has to be N x E finite numbers"
        )
    return table


def _labels(name: str, data: Any, column: str) -> tuple[str, ...]:
    """The class of each spot; empty where it has none."""
    found = _entry(name, data.obs, "obs", column)
    return tuple("" if missing else str(label) for label, missing in zip(found, found.isna(), strict=True))


def _patient(name: str, data: Any, column: str | None) -> str | None:
    if column is None and "patient" not in data.obs:
        return None
    found = sorted({str(p) for p in _entry(name, data.obs, "obs", column or "patient")})
    if len(found) != 1:
        raise UsageError(
            f"{name} is of {len(found)} patients, {', '.join(found[:3])}; a section is of one: split the file"
        )
    return found[0]
