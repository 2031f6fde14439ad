"""A file with its final name is complete: written beside it under a temporary name, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from seal_extract.errors import OutputError

HOST = re.sub(r"[^\w-]", "-", platform.node()) or "host"
FORGOTTEN_S = 24 * 3600  # nobody writes a file for a day


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``, made if need be; rename it when the block ends well.

    An error in the block leaves neither file behind.

    Raises:
        OutputError: the folder or the file cannot be written.
    """
    part = temporary(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        with writing(path):
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        with suppress(OSError):  # where there is none
            part.unlink()


def temporary(path: Path) -> Path:
    """What a file is called while this process writes it."""
    name = os.fsencode(path.name)  # of which a disk takes 255 bytes
    short = path.name if len(name) < 128 else hashlib.sha256(name).hexdigest()
    return path.with_name(f".{short}.{HOST}.{os.getpid()}.part")


def sweep(folder: Path) -> None:
    """Delete what runs that were killed have left below ``folder``; what others are writing stays."""
    for part in folder.rglob(".*.part"):
        *_, host, process, _ = part.name.rsplit(".", 3)
        with suppress(OSError):
            if is_dead(host, process) or time.time() - part.stat().st_mtime > FORGOTTEN_S:
                part.unlink()


def is_dead(host: str, process: str) -> bool:
    """Whether a process is known to have ended: one of this machine."""
    if host != HOST or not process.isdigit() or os.name != "posix":
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def writing(path: Path, option: str = "-o") -> Iterator[None]:
    """Translate what goes wrong while ``path``, below the folder that ``option`` names, is written.

    Raises:
        OutputError: in place of any OSError.
    """
    try:
        yield
    except OSError as exc:
        why = _why(exc).replace("another -o", f"another {option}")
        raise OutputError(f"cannot write {path}: {why}; nothing half-written was left") from exc


_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or choose another -o",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another -o",
    errno.EFBIG: "the file would be larger than this system allows; choose another -o",
    errno.EACCES: "this user may not write there; choose another -o",
    errno.EPERM: "this user may not write there; choose another -o",
    errno.EROFS: "that disk is read-only; choose another -o",
    errno.ENOTDIR: "a part of the path is a file; choose another -o",
    errno.EEXIST: "a part of the path is a file; choose another -o",
    errno.ENAMETOOLONG: "the name is too long for that disk; rename the slide or choose another -o",
}


def _why(exc: OSError) -> str:
    if exc.errno in _ADVICE:
        return _ADVICE[exc.errno]
    return (str(exc).splitlines() or [type(exc).__name__])[0]
