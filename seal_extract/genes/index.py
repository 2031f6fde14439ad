"""An index over the embeddings of a cohort: which patches are most alike, by the cosine of their embeddings.

Exact by default: every row of every file is looked at, some thousand at a time. `FaissIndex`, in
`seal_extract.genes.faiss_index`, answers from a folder on the disk and is for cohorts of millions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError
from seal_extract.genes.search import Found
from seal_extract.store import SlideFeatures, read_pieces

Rows = NDArray[np.float32]


class Index(Protocol):
    """Finds the patches most alike."""

    slides: tuple[SlideFeatures, ...]

    def search(self, query: NDArray[np.floating], k: int, *, skip: Found | None = None) -> list[Found]:
        """The ``k`` patches most like ``query``, float [D]; see `ExactIndex.search`."""
        ...


class ExactIndex:
    """Looks at every row at every search; nothing is kept but the list of files.

    Attributes:
        slides: features of one encoder.
    """

    def __init__(self, slides: Sequence[SlideFeatures]) -> None:
        """Hold the slides to one encoder.

        Raises:
            UsageError: they were made by several, or there is none.
        """
        check_one_encoder(slides)
        self.slides = tuple(slides)

    def __repr__(self) -> str:
        return f"ExactIndex({len(self.slides)} slides, {sum(len(s.grid) for s in self.slides):,} patches)"

    def search(self, query: NDArray[np.floating], k: int, *, skip: Found | None = None) -> list[Found]:
        """The patches most like an embedding.

        Args:
            query: float [D], of any length but 0.
            k: how many; all if there are fewer.
            skip: a patch to leave out, such as the one that was asked with.

        Returns:
            Best first, scored by the cosine; equal ones in the order of slides and rows.

        Raises:
            UsageError: ``query`` is of another width, not finite or 0; or ``k`` is below 1.
        """
        wanted = check_query(query, self.slides[0].dim, k)
        found: list[Found] = []
        for slide in self.slides:
            pieces = [rows @ wanted for rows in unit_pieces(slide)]
            scores = np.concatenate(pieces) if pieces else np.empty(0, np.float32)
            if skip is not None and skip.slide.path == slide.path:
                scores[skip.row] = -np.inf
            chosen = np.argsort(-scores, kind="stable")[:k]
            found += [Found(slide, int(row), float(scores[row])) for row in chosen if scores[row] > -np.inf]
            found = sorted(found, key=lambda one: -one.score)[:k]
        return found


def check_one_encoder(slides: Sequence[SlideFeatures]) -> str:
    """The identity of the encoder that made all of these, as a short hash.

    Raises:
        UsageError: several did, or there are no slides.
    """
    if not slides:
        raise UsageError("there are no slides to search; give the -o of a finished run")
    first = slides[0]
    for slide in slides[1:]:
        if encoder_key(slide) != encoder_key(first):
            ours, theirs = (s.provenance["encoder"]["name"] for s in (first, slide))
            other = f"by {theirs}" if ours != theirs else f"by other weights of {theirs}"
            raise UsageError(
                f"{first.path} was made by {ours} and {slide.path} {other}; give files of one encoder"
            )
    return encoder_key(first)


def encoder_key(slide: SlideFeatures) -> str:
    """What decides whether embeddings can be compared: the encoder's name, weights and precision, hashed."""
    identity = json.dumps(slide.provenance["request"]["encoder"], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def check_query(query: NDArray[np.floating], dim: int, k: int) -> Rows:
    """The query at length 1, float32 [D].

    Raises:
        UsageError: it is of another width, not finite or 0; or ``k`` is below 1.
    """
    wanted = np.asarray(query, np.float32)
    if wanted.shape != (dim,):
        raise UsageError(f"the query is {list(wanted.shape)}; these features have {dim} numbers a patch")
    if k < 1:
        raise UsageError(f"{k} patches were asked for; allowed: 1 or more")
    if not np.isfinite(wanted).all() or not wanted.any():
        raise UsageError("the query is 0 or not finite, so nothing is like it; choose another patch")
    row: Rows = unit(wanted[None])[0]
    return row


def unit(rows: NDArray[np.floating]) -> Rows:
    """Rows at length 1, float32 [B, D]; those of length 0 stay."""
    values = np.asarray(rows, np.float32)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.where(length > 0, length, 1), np.float32)


def unit_pieces(slide: SlideFeatures) -> Iterator[Rows]:
    """All rows of a slide at length 1, some thousand at a time."""
    for piece in read_pieces(slide.path):
        yield unit(piece)
