"""An index for millions of patches: FAISS inverted files on the disk, in shards.

Embeddings are put into cells around centres, by k-means on a sample, and kept
in 8 bits a number; a search looks into some cells of each shard. Shards are mapped from the disk, so that
neither building nor searching needs more memory than one of them. Source: Douze et al., arXiv 2401.08281.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import OutputError, UsageError
from seal_extract.genes.index import Rows, check_one_encoder, check_query, unit_pieces
from seal_extract.genes.search import Found
from seal_extract.publish import publish, writing
from seal_extract.store import SlideFeatures

MANIFEST, TRAINED = "slides.json", "trained.faiss"
SHARD_ROWS = 1_000_000  # 512 MB of 512 numbers
SAMPLE_PER_CELL = 40
CELLS = (16, 4096)
PROBES = 48  # cells looked into
WHOLE_ROWS = 100_000  # a shard of no more is looked at whole, in some 20 ms
OUTGROWN = 4  # times as many patches as the cells were made for: all is made anew
MARGIN = 0.5  # of the range of each number, on both sides: slides that come later may go beyond it
SEED = 0


@dataclass(frozen=True)
class _Entry:
    """A slide as the index holds it."""

    path: str
    bytes: int
    mtime_ns: int
    rows: int
    shard: int
    start: int  # its first row in the shard
    dropped: bool = False


class FaissIndex:
    """A folder on the disk; made by `build`, opened by `open`.

    Attributes:
        folder: with the shards and the list of slides.
        slides: those that are searched.
    """

    def __init__(self, folder: Path, slides: Sequence[SlideFeatures], entries: list[_Entry]) -> None:
        self.folder, self.slides, self._entries = folder, tuple(slides), entries
        self._by_path = {str(slide.path.resolve()): slide for slide in slides}
        self._shards: dict[int, Any] = {}

    def __repr__(self) -> str:
        rows = sum(entry.rows for entry in self._entries if not entry.dropped)
        return f"FaissIndex({len(self.slides)} slides, {rows:,} patches, {self.folder.name})"

    def search(self, query: NDArray[np.floating], k: int, *, skip: Found | None = None) -> list[Found]:
        """As `ExactIndex.search`, but some of the best may be missed, and scores are of rounded numbers.

        Raises:
            UsageError: as there.
            OutputError: a shard is damaged or gone.
        """
        wanted = check_query(query, self.slides[0].dim, k)[None]
        found: list[Found] = []
        for number in sorted({entry.shard for entry in self._entries if not entry.dropped}):
            entries = [entry for entry in self._entries if entry.shard == number]
            hidden = sum(entry.rows for entry in entries if entry.dropped)
            scores, rows = self._shard(number).search(wanted, k + hidden + (skip is not None))
            for score, row in zip(scores[0].tolist(), rows[0].tolist(), strict=True):
                entry = next((e for e in entries if e.start <= row < e.start + e.rows), None)
                if entry is None or entry.dropped:
                    continue
                one = Found(self._by_path[entry.path], row - entry.start, score)
                if skip is None or (one.slide.path, one.row) != (skip.slide.path, skip.row):
                    found.append(one)
        return sorted(found, key=lambda one: -one.score)[:k]

    def _shard(self, number: int) -> Any:
        if number not in self._shards:
            faiss = _faiss()
            path = self.folder / _name(number)
            try:
                shard = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
            except RuntimeError as exc:
                raise OutputError(f"{path} is damaged or gone; type --index build to make it again") from exc
            shard.parallel_mode = 1  # over the cells of one query
            shard.nprobe = shard.nlist if shard.ntotal <= WHOLE_ROWS else PROBES
            self._shards[number] = shard
        return self._shards[number]


def index_folder(slides: Sequence[SlideFeatures]) -> Path:
    """Where the index of a run lies: ``index_ENCODER`` beside the folder of its features."""
    first = slides[0]
    return first.path.parent.parent / f"index_{first.provenance['encoder']['name']}"


def build(slides: Sequence[SlideFeatures], folder: Path) -> FaissIndex:
    """Make the index, or bring it up to date: new slides are added, those that changed or vanished dropped.

    A shard is made again once more than half of it is dropped, and all of them once the cohort has outgrown
    the cells that were made for it.

    Args:
        slides: features of one encoder: all that shall be in the index.
        folder: made if need be; another encoder's index in it is an error.

    Raises:
        UsageError: several encoders, no patches, or FAISS is not installed.
        OutputError: the folder holds another encoder's index or something else, or cannot be written.
    """
    key, faiss = check_one_encoder(slides), _faiss()
    trained_on, entries = _read(folder, key) if folder.exists() else (0, [])
    now = {str(slide.path.resolve()): slide for slide in slides}
    entries = [_still_there(entry, now) for entry in entries]
    entries = _without_mostly_dropped(entries)
    held = {entry.path for entry in entries if not entry.dropped}
    new = [slide for path, slide in now.items() if path not in held and len(slide.grid)]
    if not held and not new:
        raise UsageError("these slides have no patches to search; choose others")
    total = sum(len(slide.grid) for slide in slides)
    if not entries or total > OUTGROWN * trained_on:
        entries, new, trained_on = [], [slide for slide in now.values() if len(slide.grid)], total
        shutil.rmtree(folder, ignore_errors=True)
        with writing(folder):
            folder.mkdir(parents=True)
        _write(faiss, _train(new), folder / TRAINED)
    number = 1 + max((entry.shard for entry in entries), default=-1)
    for group in _grouped(new):
        entries += _add(group, number, folder)
        number += 1
    with publish(folder / MANIFEST) as part, writing(folder / MANIFEST):
        listed = {"encoder": key, "trained_on": trained_on, "slides": [asdict(entry) for entry in entries]}
        part.write_text(json.dumps(listed), encoding="utf-8")
    used = {_name(entry.shard) for entry in entries}
    for path in folder.glob("shard_*.faiss"):
        if path.name not in used:
            path.unlink()
    return FaissIndex(folder, [s for s in slides if len(s.grid)], entries)


def open_index(slides: Sequence[SlideFeatures], folder: Path) -> FaissIndex:
    """Open an index that holds exactly these slides as they now are.

    Raises:
        UsageError: it does not; or FAISS is not installed.
        OutputError: it is another encoder's, or damaged.
    """
    key = check_one_encoder(slides)
    _faiss()
    if not (folder / MANIFEST).exists():
        raise UsageError(f"there is no index in {folder}; type --index build")
    now = {str(slide.path.resolve()): slide for slide in slides if len(slide.grid)}
    entries = [_still_there(entry, now) for entry in _read(folder, key)[1]]
    held = {entry.path for entry in entries if not entry.dropped}
    if held != set(now):
        raise UsageError(
            f"{len(set(now) - held)} slides have come or changed since {folder} was made; type --index build "
            "to bring it up to date"
        )
    return FaissIndex(folder, list(now.values()), entries)


def _still_there(entry: _Entry, now: dict[str, SlideFeatures]) -> _Entry:
    """The entry, dropped if its slide changed or is not wanted."""
    slide = now.get(entry.path)
    if slide is not None:
        stat = slide.path.stat()
        if (stat.st_size, stat.st_mtime_ns) == (entry.bytes, entry.mtime_ns):
            return entry
    return _Entry(**(asdict(entry) | {"dropped": True}))


def _without_mostly_dropped(entries: list[_Entry]) -> list[_Entry]:
    """Entries of shards of which most is in use; the slides of the others are added anew."""
    kept: list[_Entry] = []
    for number in {entry.shard for entry in entries}:
        shard = [entry for entry in entries if entry.shard == number]
        dropped = sum(entry.rows for entry in shard if entry.dropped)
        if 2 * dropped <= sum(entry.rows for entry in shard):
            kept += shard
    return kept


def _grouped(slides: Sequence[SlideFeatures]) -> Iterator[list[SlideFeatures]]:
    """Slides of a shard each."""
    group: list[SlideFeatures] = []
    for slide in slides:
        if group and sum(len(s.grid) for s in group) + len(slide.grid) > SHARD_ROWS:
            yield group
            group = []
        group.append(slide)
    if group:
        yield group


def _add(slides: list[SlideFeatures], number: int, folder: Path) -> list[_Entry]:
    """Write a shard of these slides; their entries."""
    faiss = _faiss()
    shard = faiss.read_index(str(folder / TRAINED))
    entries = []
    for slide in slides:
        start, stat = shard.ntotal, slide.path.stat()
        for rows in unit_pieces(slide):
            shard.add(rows)
        path = str(slide.path.resolve())
        entries.append(_Entry(path, stat.st_size, stat.st_mtime_ns, shard.ntotal - start, number, start))
    _write(faiss, shard, folder / _name(number))
    return entries


def _train(slides: Sequence[SlideFeatures]) -> Any:
    """An empty index whose cells are known."""
    faiss = _faiss()
    total = sum(len(slide.grid) for slide in slides)
    cells = 2 ** int(np.log2(np.clip(4 * total**0.5, *CELLS)))
    cells = max(1, min(cells, total // 40)) if total < 40 * CELLS[0] else cells
    sample = _sample(slides, min(total, SAMPLE_PER_CELL * cells))
    dim = sample.shape[1]
    kmeans = faiss.Kmeans(
        dim, cells, niter=10, seed=SEED, spherical=True, min_points_per_centroid=1,
        max_points_per_centroid=SAMPLE_PER_CELL,
    )  # fmt: skip
    kmeans.train(sample)
    coarse = faiss.IndexFlatIP(dim)
    coarse.add(kmeans.centroids)
    index = faiss.IndexIVFScalarQuantizer(
        coarse, dim, cells, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.sq.rangestat_arg = MARGIN
    index.train(sample)  # of the 8 bits; the cells are there
    index.own_fields = True
    coarse.this.disown()
    return index


def _sample(slides: Sequence[SlideFeatures], wanted: int) -> Rows:
    """Rows of all slides, each as likely as any other, float32 [wanted, D]."""
    rng = np.random.default_rng(SEED)
    total = sum(len(slide.grid) for slide in slides)
    chosen = np.sort(rng.choice(total, wanted, replace=False))
    parts, start = [], 0
    for slide in slides:
        for rows in unit_pieces(slide):
            inside = chosen[(chosen >= start) & (chosen < start + len(rows))] - start
            parts.append(rows[inside])
            start += len(rows)
    return np.ascontiguousarray(np.concatenate(parts))


def _write(faiss: Any, index: Any, path: Path) -> None:
    with publish(path) as part, writing(path):
        try:
            faiss.write_index(index, str(part))
        except RuntimeError as exc:
            raise OutputError(f"cannot write {path}: {exc}") from exc


def _read(folder: Path, key: str) -> tuple[int, list[_Entry]]:
    """Of an index of this encoder: for how many patches its cells were made, and its entries."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = [_Entry(**entry) for entry in listed["slides"]]
        trained_on, other = int(listed["trained_on"]), listed["encoder"] != key
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise OutputError(f"{folder} holds no index of seal_extract, or a damaged one; remove it") from exc
    if other:
        raise OutputError(f"{folder} is the index of another encoder or of other weights; remove it")
    return trained_on, entries


def _name(number: int) -> str:
    return f"shard_{number:04}.faiss"


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as exc:
        raise UsageError('FAISS is not installed; type: pip install "seal-extract[search]"') from exc
    return faiss
