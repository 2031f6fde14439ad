"""Weight files on this disk: where each was found, and its sha256, which is computed once per file.

Computing the hash takes longer than the rest of loading. It is kept in ``seal_extract/digests.json`` under
``$XDG_CACHE_HOME``, by default ``~/.cache``, by real path, and is valid while size, times and inode of the
file stay. That cache may be deleted at any time; where it cannot be read or written, files are hashed at each
load.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from seal_extract.errors import CheckpointError

WORTH_BYTES = 2**26  # smaller files are hashed as fast as the cache is read
MAX_FILES = 256  # in the cache; the oldest are dropped
SETTLED_NS = 2_000_000_000  # resolution of the coarsest file system: a younger file may change unseen


@dataclass(frozen=True)
class FoundFile:
    """A weight file on this disk.

    Attributes:
        path: of the file.
        source: the repository it came from, else its folder.
        revision: commit of that repository; None for a file that came from elsewhere.
        sha256: the hash that the Hub promised, in hex.
        settings: a file beside it that changes what is merged.
        pins: the hashes that its row is pinned to, or their beginnings.
        held: a file with another hash is refused before it is read.
    """

    path: Path
    source: str
    revision: str | None = None
    sha256: str | None = None
    settings: Path | None = None
    pins: tuple[str, ...] = ()
    held: bool = False


@dataclass(frozen=True)
class WeightFile:
    """A file that weights were read from.

    Attributes:
        source: repository on the Hub, or folder.
        revision: commit of that repository.
        file: its name.
        size: in bytes.
        mtime_ns: time of its last change, in nanoseconds since 1970.
        sha256: of its content, in hex.
        pinned: whether its row is pinned to this content; None if the row has no pin.
    """

    source: str
    revision: str | None
    file: str
    size: int
    mtime_ns: int
    sha256: str
    pinned: bool | None = None

    @classmethod
    def of(cls, found: FoundFile) -> WeightFile:
        """Hash a file and compare it with the Hub's promise and with the row's pins.

        Raises:
            CheckpointError: the file cannot be read, or has another content than promised or pinned.
        """
        check_regular(found.path)
        try:
            sha256, stat = sha256_of(found.path)
        except OSError as exc:
            raise CheckpointError(f"cannot read {found.path}: {exc.strerror}; fetch it again") from exc
        if found.sha256 not in (None, sha256):
            raise CheckpointError(
                f"{found.path} is damaged: its sha256 begins with {sha256[:12]}, the Hub's with "
                f"{str(found.sha256)[:12]}; delete {found.path.resolve()} and fetch it again"
            )
        pinned = any(sha256.startswith(pin) for pin in found.pins) if found.pins else None
        if found.held and pinned is False:
            raise CheckpointError(
                f"{found.path.name} of {found.source} has sha256 {sha256}, but the checked and pinned "
                f"file has {found.pins[0]}; nothing was loaded. Type --revision main to take the present "
                "file; the results then record that it is not the pinned one"
            )
        return cls(
            found.source, found.revision, found.path.name, stat.st_size, stat.st_mtime_ns, sha256, pinned
        )


def check_regular(path: Path) -> None:
    """Refuse a path that is no regular file before it is opened: reading a pipe or device might never end.

    Raises:
        CheckpointError: it is missing, a folder, a pipe or a device.
    """
    try:
        path.stat()
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise CheckpointError(f"cannot read {path}: {reason}; give the path of a file") from exc
    if not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe or device"
        raise CheckpointError(f"{path} is {what}; give the path of a file")


def sha256_of(path: Path) -> tuple[str, os.stat_result]:
    """The sha256 of a file in hex, from the cache or computed, and the state of the file it belongs to.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        stat, began_ns = os.fstat(file.fileno()), time.time_ns()
        known = _cached(path, stat) if stat.st_size >= WORTH_BYTES else None
        if known is not None:
            return known, stat
        sha256 = _hash(file)
        unchanged = _stamp(os.fstat(file.fileno())) == _stamp(stat)
    settled = began_ns - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_NS
    if stat.st_size >= WORTH_BYTES and unchanged and settled:
        _add_to_cache(path, stat, sha256)
    return sha256, stat


def _hash(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := file.read(2**22):
        digest.update(piece)
    return digest.hexdigest()


def _stamp(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _cache_path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "seal_extract" / "digests.json"


def _cache_entries() -> dict[str, Any]:
    try:
        content = json.loads(_cache_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _cached(path: Path, stat: os.stat_result) -> str | None:
    entry = _cache_entries().get(os.path.realpath(path))
    if not isinstance(entry, dict) or entry.get("stamp") != _stamp(stat):
        return None
    sha256 = entry.get("sha256")
    return sha256 if isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) else None


def _add_to_cache(path: Path, stat: os.stat_result, sha256: str) -> None:
    """Two processes that add at once may lose one entry; that file is hashed again."""
    entries = _cache_entries()
    entries.pop(os.path.realpath(path), None)
    entries[os.path.realpath(path)] = {"stamp": _stamp(stat), "sha256": sha256}
    with suppress(OSError, RuntimeError):  # the cache is optional
        cache = _cache_path()
        cache.parent.mkdir(parents=True, exist_ok=True)
        # not publish(): its temporary names are unique on one machine, and many may share a home folder
        descriptor, part = tempfile.mkstemp(prefix=f".{cache.name}.", suffix=".part", dir=cache.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(dict(list(entries.items())[-MAX_FILES:]), file, indent=1)
            os.replace(part, cache)
        finally:
            Path(part).unlink(missing_ok=True)
