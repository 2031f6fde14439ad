"""The folder of a FAISS index made, or brought up to date: each file complete or not there.

What was killed goes on where it was: the list of slides is written with every file of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from seal_extract.errors import OutputError, UsageError
from seal_extract.features.store import SlideFeatures
from seal_extract.genes.faiss_cells import cells_for, read_cells, train, write_cells
from seal_extract.genes.faiss_manifest import (
    Changes,
    Entry,
    Manifest,
    read_manifest,
    shard_path,
    trained_path,
)
from seal_extract.genes.feature_rows import RowPlaces
from seal_extract.genes.index import unit_pieces
from seal_extract.publish import file_state, sweep, writing

SHARD_BYTES = 2**29  # of rows in a file: so much memory is taken while one is made
ID_BYTES = 8  # kept with each row
OUTGROWN = 4  # times the rows that the cells were found for


def bring_up_to_date(slides: Sequence[SlideFeatures], folder: Path, encoder: str) -> tuple[Manifest, Changes]:
    """Make the folder hold these slides and no others.

    Raises:
        UsageError: no slide has patches.
        OutputError: the folder holds another index or something else, or cannot be written; or a features
            file cannot be read.
    """
    now = with_patches(slides)
    if not now:
        raise UsageError("these slides have no patches to search; choose others")
    old = read_manifest(folder, encoder) or Manifest(encoder)
    manifest, cells = _still_good(old.held_to(now), folder, sum(len(slide.grid) for slide in now.values()))
    new = [slide for path, slide in now.items() if path not in manifest.held]
    changes = _changes(old, manifest, now)
    if not new and manifest == old:
        return manifest, changes
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    if cells is None:
        cells = train(new)
        path = trained_path(folder, manifest.next)
        rows = sum(len(slide.grid) for slide in new)
        manifest = Manifest(encoder, manifest.next, write_cells(cells, path), rows, next=manifest.next)
    manifest.write(folder)
    for group, base in _grouped(new, manifest):
        manifest = _with_shard(manifest, group, base, folder)
        manifest.write(folder)
    return manifest, changes


def with_patches(slides: Sequence[SlideFeatures]) -> dict[str, SlideFeatures]:
    """The slides that have patches, by the path of their file, each once."""
    return {str(slide.path.resolve()): slide for slide in slides if len(slide.grid)}


def _still_good(manifest: Manifest, folder: Path, rows: int) -> tuple[Manifest, Any | None]:
    """What can be kept, and the cells; no cells where all has to be made anew.

    Files that are damaged, or of which more than half is dropped, are not kept.
    """
    cells = read_cells(trained_path(folder, manifest.trained), manifest.trained_bytes)
    outgrown = rows > OUTGROWN * manifest.trained_rows and cells_for(rows) > cells_for(manifest.trained_rows)
    bad = [
        number for number in manifest.sizes if cells is None or outgrown or _is_bad(manifest, number, folder)
    ]
    manifest = manifest.without(bad)
    return (manifest, cells) if manifest.entries else (manifest, None)


def _is_bad(manifest: Manifest, number: int, folder: Path) -> bool:
    rows = manifest.rows(number)
    shard = read_cells(shard_path(folder, number), manifest.sizes[number])
    dropped = sum(entry.rows for entry in manifest.of(number) if entry.dropped)
    return shard is None or shard.ntotal != rows or 2 * dropped > rows


def _changes(old: Manifest, kept: Manifest, now: Mapping[str, SlideFeatures]) -> Changes:
    before = {entry.path: entry for entry in old.entries if not entry.dropped}
    same = {path for path, entry in before.items() if entry.is_still(now.get(path))}
    return Changes(
        added=len(set(now) - set(before)),
        changed=len(set(now) & set(before) - same),
        dropped=len(set(before) - set(now)),
        kept=len(same),
        again=len(same - kept.held),
    )


def _grouped(
    slides: Sequence[SlideFeatures], manifest: Manifest
) -> Iterator[tuple[list[SlideFeatures], int | None]]:
    """Slides of a file each, and the file that they are added to: the last that has room, then new ones."""
    if not slides:
        return
    most = SHARD_BYTES // (slides[0].dim + ID_BYTES)
    roomy = [n for n in manifest.sizes if manifest.rows(n) + len(slides[0].grid) <= most]
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
    """Write a file of these slides and of all that is in ``base``, which it replaces."""
    before, size = (
        (trained_path(folder, manifest.trained), manifest.trained_bytes)
        if base is None
        else (shard_path(folder, base), manifest.sizes[base])
    )
    shard = read_cells(before, size, mapped=False)
    if shard is None:
        raise OutputError(f"{before} was changed while it was read; type --index build again")
    number = manifest.next
    entries = [] if base is None else [replace(entry, shard=number) for entry in manifest.of(base)]
    entries += [_added(slide, shard, number) for slide in slides]
    written = write_cells(shard, shard_path(folder, number))
    rest = manifest.without([] if base is None else [base])
    return replace(
        rest,
        shards=rest.sizes | {number: written},
        entries=(*rest.entries, *entries),
        next=number + 1,
    )


def _added(slide: SlideFeatures, shard: Any, number: int) -> Entry:
    """Put the rows of a slide into a file that is open."""
    start, state, places = shard.ntotal, file_state(slide.path), RowPlaces.of(slide.path)
    for rows in unit_pieces(slide):
        shard.add(rows)
    if shard.ntotal - start != len(slide.grid):
        raise OutputError(f"{slide.path} has changed while it was read; type --index build again")
    path = str(slide.path.resolve())
    return Entry(path, *state, len(slide.grid), number, start, places)
