"""Retrieval between images and expression: is a spot's own expression among the most similar to its image?

Source: SEAL (arXiv 2602.14177) and CLIP (arXiv 2103.00020): cosine similarity of unit vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError

KS = (1, 5, 10)


@dataclass(frozen=True)
class Ranks:
    """Ranks of the queries' own partners, in one direction.

    Attributes:
        recall: by k, the share of queries whose partner is among the first k.
        median_rank: 1 is the best.
    """

    recall: dict[int, float]
    median_rank: float


@dataclass(frozen=True)
class Retrieval:
    """Both directions within one section, and a random order.

    Attributes:
        to_expression: an image is the query, expression is ranked.
        to_image: expression is the query, images are ranked.
        chance: of a random order: recall k / N, median rank (N + 1) / 2.
    """

    to_expression: Ranks
    to_image: Ranks
    chance: Ranks


def retrieve(images: NDArray[Any], expression: NDArray[Any], ks: Sequence[int] = KS) -> Retrieval:
    """Rank the spots of one section by cosine similarity, from image to expression and back.

    Spots of equal similarity share the mean of their ranks, so that constant embeddings rank in the middle,
    not first.

    Args:
        images: [N, D], a row per spot.
        expression: [N, D], in the same space.
        ks: numbers of first results for the recall.

    Raises:
        UsageError: shapes that do not fit, NaN or infinity, or a k below 1.
    """
    a, b = np.asarray(images, np.float64), np.asarray(expression, np.float64)
    if a.shape != b.shape or a.ndim != 2 or not a.size or not ks or min(ks) < 1:
        raise UsageError(
            f"images are {list(a.shape)}, expression is {list(b.shape)}, ks are {tuple(ks)}; "
            "allowed: the same [N, D] of both, k of 1 or more"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UsageError("images or expression hold NaN or infinity; allowed: finite embeddings")
    similarity = _unit(a) @ _unit(b).T  # [N, N]
    n = len(a)
    chance = Ranks({k: min(k, n) / n for k in ks}, (n + 1) / 2)
    return Retrieval(_ranks(similarity, ks), _ranks(similarity.T, ks), chance)


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float64] = rows / np.where(length > 0, length, 1.0)
    return unit


def _ranks(similarity: NDArray[np.float64], ks: Sequence[int]) -> Ranks:
    own = np.diagonal(similarity)[:, None]
    above = (similarity > own + 1e-12).sum(1)
    equal = (np.abs(similarity - own) <= 1e-12).sum(1) - 1
    ranks = 1 + above + equal / 2  # [N]
    return Ranks({k: float((ranks <= k).mean()) for k in ks}, float(np.median(ranks)))
