"""The next slides copied from slow storage, or from URLs, to a fast folder before their turn, within a bound.

Only what was copied here is deleted here: copies lie in a folder of this run's own.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from stat import S_ISVTX
from tempfile import mkdtemp

from seal_extract.errors import SealExtractError, SlideOpenError, UsageError
from seal_extract.publish import try_lock, writing
from seal_extract.run.options import ExtractOptions
from seal_extract.run.slide_process import open_within
from seal_extract.slides.entry import SlideEntry
from seal_extract.slides.identity import file_stamp
from seal_extract.slides.remote import fetch, look
from seal_extract.slides.slide import Slide

IN_PLACE = (".vms", ".vmu", ".dcm")  # slides of several files whose names are inside them
AHEAD = 4  # copied and waiting at most
POLL_S = 0.01  # between two looks for another slide, where slides come one by one
PREFIX = "seal_extract-"  # of the folder that each run makes; those of older versions are left alone
YOUNG_S = 60.0  # in which a run locks the folder that it has made
CLOSE_S = 5.0  # for the copy under way: a large one is not waited for


class Stage:
    """Copies slides ahead of their reading, in a thread of its own."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Make a folder that is this user's alone in ``folder``; what killed runs have left there goes.

        Raises:
            OutputError: it cannot be made.
            UsageError: others could exchange what is copied to ``folder``.
        """
        self._limit = limit_bytes
        with writing(folder, "--stage-dir"):
            folder.mkdir(parents=True, exist_ok=True)
            _refuse_others(folder)
            _sweep(folder)
            self._folder = Path(mkdtemp(prefix=PREFIX, dir=folder))
        self._lock = _locked(self._folder)
        self._ready: deque[SlideEntry] = deque()
        self._held: dict[str, int] = {}  # bytes of each copy, by the name of the slide
        self._failed: dict[str, SealExtractError] = {}  # why there is none of a URL, likewise
        self._error: BaseException | None = None  # what ended the thread
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._ended = self._closed = False

    def check(self, entries: Iterable[SlideEntry]) -> None:
        """Refuse a bound that one slide alone exceeds; URLs are asked when their turn comes.

        Raises:
            UsageError: there is such a slide.
        """
        sizes = {entry.source: _bytes(entry.path) for entry in entries if entry.url is None}
        largest = max(sizes, key=sizes.__getitem__, default=None)
        if largest is not None and sizes[largest] > self._limit:
            raise UsageError(self._too_large(largest, sizes[largest]))

    def _too_large(self, source: str, size: int) -> str:
        return (
            f"{source} has {size / 1e9:.2f} GB, more than --stage-gb {self._limit / 1e9:.3g}; "
            f"type --stage-gb {size / 1e9 + 0.01:.2f} or more"
        )

    def entries(self, entries: Iterable[SlideEntry | None]) -> Iterator[SlideEntry | None]:
        """The same slides, each with its copy; None while the next is being copied."""
        self._thread = threading.Thread(target=self._copy_all, args=(entries,), name="stage", daemon=True)
        self._thread.start()
        while True:
            with self._changed:
                if self._ready:
                    entry: SlideEntry | None = self._ready.popleft()
                    self._changed.notify_all()
                elif self._ended:
                    if self._error is not None:
                        raise self._error
                    return
                else:
                    entry = None
            yield entry

    def refuse_failed(self, entry: SlideEntry) -> None:
        """Refuse a slide at a URL of which no copy could be had.

        Raises:
            SealExtractError: the reason.
        """
        if (error := self._failed.pop(entry.name, None)) is not None:
            raise error

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
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # --- in the thread ------------------------------------------------------------------------------

    def _copy_all(self, entries: Iterable[SlideEntry | None]) -> None:
        try:
            for entry in entries:
                if self._closed:
                    break
                if entry is None:
                    time.sleep(POLL_S)
                    continue
                staged = self._staged(entry)
                with self._changed:
                    if staged.copy is None:
                        self._held.pop(entry.name, None)
                    self._ready.append(staged)
        except BaseException as exc:
            self._error = exc
        with self._changed:
            self._ended = True

    def _staged(self, entry: SlideEntry) -> SlideEntry:
        """The entry with its copy; without one where none can be had: a file is then read in its place."""
        if entry.url is None and (entry.path.suffix.lower() in IN_PLACE or not entry.path.is_file()):
            return entry
        folder = self._folder / entry.name
        try:
            if entry.url is None:
                self._take_room(entry, _bytes(entry.path))
                folder.mkdir()
                return self._copy(entry, folder)
            there = look(entry.url, fresh=True)
            self._take_room(entry, there.size)
            folder.mkdir()
            fetch(entry.url, there, folder / entry.path.name, lambda: self._closed)
            return replace(entry, copy=folder / entry.path.name, version=there.version)
        except Exception as exc:  # the libraries behind URLs raise whatever they like
            shutil.rmtree(folder, ignore_errors=True)
            if entry.url is not None:
                self._failed[entry.name] = entry.blame(exc)
            elif not self._closed:
                warnings.warn(f"{entry.path} is not staged but read in its place: {exc}", stacklevel=2)
            return entry

    def _take_room(self, entry: SlideEntry, size: int) -> None:
        """Wait until a copy fits."""
        if size > self._limit:
            raise SlideOpenError(self._too_large(entry.source, size))
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room(size))
            if self._closed:
                raise SlideOpenError(f"{entry.source}: the run was stopped")
            self._held[entry.name] = size

    def _has_room(self, size: int) -> bool:
        return len(self._ready) < AHEAD and sum(self._held.values()) + size <= self._limit

    def _copy(self, entry: SlideEntry, folder: Path) -> SlideEntry:
        before = file_stamp(entry.path)
        copy = Path(shutil.copy2(entry.path, folder))
        if (parts := _mrxs_parts(entry.path)) is not None:
            shutil.copytree(parts, folder / parts.name)
        if file_stamp(entry.path) != before:
            raise OSError("it was changed while it was copied")
        return replace(entry, copy=copy)


@contextmanager
def open_by_itself(entry: SlideEntry, options: ExtractOptions) -> Iterator[Slide]:
    """Open one slide; of one at a URL a copy is made in ``stage_dir``, for as long as it is open.

    Raises:
        SlideError: see `open_entry`.
        UsageError: it is a URL, and there is no ``stage_dir``.
    """
    if entry.url is None or options.stage_dir is None:
        with open_within(entry, options) as slide:
            yield slide
        return
    with closing(Stage(options.stage_dir, int(options.stage_gb * 1e9))) as stage:
        copied = next(filter(None, stage.entries([entry])))
        stage.refuse_failed(entry)
        try:
            with open_within(copied, options) as slide:
                yield slide
        except SealExtractError as exc:
            copied.blame(exc)
            raise


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


def _refuse_others(folder: Path) -> None:
    """Refuse a folder in which another user may rename what is copied, and so put his own in its place."""
    if os.name != "posix" or os.geteuid() == 0:  # whom nobody's permissions bind
        return
    stat = folder.stat()
    if stat.st_uid not in (0, os.geteuid()):
        why = "belongs to another user"
    elif stat.st_uid and stat.st_mode & 0o002 and not stat.st_mode & S_ISVTX:
        why = "may be written to by all users"
    else:
        return
    raise UsageError(f"--stage-dir {folder} {why}, who could exchange the copies; give a folder of your own")


def _sweep(folder: Path) -> None:
    """Delete what this user's runs have left that no process holds any more."""
    for left in folder.glob(f"{PREFIX}*"):
        with suppress(OSError):
            stat = left.lstat()
            if os.name == "posix" and stat.st_uid == os.geteuid() and time.time() - stat.st_mtime > YOUNG_S:
                lock = _locked(left)
                if lock is not None:
                    shutil.rmtree(left, ignore_errors=True)
                    os.close(lock)


def _locked(folder: Path) -> int | None:
    """A lock on a folder, held as long as this process lives; None where another process has it."""
    if os.name != "posix":
        return None
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    if try_lock(lock):
        return lock
    os.close(lock)
    return None
