"""The folder of a FAISS index: its files, the list of slides that they hold, and how it is updated.

k-means finds cells on a sample of the embeddings; the embeddings of each cell are kept together in 8 bits a
number (Douze et al., The Faiss library, arXiv 2401.08281: inverted lists, scalar quantiser). They lie in
several files, called shards, so that building needs no more memory than one of them. The list of slides is
written after each shard, and every file is complete or absent: a build that was killed continues with the
next shard.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from seal_extract.errors import OutputError, UsageError, how_to_install
from seal_extract.features.store import SlideFeatures
from seal_extract.genes.feature_rows import LAYABLE, Count, RowPlaces
from seal_extract.genes.index import Rows, unit_pieces
from seal_extract.publish import file_state, publish, sweep, writing

MANIFEST = "slides.json"
OURS = ("shard_*.faiss", "trained_*.faiss", ".*.part")
SHARD_BYTES = 2**29  # of rows in a shard: building one takes so much memory
ID_BYTES = 8  # kept with each row
SAMPLE_PER_CELL = 40
CELLS = (16, 4096)
OUTGROWN = 4  # times the rows that the cells were found for
MARGIN = 0.5  # of the range of each number, on both sides: later slides may go beyond it
SEED = 0


# --- the list of slides ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A slide in the index.

    Attributes:
        path: path of its features file.
        bytes: size of that file when its rows were added.
        mtime_ns: modification time of that file then.
        rows: number of rows.
        shard: number of the shard that holds them.
        start: position of the first of them in the shard.
        places: where the rows lie in the features file.
        dropped: whether the slide has changed or was removed since.
    """

    path: str
    bytes: Count
    mtime_ns: Count
    rows: Count
    shard: Count
    start: Count
    places: RowPlaces
    dropped: bool = False

    @property
    def state(self) -> tuple[int, int]:
        """Size and modification time of the features file; see `file_state`."""
        return self.bytes, self.mtime_ns


@dataclass(frozen=True)
class Manifest:
    """Everything of an index but its rows.

    Attributes:
        encoder: from `encoder_key`.
        trained: number of the file with the cells; -1 before there is one.
        trained_bytes: its size.
        trained_rows: rows of the cohort on whose sample the cells were found.
        shards: size in bytes of each shard, by number.
        entries: the slides, those of each shard in the order of their rows.
        next: number of the next shard. No number is used twice, because an open index may read an old shard.
    """

    encoder: str
    trained: Annotated[int, msgspec.Meta(ge=-1, lt=2**62)] = -1
    trained_bytes: Count = 0
    trained_rows: Count = 0
    shards: Mapping[Count, Count] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()
    next: Count = 0

    @property
    def searchable(self) -> set[str]:
        """Paths of the slides that can be searched."""
        return {entry.path for entry in self.entries if not entry.dropped}

    def of(self, shard: int) -> list[Entry]:
        """The slides of a shard, also those that were dropped."""
        return [entry for entry in self.entries if entry.shard == shard]

    def rows(self, shard: int) -> int:
        """Rows in a shard, also of slides that were dropped."""
        return sum(entry.rows for entry in self.of(shard))

    def limited_to(self, now: Mapping[str, SlideFeatures]) -> Manifest:
        """The same manifest in which slides are dropped that are not among these or have changed."""
        entries = [entry if _is_same(entry, now) else replace(entry, dropped=True) for entry in self.entries]
        return replace(self, entries=tuple(entries))

    def without(self, shards: Collection[int]) -> Manifest:
        """The same manifest without some shards."""
        return replace(
            self,
            shards={number: size for number, size in self.shards.items() if number not in shards},
            entries=tuple(entry for entry in self.entries if entry.shard not in shards),
        )

    def write(self, folder: Path) -> None:
        """Write the list, then delete the files that it does not name.

        Raises:
            OutputError: it cannot be written.
        """
        with publish(folder / MANIFEST) as part:
            part.write_bytes(msgspec.json.encode(self))
        used = {shard_path(folder, number) for number in self.shards} | {trained_path(folder, self.trained)}
        for path in {file for pattern in OURS[:2] for file in folder.glob(pattern)} - used:
            with writing(path):
                path.unlink(missing_ok=True)


def _is_same(entry: Entry, now: Mapping[str, SlideFeatures]) -> bool:
    return entry.path in now and file_state(now[entry.path].path) == entry.state


def shard_path(folder: Path, number: int) -> Path:
    """Path of a shard."""
    return folder / f"shard_{number:04}.faiss"


def trained_path(folder: Path, number: int) -> Path:
    """Path of the file with the cells."""
    return folder / f"trained_{number:04}.faiss"


def read_manifest(folder: Path, encoder: str) -> Manifest | None:
    """The list of slides in a folder; None if there is no index yet.

    Raises:
        OutputError: the index is damaged or of another encoder, or the folder holds something else.
    """
    path = folder / MANIFEST
    if not path.exists():
        ours = {file for pattern in OURS for file in folder.glob(pattern)}
        if folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - ours):
            raise OutputError(f"{folder} holds no index of seal_extract, or a damaged one; remove it")
        return None
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
        _check(manifest)
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as exc:
        raise OutputError(f"{folder} holds no index of seal_extract, or a damaged one; remove it") from exc
    if manifest.encoder != encoder:
        raise OutputError(f"{folder} is the index of another encoder or of other weights; remove it")
    return manifest


def _check(manifest: Manifest) -> None:
    """Raise `ValueError` if the parts of a manifest do not agree."""
    if {entry.shard for entry in manifest.entries} != set(manifest.shards):
        raise ValueError("entries and shards do not agree")
    for shard in manifest.shards:
        start = 0
        for entry in manifest.of(shard):
            places = entry.places
            held = len(places.chunks) * places.chunk_rows if places.dtype in LAYABLE else 0
            if entry.start != start or (places.chunks and held < entry.rows):
                raise ValueError("rows do not follow one another, or lie in no chunk")
            start += entry.rows


# --- updates --------------------------------------------------------------------------------------


def update_folder(slides: Sequence[SlideFeatures], folder: Path, encoder: str) -> tuple[Manifest, str]:
    """Make the folder hold these slides and no others; also returns a sentence that counts the changes.

    Raises:
        UsageError: no slide has patches.
        OutputError: the folder holds another index or something else, or cannot be written; or a features
            file cannot be read.
    """
    now = with_patches(slides)
    if not now:
        raise UsageError("these slides have no patches to search; choose others")
    old = read_manifest(folder, encoder) or Manifest(encoder)
    manifest, cells = _usable(old.limited_to(now), folder, sum(len(slide.grid) for slide in now.values()))
    new = [slide for path, slide in now.items() if path not in manifest.searchable]
    changes = _changes(old, manifest, now)
    if not new and manifest == old:
        return manifest, changes
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    if cells is None:
        cells, number = _train(new), manifest.next
        size, rows = _write(cells, trained_path(folder, number)), sum(len(slide.grid) for slide in new)
        manifest = Manifest(encoder, number, size, rows, next=number)
    manifest.write(folder)
    for group, base in _grouped(new, manifest):
        manifest = _with_shard(manifest, group, base, folder)
        manifest.write(folder)
    return manifest, changes


def with_patches(slides: Sequence[SlideFeatures]) -> dict[str, SlideFeatures]:
    """The slides that have patches, by the path of their file, each once."""
    return {str(slide.path.resolve()): slide for slide in slides if len(slide.grid)}


def _usable(manifest: Manifest, folder: Path, rows: int) -> tuple[Manifest, Any | None]:
    """The shards that can be kept, and the cells; None as cells if everything has to be made again.

    Shards are not kept that are damaged or of which more than half is dropped.
    """
    cells = read_faiss(trained_path(folder, manifest.trained), manifest.trained_bytes)
    outgrown = rows > OUTGROWN * manifest.trained_rows and _cells_for(rows) > _cells_for(
        manifest.trained_rows
    )
    bad = []
    for number, size in manifest.shards.items():
        held, shard = manifest.rows(number), read_faiss(shard_path(folder, number), size)
        dropped = sum(entry.rows for entry in manifest.of(number) if entry.dropped)
        damaged = cells is None or shard is None or shard.ntotal != held
        if damaged or outgrown or 2 * dropped > held:
            bad.append(number)
    manifest = manifest.without(bad)
    return manifest, cells if manifest.entries else None


def _changes(old: Manifest, kept: Manifest, now: Mapping[str, SlideFeatures]) -> str:
    before = {entry.path: entry for entry in old.entries if not entry.dropped}
    same = {path for path, entry in before.items() if _is_same(entry, now)}
    added, dropped = len(now.keys() - before.keys()), len(before.keys() - now.keys())
    changed, again = len(now.keys() & before.keys() - same), len(same - kept.searchable)
    put_in_again = f" ({again} put in again)" if again else ""
    return f"{added} slides added, {changed} changed, {dropped} dropped, {len(same)} kept{put_in_again}"


def _grouped(
    slides: Sequence[SlideFeatures], manifest: Manifest
) -> Iterator[tuple[list[SlideFeatures], int | None]]:
    """The slides of each new shard, and the shard that they are added to: the last with room, then none."""
    if not slides:
        return
    most = SHARD_BYTES // (slides[0].dim + ID_BYTES)
    roomy = [n for n in manifest.shards if manifest.rows(n) + len(slides[0].grid) <= most]
    base = max(roomy, default=None)
    group: list[SlideFeatures] = []
    rows = 0 if base is None else manifest.rows(base)
    for slide in slides:
        if group and rows + len(slide.grid) > most:
            yield group, base
            group, base, rows = [], None, 0
        group.append(slide)
        rows += len(slide.grid)
    yield group, base


def _with_shard(manifest: Manifest, slides: list[SlideFeatures], base: int | None, folder: Path) -> Manifest:
    """Write a shard of these slides and of everything in ``base``, which it replaces."""
    if base is None:
        before, size = trained_path(folder, manifest.trained), manifest.trained_bytes
    else:
        before, size = shard_path(folder, base), manifest.shards[base]
    shard, number = read_faiss(before, size, mapped=False), manifest.next
    if shard is None:
        raise OutputError(f"{before} was changed while it was read; type --index build again")
    entries = [replace(entry, shard=number) for entry in manifest.of(base)] if base is not None else []
    for slide in slides:
        start, state, places = shard.ntotal, file_state(slide.path), RowPlaces.of(slide.path)
        for rows in unit_pieces(slide):
            shard.add(rows)
        if shard.ntotal - start != len(slide.grid):
            raise OutputError(f"{slide.path} has changed while it was read; type --index build again")
        path = str(slide.path.resolve())
        entries.append(Entry(path, *state, len(slide.grid), number, start, places))
    written = _write(shard, shard_path(folder, number))
    rest = manifest.without([] if base is None else [base])
    return replace(
        rest, shards={**rest.shards, number: written}, entries=(*rest.entries, *entries), next=number + 1
    )


# --- FAISS ----------------------------------------------------------------------------------------


def _cells_for(rows: int) -> int:
    """Number of cells for so many rows: about four times their root, a power of two."""
    if rows < SAMPLE_PER_CELL * CELLS[0]:
        return max(1, rows // SAMPLE_PER_CELL)
    return int(2 ** int(np.log2(np.clip(4 * rows**0.5, *CELLS))))


def _train(slides: Sequence[SlideFeatures]) -> Any:
    """An empty FAISS index whose cells are found on a sample of the rows.

    Raises:
        OutputError: no sampled row is finite and other than 0.
    """
    faiss, total = import_faiss(), sum(len(slide.grid) for slide in slides)
    sample = _sample(slides, min(total, SAMPLE_PER_CELL * _cells_for(total)))
    if not len(sample):
        raise OutputError(
            f"all features sampled from {slides[0].path} on are 0 or not finite; encode these slides again"
        )
    dim, cells = sample.shape[1], min(_cells_for(total), len(sample))
    index = faiss.index_factory(dim, f"IVF{cells},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.seed, index.cp.spherical = 10, SEED, True
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, SAMPLE_PER_CELL
    index.sq.rangestat_arg = MARGIN
    index.train(sample)
    return index


def _sample(slides: Sequence[SlideFeatures], wanted: int) -> Rows:
    """Random rows of all slides at length 1, without those that are 0 or not finite: float32 [B, D]."""
    total, start, parts = sum(len(slide.grid) for slide in slides), 0, []
    chosen = np.sort(np.random.default_rng(SEED).choice(total, wanted, replace=False))
    for slide in slides:
        for rows in unit_pieces(slide):
            first, last = np.searchsorted(chosen, (start, start + len(rows)))
            some = rows[chosen[first:last] - start]
            parts.append(some[some.any(1)])
            start += len(rows)
    return np.ascontiguousarray(np.concatenate(parts))


def _write(index: Any, path: Path) -> int:
    """Write a FAISS index; returns its size in bytes."""
    with publish(path) as part:
        try:
            import_faiss().write_index(index, str(part))
        except RuntimeError as exc:
            raise OutputError(f"cannot write {path}: {exc}") from exc
        return part.stat().st_size


def read_faiss(path: Path, size: int, *, mapped: bool = True) -> Any | None:
    """A FAISS index from a file; None if the file is damaged or missing.

    Args:
        path: the file.
        size: its size in bytes when it was written.
        mapped: leave the rows on the disk until they are needed.
    """
    faiss = import_faiss()
    if not path.is_file() or path.stat().st_size != size:
        return None
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP if mapped else 0)
    except RuntimeError:
        return None


def import_faiss() -> Any:
    """The library FAISS; raises `UsageError` if it is not installed."""
    try:
        import faiss
    except ImportError as exc:
        raise UsageError(f"FAISS is not installed; {how_to_install('search')}") from exc
    return faiss
