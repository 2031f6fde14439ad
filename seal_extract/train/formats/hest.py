"""Sections of HEST-1k's folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seal_extract.slides.mpp import read_metadata, stated_mpp
from seal_extract.train.formats.anndata import array_places, open_h5ad, pixel_places, section_of
from seal_extract.train.formats.matching import held_to_pitch, lattice_of, mpp_by_pitch, there
from seal_extract.train.sections import Section

VISIUM_PITCH_UM = 100.0


def read_hest(
    folder: Path,
    name: str,
    *,
    mpp: float | None = None,
    counts_are: str = "counts",
    duplicates: str = "refuse",
    lattice: str = "auto",
    obsm: str | None = None,
    patient: str | None = None,
) -> Section:
    """A section of HEST (Jaume et al. 2024): ``st/NAME.h5ad``, ``wsis/NAME.tif``, ``metadata/NAME.json``.

    µm/px is ``pixel_size_um_estimated`` of the metadata, for Visium held to 100 µm between spots; a patient
    is one of a data set, as data sets count theirs anew. Patches are cut from the slide; where it was not
    downloaded and ``patches/NAME.h5`` was, they are those.

    Args:
        folder: with those folders.
        name: of the section, such as TENX95.
        mpp: µm/px, where metadata are missing or wrong.
        counts_are: ``"counts"`` or ``"log1p"``.
        duplicates: ``"sum"`` adds genes of one name.
        lattice: ``"hexagonal"``, ``"square"``, ``"none"``; ``"auto"`` tells by rows and columns.
        obsm: key of another model's embeddings.
        patient: of all these sections.

    Raises:
        UsageError: a file is missing or malformed; a µm/px that is unknown or that the pitch contradicts.
    """
    slide = _slide(folder, name)
    meta = read_metadata(folder / "metadata" / f"{name}.json")
    data = open_h5ad(there(folder, f"st/{name}.h5ad"), name)
    array_rc = array_places(name, data)
    lattice, xy_l0 = lattice_of(name, lattice, array_rc), pixel_places(name, data)
    technology = meta.get("st_technology")
    by_pitch = None
    if array_rc is not None and lattice == "hexagonal" and technology in ("Visium", None):
        by_pitch = mpp_by_pitch(array_rc, lattice, VISIUM_PITCH_UM, xy_l0)
    key, said = stated_mpp(meta) or ("", None)
    source = "mpp" if mpp is not None or said is None else f"{key} of its metadata"
    return section_of(
        data,
        name,
        slide=slide,
        mpp=held_to_pitch(name, said if mpp is None else mpp, by_pitch, source),
        mpp_source=source if by_pitch is None else f"{VISIUM_PITCH_UM:g} µm between spots",
        patient=patient or _patient(meta) or name,
        lattice=lattice,
        counts_are=counts_are,
        duplicates=duplicates,
        obsm=obsm,
    )


def _slide(folder: Path, name: str) -> Path:
    """The slide, or the ready-cut patches where only they were downloaded."""
    return there(folder, f"wsis/{name}.tif", f"patches/{name}.h5")


def _patient(meta: dict[str, Any]) -> str | None:
    patient, study = meta.get("patient"), meta.get("dataset_title")
    if patient is None or patient != patient or not str(patient).strip():  # pandas wrote NaN
        return None
    return f"{patient} of {study}" if isinstance(study, str) and study else str(patient)
