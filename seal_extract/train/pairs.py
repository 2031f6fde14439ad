"""Patches and the expression measured where they lie, of one or many sections."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from seal_extract.errors import UsageError
from seal_extract.patches.grid import PatchGrid, level_to_read
from seal_extract.patches.stream import stream_batches
from seal_extract.patches.tiles import open_patch_reader
from seal_extract.slides.patch_files import SAME_MPP, open_patches
from seal_extract.slides.slide import Slide, open_slide
from seal_extract.train.sections import Expression, Section

READ = 64  # patches at a time


@dataclass(frozen=True, repr=False)
class Pairs:
    """What is trained on, row by row.

    Attributes:
        patches: uint8 [N, 3, S, S], RGB, centred on the spots.
        expression: float32 [N, G], log1p of the panel.
        section: int64 [N], position of each row's section in ``names``.
        names: of the sections.
        patients: of the sections.
        panel: the genes of the columns.
        xy_um: float64 [N, 2], centres in µm within the section.
        barcodes: of the spots.
        embeddings: float32 [N, E] of another model, if all sections bring some.
    """

    patches: NDArray[np.uint8]
    expression: Expression
    section: NDArray[np.int64]
    names: tuple[str, ...]
    patients: tuple[str, ...]
    panel: tuple[str, ...]
    xy_um: NDArray[np.float64]
    barcodes: tuple[str, ...]
    embeddings: Expression | None = None

    def __len__(self) -> int:
        return len(self.expression)

    def __repr__(self) -> str:
        side = self.patches.shape[-1]
        return f"Pairs({len(self)} patches of {side} px, {len(self.panel)} genes, of {', '.join(self.names)})"


def make_pairs(
    sections: Sequence[Section],
    panel: Sequence[str],
    patch_px: int = 224,
    mpp: float = 0.5,
    *,
    smooth: bool = False,
) -> Pairs:
    """Cut a patch around every spot with the package's own reader, and take the panel's expression there.

    A slide that is coarser than ``mpp`` is enlarged, and spots whose patch would leave the slide are left
    out; both are said.

    Args:
        sections: all of them go into memory: 150 kB a spot at 224 px.
        panel: genes, in the order of the columns.
        patch_px: side of the patches.
        mpp: their µm/px.
        smooth: half of each spot's expression is the mean of its true neighbours'.

    Raises:
        UsageError: no patch lies inside a slide; a gene that a section lacks.
        SlideError: a slide that cannot be opened or read.
    """
    patches: list[NDArray[np.uint8]] = []
    kept, expression, xy_um = [], [], []
    for section in sections:
        values = section.log1p(panel)
        values = section.smoothed(values) if smooth else values
        if section.slide.suffix == ".h5":
            rows, mpp_l0 = _add_ready(section, patch_px, mpp, patches)
        else:
            with open_slide(section.slide, mpp=section.mpp) as slide:
                grid, rows = _grid(slide, section, patch_px, mpp)
                patches.append(_read(slide, grid))
                mpp_l0 = slide.mpp
        xy_um.append(section.xy_l0[rows] * mpp_l0)
        kept.append(section.take(rows))
        expression.append(values[rows])
    with_table = all(s.embeddings is not None for s in kept)
    return Pairs(
        patches=np.concatenate(patches),
        expression=np.concatenate(expression),
        section=np.repeat(np.arange(len(kept)), [len(s) for s in kept]),
        names=tuple(s.name for s in kept),
        patients=tuple(s.patient for s in kept),
        panel=tuple(panel),
        xy_um=np.concatenate(xy_um),
        barcodes=tuple(b for s in kept for b in s.barcodes),
        embeddings=np.concatenate([s.embeddings for s in kept if s.embeddings is not None])
        if with_table
        else None,
    )


def _grid(slide: Slide, section: Section, patch_px: int, mpp: float) -> tuple[PatchGrid, NDArray[np.int64]]:
    """Patches around the spots, and the rows of those that lie inside the slide."""
    if mpp < slide.mpp * 0.99:
        warnings.warn(
            f"{section.name}: patches at {mpp:g} µm/px are enlarged from the slide's {slide.mpp:.4g}",
            stacklevel=3,
        )
    size_l0 = max(1, round(patch_px * mpp / slide.mpp))
    corners = np.round(section.xy_l0 - size_l0 / 2).astype(np.int64)
    inside = ((corners >= 0) & (corners + size_l0 <= np.array(slide.size_l0))).all(1)
    if not inside.any():
        raise UsageError(
            f"{section.name}: all {len(section)} spots lie outside {slide.path.name} of {slide.size_l0[0]} x "
            f"{slide.size_l0[1]} px; their places have to be in pixels of that image"
        )
    if not inside.all():
        warnings.warn(
            f"{section.name}: {(~inside).sum()} of {len(section)} spots are left out, as their patches would "
            "leave the slide",
            stacklevel=3,
        )
    level, read_px = level_to_read(slide, patch_px, size_l0)
    rows = np.flatnonzero(inside)
    return PatchGrid(corners[rows], patch_px, mpp, size_l0, 0, level, read_px, "spots"), rows


def _add_ready(
    section: Section, patch_px: int, mpp: float, patches: list[NDArray[np.uint8]]
) -> tuple[NDArray[np.int64], float]:
    """Add the ready-cut patches of spots, by barcode; gives the rows that have one, and the slide's µm/px.

    Raises:
        UsageError: they have no barcodes, or are of another size or µm/px than asked for.
    """
    try:
        file = open_patches(section.slide, slide_mpp=section.mpp)
    except UsageError as exc:  # nobody states their µm/px
        why = str(exc).split(";")[0]
        raise UsageError(f"{section.name}: {why}; download its slide, from which patches are cut") from exc
    if file.patch_px != patch_px or abs(file.mpp / mpp - 1) > SAME_MPP:
        raise UsageError(
            f"{section.name}: {file.path} holds patches of {file.patch_px} px at {file.mpp:.4g} µm/px, asked "
            f"are {patch_px} px at {mpp:.4g}; download its slide, or ask for those"
        )
    at = {barcode: i for i, barcode in enumerate(file.barcodes or ())}
    rows = np.array([i for i, barcode in enumerate(section.barcodes) if barcode in at], np.int64)
    if not len(rows):
        raise UsageError(
            f"{section.name}: {file.path} has no patch with the barcode of a spot; it has to be "
            "of this section"
        )
    if len(rows) < len(section):
        warnings.warn(
            f"{section.name}: {len(section) - len(rows)} of {len(section)} spots are left out, as they have "
            "no patch",
            stacklevel=3,
        )
    order = [at[section.barcodes[row]] for row in rows]
    images = np.concatenate(list(file.read(READ)))[order]  # uint8 [N, S, S, 3]
    patches.append(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return rows, file.slide_mpp


def _read(slide: Slide, grid: PatchGrid) -> NDArray[np.uint8]:
    decoder = open_patch_reader(slide, grid, torch.device("cpu"))
    return np.concatenate([batch.patches.numpy() for batch in stream_batches([decoder], READ)])
