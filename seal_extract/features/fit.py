"""Does a feature file fit a slide encoder: the encoder, its crop, size and µm/px of patches, positions?

In a file of another tool the attribute ``encoder`` on ``features`` names the encoder, as TRIDENT writes it,
and those on ``coords`` describe the patches. Such a file does not say how the encoder cropped them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import h5py

from seal_extract.encoders.slide_encoders import SLIDE_ENCODERS, SlideEncoder, find_slide_encoder
from seal_extract.features.checks import (
    Check,
    CheckedFile,
    in_hdf5,
    is_pooled,
    mil_lab,
    patho_bench,
    read_provenance,
)


def rows_for(name: str) -> tuple[SlideEncoder, ...]:
    """The slide encoders of a name or a family such as ``feather``; none if there is no such name."""
    family = tuple(row for row in SLIDE_ENCODERS.values() if row.name.startswith(f"{name}-"))
    if name in SLIDE_ENCODERS or not family:
        row = find_slide_encoder(name)
        return () if row is None else (row,)
    return family


def fits(rows: Sequence[SlideEncoder]) -> Check:
    """Make the check of a file for one slide encoder, or for that of several which takes its encoder."""

    def check(seen: CheckedFile, file: h5py.File) -> None:
        if is_pooled(seen, file):
            return seen.short("is the embedding of a whole slide; give the features of its patches")
        made = _Made.of(file)
        row = next((row for row in rows if made.encoder and row.is_of(made.encoder)), None)
        (patho_bench if (row or rows[0]).positions else mil_lab)(seen, file)
        if row is None and (made.encoder or len(rows) > 1):
            takes = " or ".join(f"{r.encoder} ({r.encoder_dim} columns)" for r in rows)
            name = rows[0].name if len(rows) == 1 else "this slide encoder"
            return seen.short(
                f"features of {made.encoder or 'an encoder without name'}; {name} takes {takes}"
            )
        _compare(seen, row or rows[0], made)

    return in_hdf5(check)


@dataclass(frozen=True)
class _Made:
    """How the features of a file were made; None of what it does not say."""

    encoder: str | None
    patch_px: float | None
    mpp: float | None
    overlap_px: float
    input: str | None

    @classmethod
    def of(cls, file: h5py.File) -> _Made:
        ours, features, coords = read_provenance(file), file.get("features"), file.get("coords")
        if "grid" in ours:
            grid, source = ours["grid"], ours.get("features", ours)  # of an export: of the original
            recipe = source.get("request", {}).get("encoder", {}).get("input")
            recipe = recipe and recipe.partition(";")[0]
            name = source["encoder"]["name"]
            return cls(name, grid["patch_px"], grid["mpp"], grid["overlap_px"], recipe)
        attrs = coords.attrs if isinstance(coords, h5py.Dataset) else {}
        encoder = features.attrs.get("encoder") if isinstance(features, h5py.Dataset) else None
        of_clam = "patch_level" in attrs  # CLAM's patch_size is counted at that level
        magnification = _number(attrs.get("target_magnification"))
        return cls(
            None if encoder is None else str(encoder),
            None if of_clam else _number(attrs.get("patch_size")),
            10 / magnification if magnification else None,
            _number(attrs.get("overlap")) or 0.0,
            None,
        )


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _compare(seen: CheckedFile, row: SlideEncoder, made: _Made) -> None:
    if seen.dim not in (None, row.encoder_dim):
        seen.short(f"features of {seen.dim} columns; {row.name} takes {row.encoder_dim} of {row.encoder}")
    elif made.encoder is None:
        seen.warn(f"does not name its encoder; {row.name} takes {row.encoder}, which has as many columns")
    if made.patch_px is None or made.mpp is None:
        seen.warn(f"does not say how large its patches are; {row.name} takes {row.trained_at}")
    elif mismatch := row.mismatch(round(made.patch_px), made.mpp):
        seen.short(mismatch)
    if row.input and made.input not in (None, row.input):
        seen.short(f"its encoder got patches {made.input}; {row.name} takes them {row.input}")
    if row.positions and made.overlap_px:
        seen.warn(f"patches overlap by {made.overlap_px:g} px; {row.name} counts places in whole patches")
