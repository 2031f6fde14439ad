"""Patches through depth: what neighbouring planes show at one place, as pixels or as embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
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
from seal_extract.run.embed import Embedder, open_embedder
from seal_extract.slides.planes import apply
from seal_extract.slides.slide import Slide
from seal_extract.train.pairs import READ, CutPatches, Pairs, corners_inside, make_pairs
from seal_extract.train.sections import Section
from seal_extract.volume.volume import Volume

CPU = torch.device("cpu")


@contextmanager
def opened(volume: Volume, plane: int) -> Iterator[Slide]:
    """A plane, open; its patches lie on the frame, whatever area its file says was scanned."""
    with volume.planes[plane].open() as slide:
        slide.bounds_l0 = (0, 0, *volume.size_px)
        yield slide


def _reader(
    volume: Volume,
    plane: int,
    slide: Slide,
    corners: NDArray[np.int64],
    size_l0: int,
    patch: tuple[int, float],
    device: torch.device,
) -> PatchReader:
    """The way to read patches with these corners, int64 [N, 2], of an open plane."""
    level, read_px = level_to_read(slide, patch[0], size_l0)
    grid = PatchGrid(corners, *patch, size_l0, 0, level, read_px, "spots")
    if volume.planes[plane].origin is None:
        return open_patch_reader(slide, grid, device)
    resampling = Resampling(grid.patch_px, early=device.type == "cpu")
    return RegionReader(slide, grid, resampling, "a plane of a volume")


def see(
    volume: Volume,
    planes: NDArray[np.int64],
    corners: NDArray[np.int64],
    size_l0: int,
    patch: tuple[int, float],
    embedder: Embedder | None = None,
    device: torch.device = CPU,
) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """What planes show at some places, batch by batch, in the order in which files are read fastest.

    Args:
        volume: of the planes.
        planes: int64 [M], numbers.
        corners: int64 [M, 2], top-left corners of patches in the frame, inside it.
        size_l0: side of a patch in the frame.
        patch: its side in pixels, and µm/px.
        embedder: of patches; without it they are given themselves.
        device: that it computes on.

    Yields:
        rows of the places, int64 [B]; and float32 [B, D], or uint8 [B, 3, S, S].

    Raises:
        ReadError: a patch cannot be read.
        EncoderError: an embedding is no number.
    """
    together = volume.whole is not None
    order, done = np.lexsort((planes, *corners.T) if together else (*corners.T, planes)), 0
    with ExitStack() as stack:

        def readers() -> Iterator[PatchReader]:
            for plane in [0] if together else np.unique(planes):
                rows = order if together else order[planes[order] == plane]
                below = np.stack([0 * rows, together * planes[rows] * volume.size_px[1]], axis=1)
                slide = stack.enter_context((volume.whole or volume.planes[plane].open)())
                yield _reader(volume, plane, slide, corners[rows] + below, size_l0, patch, device)

        for batch in stream_batches(readers(), embedder.batch_size if embedder else READ, device=device):
            rows = order[done : done + len(batch)]
            done += len(batch)
            if embedder is None:
                yield rows, batch.patches.numpy()
                continue
            embeddings = embedder.submit(batch.patches)()
            if not np.isfinite(embeddings).all():
                names = ", ".join(volume.planes[plane].name for plane in np.unique(planes[rows]))
                raise EncoderError(f"{volume.path}: an embedding of {names} holds NaN; try another encoder")
            yield rows, embeddings


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
    volumes = iter([volume for volume, _ in places])  # in the order in which sections are cut

    def cut(section: Section, patch_px: int, mpp: float) -> CutPatches:
        return _cut_deep(next(volumes), section, planes, patch_px, mpp, encoder)

    pairs = make_pairs([section for _, section in places], panel, patch_px, mpp, smooth=smooth, cut=cut)
    return replace(pairs, embeddings=None) if encoder is None else _embedded(pairs, pairs.patches, patch_px)


def _cut_deep(
    volume: Volume, section: Section, planes: int, patch_px: int, mpp: float, encoder: Encoder | None
) -> CutPatches:
    """Patches uint8 [N, k, 3, S, S], or embeddings float32 [N, k, D]; see `make_pairs`."""
    if section.name not in volume.sections:
        names = ", ".join(volume.sections) or "none"
        raise UsageError(f"{section.name} lies outside {volume.path}, whose sections are: {names}")
    plane, to_frame = volume.sections[section.name]
    size_l0 = max(1, round(patch_px * mpp / volume.mpp))
    xy = apply(to_frame, section.xy_l0)
    advice = "check its transform, which takes the section's level-0 pixels to those of the volume"
    corners, rows = corners_inside(section, xy, size_l0, str(volume.path), volume.size_px, advice)
    # beyond the ends of the volume a plane is there several times
    numbers, at = np.unique(volume.around(plane, planes), return_inverse=True)
    everywhere = np.repeat(numbers, len(rows)), np.tile(corners, (len(numbers), 1))
    shape, dtype = (
        ((3, patch_px, patch_px), np.uint8) if encoder is None else ((encoder.spec.dim,), np.float32)
    )
    seen: NDArray[Any] = np.empty((len(everywhere[0]), *shape), dtype)
    with nullcontext() if encoder is None else closing(open_embedder(encoder, patch_px)) as embedder:
        device = CPU if encoder is None else encoder.device
        for some, values in see(volume, *everywhere, size_l0, (patch_px, mpp), embedder, device):
            seen[some] = values
    deep = seen.reshape(len(numbers), len(rows), *shape)[at].swapaxes(0, 1)
    return deep, rows, xy[rows] * volume.mpp


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
    if encoder is None:
        return replace(pairs, patches=pairs.patches[:, None], embeddings=None)
    with closing(open_embedder(encoder, patch_px)) as embedder:
        parts = torch.split(torch.from_numpy(pairs.patches), READ)
        embeddings = np.concatenate([embedder.submit(part.to(encoder.device))() for part in parts])
    return _embedded(pairs, embeddings[:, None], patch_px)


def _embedded(pairs: Pairs, embeddings: NDArray[Any], patch_px: int) -> Pairs:
    """With embeddings float32 [N, k, D] in place of the patches."""
    return replace(pairs, patches=np.empty((len(pairs), 0, patch_px), np.uint8), embeddings=embeddings)
