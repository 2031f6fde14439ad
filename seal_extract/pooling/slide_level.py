"""Slide-level embeddings: ways to pool, and the file, which Patho-Bench reads as ``pooled_embeddings_dir``.

    features       float32 [1, D']; where each of C classes has its own, [1, C D'], class after class, and the
                   attribute ``rows`` is C
    coords         int64 [N, 2], level-0 pixels, attributes as beside patch features
    attention      float32 [C, N], softmax over the patches; attention_scores, the same before it
    probabilities  float32 [K], of each class, where the model has a classifier

A patch that could not be read has features of zeros: it is left out, its attention is 0 and its score NaN.
CLAM's ``mil`` selects one patch instead: see `TopInstance`; the dataset's attribute ``description`` says so.
Files of earlier versions have features [D'] or [C, D'] and no probabilities; they are read, and kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from seal_extract.encoders.slide_encoders import SlideEncoder
from seal_extract.errors import OutputError, UsageError
from seal_extract.features.feature_file import (
    HERE,
    PIXELS,
    PROVENANCE,
    SlideLabel,
    create_coords,
    write_described,
)
from seal_extract.features.store import SlideFeatures, read_pieces
from seal_extract.hdf5 import DAMAGED, checked, open_hdf5
from seal_extract.names import shareable
from seal_extract.patches.grid import PatchGrid
from seal_extract.run.provenance import first_difference

MEAN = "mean"
SLIDE_LEVEL = 1  # raised whenever the same request gives other numbers than before
SCORES, ATTENTION, PROBABILITIES = "attention_scores", "attention", "probabilities"
Rows = NDArray[np.float32]  # [B, D], some patches of a slide


@dataclass(frozen=True)
class Pooled:
    """The patches of a slide, pooled.

    Attributes:
        features: float32 [D'], or [C, D'] where each class has its own attention.
        scores: float32 [C, N], the output of the attention network for each patch; None without attention.
        attention: float32 [C, N], their softmax over the patches: each row sums to 1.
        probabilities: float32 [K], one per class, from the model's classifier; None without one.
        descriptions: sentences about datasets of the file, by dataset, where the name does not say enough.
    """

    features: NDArray[np.float32]
    scores: NDArray[np.float32] | None = None
    attention: NDArray[np.float32] | None = None
    probabilities: NDArray[np.float32] | None = None
    descriptions: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        rows = "" if self.attention is None else f", attention {list(self.attention.shape)}"
        return f"Pooled({list(self.features.shape)}{rows})"


class Pooling(Protocol):
    """A way to pool; `open_pooling` gives one."""

    @property
    def name(self) -> str:
        """The name that is written before the encoder's in folder names."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the numbers, as JSON: kind, and sha256 of the checkpoint."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """Further facts, as JSON."""
        ...

    @property
    def dim(self) -> int | None:
        """Width of the features that it accepts; None for any."""
        ...

    @property
    def made_for(self) -> SlideEncoder | None:
        """The features that it was trained on, where they are known."""
        ...

    def pool(self, pieces: Iterable[Rows], count: int) -> Pooled:
        """Pool the ``count`` patches of a slide, at least one, which arrive as pieces [B, D]."""
        ...


@dataclass(frozen=True)
class MeanPooling:
    """The arithmetic mean of all patches."""

    name = MEAN
    dim = None
    made_for = None

    @property
    def identity(self) -> dict[str, Any]:
        """See `Pooling.identity`."""
        return {"kind": MEAN}

    @property
    def facts(self) -> dict[str, Any]:
        """See `Pooling.facts`."""
        return {}

    def pool(self, pieces: Iterable[Rows], count: int) -> Pooled:
        """See `Pooling.pool`; summed in float64."""
        total = sum(rows.sum(0, dtype=np.float64) for rows in pieces)
        return Pooled((total / count).astype(np.float32))


def check_features(pooling: Pooling, dim: int, of: str) -> None:
    """Refuse features of another width than the model accepts, or of another encoder where that is known.

    Args:
        pooling: from `open_pooling`.
        dim: columns of the features.
        of: the name of the encoder.

    Raises:
        UsageError: width or encoder differ.
    """
    row = pooling.made_for
    if row is not None and (not row.is_of(of) or dim != row.encoder_dim):
        raise UsageError(
            f"{row.name} takes features of {row.encoder} ({row.encoder_dim} columns), these are of {of} "
            f"({dim}); make its features with: {row.command}"
        )
    if pooling.dim not in (None, dim):
        raise UsageError(
            f"the model {pooling.name} takes features of {pooling.dim} columns, those of {of} have {dim}; "
            f"give the checkpoint that was trained on {of}, or another --encoder"
        )


# --- the file -----------------------------------------------------------------------------------------


def read_embedding(path: Path) -> NDArray[np.float32]:
    """The embedding in a file of slide or patient level: float32 [D'], or [C, D'] of several attentions."""
    with open_hdf5(path) as file:
        values: NDArray[np.float32] = file[PIXELS][()]
        rows = file[PIXELS].attrs.get("rows", 1)
    return values if len(values) > 1 else values.reshape((rows, -1) if rows > 1 else -1)


@dataclass(frozen=True)
class SlideLevel:
    """The embedding of one slide, in the file that holds it.

    Attributes:
        path: the HDF5 file.
        grid: where the patches lie that were pooled.
        provenance: the pooling, and the patch features with their provenance.
        finished_before: whether `pool_slide` had nothing to do.
    """

    path: Path
    grid: PatchGrid
    provenance: dict[str, Any]
    finished_before: bool = False

    @cached_property
    def features(self) -> NDArray[np.float32]:
        """float32 [D'], or [C, D'] where each class has its own attention."""
        return read_embedding(self.path)

    @cached_property
    def attention(self) -> NDArray[np.float32] | None:
        """float32 [C, N]: each row sums to 1. None of a mean."""
        return self._read(ATTENTION)

    @cached_property
    def scores(self) -> NDArray[np.float32] | None:
        """float32 [C, N]: the attention before the softmax; NaN of patches left out. None of a mean."""
        return self._read(SCORES)

    @cached_property
    def probabilities(self) -> NDArray[np.float32] | None:
        """float32 [K]: of each class. None of a mean, of a model without classifier, and in older files."""
        return self._read(PROBABILITIES)

    @cached_property
    def is_older(self) -> bool:
        """Whether an older version wrote it, without probabilities and unreadable for Patho-Bench."""
        with open_hdf5(self.path) as file:
            return file[PIXELS].ndim == 1 or len(file[PIXELS]) > 1

    def _read(self, dataset: str) -> NDArray[np.float32] | None:
        with open_hdf5(self.path) as file:
            return file[dataset][()] if dataset in file else None

    def __repr__(self) -> str:
        kind = self.provenance["pooling"]["kind"]
        shape = " x ".join(map(str, self.features.shape))
        return f"SlideLevel({self.path.name}: {shape}, {kind} of {len(self.grid)} patches)"


def pool_slide(
    features: SlideFeatures, pooling: Pooling, path: str | os.PathLike[str], *, overwrite: bool = False
) -> SlideLevel:
    """Pool the patches of a slide and write the result, unless the same request wrote it before.

    Args:
        features: from `read_features` or `extract`.
        pooling: from `open_pooling`.
        path: the file; `Layout.slide_level` says where a run puts it.
        overwrite: replace a file that something else made.

    Raises:
        UsageError: the slide has no patches, or the model takes features of another width.
        OutputError: the features cannot be read, or the file exists and was made by another request.
        CheckpointError: the model's scores are not finite.
    """
    path, row, grid = Path(path), pooling.made_for, features.grid
    check_features(pooling, features.dim, features.provenance["encoder"]["name"])
    request = {
        "slide_level": SLIDE_LEVEL,
        "pooling": pooling.identity,
        "features": features.provenance["request"],
    }
    unreadable = unreadable_rows(features).tolist()
    if len(features.grid) == len(unreadable):
        raise UsageError(
            f"{features.path} has no patches{' that could be read' if unreadable else ''}, so that there is "
            f"nothing to pool; leave that slide out"
        )
    found = None if overwrite else _find(path, request)
    if found is not None and found.provenance["left_out"] == unreadable:
        return found
    pooled = pool_rows([features], pooling)
    provenance = {
        "request": request,
        "pooling": {"name": pooling.name, **pooling.identity, **pooling.facts},
        "mismatch": None if row is None else row.mismatch(grid.patch_px, grid.mpp),
        "left_out": unreadable,  # rows of patches that could not be read
        "patch_features": {"path": features.path.name, "provenance": shareable(features.provenance)},
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    _write(path, features, pooled, provenance)
    return SlideLevel(path, features.grid, provenance)


def read_slide_level(path: str | os.PathLike[str]) -> SlideLevel:
    """Open a file that `pool_slide` wrote.

    Raises:
        OutputError: the file does not exist, or `pool_slide` did not write it.
    """
    found = _open(Path(path))
    if found is None:
        raise OutputError(
            f"{path} is not a slide-level file of seal_extract; give OUT/.../slide_features_NAME/SLIDE.h5"
        )
    return found


def _open(path: Path) -> SlideLevel | None:
    try:
        with open_hdf5(path) as file:
            provenance = json.loads(file.attrs[PROVENANCE])
            made_by = provenance["patch_features"]["provenance"]
            return SlideLevel(path, PatchGrid(file["coords"][()], **made_by["grid"]), provenance)
    except (*DAMAGED, TypeError):
        return None


def _find(path: Path, request: dict[str, Any]) -> SlideLevel | None:
    """The file of the same request; None if there is no file."""
    undo = (
        f"move {path.parent.name} away, give the checkpoint another name, or type --overwrite, which encodes "
        f"the slide again"
    )
    if finished_by(path, request, undo) is None:
        return None
    found = read_slide_level(path)
    return replace(found, finished_before=True)


def finished_by(path: Path, request: dict[str, Any], undo: str) -> dict[str, Any] | None:
    """The provenance of a pooled file that the same request wrote; None if there is no file.

    Args:
        path: the file.
        request: what is asked for now.
        undo: what to type if something else made the file.

    Raises:
        OutputError: another request or another tool made it.
    """
    if not path.exists():
        return None
    try:
        with open_hdf5(path) as file:
            provenance: dict[str, Any] = json.loads(file.attrs[PROVENANCE])
            before = provenance["request"]
    except (*DAMAGED, TypeError) as exc:
        raise OutputError(f"{path} exists and is not ours; move it away, or type --overwrite") from exc
    difference = first_difference(before, json.loads(json.dumps(request)))
    if difference is not None:
        raise OutputError(f"{path} exists, made with another request ({difference}); {undo}")
    return provenance


# --- rows in, file out ------------------------------------------------------------------------------


def unreadable_rows(features: SlideFeatures) -> NDArray[np.int64]:
    """The rows of patches that could not be read, whose features are zeros: int64 [M]."""
    return np.asarray([patch["row"] for patch in features.provenance["unreadable"]], np.int64)


def pool_rows(slides: Sequence[SlideFeatures], pooling: Pooling) -> Pooled:
    """Pool the patches of slides as one bag, without those that could not be read.

    Raises:
        OutputError: features cannot be read.
        CheckpointError: the model's scores are not finite.
    """
    starts = np.cumsum([0, *(len(slide.grid) for slide in slides)])
    left_out = [unreadable_rows(slide) for slide in slides]
    pieces = chain.from_iterable(map(readable_pieces, slides))
    lost = np.concatenate([rows + start for rows, start in zip(left_out, starts, strict=False)])
    try:
        pooled = pooling.pool(pieces, int(starts[-1]) - len(lost))
    except (*DAMAGED, EOFError) as exc:
        paths = " or ".join(str(slide.path) for slide in slides)
        raise OutputError(f"{paths} cannot be read ({exc}); encode that slide again") from exc
    if pooled.scores is None or pooled.attention is None or not len(lost):
        return pooled
    read = np.setdiff1d(np.arange(starts[-1]), lost)
    scores = np.full((len(pooled.scores), starts[-1]), np.nan, np.float32)
    attention = np.zeros_like(scores)
    scores[:, read], attention[:, read] = pooled.scores, pooled.attention
    return replace(pooled, scores=scores, attention=attention)


def readable_pieces(features: SlideFeatures) -> Iterator[Rows]:
    """The rows of a slide in pieces, without those of patches that could not be read.

    Raises:
        OutputError: the file is damaged, or has not a row for each patch.
    """
    left_out, start = unreadable_rows(features), 0
    for piece in read_pieces(features.path):
        skipped = left_out[(left_out >= start) & (left_out < start + len(piece))] - start
        start += len(piece)
        if start <= len(features.grid):
            yield np.delete(piece, skipped, 0) if len(skipped) else piece
    if start != len(features.grid):
        raise OutputError(
            f"{features.path} has {start} rows for {len(features.grid)} patches; encode that slide again"
        )


def _write(path: Path, features: SlideFeatures, pooled: Pooled, provenance: dict[str, Any]) -> None:
    slide = features.provenance["slide"]
    label = SlideLabel(features.path.stem, tuple(slide["size_l0"]), slide["mpp"])

    def describe(file: h5py.File) -> None:
        write_pooled(file, label.name, pooled)
        create_coords(file, label, features.grid)

    write_described(path, provenance, describe)


def write_pooled(file: h5py.File, name: str, pooled: Pooled) -> None:
    """Write what a pooling gave into an open file: one row, and what lies beside it."""
    row, rows = pooled.features.reshape(1, -1), pooled.features.size // pooled.features.shape[-1]
    file.create_dataset(PIXELS, data=row, **checked(row)).attrs.update(name=name, savetodir=HERE, rows=rows)
    beside = {ATTENTION: pooled.attention, SCORES: pooled.scores, PROBABILITIES: pooled.probabilities}
    for dataset, values in beside.items():
        if values is not None:
            file.create_dataset(dataset, data=values, fletcher32=True)
    for dataset in file.keys() & pooled.descriptions:
        file[dataset].attrs["description"] = pooled.descriptions[dataset]
