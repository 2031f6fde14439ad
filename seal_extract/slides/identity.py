"""The identity of a slide: all files that belong to it, whether they have changed, and a digest of them.

Name and size do not tell two slides apart: uncompressed scans of equal width and height have equal sizes.
"""

from __future__ import annotations

import hashlib
import os
import re
from functools import lru_cache
from pathlib import Path

from seal_extract.publish import file_state

WHOLE_BYTES = 2**23  # a file up to this size is read whole
SAMPLES, SAMPLE_BYTES = 64, 2**14  # read of a larger one: its head, its tail, and as much between
LEAST_SAMPLES = 4  # of each file of a slide that has very many
DICOM_HEAD_BYTES = 2**14  # the number of the series stands before the pixels and the optical paths

FileStamp = tuple[int, ...]


def slide_files(path: Path) -> list[Path]:
    """The file and those that are read with it: images of VMS and VMU, parts of MRXS and DICOM."""
    kind = path.suffix.lower() if path.is_file() else ""  # opening a FIFO would wait for ever
    if kind == ".mrxs":
        return [path, *sorted(p for p in path.with_suffix("").rglob("*") if p.is_file())]
    if kind in (".vms", ".vmu"):
        named = (path.parent / name for name in _values(path) if name == os.path.basename(name))
        return [path, *sorted({p for p in named if p.is_file() and p != path})]
    if kind == ".dcm" and (series := _series(path, file_stamp_of([path]))):
        beside = (p for p in sorted(path.parent.glob("*.[dD][cC][mM]")) if p != path and p.is_file())
        return [path, *(p for p in beside if _series(p, file_stamp_of([p])) == series)]
    return [path]


def file_stamp(path: Path) -> FileStamp:
    """Inode, size and time in ns of each file of a slide, zeros for a missing one.

    They change when a file is replaced or written to.
    """
    return file_stamp_of(slide_files(path))


def file_stamp_of(files: list[Path]) -> FileStamp:
    """`file_stamp` of these files."""
    stamp: list[int] = []
    for file in files:
        try:
            stamp += (file.stat().st_ino, *file_state(file))
        except OSError:
            stamp += (0, 0, 0)
    return tuple(stamp)


def sizes_and_times(path: Path) -> str:
    """A digest of name, size and time in ns of each file of a slide; equal for a copy that keeps the times.

    Raises:
        OSError: a file is missing.
    """
    stamps = [(str(file.relative_to(path.parent)), *file_state(file)) for file in slide_files(path)]
    return hashlib.sha256(repr(stamps).encode("utf-8", "surrogateescape")).hexdigest()


def content(path: Path) -> str:
    """A digest of name, size, head, tail and samples of each file of a slide; equal for every copy of it.

    Raises:
        OSError: a file cannot be read.
    """
    return _content(path, file_stamp(path))


@lru_cache(maxsize=64)
def _content(path: Path, stamp: FileStamp) -> str:
    files = slide_files(path)
    samples = max(LEAST_SAMPLES, SAMPLES // len(files))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        relative = "" if file == path else str(file.relative_to(path.parent))
        digest.update(f"{relative} {size}\n".encode("utf-8", "surrogateescape"))
        with file.open("rb") as opened:
            if size <= WHOLE_BYTES:
                digest.update(opened.read())
                continue
            for i in range(samples):
                opened.seek((size - SAMPLE_BYTES) * i // (samples - 1))
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _values(path: Path) -> list[str]:
    """The values of a key file: ``ImageFile(1,0)=slide_1_0.jpg``."""
    try:
        text = path.read_bytes()[:WHOLE_BYTES].decode(errors="surrogateescape")
    except OSError:
        return []
    return re.findall(r"^[^=\n]+=[ \t]*([^\r\n]+?)[ \t]*\r?$", text, re.MULTILINE)


@lru_cache(maxsize=2**16)
def _series(path: Path, stamp: FileStamp) -> bytes:
    """SeriesInstanceUID, (0020,000E), which all files of one DICOM slide state; empty if unknown."""
    try:
        with path.open("rb") as file:
            head = file.read(DICOM_HEAD_BYTES)
    except OSError:
        return b""
    found = re.search(rb"\x20\x00\x0e\x00(?:UI..|..\x00\x00)([0-9.]+)", head, re.DOTALL)
    return found[1] if found else b""
