"""Pairs of patch and measured expression from tissue sections, and the batches to train on.

Every epoch has an order of its own, which depends on the seed and the epoch's number only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seal_extract.errors import UsageError
from seal_extract.patches.grid import PatchGrid, level_to_read
from seal_extract.patches.reader import open_patch_reader
from seal_extract.patches.stream import stream_batches
from seal_extract.slides.patch_files import SAME_MPP, open_patches
from seal_extract.slides.slide import open_slide
from seal_extract.train.sections import Expression, Section

READ = 64  # patches at a time
REGION = 9  # a patch and its eight neighbours
REACH = 1.6  # times the pitch: the diagonal of a square lattice is 1.41, its next ring 2
Patches = NDArray[np.uint8]  # [N, 3, S, S], RGB
CutPatches = tuple[NDArray[Any], NDArray[np.int64], NDArray[np.float64]]  # patches, rows, centres in µm
Cut = Callable[[Section, int, float], CutPatches]


@dataclass(frozen=True, repr=False)
class Pairs:
    """N pairs, row by row.

    Attributes:
        patches: uint8 [N, 3, S, S], RGB, centred on the spots.
        expression: float32 [N, G], log1p of the panel.
        section: int64 [N], position of each row's section in ``names``.
        names: of the sections.
        patients: of the sections.
        panel: the genes of the columns.
        xy_um: float64 [N, 2], centres in µm within the section.
        row: int64 [N], of each spot in its section.
        embeddings: float32 [N, E] of another model, if all sections have some.
    """

    patches: Patches
    expression: Expression
    section: NDArray[np.int64]
    names: tuple[str, ...]
    patients: tuple[str, ...]
    panel: tuple[str, ...]
    xy_um: NDArray[np.float64]
    row: NDArray[np.int64]
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
    cut: Cut | None = None,
) -> Pairs:
    """Cut a patch around every spot, and take the panel's expression there.

    Warns about a slide coarser than ``mpp``, whose patches are upsampled, and about spots that are left out
    because their patch would leave the slide.

    Args:
        sections: all patches go into memory: 150 kB per spot at 224 px.
        panel: genes, in the order of the columns.
        patch_px: side of the patches.
        mpp: µm/px of the patches.
        smooth: whether half of each spot's expression is the mean of its neighbours'.
        cut: gives the patches of a section, the rows of their spots, and their centres in µm; by default out
            of its slide.

    Raises:
        UsageError: no patch lies inside a slide; a gene that a section lacks.
        SlideError: a slide that cannot be opened or read.
    """
    patches, rows, expression, xy_um, embeddings = [], [], [], [], []
    for section in sections:
        values = section.log1p(panel)
        values = section.smoothed(values) if smooth else values
        by_default = _precut_patches if section.slide.suffix == ".h5" else _cut_patches
        images, kept, centres = (cut or by_default)(section, patch_px, mpp)
        patches.append(images)
        rows.append(kept)
        expression.append(values[kept])
        xy_um.append(centres)
        if section.embeddings is not None:
            embeddings.append(section.embeddings[kept])
    return Pairs(
        patches=np.concatenate(patches),
        expression=np.concatenate(expression),
        section=np.repeat(np.arange(len(rows)), [len(kept) for kept in rows]),
        names=tuple(s.name for s in sections),
        patients=tuple(s.patient for s in sections),
        panel=tuple(panel),
        xy_um=np.concatenate(xy_um),
        row=np.concatenate(rows),
        embeddings=np.concatenate(embeddings) if len(embeddings) == len(rows) else None,
    )


def _cut_patches(section: Section, patch_px: int, mpp: float) -> CutPatches:
    """The patches that lie inside the slide."""
    with open_slide(section.slide, mpp=section.mpp) as slide:
        if mpp < slide.mpp * 0.99:
            warnings.warn(
                f"{section.name}: patches at {mpp:g} µm/px are enlarged from the slide's {slide.mpp:.4g}",
                stacklevel=3,
            )
        size_l0 = max(1, round(patch_px * mpp / slide.mpp))
        where = (slide.path.name, slide.size_l0, "their positions have to be in its pixels")
        corners, rows = corners_inside(section, section.xy_l0, size_l0, *where)
        level, read_px = level_to_read(slide, patch_px, size_l0)
        grid = PatchGrid(corners, patch_px, mpp, size_l0, 0, level, read_px, "spots")
        reader = open_patch_reader(slide, grid, torch.device("cpu"))
        batches = [batch.patches.numpy() for batch in stream_batches([reader], READ)]
        return np.concatenate(batches), rows, section.xy_l0[rows] * slide.mpp


def corners_inside(
    section: Section, xy: NDArray[np.float64], size: int, place: str, size_px: tuple[int, int], advice: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The corners of the patches around spots that lie inside a picture, int64 [M, 2], and their rows [M].

    Warns about those that do not.

    Raises:
        UsageError: none does; the message ends with ``advice``.
    """
    corners = np.round(xy - size / 2).astype(np.int64)
    inside = ((corners >= 0) & (corners + size <= np.array(size_px))).all(1)
    if not inside.any():
        raise UsageError(
            f"{section.name}: all {len(section)} spots lie outside {place} of {size_px[0]} x {size_px[1]} "
            f"px; {advice}"
        )
    if not inside.all():
        warnings.warn(
            f"{section.name}: {(~inside).sum()} of {len(section)} spots are left out, as their patches "
            f"would leave {place}",
            stacklevel=4,
        )
    return corners[inside], np.flatnonzero(inside)


def _precut_patches(section: Section, patch_px: int, mpp: float) -> CutPatches:
    """As `_cut_patches`, of patches that a file holds already, by the barcodes of the spots."""
    try:
        file = open_patches(section.slide, slide_mpp=section.mpp)
    except UsageError as exc:  # no file states their µm/px
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
    centres = section.xy_l0[rows] * file.slide_mpp
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), rows, centres


# --- batches ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainBatch:
    """B pairs.

    Attributes:
        patches: uint8 [B, 3, S, S].
        expression: float32 [B, G], log1p of the panel.
        row: int64 [B], of each pair.
        region: int64 [B], which region of the batch each pair belongs to; None without regions.
        embedding: float32 [B, E], of another model; None where there is none.
    """

    patches: Tensor
    expression: Tensor
    row: Tensor
    region: Tensor | None = None
    embedding: Tensor | None = None

    def __len__(self) -> int:
        return len(self.row)

    def to(self, device: torch.device, *, patches: bool = True) -> TrainBatch:
        """All of it on a device, or all but the patches."""
        named = {k: v for k, v in vars(self).items() if v is not None and (patches or k != "patches")}
        moved = {name: value.to(device) for name, value in named.items()}
        return replace(self, **moved)


class Batches:
    """Batches of pairs, or of whole regions of neighbouring pairs."""

    def __init__(self, pairs: Pairs, batch_size: int, seed: int = 0, *, regions: bool = False) -> None:
        """Check that the pairs fill a batch.

        Args:
            pairs: from `make_pairs`.
            batch_size: pairs in a batch; with ``regions``, regions in a batch.
            seed: of the order.
            regions: whether batches hold regions, each a patch with its neighbours.

        Raises:
            UsageError: fewer pairs than a batch.
        """
        if not 1 < batch_size <= len(pairs):
            raise UsageError(
                f"batch_size is {batch_size}, but {', '.join(pairs.names)} have {len(pairs)} pairs; "
                f"type batch_size = {min(64, len(pairs))}"
            )
        self.pairs, self.batch_size, self.seed = pairs, batch_size, seed
        self._regions = neighbourhoods(pairs) if regions else None

    def __len__(self) -> int:
        """Batches of an epoch; pairs that do not fill a batch wait for another epoch's order."""
        return len(self.pairs) // self.batch_size

    def epoch(self, number: int, rank: int = 0, ranks: int = 1) -> Iterator[TrainBatch]:
        """The batches of an epoch, or every ``ranks``-th of them."""
        order = np.random.default_rng([self.seed, number]).permutation(len(self.pairs))
        for i in range(rank, len(self) - len(self) % ranks, ranks):
            yield self.take(order[i * self.batch_size : (i + 1) * self.batch_size])

    def whole(self) -> Iterator[TrainBatch]:
        """All pairs in order, a batch per section, for validation."""
        for section in np.unique(self.pairs.section):
            yield self.take(np.flatnonzero(self.pairs.section == section))

    def take(self, rows: NDArray[np.int64]) -> TrainBatch:
        """The pairs of some rows, or the regions around them."""
        region = None
        if self._regions is not None:
            members = self._regions[rows]  # int64 [R, 9], -1 where there is none
            kept = members >= 0
            region = torch.from_numpy(np.nonzero(kept)[0])
            rows = members[kept]
        embeddings = self.pairs.embeddings
        return TrainBatch(
            torch.from_numpy(np.ascontiguousarray(self.pairs.patches[rows])),
            torch.from_numpy(self.pairs.expression[rows]),
            torch.from_numpy(rows),
            region,
            None if embeddings is None else torch.from_numpy(embeddings[rows]),
        )


def neighbourhoods(pairs: Pairs) -> NDArray[np.int64]:
    """Each pair and the up to eight nearest pairs of the same section that touch it.

    Returns:
        int64 [N, 9], the pair itself first; -1 where a neighbour is missing.
    """
    from scipy.spatial import cKDTree

    found = np.full((len(pairs), REGION), -1, np.int64)
    for section in np.unique(pairs.section):
        rows = np.flatnonzero(pairs.section == section)
        tree = cKDTree(pairs.xy_um[rows])
        distance, nearest = tree.query(pairs.xy_um[rows], k=min(REGION, len(rows)))
        distance, nearest = distance.reshape(len(rows), -1), nearest.reshape(len(rows), -1)
        # of the nearest four: spots lie unevenly, and the nearest one alone is nearer than the pitch
        pitch = np.median(distance[:, 1:5]) if distance.shape[1] > 1 else 0.0
        near = distance <= REACH * pitch
        found[rows[:, None], np.arange(distance.shape[1])] = np.where(near, rows[nearest], -1)
    return found
