"""An index for millions of patches: FAISS inverted files on the disk, in shards.

Embeddings are put into cells around centres and kept in 8 bits a number: a patch takes D + 8 bytes. A search
looks into some cells of each shard, reads the rows of the best candidates from the features files, and ranks
them by their true cosine. Shards are mapped from the disk, so that neither building nor searching needs more
memory than one of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import OutputError, UsageError
from seal_extract.features.store import SlideFeatures
from seal_extract.genes.faiss_cells import import_faiss, read_cells
from seal_extract.genes.faiss_manifest import Changes, Entry, Manifest, read_manifest, shard_path
from seal_extract.genes.faiss_update import bring_up_to_date, with_patches
from seal_extract.genes.index import (
    Best,
    Hits,
    Rows,
    as_hits,
    check_one_encoder,
    check_queries,
    check_query,
    exact_scores,
    places_of,
    rows_to_skip,
    unit,
)
from seal_extract.genes.search import Found

PROBES = 48  # cells looked into, of each shard
WHOLE_ROWS = 100_000  # an index of no more is looked at whole, in some 20 ms
MORE_CANDIDATES = 10  # rows read again beside half as many more as are asked for


@dataclass(frozen=True)
class _Shard:
    """One file of the index.

    Attributes:
        index: FAISS's.
        starts: first row of each slide in it, ascending, int64 [E].
        place: of that slide in `FaissIndex.slides`, -1 if it is not searched, int32 [E].
    """

    index: Any
    starts: NDArray[np.int64]
    place: NDArray[np.int32]

    @classmethod
    def of(cls, index: Any, entries: Sequence[Entry], place: dict[str, int]) -> _Shard:
        places = [-1 if entry.dropped else place.get(entry.path, -1) for entry in entries]
        return cls(index, np.array([entry.start for entry in entries], np.int64), np.array(places, np.int32))

    def shown(self, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of its slides are among those chosen, bool [E]; ``chosen`` is bool [slides]."""
        return np.append(chosen, False)[self.place]

    @property
    def rows(self) -> NDArray[np.int64]:
        """Rows of each slide in it, int64 [E]."""
        return np.diff(np.append(self.starts, self.index.ntotal))

    def named(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Slide and row there of rows here."""
        entry = np.searchsorted(self.starts, rows, side="right") - 1
        return self.place[entry], rows - self.starts[entry]


class FaissIndex:
    """A folder on the disk; made by `build`, opened by `open_index`.

    Attributes:
        folder: with the shards and the list of slides.
        slides: those that are searched.
        changes: what `build` did; None for an index that was only opened.
    """

    def __init__(
        self,
        folder: Path,
        slides: Sequence[SlideFeatures],
        manifest: Manifest,
        changes: Changes | None = None,
    ) -> None:
        """Open the shards.

        Raises:
            OutputError: one is damaged or gone.
            UsageError: FAISS is not installed.
        """
        self.folder, self.slides, self.changes = folder, tuple(slides), changes
        self._dim = self.slides[0].dim
        entries = {entry.path: entry for entry in manifest.entries if not entry.dropped}
        place = {str(slide.path.resolve()): i for i, slide in enumerate(self.slides)}
        self._entries = [entries[path] for path in place]
        self._shards = []
        for number, size in manifest.sizes.items():
            there = manifest.of(number)
            index = read_cells(shard_path(folder, number), size)
            if index is None or index.ntotal != sum(entry.rows for entry in there) or index.d != self._dim:
                raise OutputError(
                    f"{shard_path(folder, number)} is damaged or gone; type --index build to make it again"
                )
            self._shards.append(_Shard.of(index, there, place))

    def __repr__(self) -> str:
        rows = sum(len(slide.grid) for slide in self.slides)
        return f"FaissIndex({len(self.slides)} slides, {rows:,} patches, {self.folder.name})"

    def search(self, query: NDArray[np.floating], k: int, *, skip: Found | None = None) -> list[Found]:
        """As `ExactIndex.search`, with the same scores, but some of the best may be missed.

        Raises:
            UsageError: as there.
            OutputError: a features file is gone.
        """
        queries = check_query(query, self._dim)[None]
        return self.search_many(queries, k, skip=() if skip is None else (skip,)).of(0)

    def search_many(
        self,
        queries: NDArray[np.floating],
        k: int,
        *,
        among: Collection[str] | None = None,
        skip: Sequence[Found] = (),
    ) -> Hits:
        """As `ExactIndex.search_many`, with the same scores, but some of the best may be missed.

        Where only some of the rows are looked for, more cells are looked into.

        Raises:
            UsageError: as there.
            OutputError: a features file is gone.
        """
        wanted = check_queries(queries, self._dim, k)
        chosen = np.zeros(len(self.slides), bool)
        chosen[places_of(self.slides, among)] = True
        left_out = rows_to_skip(self.slides, skip)
        gone = sum(map(len, left_out.values()))
        candidates = k + k // 2 + MORE_CANDIDATES + gone
        rough = [Best(candidates) for _ in wanted]
        for scores, slide, row in self._candidates(unit(wanted), candidates, chosen):
            for q, one in enumerate(rough):
                real = slide[q] >= 0
                one.add(scores[q][real], slide[q][real], row[q][real])
        return as_hits(
            self.slides, [self._ranked(q, one, k, left_out) for q, one in zip(wanted, rough, strict=True)]
        )

    def _candidates(
        self, queries: Rows, count: int, chosen: NDArray[np.bool_]
    ) -> list[tuple[Rows, NDArray[np.int32], NDArray[np.int64]]]:
        """From each shard, scores of rounded rows, slides (-1 where there is none) and rows, [Q, count]."""
        shown = [shard.shown(chosen) for shard in self._shards]
        looked_for = [int(shard.rows[some].sum()) for shard, some in zip(self._shards, shown, strict=True)]
        rows_held = sum(shard.index.ntotal for shard in self._shards)
        found, cells = [], None
        for shard, some, there in zip(self._shards, shown, looked_for, strict=True):
            if not there:
                continue
            index, wanted = shard.index, min(count, there)
            index.parallel_mode = int(len(queries) == 1)  # 1: threads share the cells of a query
            index.nprobe = _probes(index.nlist, rows_held, sum(looked_for), count)
            if some.all():
                if cells is None:  # the centres are the same in each shard
                    cells = index.quantizer.search(queries, index.nprobe)
                scores, rows = index.search_preassigned(queries, wanted, cells[1], cells[0])
            else:
                scores, rows = index.search(queries, wanted, params=_only(np.repeat(some, shard.rows), index))
            slide, row = shard.named(rows)
            found.append((scores, np.where(rows >= 0, slide, -1), row))
        return found

    def _ranked(self, query: Rows, rough: Best, k: int, left_out: dict[int, list[int]]) -> Best:
        """The best of some candidates by their true scores."""
        best = Best(k)
        for place in np.unique(rough.slide).tolist():
            rows = np.setdiff1d(rough.row[rough.slide == place], left_out.get(place, []))
            slide, rows = self.slides[place], rows.astype(np.int64)
            entry = self._entries[place]
            values = entry.places.read(slide, rows, entry.state)
            usable = np.isfinite(values).all(1)
            rows, values = rows[usable], values[usable]
            best.add(exact_scores(values, query), np.full(len(rows), place, np.int32), rows)
        return best


def _probes(cells: int, rows: int, looked_for: int, candidates: int) -> int:
    """How many cells to look into, where some of the rows in all shards are looked for."""
    if rows <= WHOLE_ROWS:
        return cells
    some = max(PROBES * rows, 4 * candidates * cells)  # four times as many as are wanted, or more
    return min(cells, -(-some // looked_for))


def _only(rows: NDArray[np.bool_], index: Any) -> Any:
    """Parameters of a search among some rows, bool [rows]."""
    faiss = import_faiss()
    chosen = faiss.IDSelectorBitmap(np.packbits(rows, bitorder="little"))
    return faiss.SearchParametersIVF(nprobe=index.nprobe, sel=chosen)


def index_folder(slides: Sequence[SlideFeatures]) -> Path:
    """Where the index of a run lies: ``index_ENCODER`` beside the folder of its features."""
    first = slides[0]
    return first.path.parent.parent / f"index_{first.provenance['encoder']['name']}"


def build(slides: Sequence[SlideFeatures], folder: Path) -> FaissIndex:
    """Make the index, or bring it up to date: new slides are added, those that changed or vanished dropped.

    A file of rows is made again where it is damaged or more than half of it is dropped, and all of them where
    the cohort has grown to several times what its cells were found for.

    Args:
        slides: features of one encoder: all that shall be in the index.
        folder: made if need be; another encoder's index in it is an error.

    Raises:
        UsageError: several encoders, no patches, or FAISS is not installed.
        OutputError: the folder holds another encoder's index or something else, or cannot be written; or a
            features file cannot be read.
    """
    key = check_one_encoder(slides)
    import_faiss()
    manifest, changes = bring_up_to_date(slides, folder, key)
    return FaissIndex(folder, list(with_patches(slides).values()), manifest, changes)


def open_index(slides: Sequence[SlideFeatures], folder: Path) -> FaissIndex:
    """Open an index that holds these slides as they now are; others that it holds are not searched.

    Raises:
        UsageError: it does not; or FAISS is not installed.
        OutputError: it is another encoder's, or damaged.
    """
    key = check_one_encoder(slides)
    import_faiss()
    manifest = read_manifest(folder, key)
    if manifest is None:
        raise UsageError(f"there is no index in {folder}; type --index build")
    now = with_patches(slides)
    manifest = manifest.held_to(now)
    missing = len(set(now) - manifest.held)
    if missing or not now:
        raise UsageError(
            f"{missing} slides have come or changed since {folder} was made; type --index build "
            "to bring it up to date"
            if now
            else "these slides have no patches to search; choose others"
        )
    return FaissIndex(folder, list(now.values()), manifest)
