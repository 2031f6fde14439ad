"""The sha256 of large weight files: each is hashed once, and not again for as long as it stays the same file.

Hashing takes longer than all the rest of loading. What it gave is kept in ``seal_extract/digests.json``
under ``$XDG_CACHE_HOME``, by default ``~/.cache``: by real path, and held to size, times and inode. That file
may be deleted at any time; where it cannot be read or written, weight files are hashed at each load.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

WORTH_BYTES = 2**26  # below, hashing takes no longer than looking it up is worth
MAX_FILES = 256  # remembered; the oldest are forgotten
SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system: a file as young as that may change unseen


def sha256_of(path: Path) -> tuple[str, os.stat_result]:
    """The sha256 of a file in hex, remembered or taken now, and the state of the file that it belongs to.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        stat, began_ns = os.fstat(file.fileno()), time.time_ns()
        known = _recall(path, stat) if stat.st_size >= WORTH_BYTES else None
        if known is not None:
            return known, stat
        sha256 = _hash(file)
        stayed = _stamp(os.fstat(file.fileno())) == _stamp(stat)
    settled = began_ns - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_NS
    if stat.st_size >= WORTH_BYTES and stayed and settled:
        _remember(path, stat, sha256)
    return sha256, stat


def _hash(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := file.read(2**22):
        digest.update(piece)
    return digest.hexdigest()


def _stamp(stat: os.stat_result) -> list[int]:
    """What differs once another file lies there or this one was written to."""
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _memory() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "seal_extract" / "digests.json"


def _recall(path: Path, stat: os.stat_result) -> str | None:
    entry = _entries().get(os.path.realpath(path))
    if not isinstance(entry, dict) or entry.get("stamp") != _stamp(stat):
        return None
    sha256 = entry.get("sha256")
    return sha256 if isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) else None


def _entries() -> dict[str, Any]:
    try:
        content = json.loads(_memory().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _remember(path: Path, stat: os.stat_result, sha256: str) -> None:
    """Add one file; of two processes that do so at once, one may be lost and is hashed again."""
    entries = _entries()
    entries.pop(os.path.realpath(path), None)
    entries[os.path.realpath(path)] = {"stamp": _stamp(stat), "sha256": sha256}
    with suppress(OSError, RuntimeError):  # a cache: what cannot be kept is done without
        memory = _memory()
        memory.parent.mkdir(parents=True, exist_ok=True)
        # not publish(): its temporary name is no other process's on this machine, but a home may be on many
        descriptor, part = tempfile.mkstemp(prefix=f".{memory.name}.", suffix=".part", dir=memory.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(dict(list(entries.items())[-MAX_FILES:]), file, indent=1)
            os.replace(part, memory)
        finally:
            Path(part).unlink(missing_ok=True)
