"""Patches through depth: what neighbouring planes show at one place, as pixels or as embeddings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seal_extract.encoders import Encoder
from seal_extract.errors import EncoderError, UsageError
from seal_extract.patches.grid import PatchGrid, level_to_read
from seal_extract.patches.reader import open_patch_reader
from seal_extract.patches.regions import PatchReader, RegionReader
from seal_extract.patches.resample import Resampling
from seal_extract.patches.stream import stream_batches
from seal_extract.run.embed import Embedder, Embeddings, open_embedder
from seal_extract.slides.planes import apply
from seal_extract.slides.slide import Slide
from seal_extract.train.pairs import READ, Pairs, make_pairs
from seal_extract.train.sections import Section
from seal_extract.volume.volume import Volume

CPU = torch.device("cpu")


@contextmanager
def opened(volume: Volume, plane: int) -> Iterator[Slide]:
    """A plane, open; its patches lie on the frame, whatever area its file says was scanned."""
    with volume.planes[plane].open() as slide:
        slide.bounds_l0 = (0, 0, *volume.size_px)
        yield slide


def plane_reader(
    volume: Volume, plane: int, slide: Slide, grid: PatchGrid, device: torch.device
) -> PatchReader:
    """The way to read patches of an open plane."""
    if volume.planes[plane].origin is None:
        return open_patch_reader(slide, grid, device)
    resampling = Resampling(grid.patch_px, early=device.type == "cpu")
    return RegionReader(slide, grid, resampling, "a plane of a volume")


def grid_at(slide: Slide, corners: NDArray[np.int64], size_l0: int, patch_px: int, mpp: float) -> PatchGrid:
    """Patches with these corners: int64 [N, 2]."""
    level, read_px = level_to_read(slide, patch_px, size_l0)
    return PatchGrid(corners, patch_px, mpp, size_l0, 0, level, read_px, "spots")


def embed_plane(
    volume: Volume, plane: int, slide: Slide, grid: PatchGrid, embedder: Embedder, device: torch.device
) -> Iterator[Embeddings]:
    """Embeddings of the patches of an open plane, batch by batch: float32 [B, D].

    Raises:
        ReadError: a patch cannot be read.
        EncoderError: an embedding is no number.
    """
    reader = plane_reader(volume, plane, slide, grid, device)
    for batch in stream_batches([reader], embedder.batch_size, device=device):
        embeddings = embedder.submit(batch.patches)()
        if not np.isfinite(embeddings).all():
            name = volume.planes[plane].name
            raise EncoderError(f"{volume.path}: an embedding of {name} holds NaN; try another encoder")
        yield embeddings


def depth_pairs(
    places: Sequence[tuple[Volume, Section]],
    panel: Sequence[str],
    planes: int,
    patch_px: int,
    mpp: float,
    *,
    smooth: bool = False,
    encoder: Encoder | None = None,
) -> Pairs:
    """Cut patches through depth around every spot, and take the panel's expression there.

    Warns about spots that are left out because their patches would leave the volume.

    Args:
        places: sections with expression, each in its volume by its name; all patches go into memory.
        panel: genes, in the order of the columns.
        planes: of each patch, odd.
        patch_px: side of the patches.
        mpp: µm/px of the patches.
        smooth: whether half of each spot's expression is the mean of its neighbours'.
        encoder: embeds the patches, which are not kept then.

    Returns:
        Pairs with ``patches`` uint8 [N, k, 3, S, S]; or with ``embeddings`` float32 [N, k, D].

    Raises:
        UsageError: a section that is none of the volume, or all of whose spots lie outside it; a gene that a
            section lacks.
        SlideError: a plane that cannot be opened or read.
    """
    parts = []
    for volume, section in places:
        if section.name not in volume.sections:
            names = ", ".join(volume.sections) or "none"
            raise UsageError(f"{section.name} lies outside {volume.path}, whose sections are: {names}")
        plane, to_frame = volume.sections[section.name]
        expression = section.log1p(panel)
        expression = section.smoothed(expression) if smooth else expression
        size_l0 = max(1, round(patch_px * mpp / volume.mpp))
        xy = apply(to_frame, section.xy_l0)
        corners = np.round(xy - size_l0 / 2).astype(np.int64)
        rows = np.flatnonzero(((corners >= 0) & (corners + size_l0 <= np.array(volume.size_px))).all(1))
        _tell_left_out(volume, section, len(rows))
        seen = {
            i: _see(volume, i, corners[rows], size_l0, patch_px, mpp, encoder)
            for i in sorted(set(volume.around(plane, planes)))
        }
        deep = np.stack([seen[i] for i in volume.around(plane, planes)], axis=1)
        parts.append((section, deep, expression[rows], xy[rows] * volume.mpp, rows))
    patches = np.concatenate([part[1] for part in parts])
    return Pairs(
        patches=patches if encoder is None else np.empty((len(patches), 0, patch_px), np.uint8),
        expression=np.concatenate([part[2] for part in parts]),
        section=np.repeat(np.arange(len(parts)), [len(part[1]) for part in parts]),
        names=tuple(s.name for _, s in places),
        patients=tuple(s.patient for _, s in places),
        panel=tuple(panel),
        xy_um=np.concatenate([part[3] for part in parts]),
        row=np.concatenate([part[4] for part in parts]),
        embeddings=None if encoder is None else patches,
    )


def flat_pairs(
    sections: Sequence[Section],
    panel: Sequence[str],
    patch_px: int,
    mpp: float,
    *,
    smooth: bool = False,
    encoder: Encoder | None = None,
) -> Pairs:
    """`make_pairs` of sections by themselves, as patches of one plane; see `depth_pairs`."""
    pairs = make_pairs(sections, panel, patch_px, mpp, smooth=smooth)
    patches, embeddings = pairs.patches[:, None], None
    if encoder is not None:
        embedder = open_embedder(encoder, patch_px)
        parts = torch.split(torch.from_numpy(pairs.patches), READ)
        embeddings = np.concatenate([embedder.submit(part.to(encoder.device))() for part in parts])[:, None]
        embedder.close()
        patches = np.empty((len(pairs), 0, patch_px), np.uint8)
    return Pairs(**(vars(pairs) | {"patches": patches, "embeddings": embeddings}))


def _tell_left_out(volume: Volume, section: Section, kept: int) -> None:
    where = f"{section.name}: {len(section) - kept} of {len(section)} spots"
    if not kept:
        raise UsageError(
            f"{where} lie outside {volume.path} of {volume.size_px[0]} x {volume.size_px[1]} px; check its "
            "transform, which takes the section's level-0 pixels to those of the volume"
        )
    if kept < len(section):
        warnings.warn(f"{where} are left out, as their patches would leave the volume", stacklevel=3)


def _see(
    volume: Volume,
    plane: int,
    corners: NDArray[np.int64],
    size_l0: int,
    patch_px: int,
    mpp: float,
    encoder: Encoder | None,
) -> NDArray[Any]:
    """Patches of one plane, uint8 [N, 3, S, S]; or their embeddings, float32 [N, D]."""
    with opened(volume, plane) as slide:
        grid = grid_at(slide, corners, size_l0, patch_px, mpp)
        if encoder is None:
            reader = plane_reader(volume, plane, slide, grid, CPU)
            return np.concatenate([batch.patches.numpy() for batch in stream_batches([reader], READ)])
        embedder = open_embedder(encoder, patch_px)
        try:
            return np.concatenate(list(embed_plane(volume, plane, slide, grid, embedder, encoder.device)))
        finally:
            embedder.close()
