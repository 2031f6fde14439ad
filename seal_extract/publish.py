"""Atomic writes: a file is written beside its place under a temporary name, then renamed.

So a file with its final name is complete. The writer holds an advisory lock on the temporary file, which
ends with the process, however it ends. The lock distinguishes the temporary files of killed runs from those
that another process is writing, also in another container. There are no lock files. The lock is shared,
because the file has its final name a moment before its writer releases it, and HDF5 takes a shared lock on
the files that it reads.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from seal_extract.errors import NAME_TOO_LONG, OutputError, first_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def _kernel() -> str:
    """A name that all processes share that see each other's locks, also those in other containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return re.sub(r"[^\w-]", "-", platform.node()) or "host"


KERNEL = _kernel()
OURS = re.compile(r"\.seal-extract\.([\w-]+)\.[0-9a-f]{16}\.part")
PATTERN = ".seal-extract.*.part"
FORGOTTEN_S = 7 * 24 * 3600  # nobody writes to a file for a week; decides where locks cannot be trusted


@contextmanager
def publish(path: Path, keep: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; rename it when the block ends without an error.

    The folder is made if need be. An error in the block leaves neither file behind. Temporary files of killed
    runs in the folder are deleted.

    Args:
        path: the file.
        keep: never replace an existing file, but call this with one that another run has written meanwhile,
            to ask whether it can stay in place of this one. By default an existing file is replaced.

    Raises:
        OutputError: the folder or the file cannot be written, which includes any OSError in the block; or
            ``keep`` returned False.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_once(path.parent)
        with claimed(path.parent) as part:
            yield part
            _sync(part, os.O_RDWR)
            if keep is None:
                os.replace(part, path)
            elif not _named(part, path) and not keep(path):
                raise OutputError(
                    f"{path} was written by another run meanwhile, from another request; "
                    f"type --overwrite to replace it, or another -o"
                )
            with suppress(OSError):  # not every disk can
                _sync(path.parent, os.O_RDONLY)


@contextmanager
def claimed(folder: Path, *, as_folder: bool = False) -> Iterator[Path]:
    """A new temporary file or folder that no other process uses or deletes; it is deleted at the end."""
    while True:
        part = folder / f".seal-extract.{KERNEL}.{secrets.token_hex(8)}.part"
        descriptor = _create(part, as_folder)
        if descriptor is None or (try_lock(descriptor, shared=True) is not False and part.exists()):
            break
        os.close(descriptor)  # another process is deleting it
    try:
        yield part
    finally:
        if descriptor is not None:
            os.close(descriptor)
        _delete(part)


def _create(part: Path, as_folder: bool) -> int | None:
    """A descriptor to hold its lock; None on Windows, where an open file cannot be renamed."""
    if as_folder:
        part.mkdir(mode=0o700)
        return None if fcntl is None else os.open(part, os.O_RDONLY)
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    if fcntl is not None:
        return descriptor
    os.close(descriptor)
    return None


def file_state(file: Path | int) -> tuple[int, int]:
    """Size in bytes and time in ns of a file, or of an open descriptor: a file that has others has changed.

    Raises:
        OSError: there is no such file.
    """
    stat = os.stat(file)
    return stat.st_size, stat.st_mtime_ns


def sweep(folder: Path) -> None:
    """Delete the temporary files of killed runs below ``folder``; those being written stay."""
    for part in folder.rglob(PATTERN):
        _delete_if_dead(part)


@lru_cache(maxsize=2**12)
def _sweep_once(folder: Path) -> None:
    for part in folder.glob(PATTERN):
        _delete_if_dead(part)


def _delete_if_dead(part: Path) -> None:
    found = OURS.fullmatch(part.name)
    if found is None:
        return
    with suppress(OSError):
        descriptor = os.open(part, os.O_RDONLY if part.is_dir() else os.O_RDWR)
        try:
            lock = try_lock(descriptor)
            is_forgotten = time.time() - os.fstat(descriptor).st_mtime > FORGOTTEN_S
            # on a shared disk each machine may see its own locks only
            if lock is not False and ((lock and found[1] == KERNEL) or is_forgotten):
                _delete(part)
        finally:
            os.close(descriptor)


def try_lock(descriptor: int, *, shared: bool = False) -> bool | None:
    """Take the lock of an open file or folder: whether it was free; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _delete(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        with suppress(OSError):
            part.unlink()


def _named(part: Path, path: Path) -> bool:
    """Give a file its name; False if that name exists."""
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError:  # a disk without hard links: the moment between the next two lines is not guarded
        if os.path.lexists(path):
            return False
        os.rename(part, path)
    return True


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path, option: str = "-o") -> Iterator[None]:
    """Translate disk errors while ``path``, below the folder that ``option`` names, is written.

    Raises:
        OutputError: in place of any OSError.
    """
    try:
        yield
    except OSError as exc:
        why = disk_advice(exc, option) or first_line(exc)
        raise OutputError(f"cannot write {path}: {why}; nothing half-written was left") from exc


def disk_advice(error: OSError, other: str) -> str | None:
    """What a disk error means and how to go on, for example with another ``-o``; None of other errors."""
    advice = _ADVICE.get(error.errno or 0)
    return advice and advice.replace("another -o", f"another {other}")


_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or choose another -o",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another -o",
    errno.EFBIG: "the file would be larger than this system allows; choose another -o",
    errno.EACCES: "this user may not write there; choose another -o",
    errno.EPERM: "this user may not write there; choose another -o",
    errno.EROFS: "that disk is read-only; choose another -o",
    errno.ENOTDIR: "a part of the path is a file; choose another -o",
    errno.EEXIST: "a part of the path is a file; choose another -o",
    errno.ENAMETOOLONG: NAME_TOO_LONG,
}
