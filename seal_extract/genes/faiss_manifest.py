"""What a FAISS index on the disk says of itself: encoder, slides as they were, files."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from seal_extract.errors import OutputError
from seal_extract.features.store import SlideFeatures
from seal_extract.genes.feature_rows import LAYABLE, RowPlaces
from seal_extract.publish import file_state, publish, writing

MANIFEST = "slides.json"
OURS = ("shard_*.faiss", "trained_*.faiss", ".*.part")


@dataclass(frozen=True)
class Entry:
    """A slide as the index holds it.

    Attributes:
        path: of its features file.
        bytes: of that file, when its rows were put in.
        mtime_ns: likewise.
        rows: how many.
        shard: number of the file that they are in.
        start: the first of them there.
        places: where its rows lie in the features file.
        dropped: whether the slide has changed or gone since.
    """

    path: str
    bytes: int
    mtime_ns: int
    rows: int
    shard: int
    start: int
    places: RowPlaces
    dropped: bool = False

    @property
    def state(self) -> tuple[int, int]:
        """Size and time of the features file."""
        return self.bytes, self.mtime_ns

    def is_still(self, slide: SlideFeatures | None) -> bool:
        """Whether the features file is the one whose rows were put in, by size and time."""
        return slide is not None and file_state(slide.path) == self.state


@dataclass(frozen=True)
class Manifest:
    """All of an index but its rows.

    Attributes:
        encoder: from `encoder_key`.
        trained: number of the file with the cells; -1 before there is one.
        trained_bytes: its size.
        trained_rows: of the cohort whose sample the cells were found on.
        shards: bytes of each file of rows, by number.
        entries: the slides.
        next: number of the next file of rows; none is used twice: an index that is open may read the first.
    """

    encoder: str
    trained: int = -1
    trained_bytes: int = 0
    trained_rows: int = 0
    shards: Mapping[int, int] | None = None
    entries: tuple[Entry, ...] = ()
    next: int = 0

    def __post_init__(self) -> None:
        sizes = {int(number): int(size) for number, size in (self.shards or {}).items()}
        object.__setattr__(self, "shards", sizes)
        if {entry.shard for entry in self.entries} != set(sizes):
            raise ValueError("entries and shards do not agree")
        if not all(type(n) is int for n in (self.trained, self.trained_bytes, self.trained_rows, self.next)):
            raise ValueError("a number is none")

    @property
    def sizes(self) -> dict[int, int]:
        """Bytes of each file of rows, by number."""
        return dict(self.shards or {})

    @property
    def held(self) -> set[str]:
        """Paths of the slides that can be searched."""
        return {entry.path for entry in self.entries if not entry.dropped}

    def of(self, shard: int) -> list[Entry]:
        """The slides in a file, in the order of their rows."""
        return sorted((e for e in self.entries if e.shard == shard), key=lambda entry: entry.start)

    def rows(self, shard: int) -> int:
        """Rows in a file, also of slides that were dropped."""
        return sum(entry.rows for entry in self.entries if entry.shard == shard)

    def held_to(self, now: Mapping[str, SlideFeatures]) -> Manifest:
        """The same, with slides dropped that are not among these, or no longer as they were."""
        entries = [e if e.is_still(now.get(e.path)) else replace(e, dropped=True) for e in self.entries]
        return replace(self, entries=tuple(entries))

    def without(self, shards: Collection[int]) -> Manifest:
        """The same without some files."""
        return replace(
            self,
            shards={number: size for number, size in self.sizes.items() if number not in shards},
            entries=tuple(entry for entry in self.entries if entry.shard not in shards),
        )

    def write(self, folder: Path) -> None:
        """Publish it, then remove the files that it does not name.

        Raises:
            OutputError: it cannot be written.
        """
        with publish(folder / MANIFEST) as part:
            part.write_text(json.dumps(asdict(self)), encoding="utf-8")
        used = {shard_path(folder, number) for number in self.sizes} | {trained_path(folder, self.trained)}
        for pattern in OURS[:2]:
            for path in set(folder.glob(pattern)) - used:
                with writing(path):
                    path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Changes:
    """What bringing an index up to date did, in slides.

    Attributes:
        added: that it did not hold.
        changed: whose features are others than those it held.
        dropped: that it no longer holds.
        kept: the rest.
        again: of these, put in again: their file was damaged or mostly dropped, or the cohort has outgrown
            the cells.
    """

    added: int
    changed: int
    dropped: int
    kept: int
    again: int

    def __str__(self) -> str:
        again = f" ({self.again} put in again)" if self.again else ""
        return (
            f"{self.added} slides added, {self.changed} changed, {self.dropped} dropped, "
            f"{self.kept} kept{again}"
        )


def read_manifest(folder: Path, encoder: str) -> Manifest | None:
    """What the folder says of itself; None where there is no index yet.

    Raises:
        OutputError: it is another encoder's, damaged, or the folder holds something else.
    """
    path = folder / MANIFEST
    if not path.exists():
        ours = {file for pattern in OURS for file in folder.glob(pattern)}
        if folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - ours):
            raise OutputError(f"{folder} holds no index of seal_extract, or a damaged one; remove it")
        return None
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        entries = tuple(_entry(**entry) for entry in listed.pop("entries"))
        manifest = Manifest(**listed, entries=entries)
        for shard in manifest.sizes:
            *starts, _ = accumulate((entry.rows for entry in manifest.of(shard)), initial=0)
            if [entry.start for entry in manifest.of(shard)] != starts:
                raise ValueError("rows do not follow one another")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as exc:
        raise OutputError(f"{folder} holds no index of seal_extract, or a damaged one; remove it") from exc
    if manifest.encoder != encoder:
        raise OutputError(f"{folder} is the index of another encoder or of other weights; remove it")
    return manifest


def _entry(*, places: dict[str, Any], **rest: Any) -> Entry:
    """A slide as it was written down.

    Raises:
        TypeError, ValueError, KeyError: it was written by something else.
    """
    rows = RowPlaces(**places | {"chunks": tuple(places["chunks"])})
    entry = Entry(places=rows, **rest)
    counts = [*entry.state, entry.rows, rows.dim, entry.shard, entry.start, rows.chunk_rows - 1, *rows.chunks]
    if not all(type(n) is int and 0 <= n < 2**62 for n in counts) or not isinstance(entry.path, str):
        raise ValueError("a number or path is none")
    if rows.chunks and (rows.dtype not in LAYABLE or len(rows.chunks) * rows.chunk_rows < entry.rows):
        raise ValueError("rows lie in no chunk")
    return entry


def shard_path(folder: Path, number: int) -> Path:
    """A file of rows."""
    return folder / f"shard_{number:04}.faiss"


def trained_path(folder: Path, number: int) -> Path:
    """The file with the cells."""
    return folder / f"trained_{number:04}.faiss"
