"""Patient-level embeddings: one bag of all patches (early fusion), or the mean of the slides' (late fusion).

    features     float32 [1, D'] as of a slide, which Patho-Bench reads as ``pooled_embeddings_dir``
    coords       int64 [N, 2] of a bag: the patches of the slides one after another, in level-0 pixels of each
    slide        int32 [N] of a bag: the slide of each patch, by its place in ``bag`` of the provenance
    attention    float32 [C, N] of a bag, over all its patches; scores and probabilities as of a slide

Slides are taken in the order of their names: the order of a table changes nothing. As in Patho-Bench, slides
of other ``patch_size_level0`` do not become one bag.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError
from seal_extract.features.feature_file import write_described
from seal_extract.features.store import SlideFeatures
from seal_extract.hdf5 import checked
from seal_extract.pooling.slide_level import (
    Pooled,
    Pooling,
    SlideLevel,
    check_features,
    finished_by,
    pool_rows,
    read_embedding,
    unreadable_rows,
    write_pooled,
)

EARLY, LATE = FUSIONS = ("early", "late")
PATIENT_LEVEL = 1  # raised whenever the same request gives other numbers than before


@dataclass(frozen=True)
class PatientLevel:
    """The embedding of one patient, in the file that holds it.

    Attributes:
        path: the HDF5 file.
        provenance: the fusion, the pooling, and the slides.
        finished_before: whether there was nothing to do.
    """

    path: Path
    provenance: dict[str, Any]
    finished_before: bool = False

    @cached_property
    def features(self) -> NDArray[np.float32]:
        """float32 [D'], or [C, D'] where each class has its own attention."""
        return read_embedding(self.path)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.features.shape))
        count = len(self.provenance["slides"])
        return (
            f"PatientLevel({self.path.name}: {shape}, {self.provenance['fusion']} fusion of {count} slides)"
        )


def fuse_early(
    patient: str,
    slides: Sequence[SlideFeatures],
    pooling: Pooling,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> PatientLevel:
    """Pool the patches of all slides of a patient as one bag, unless the same request did before.

    Args:
        patient: its name, for the file and messages.
        slides: at least one with patches; those without have no part in the bag.
        pooling: from `open_pooling`.
        path: the file.
        overwrite: replace a file that something else made.

    Raises:
        UsageError: there are no patches, or slides of different encoders or sizes of patches.
        OutputError: features cannot be read, or the file exists and was made by another request.
        CheckpointError: the model's scores are not finite.
    """
    slides = sorted(slides, key=lambda slide: slide.path.stem)
    bag = [slide for slide in slides if len(slide.grid) > len(unreadable_rows(slide))]
    if not bag:
        raise UsageError(f"patient {patient} has no patches, so that there is nothing to pool")
    check_same(patient, bag)
    check_features(pooling, bag[0].dim, bag[0].provenance["encoder"]["name"])
    left_out = [unreadable_rows(slide).tolist() for slide in bag]
    request = {
        "patient_level": PATIENT_LEVEL,
        "fusion": EARLY,
        "pooling": pooling.identity,
        "slides": [slide.provenance["request"] for slide in bag],
        "left_out": left_out,
    }
    path, grid, row = Path(path), bag[0].grid, pooling.made_for
    found = None if overwrite else finished_by(path, request, _UNDO)
    if found is not None:
        return PatientLevel(path, found, finished_before=True)
    pooled = pool_rows(bag, pooling)
    provenance = {
        "request": request,
        **_facts(patient, EARLY, [slide.path.stem for slide in slides]),
        "bag": [slide.path.stem for slide in bag],
        "pooling": {"name": pooling.name, **pooling.identity, **pooling.facts},
        "mismatch": None if row is None else row.mismatch(grid.patch_px, grid.mpp),
    }
    counts = [len(slide.grid) for slide in bag]

    def describe(file: h5py.File) -> None:
        xy = np.concatenate([slide.grid.xy_l0 for slide in bag])
        coords = file.create_dataset("coords", data=xy, **checked(xy))
        coords.attrs.update(patch_size=grid.patch_px, patch_size_level0=grid.patch_size_l0)
        of_slide = np.repeat(np.arange(len(bag), dtype=np.int32), counts)
        file.create_dataset("slide", data=of_slide, **checked(of_slide))
        write_pooled(file, patient, pooled)

    write_described(path, provenance, describe)
    return PatientLevel(path, provenance)


def fuse_late(
    patient: str, slides: Sequence[SlideLevel], path: str | os.PathLike[str], *, overwrite: bool = False
) -> PatientLevel:
    """Write the mean of the embeddings of a patient's slides, unless the same request did before.

    Args:
        patient: its name, for the file and messages.
        slides: from `pool_slide`, all with one pooling; at least one.
        path: the file.
        overwrite: replace a file that something else made.

    Raises:
        UsageError: there are no slides, or they were pooled in different ways.
        OutputError: a file cannot be read, or exists and was made by another request.
    """
    slides = sorted(slides, key=lambda slide: slide.path.stem)
    if not slides:
        raise UsageError(f"patient {patient} has no patches, so that there is nothing to pool")
    poolings = {str(slide.provenance["request"]["pooling"]) for slide in slides}
    if len(poolings) > 1:
        raise UsageError(f"the slides of patient {patient} were pooled in {len(poolings)} ways; give one")
    request = {
        "patient_level": PATIENT_LEVEL,
        "fusion": LATE,
        "slides": [slide.provenance["request"] for slide in slides],
        "left_out": [slide.provenance["left_out"] for slide in slides],
    }
    path = Path(path)
    found = None if overwrite else finished_by(path, request, _UNDO)
    if found is not None:
        return PatientLevel(path, found, finished_before=True)
    provenance = {
        "request": request,
        **_facts(patient, LATE, [slide.path.stem for slide in slides]),
        "pooling": slides[0].provenance["pooling"],
    }
    mean = np.stack([slide.features for slide in slides]).mean(0, np.float64).astype(np.float32)
    write_described(path, provenance, lambda file: write_pooled(file, patient, Pooled(mean)))
    return PatientLevel(path, provenance)


_UNDO = "delete it if slides of the patient were added or changed, or type --overwrite"


def _facts(patient: str, fusion: str, slides: Sequence[str]) -> dict[str, Any]:
    written = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"patient": patient, "fusion": fusion, "slides": slides, "written": written}


def check_same(patient: str, bag: Sequence[SlideFeatures]) -> None:
    """Refuse slides whose patches cannot be one bag, as Patho-Bench does."""

    def facts(slide: SlideFeatures) -> dict[str, Any]:
        grid, encoder = slide.grid, slide.provenance["encoder"]["name"]
        return {
            "patch_size_level0": grid.patch_size_l0,
            "encoder": encoder,
            "weights": slide.provenance["request"].get("encoder"),
            "patches": f"{grid.patch_px} px at {grid.mpp:g} µm/px",
        }

    first = facts(bag[0])
    for slide in bag[1:]:
        other = facts(slide)
        for name in first:
            if first[name] != other[name]:
                values = "" if name == "weights" else f" ({first[name]} and {other[name]})"
                raise UsageError(
                    f"slides {bag[0].path.stem} and {slide.path.stem} of patient {patient} differ in "
                    f"{name}{values} and cannot be one bag; type --patient-level late"
                )
