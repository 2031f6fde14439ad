"""Patches that look alike by cosine similarity, in a slide and over all files of a cohort, exactly."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seal_extract.store import read_pieces

Rows = NDArray[np.float32]


class Alike(NamedTuple):
    """A patch that looks like the one asked about.

    Attributes:
        file: which of the files, counted from 0.
        row: which of its patches.
        cosine: of the two embeddings, -1 to 1.
    """

    file: int
    row: int
    cosine: float


def alike_in_slide(features: Rows, row: int, most: int) -> list[Alike]:
    """The patches most like ``row`` of float32 [N, D], without itself, the nearest first."""
    cosine = _cosines(features, features[row])
    cosine[row] = -np.inf
    return [Alike(0, k, c) for k, c in _largest(cosine, min(most, len(features) - 1))]


def alike_in_files(query: Rows, files: Iterable[tuple[int, Path]], most: int) -> list[Alike]:
    """The patches most like an embedding, float32 [D], over many files, of which none is held in memory.

    Args:
        query: the embedding.
        files: number and path of each features file.
        most: how many to return.
    """
    found: list[Alike] = []
    for number, path in files:
        start = 0
        for piece in read_pieces(path):
            cosine = _cosines(piece.astype(np.float32, copy=False), query)
            found += [Alike(number, start + k, c) for k, c in _largest(cosine, most)]
            start += len(piece)
        found = sorted(found, key=lambda a: -a.cosine)[:most]
    return found


def _cosines(features: Rows, query: Rows) -> Rows:
    lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(query)
    return np.asarray(features @ query / np.maximum(lengths, 1e-12), np.float32)


def _largest(values: Rows, most: int) -> list[tuple[int, float]]:
    first = np.argsort(-values, kind="stable")[:most]
    return [(int(k), float(values[k])) for k in first]
