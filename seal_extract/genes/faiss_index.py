"""An index for millions of patches: FAISS inverted lists on the disk.

A patch takes D + 8 bytes. A search looks into some cells of each shard, reads the rows of the best candidates
from the features files, and ranks them by their exact cosine. Shards are mapped from the disk, so that a
search needs little memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import OutputError, UsageError
from seal_extract.features.store import SlideFeatures
from seal_extract.genes.faiss_folder import (
    Entry,
    Manifest,
    import_faiss,
    read_faiss,
    read_manifest,
    shard_path,
    update_folder,
    with_patches,
)
from seal_extract.genes.index import (
    Found,
    Hits,
    Index,
    Rows,
    TopK,
    as_hits,
    check_one_encoder,
    check_queries,
    exact_scores,
    places_of,
    rows_to_skip,
    unit,
)

PROBES = 48  # cells that a search looks into, in each shard
WHOLE_ROWS = 100_000  # an index of no more rows is searched completely, in some 20 ms
MORE_CANDIDATES = 10  # rows read again beside half as many more as are asked for
FEW_QUERIES = 4  # so many queries are searched in one thread: starting more takes longer than the search


@dataclass(frozen=True)
class _Shard:
    """One shard of an open index.

    Attributes:
        index: the FAISS index.
        starts: first row of each slide in it, ascending, int64 [E].
        place: position of that slide in `FaissIndex.slides`, int32 [E]; -1 if it is not searched.
    """

    index: Any
    starts: NDArray[np.int64]
    place: NDArray[np.int32]

    @classmethod
    def of(cls, index: Any, entries: Sequence[Entry], place: dict[str, int]) -> _Shard:
        places = [-1 if entry.dropped else place.get(entry.path, -1) for entry in entries]
        return cls(index, np.array([entry.start for entry in entries], np.int64), np.array(places, np.int32))

    def chosen_rows(self, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whether each row belongs to a chosen slide, bool [rows]; ``chosen`` is bool [slides]."""
        counts = np.diff(np.append(self.starts, self.index.ntotal))
        return np.repeat(np.append(chosen, False)[self.place], counts)

    def located(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Position of the slide, and row of that slide, for rows of the shard; -1 for row -1."""
        entry = np.searchsorted(self.starts, rows, side="right") - 1
        return np.where(rows >= 0, self.place[entry], -1), rows - self.starts[entry]


class FaissIndex(Index):
    """An index in a folder on the disk; made by `build`, opened by `open_index`.

    Attributes:
        folder: the folder.
        slides: the slides that are searched.
        changes: a sentence that counts the changes of `build`; empty for an index that was only opened.
    """

    def __init__(
        self, folder: Path, slides: Sequence[SlideFeatures], manifest: Manifest, changes: str = ""
    ) -> None:
        """Open the shards.

        Raises:
            OutputError: a shard is damaged or missing.
            UsageError: FAISS is not installed.
        """
        self.folder, self.slides, self.changes = folder, tuple(slides), changes
        self.dim = self.slides[0].dim
        place = {str(slide.path.resolve()): i for i, slide in enumerate(self.slides)}
        entries = {entry.path: entry for entry in manifest.entries if not entry.dropped}
        self._entries = [entries[path] for path in place]
        self._shards = []
        for number, size in manifest.shards.items():
            path, held = shard_path(folder, number), manifest.rows(number)
            index = read_faiss(path, size)
            if index is None or index.ntotal != held or index.d != self.dim:
                raise OutputError(f"{path} is damaged or gone; type --index build to make it again")
            self._shards.append(_Shard.of(index, manifest.of(number), place))

    def __repr__(self) -> str:
        rows = sum(len(slide.grid) for slide in self.slides)
        return f"FaissIndex({len(self.slides)} slides, {rows:,} patches, {self.folder.name})"

    def search_many(
        self,
        queries: NDArray[np.floating],
        k: int,
        *,
        among: Collection[str] | None = None,
        skip: Sequence[Found] = (),
    ) -> Hits:
        """See `Index.search_many`. Scores equal those of `ExactIndex`, but some of the best may be missed.

        More cells are searched if only some of the slides are wanted.
        """
        wanted = check_queries(queries, self.dim, k)
        chosen = np.zeros(len(self.slides), bool)
        chosen[places_of(self.slides, among)] = True
        skipped = rows_to_skip(self.slides, skip)
        candidates = k + k // 2 + MORE_CANDIDATES + sum(map(len, skipped.values()))
        rough = [TopK(candidates) for _ in wanted]
        for scores, slide, row in self._candidates(unit(wanted), candidates, chosen):
            for q, one in enumerate(rough):
                real = slide[q] >= 0
                one.add(scores[q][real], slide[q][real], row[q][real])
        ranked = [self._ranked(query, one, k, skipped) for query, one in zip(wanted, rough, strict=True)]
        return as_hits(self.slides, ranked)

    def _candidates(
        self, queries: Rows, count: int, chosen: NDArray[np.bool_]
    ) -> Iterator[tuple[Rows, NDArray[np.int32], NDArray[np.int64]]]:
        """From each shard, rounded scores, slides (-1 if there are fewer) and rows, [Q, count]."""
        faiss, cells = import_faiss(), None
        masks = [shard.chosen_rows(chosen) for shard in self._shards]
        total = sum(shard.index.ntotal for shard in self._shards)
        wanted = sum(int(mask.sum()) for mask in masks)
        for shard, mask in zip(self._shards, masks, strict=True):
            index, most = shard.index, min(count, int(mask.sum()))
            if not most:
                continue
            index.nprobe = _probes(index.nlist, total, wanted, count)
            with _threads(1 if len(queries) <= FEW_QUERIES else None):
                if mask.all():
                    if cells is None:  # the centres are the same in each shard
                        cells = index.quantizer.search(queries, index.nprobe)
                    scores, rows = index.search_preassigned(queries, most, cells[1], cells[0])
                else:
                    only = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
                    how = faiss.SearchParametersIVF(nprobe=index.nprobe, sel=only)
                    scores, rows = index.search(queries, most, params=how)
            yield scores, *shard.located(rows)

    def _ranked(self, query: Rows, rough: TopK, k: int, skipped: dict[int, list[int]]) -> TopK:
        """The best candidates by their exact scores."""
        best = TopK(k)
        for place in np.unique(rough.slide).tolist():
            entry, rows = self._entries[place], rough.row[rough.slide == place]
            rows = np.setdiff1d(rows, skipped.get(place, [])).astype(np.int64)
            values = entry.places.read(self.slides[place], rows, entry.state)
            usable = np.isfinite(values).all(1)
            rows, values = rows[usable], values[usable]
            best.add(exact_scores(values, query), np.full(len(rows), place, np.int32), rows)
        return best


def _probes(cells: int, rows: int, wanted: int, candidates: int) -> int:
    """Number of cells to search in each shard, if ``wanted`` of all rows are searched for."""
    if rows <= WHOLE_ROWS:
        return cells
    some = max(PROBES * rows, 4 * candidates * cells)  # four times as many rows as candidates, or more
    return min(cells, -(-some // wanted))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let FAISS use so many threads for a while; None leaves their number."""
    faiss = import_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count or before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def index_folder(slides: Sequence[SlideFeatures]) -> Path:
    """Folder of the index of a run: ``index_ENCODER`` beside the folder of its features."""
    first = slides[0]
    return first.path.parent.parent / f"index_{first.provenance['encoder']['name']}"


def build(slides: Sequence[SlideFeatures], folder: Path) -> FaissIndex:
    """Make the index, or update it: new slides are added, slides that changed or are not given are dropped.

    A shard is made again if it is damaged or more than half of it is dropped. All shards are made again if
    the cohort has grown to several times the size that the cells were found for.

    Args:
        slides: features of one encoder: all slides that the index shall hold.
        folder: the folder; it is made if needed.

    Raises:
        UsageError: several encoders, no patches, or FAISS is not installed.
        OutputError: the folder holds another encoder's index or something else, or cannot be written; or a
            features file cannot be read.
    """
    key = check_one_encoder(slides)
    import_faiss()
    manifest, changes = update_folder(slides, folder, key)
    return FaissIndex(folder, list(with_patches(slides).values()), manifest, changes)


def open_index(slides: Sequence[SlideFeatures], folder: Path) -> FaissIndex:
    """Open an index that holds these slides as they are now; other slides that it holds are not searched.

    Raises:
        UsageError: it does not hold them, or FAISS is not installed.
        OutputError: it is damaged or of another encoder.
    """
    key = check_one_encoder(slides)
    import_faiss()
    manifest = read_manifest(folder, key)
    if manifest is None:
        raise UsageError(f"there is no index in {folder}; type --index build")
    now = with_patches(slides)
    if not now:
        raise UsageError("these slides have no patches to search; choose others")
    manifest = manifest.limited_to(now)
    missing = len(now.keys() - manifest.searchable)
    if missing:
        raise UsageError(
            f"{missing} slides have come or changed since {folder} was made; type --index build to update it"
        )
    return FaissIndex(folder, list(now.values()), manifest)
