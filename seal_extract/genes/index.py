"""Which patches of a cohort are most alike, by the cosine of their embeddings.

`ExactIndex` compares every row of every file, some thousand at a time. `FaissIndex`, in
`seal_extract.genes.faiss_index`, answers from a folder on the disk and is meant for cohorts of millions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import OutputError, UsageError
from seal_extract.features.store import SlideFeatures, read_pieces

QUERIES = 256  # scored at a time: as many columns of scores as a piece has of features

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Found:
    """A patch that a search found.

    Attributes:
        slide: features of its slide.
        row: its row in the features.
        score: score of the search; higher is better.
    """

    slide: SlideFeatures
    row: int
    score: float

    @property
    def xy_l0(self) -> tuple[int, int]:
        """Its top-left corner in level-0 pixels."""
        x, y = self.slide.grid.xy_l0[self.row].tolist()
        return x, y


@dataclass(frozen=True)
class Hits:
    """The patches that a search found, best first; patches with equal scores in the order of slides and rows.

    Attributes:
        slides: the slides that were searched.
        scores: float32 [Q, K]; -inf where a query has fewer hits than others.
        slide: position in ``slides``, int32 [Q, K]; -1 there.
        row: row of the slide's features, int64 [Q, K]; -1 there.
    """

    slides: tuple[SlideFeatures, ...]
    scores: Rows
    slide: NDArray[np.int32]
    row: NDArray[np.int64]

    def __repr__(self) -> str:
        return f"Hits({len(self.scores)} queries x {self.scores.shape[1]} patches, {len(self.slides)} slides)"

    def of(self, query: int) -> list[Found]:
        """The hits of one query, best first."""
        found = zip(self.slide[query].tolist(), self.row[query].tolist(), self.scores[query], strict=True)
        return [Found(self.slides[slide], row, float(score)) for slide, row, score in found if slide >= 0]


class Index(Protocol):
    """Finds the patches that are most like an embedding.

    Attributes:
        slides: the slides that are searched.
        dim: length of a query.
    """

    slides: tuple[SlideFeatures, ...]
    dim: int

    def search(self, query: NDArray[np.floating], k: int, *, skip: Found | None = None) -> list[Found]:
        """The ``k`` patches most like an embedding, float [D], best first; see `search_many`.

        Args:
            query: the embedding.
            k: number of patches; all if there are fewer.
            skip: a patch to leave out, such as the one that the embedding is of.
        """
        if np.shape(query) != (self.dim,):
            shape = list(np.shape(query))
            raise UsageError(f"the query is {shape}; these features have {self.dim} numbers a patch")
        return self.search_many(np.asarray(query)[None], k, skip=() if skip is None else (skip,)).of(0)

    def search_many(
        self,
        queries: NDArray[np.floating],
        k: int,
        *,
        among: Collection[str] | None = None,
        skip: Sequence[Found] = (),
    ) -> Hits:
        """The patches most like each of many embeddings.

        Rows that are not finite are never found.

        Args:
            queries: float [Q, D], finite and not 0.
            k: number of patches for each; all if there are fewer.
            among: names of the slides to search; all by default.
            skip: patches to leave out of all answers.

        Raises:
            UsageError: a query has another width, is not finite or is 0; ``k`` is below 1; or a slide of
                ``among`` is unknown.
            OutputError: a features file cannot be read.
        """
        ...


class ExactIndex(Index):
    """Compares every row at every search; only the list of files is kept in memory."""

    def __init__(
        self, slides: Sequence[SlideFeatures], *, project: Callable[[Rows], Rows] | None = None
    ) -> None:
        """Check that the slides can be compared.

        Args:
            slides: features of one encoder.
            project: maps rows, float32 [B, D], to the space of the queries; see `image_head`.

        Raises:
            UsageError: several encoders made them, or there are none.
        """
        check_one_encoder(slides)
        self.slides, self._project, self.dim = tuple(slides), project, slides[0].dim
        if project is not None:
            self.dim = project(np.zeros((1, self.dim), np.float32)).shape[1]

    def __repr__(self) -> str:
        return f"ExactIndex({len(self.slides)} slides, {sum(len(s.grid) for s in self.slides):,} patches)"

    def search_many(
        self,
        queries: NDArray[np.floating],
        k: int,
        *,
        among: Collection[str] | None = None,
        skip: Sequence[Found] = (),
    ) -> Hits:
        """See `Index.search_many`; the files are read once for all queries.

        Rows are scored in float32. Rows whose rank could depend on its rounding are scored again in float64,
        so that equal rows have equal scores wherever they lie. The memory in use is that of a piece of rows
        and of the hits.
        """
        wanted = check_queries(queries, self.dim, k)
        skipped = rows_to_skip(self.slides, skip)
        best = [TopK(k) for _ in wanted]
        for place in places_of(self.slides, among):
            start = 0
            for read in pieces(self.slides[place]):
                rows = read if self._project is None else self._project(read)
                usable = np.asarray(np.isfinite(rows).all(axis=1))
                gone = [row - start for row in skipped.get(place, ()) if start <= row < start + len(rows)]
                usable[gone] = False
                for first in range(0, len(wanted), QUERIES):
                    these = slice(first, first + QUERIES)
                    _add_piece(rows, usable, wanted[these], best[these], place, start)
                start += len(rows)
        return as_hits(self.slides, best)


def _add_piece(
    rows: Rows, usable: NDArray[np.bool_], queries: Rows, best: list[TopK], place: int, start: int
) -> None:
    """Add the best rows of a piece of a slide to the best of each query."""
    with np.errstate(invalid="ignore", over="ignore"):  # of rows that are not usable
        length = np.sqrt(np.einsum("ij,ij->i", rows, rows))
        rough = rows @ unit(queries).T  # [B, Q]
    rough[usable] /= np.where(length > 0, length, 1)[usable, None]
    rough[~usable] = -np.inf
    # sums of D products in float32 are off by less than D / 2**24 of their lengths (Higham 2002, 3.5):
    # twice for two scores that are compared, twice for the length
    slack = 4 * (rows.shape[1] + 8) * 2.0**-24
    for query, scores, one in zip(queries, rough.T, best, strict=True):
        floor = one.floor
        if len(scores) > one.k:
            floor = max(floor, float(np.partition(scores, -one.k)[-one.k]))
        chosen = np.flatnonzero((scores >= floor - slack) & usable)
        if len(chosen):
            exact = exact_scores(rows[chosen], query)
            one.add(exact, np.full(len(chosen), place, np.int32), chosen + start)


class TopK:
    """The best n patches of one query: scores float32 [n], slide int32 [n], row int64 [n], n up to ``k``."""

    def __init__(self, k: int) -> None:
        self.k, self.scores = k, np.empty(0, np.float32)
        self.slide, self.row = np.empty(0, np.int32), np.empty(0, np.int64)

    @property
    def floor(self) -> float:
        """The lowest score that can still enter."""
        return float(self.scores[-1]) if len(self.scores) == self.k else -np.inf

    def add(self, scores: Rows, slide: NDArray[np.int32], row: NDArray[np.int64]) -> None:
        """Add patches, in the order of score, slide and row."""
        scores, slide = np.concatenate([self.scores, scores]), np.concatenate([self.slide, slide])
        row = np.concatenate([self.row, row])
        order = np.lexsort((row, slide, -scores))[: self.k]
        self.scores, self.slide, self.row = scores[order], slide[order], row[order]


def as_hits(slides: tuple[SlideFeatures, ...], best: Sequence[TopK]) -> Hits:
    """The best patches of all queries side by side."""
    shape = (len(best), max((len(one.scores) for one in best), default=0))
    scores, slide = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32)
    row = np.full(shape, -1, np.int64)
    for q, one in enumerate(best):
        n = len(one.scores)
        scores[q, :n], slide[q, :n], row[q, :n] = one.scores, one.slide, one.row
    return Hits(slides, scores, slide, row)


def exact_scores(rows: Rows, query: Rows) -> Rows:
    """Cosine of rows [B, D] to a query in float64, rounded to float32 [B]; independent of other rows."""
    many, one = rows.astype(np.float64), query.astype(np.float64)
    scores = (many * one).sum(1)  # not a matrix product, whose sums depend on where a row lies
    length = np.sqrt((many * many).sum(1)) * np.sqrt((one * one).sum())
    rounded: Rows = (scores / np.where(length > 0, length, 1)).astype(np.float32)
    return rounded


# --- what can be searched -------------------------------------------------------------------------


def check_one_encoder(slides: Sequence[SlideFeatures]) -> str:
    """The `encoder_key` of the encoder that made all of these features.

    Raises:
        UsageError: several encoders made them, or there are no slides.
    """
    if not slides:
        raise UsageError("there are no slides to search; give the -o of a finished run")
    first, key = slides[0], encoder_key(slides[0])
    for slide in slides[1:]:
        if encoder_key(slide) != key:
            ours, theirs = (s.provenance["encoder"]["name"] for s in (first, slide))
            other = f"by {theirs}" if ours != theirs else f"by other weights of {theirs}"
            raise UsageError(
                f"{first.path} was made by {ours} and {slide.path} {other}; give files of one encoder"
            )
    return key


def encoder_key(slide: SlideFeatures) -> str:
    """Short hash of the encoder's name, weights and precision; embeddings of one key can be compared."""
    identity = json.dumps(slide.provenance["request"]["encoder"], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def check_queries(queries: NDArray[np.floating], dim: int, k: int) -> Rows:
    """The queries as float32 [Q, D]; see `Index.search_many` for the errors."""
    wanted = np.asarray(queries, np.float32)
    if wanted.ndim != 2 or wanted.shape[1] != dim:
        raise UsageError(f"the queries are {list(wanted.shape)}; these features have {dim} numbers a patch")
    if k < 1:
        raise UsageError(f"{k} patches were asked for; allowed: 1 or more")
    bad = np.flatnonzero(~(np.isfinite(wanted).all(1) & wanted.any(1)))
    if len(bad):
        which = "the query" if len(wanted) == 1 else f"query {bad[0]}"
        raise UsageError(f"{which} is 0 or not finite, so nothing is like it; choose another patch")
    return wanted


def places_of(slides: Sequence[SlideFeatures], names: Collection[str] | None) -> list[int]:
    """Positions of the slides with these names, in order; of all by default.

    Raises:
        UsageError: a name is not among them.
    """
    known = [slide.path.stem for slide in slides]
    for name in sorted(set(names or ()) - set(known)):
        near = get_close_matches(name, known, n=3, cutoff=0.3) or known[:1]
        raise UsageError(f"there is no slide {name} here; the nearest are {', '.join(near)}")
    return [i for i, name in enumerate(known) if names is None or name in names]


def rows_to_skip(slides: Sequence[SlideFeatures], skip: Sequence[Found]) -> dict[int, list[int]]:
    """Rows to leave out, by the position of their slide."""
    place = {slide.path.resolve(): i for i, slide in enumerate(slides)} if skip else {}
    rows: dict[int, list[int]] = {}
    for one in skip:
        if (where := place.get(one.slide.path.resolve())) is not None:
            rows.setdefault(where, []).append(one.row)
    return rows


# --- rows of features -----------------------------------------------------------------------------


def sound_slides(
    slides: Sequence[SlideFeatures],
) -> tuple[list[SlideFeatures], dict[Path, OutputError]]:
    """The slides whose rows can all be read and are finite, and an error for each of the others."""
    sound, damaged = [], {}
    for slide in slides:
        try:
            if not all(np.isfinite(rows).all() for rows in pieces(slide)):
                raise OutputError(
                    f"{slide.path} holds NaN or infinity; encode that slide again with --overwrite"
                )
            sound.append(slide)
        except OutputError as exc:
            damaged[slide.path] = exc
    return sound, damaged


def unit(rows: NDArray[np.floating]) -> Rows:
    """Rows at length 1, float32 [B, D]; rows of length 0 stay."""
    values = np.asarray(rows, np.float32)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.where(length > 0, length, 1), np.float32)


def unit_pieces(slide: SlideFeatures) -> Iterator[Rows]:
    """All rows of a slide at length 1, some thousand at a time; rows that are not finite become 0."""
    for rows in pieces(slide):
        rows[~np.isfinite(rows).all(1)] = 0
        yield unit(rows)


def pieces(slide: SlideFeatures) -> Iterator[Rows]:
    """All rows of a slide as float32, some thousand at a time; `OutputError` if the file is damaged."""
    for piece in read_pieces(slide.path):
        yield np.asarray(piece, np.float32)
