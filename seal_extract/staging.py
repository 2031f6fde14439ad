"""The next slides copied from slow storage to a fast folder before their turn, within a bound.

Only what was copied here is deleted here: copies lie in a folder of this process's own.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from seal_extract.errors import UsageError
from seal_extract.planned import file_stamp
from seal_extract.publish import HOST, is_dead, writing
from seal_extract.slide_list import SlideEntry

IN_PLACE = (".vms", ".vmu", ".dcm")  # slides of several files whose names are inside them
AHEAD = 4  # copied and waiting at most
POLL_S = 0.01  # between two looks for another slide, where slides come one by one


class Stage:
    """Copies slides ahead of their reading, in a thread of its own."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Make a folder for this process in ``folder``; what killed runs have left there goes.

        Raises:
            OutputError: it cannot be made.
        """
        self._limit = limit_bytes
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
            self._folder = folder / f"seal_extract.{HOST}.{os.getpid()}"
            self._folder.mkdir(exist_ok=True)
        self._ready: deque[SlideEntry] = deque()
        self._held: dict[str, int] = {}  # bytes of each copy, by the name of the slide
        self._changed = threading.Condition()
        self._ended = self._closed = False

    def check(self, entries: Iterable[SlideEntry]) -> None:
        """Refuse a bound that one slide alone exceeds.

        Raises:
            UsageError: there is such a slide.
        """
        sizes = {entry.path: _bytes(entry.path) for entry in entries}
        largest = max(sizes, key=sizes.__getitem__, default=None)
        if largest is not None and sizes[largest] > self._limit:
            raise UsageError(
                f"{largest} has {sizes[largest] / 1e9:.2f} GB, more than --stage-gb {self._limit / 1e9:.3g}; "
                f"type --stage-gb {sizes[largest] / 1e9 + 0.01:.2f} or more"
            )

    def entries(self, entries: Iterable[SlideEntry | None]) -> Iterator[SlideEntry | None]:
        """The same slides, each with its copy; None while the next is being copied."""
        threading.Thread(target=self._copy_all, args=(entries,), name="stage", daemon=True).start()
        while True:
            with self._changed:
                if self._ready:
                    entry: SlideEntry | None = self._ready.popleft()
                    self._changed.notify_all()
                elif self._ended:
                    return
                else:
                    entry = None
            yield entry

    def release(self, entry: SlideEntry) -> None:
        """Delete the copy of a slide from which nothing is read any more."""
        with self._changed:
            if self._held.pop(entry.name, None) is not None:
                shutil.rmtree(self._folder / entry.name, ignore_errors=True)
                self._changed.notify_all()

    def close(self) -> None:
        """Stop copying, and delete all copies."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _copy_all(self, entries: Iterable[SlideEntry | None]) -> None:
        for entry in entries:
            if self._closed:
                break
            if entry is None:
                time.sleep(POLL_S)
                continue
            size = _bytes(entry.path)
            with self._changed:
                self._changed.wait_for(lambda size=size: self._closed or self._has_room(size))  # type: ignore[misc]
                if self._closed:
                    break
                self._held[entry.name] = size
            staged = self._copy(entry)
            with self._changed:
                if staged is entry:
                    self._held.pop(entry.name, None)
                self._ready.append(staged)
        with self._changed:
            self._ended = True

    def _has_room(self, size: int) -> bool:
        return len(self._ready) < AHEAD and sum(self._held.values()) + size <= self._limit

    def _copy(self, entry: SlideEntry) -> SlideEntry:
        """The entry with its copy; as it is where a copy cannot be had, so that it is read in its place."""
        if entry.path.suffix.lower() in IN_PLACE or not entry.path.is_file():
            return entry
        folder = self._folder / entry.name
        try:
            folder.mkdir()
            before = file_stamp(entry.path)
            copy = Path(shutil.copy2(entry.path, folder))
            if (parts := _mrxs_parts(entry.path)) is not None:
                shutil.copytree(parts, folder / parts.name)
            if file_stamp(entry.path) != before:
                raise OSError("it was changed while it was copied")
        except OSError as exc:
            shutil.rmtree(folder, ignore_errors=True)
            if not self._closed:
                warnings.warn(f"{entry.path} is not staged but read in its place: {exc}", stacklevel=2)
            return entry
        return replace(entry, copy=copy)


def _mrxs_parts(path: Path) -> Path | None:
    parts = path.with_suffix("")
    return parts if path.suffix.lower() == ".mrxs" and parts.is_dir() else None


def _bytes(path: Path) -> int:
    try:
        parts = _mrxs_parts(path)
        inside = sum(p.stat().st_size for p in parts.rglob("*") if p.is_file()) if parts else 0
        return path.stat().st_size + inside
    except OSError:
        return 0


def _sweep(folder: Path) -> None:
    for left in folder.glob("seal_extract.*.*"):
        _, host, process = left.name.split(".", 2)
        if is_dead(host, process):
            shutil.rmtree(left, ignore_errors=True)
