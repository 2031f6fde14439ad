"""The directories of a TIFF, with every number checked against the file's size before it is used.

OpenSlide, libtiff and tifffile trust a TIFF: they follow directories in circles, allocate the memory that an
entry claims, and convert other colour spaces to RGB unasked. So the directories are checked here first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import SlideOpenError

# tifffile's log about a damaged file reaches an application's handlers, not the terminal: an error says it
logging.getLogger("tifffile").addHandler(logging.NullHandler())

TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MOST_DIRECTORIES = 4096  # a slide has some ten, a stack of planes some hundred
MOST_ENTRIES = 4096  # of a directory
MOST_VALUE_BYTES = 2**28  # of all entries together: the tables of 20 million tiles
MOST_TILE_PX = 2**26  # of one tile or strip; 256 MB decoded
FEW = 16  # values that are read at once

WIDTH, LENGTH, DESCRIPTION, STRIP_OFFSETS, STRIP_BYTE_COUNTS = 256, 257, 270, 273, 279
TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_BYTE_COUNTS, SUB_DIRECTORIES = 322, 323, 324, 325, 330
NDPI_FLAG = 65420

# bytes of a value by the number of its type, and the types that are whole numbers
_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_WHOLE = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}


# --- directories --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One entry of a directory.

    Attributes:
        kind: the TIFF's number of the type.
        count: how many values it claims.
        at: where they begin in the file.
        few: the values, if they are at most `FEW` whole numbers that lie in the file.
    """

    kind: int
    count: int
    at: int
    few: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        """The size that the values claim."""
        return self.count * _BYTES.get(self.kind, 1)


class Directory(dict[int, Entry]):
    """The entries of a directory by tag."""

    def number(self, tag: int, default: int = 0) -> int:
        """The first value of a tag."""
        return self.numbers(tag, default)[0]

    def numbers(self, tag: int, default: int = 0) -> tuple[int, ...]:
        """The values of a tag."""
        return (self[tag].few if tag in self else ()) or (default,)

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height)."""
        return self.number(WIDTH), self.number(LENGTH)


@dataclass(frozen=True)
class Tiff:
    """The directories of a TIFF, those of SubIFDs among them.

    Attributes:
        path: the file.
        bytes: its size.
        order: ``<`` or ``>``.
        directories: none if the file is no TIFF.
        whole: False if a directory lies outside the file.
        ndpi: whether the upper halves of its offsets lie elsewhere.
    """

    path: Path
    bytes: int
    order: str = "<"
    directories: tuple[Directory, ...] = ()
    whole: bool = True
    ndpi: bool = False

    def values(self, entry: Entry | None) -> NDArray[Any]:
        """The whole numbers of an entry, fewer than it claims if the file ends before."""
        if entry is None or entry.kind not in _WHOLE or entry.at >= self.bytes:
            return np.empty(0, np.uint64)
        kind = np.dtype(self.order + _WHOLE[entry.kind])
        count = min(entry.count, (self.bytes - entry.at) // kind.itemsize)
        return np.fromfile(self.path, kind, count, offset=entry.at)

    def text(self, entry: Entry | None) -> str:
        """The text of an entry; empty if it lies outside the file."""
        if entry is None or entry.at + entry.bytes > self.bytes:
            return ""
        with self.path.open("rb") as file:
            file.seek(entry.at)
            return file.read(entry.bytes).rstrip(b"\0").decode("utf-8", "replace")


@dataclass(frozen=True)
class _Form:
    """The byte order of a TIFF, and the formats of `struct` for its counts, entries and offsets."""

    order: str
    count: str
    entry: str
    offset: str
    first: int
    ndpi: bool = False


def read_tiff(path: Path) -> Tiff:
    """Read the directories of a TIFF; none of a file that is no TIFF.

    Raises:
        SlideOpenError: they lead in a circle, or claim more values than the file holds or a slide has.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(16).ljust(16, b"\0")
        if head[:4] not in TIFF_HEADS:
            return Tiff(path, size)
        form = _form_of(file, head, size)
        directories: list[Directory] = []
        whole = True
        try:
            for found in _walk(file, form, size):
                directories += found
        except EOFError:
            whole = False
    return Tiff(path, size, form.order, tuple(directories), whole, form.ndpi)


def _form_of(file: BinaryIO, head: bytes, size: int) -> _Form:
    order = "<" if head[:2] == b"II" else ">"
    if b"+" in head[2:4]:
        return _Form(order, "Q", "HHQ8s", "Q", struct.unpack_from(order + "Q", head, 8)[0])
    ndpi = _Form(order, "H", "HHI4s", "Q", struct.unpack_from(order + "Q", head, 4)[0], True)
    with contextlib.suppress(EOFError, SlideOpenError):  # NDPI is a classic TIFF with offsets of 64 bits
        if order == "<" and NDPI_FLAG in _read_directory(file, ndpi, ndpi.first, size)[0]:
            return ndpi
    return _Form(order, "H", "HHI4s", "I", struct.unpack_from(order + "I", head, 4)[0])


def _walk(file: BinaryIO, form: _Form, size: int) -> Iterator[list[Directory]]:
    """Follow the chain of directories; each comes with its SubIFDs."""
    chain: set[int] = set()
    known = claimed = 0
    at = form.first
    while at:
        if at in chain:
            raise SlideOpenError(f"{file.name}: its TIFF directories lead in a circle; copy it again")
        chain.add(at)
        directory, at = _read_directory(file, form, at, size)
        found = [directory]
        for offset in directory[SUB_DIRECTORIES].few if SUB_DIRECTORIES in directory else ():
            with contextlib.suppress(EOFError):
                found.append(_read_directory(file, form, offset, size)[0])
        known += len(found)
        claimed += sum(e.bytes for d in found for e in d.values() if e.at + e.bytes <= size)
        if known > MOST_DIRECTORIES or claimed > min(MOST_VALUE_BYTES, size + 2**16):
            raise SlideOpenError(
                f"{file.name}: {known} or more TIFF directories that claim {claimed / 1e6:.3g} MB of values; "
                f"allowed: {MOST_DIRECTORIES}, and {MOST_VALUE_BYTES / 1e6:.0f} MB that the file really holds"
            )
        yield found


def _read_directory(file: BinaryIO, form: _Form, at: int, size: int) -> tuple[Directory, int]:
    """A directory and the offset of the next one.

    Raises:
        EOFError: it does not lie in the file.
    """
    head, width, link = (struct.calcsize("<" + part) for part in (form.count, form.entry, form.offset))
    (entries,) = struct.unpack(form.order + form.count, _take(file, at, head, size))
    if entries > MOST_ENTRIES:
        raise SlideOpenError(
            f"{file.name}: a TIFF directory claims {entries} entries; allowed: {MOST_ENTRIES}; copy it again"
        )
    at += head
    data = _take(file, at, entries * (width + 4 * form.ndpi) + link, size)
    (following,) = struct.unpack_from(form.order + form.offset, data, entries * width)
    directory = Directory()
    for i, (tag, kind, count, value) in enumerate(
        struct.iter_unpack(form.order + form.entry, data[: entries * width])
    ):
        entry = Entry(kind, count, at + (i + 1) * width - len(value))
        if entry.bytes > len(value):
            (start,) = struct.unpack(form.order + "IQ"[len(value) == 8], value)
            if form.ndpi:
                start += struct.unpack_from("<I", data, entries * width + link + 4 * i)[0] << 32
            entry = replace(entry, at=start)
        few = FEW if tag != SUB_DIRECTORIES else MOST_DIRECTORIES
        if 0 < count <= few and kind in _WHOLE and entry.at + entry.bytes <= size:
            found = np.frombuffer(_take(file, entry.at, entry.bytes, size), form.order + _WHOLE[kind])
            entry = replace(entry, few=tuple(found.tolist()))
        directory.setdefault(tag, entry)  # of two of a tag libtiff takes the first
    return directory, following


def _take(file: BinaryIO, at: int, count: int, size: int) -> bytes:
    if at + count > size:
        raise EOFError
    file.seek(at)
    return file.read(count)


# --- refusals -----------------------------------------------------------------------------------------


def refuse_impossible(path: Path) -> None:
    """Refuse directories over which OpenSlide and libtiff crash or show black pixels.

    They follow directories in circles, divide by sides of zero, end the process if there is no memory for a
    tile, and show black, which looks like glass, beyond the end of a table of tiles. Files that are no TIFF
    pass.

    Raises:
        SlideOpenError: a directory is of such a kind.
    """
    for directory in read_tiff(path).directories:
        if directory.keys() & {TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_BYTE_COUNTS}:
            _check_tiles(path, directory)


def _check_tiles(path: Path, directory: Directory) -> None:
    (width, height), w, h = directory.size_px, directory.number(TILE_WIDTH), directory.number(TILE_LENGTH)
    if not (0 < w * h <= MOST_TILE_PX and width and height):
        raise SlideOpenError(f"{path}: its directory of {width} x {height} px has tiles of {w} x {h} px")
    tiles = -(-width // w) * -(-height // h)
    known = counted(directory, TILE_OFFSETS, TILE_BYTE_COUNTS)
    if known < tiles:
        raise SlideOpenError(f"{path}: its directory of {width} x {height} px knows {known} of {tiles} tiles")


def counted(directory: Directory, *tables: int) -> int:
    """How many values the shortest of some tables claims."""
    return min(directory[tag].count if tag in directory else 0 for tag in tables)


def tiles_longer_than_the_file(
    path: Path, sizes_px: Collection[tuple[int, int]]
) -> dict[tuple[int, int], NDArray[np.int64]]:
    """Tiles that claim more bytes than the file has: OpenSlide would end the process if it lacked the memory.

    Args:
        path: the file.
        sizes_px: (width, height) of the levels.

    Returns:
        By the (width, height) of their directory, int64 [K, 4] of (left, top, right, bottom) in its pixels.

    Raises:
        SlideOpenError: there are such tiles, and it is unknown where they lie, because levels and directories
            have other sizes.
    """
    tiff = read_tiff(path)
    found = {}
    for directory in tiff.directories:
        too_long = np.flatnonzero(tiff.values(directory.get(TILE_BYTE_COUNTS)) > tiff.bytes)
        if len(too_long):
            w, h = directory.number(TILE_WIDTH), directory.number(TILE_LENGTH)
            across = -(-directory.size_px[0] // w)
            left, top = too_long % across * w, too_long // across * h
            found[directory.size_px] = np.stack([left, top, left + w, top + h], 1)
    if not found.keys() <= {*sizes_px} and not {*sizes_px} <= {d.size_px for d in tiff.directories}:
        raise SlideOpenError("a tile claims more bytes than the file has, and where it lies is unknown")
    return found


def refuse_truncated(path: Path) -> None:
    """Refuse a TIFF that ends before its directories or tiles do: tiffslide would read the rest of it.

    Does nothing to files that are no TIFF.

    Raises:
        SlideOpenError: the file is shorter than it says.
    """
    tiff = read_tiff(path)
    ends = [0.0]
    for directory in tiff.directories:
        for tags in ((STRIP_OFFSETS, STRIP_BYTE_COUNTS), (TILE_OFFSETS, TILE_BYTE_COUNTS)):
            ends += [directory[tag].at + directory[tag].bytes for tag in tags if tag in directory]
            offsets, counts = (tiff.values(directory.get(tag)).astype(np.float64) for tag in tags)
            known = min(len(offsets), len(counts))
            ends.append((offsets[:known] + counts[:known]).max(initial=0))
    # NDPI keeps the upper halves of its offsets elsewhere
    if max(ends) > tiff.bytes or not (tiff.ndpi or tiff.whole):
        raise SlideOpenError(
            f"{path} is truncated: {tiff.bytes} bytes are there and it needs more; copy it again"
        )
