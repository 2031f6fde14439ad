"""The next slides copied from slow storage, or from URLs, to a fast folder before their turn, within a bound.

Only what was copied here is deleted here: copies lie in a folder of this run's own.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from stat import S_ISVTX
from tempfile import mkdtemp

from seal_extract.errors import SealExtractError, SlideOpenError, UsageError
from seal_extract.publish import try_lock, writing
from seal_extract.run.job import Channel, SlideJob, Stopped
from seal_extract.slides.entry import SlideEntry, file_stamp
from seal_extract.slides.remote import fetch, look
from seal_extract.slides.slide import parts_folder

IN_PLACE = (".vms", ".vmu", ".dcm")  # slides of several files whose names are inside them
AHEAD = 3  # copied and waiting at most, beside the one that is being copied
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
        self._copies: Channel[SlideJob] = Channel(AHEAD)
        self._held: dict[str, int] = {}  # bytes of each copy, by the name of the slide
        self._room = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_stopped = False

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

    def copied(self, jobs: Iterable[SlideJob]) -> Iterator[SlideJob]:
        """The same jobs, each with a copy of its slide, as soon as that is there.

        A file that cannot be copied is read in its place. Where there is no copy of a URL, the job has the
        error.
        """
        self._thread = threading.Thread(target=self._copy_all, args=(jobs,), name="stage", daemon=True)
        self._thread.start()
        return self._copies

    def release(self, entry: SlideEntry) -> None:
        """Delete the copy of a slide from which nothing is read any more."""
        with self._room:
            if self._held.pop(entry.name, None) is not None:
                shutil.rmtree(self._folder / entry.name, ignore_errors=True)
                self._room.notify_all()

    def stop(self) -> None:
        """Stop copying."""
        with self._room:
            self._is_stopped = True
            self._room.notify_all()
        self._copies.stop()

    def close(self) -> None:
        """Stop copying, and delete all copies."""
        self.stop()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # --- in the thread ------------------------------------------------------------------------------

    def _copy_all(self, jobs: Iterable[SlideJob]) -> None:
        try:
            for job in jobs:
                self._copies.put(self._with_copy(job))
            self._copies.end()
        except Stopped:
            pass
        except BaseException as exc:
            self._copies.end(exc)

    def _with_copy(self, job: SlideJob) -> SlideJob:
        entry = job.entry
        if entry.is_streamed:
            return job
        if entry.url is None and (entry.path.suffix.lower() in IN_PLACE or not entry.path.is_file()):
            return job
        folder = self._folder / entry.name
        try:
            copy = folder / entry.path.name
            if entry.url is None:
                self._take_room(entry, _bytes(entry.path))
                _copy(entry.path, folder)
                return replace(job, entry=replace(entry, copy=copy))
            there = look(entry.url, fresh=True)
            self._take_room(entry, there.size)
            fetch(entry.url, there, copy, lambda: self._is_stopped)
            return replace(job, entry=replace(entry, copy=copy, version=there.version))
        except Stopped:
            raise
        except Exception as exc:  # the libraries behind URLs raise whatever they like
            shutil.rmtree(folder, ignore_errors=True)
            self.release(entry)
            if entry.url is not None:
                return replace(job, error=entry.blame(exc))
            warnings.warn(f"{entry.path} is not staged but read in its place: {exc}", stacklevel=2)
            return job

    def _take_room(self, entry: SlideEntry, size: int) -> None:
        """Wait until a copy fits, and make its folder.

        Raises:
            Stopped: the run was stopped.
            SlideOpenError: it never fits.
        """
        if size > self._limit:
            raise SlideOpenError(self._too_large(entry.source, size))
        with self._room:
            self._room.wait_for(lambda: self._is_stopped or sum(self._held.values()) + size <= self._limit)
            if self._is_stopped:
                raise Stopped
            self._held[entry.name] = size
        (self._folder / entry.name).mkdir()


@contextmanager
def with_copy(job: SlideJob) -> Iterator[SlideJob]:
    """The job of a slide at a URL, with a copy in ``stage_dir`` while the block lasts; others as they are."""
    if job.entry.url is None or job.options.stage_dir is None:
        yield job
        return
    with closing(Stage(job.options.stage_dir, int(job.options.stage_gb * 1e9))) as stage:
        (copied,) = stage.copied([job])
        try:
            yield copied
        except SealExtractError as exc:
            copied.entry.blame(exc)  # names the URL, not the copy
            raise


def _copy(slide: Path, folder: Path) -> None:
    before = file_stamp(slide)
    shutil.copy2(slide, folder)
    if (parts := parts_folder(slide)) is not None and parts.is_dir():
        shutil.copytree(parts, folder / parts.name)
    if file_stamp(slide) != before:
        raise OSError("it was changed while it was copied")


def _bytes(path: Path) -> int:
    try:
        parts = parts_folder(path)
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
