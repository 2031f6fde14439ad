"""Files of a few bytes that claim more than there is, each with what the one line about it has to say.

Run as a program, ``python tests/bombs.py BYTES SECONDS FILE...``, it opens each and prints a line.
"""

import json
import resource
import signal
import struct
import sys
import zlib
from pathlib import Path

WORDS = {"H": 3, "I": 4, "Q": 16}
DESCRIPTION, SUB_DIRECTORIES = 270, 330
RGB8_TILES = {256: 64, 257: 64, 258: 8, 259: 1, 262: 2, 277: 3, 322: 64, 323: 64}  # no table of tiles
CIRCLE, TOO_MANY = "lead in a circle", "allowed: 4096"


def directory(at, tags, following, big=False):
    """A directory at ``at``; a tag is a number, or (type, count, value)."""
    count, word, kind = ("Q", "Q", 16) if big else ("H", "I", 4)
    data = struct.pack("<" + count, len(tags))
    for tag, value in sorted(tags.items()):
        entry = value if isinstance(value, tuple) else (kind, 1, value)
        data += struct.pack("<HH" + word * 2, tag, *entry)
    return data + struct.pack("<" + word, following)


def classic(*directories):
    """A classic TIFF of (tags, number of the directory that follows or None)."""
    sizes = [2 + 12 * len(tags) + 4 for tags, _ in directories]
    starts = [8 + sum(sizes[:i]) for i in range(len(sizes) + 1)]
    data = b"II*\0" + struct.pack("<I", 8)
    for (tags, following), at in zip(directories, starts, strict=False):
        data += directory(at, tags, 0 if following is None else starts[following])
    return data


def two_million_empty_directories():
    offsets = [8 + 6 * (i + 1) for i in range(2_000_000)]
    return b"II*\0" + struct.pack("<I", 8) + b"".join(struct.pack("<HI", 0, at) for at in offsets)


def sparse(path, head, size):
    path.write_bytes(head)
    with path.open("r+b") as file:
        file.truncate(size)


def big(tags, entries=None):
    head = b"II+\0" + struct.pack("<HHQ", 8, 0, 16)
    return head + (directory(16, tags, 0, big=True) if entries is None else struct.pack("<Q", entries))


def many_pixels(side=400_000, tile=8192):
    """All tiles are one and the same, of zeros."""
    data, tiles = zlib.compress(bytes(tile * tile * 3), 9), (-(-side // tile)) ** 2
    sides = {256: side, 257: side, 322: tile, 323: tile, 284: (3, 1, 1)}

    def pointing_to(at):
        tables = {
            258: (3, 3, at),
            259: (3, 1, 8),
            324: (4, tiles, at + 8),
            325: (4, tiles, at + 8 + 4 * tiles),
        }
        return classic(({**RGB8_TILES, **sides, **tables}, None))

    at = len(pointing_to(0))
    offsets = struct.pack("<I", at + 8 + 8 * tiles) * tiles
    return (
        pointing_to(at)
        + struct.pack("<4H", 8, 8, 8, 0)
        + offsets
        + struct.pack("<I", len(data)) * tiles
        + data
    )


TIFFS = {
    "400,000 px squared": (many_pixels(), "allowed: 34 Gpx"),
    "first to itself": (classic((RGB8_TILES, 0)), CIRCLE),
    "last to the first": (classic((RGB8_TILES, 1), ({256: 1}, 2), ({}, 0)), CIRCLE),
    "last to itself": (classic((RGB8_TILES, 1), ({256: 1}, 1)), CIRCLE),
    "two million": (two_million_empty_directories(), TOO_MANY),
    "many SubIFDs": (
        classic(({**RGB8_TILES, 330: (4, 4096, 8)}, None)) + struct.pack("<I", 8) * 4096,
        TOO_MANY,
    ),
    "65,535 entries": (b"II*\0" + struct.pack("<IH", 8, 65535) + bytes(12 * 65535), TOO_MANY),
}
SPARSE = {
    "2^40 entries": (big({}, entries=2**40), 2**40, TOO_MANY),
    "2^36 tiles": (big({**RGB8_TILES, 324: (16, 2**36, 400), 325: (16, 2**36, 400)}), 2**40, "MB of values"),
    "2^36 letters": (big({**RGB8_TILES, DESCRIPTION: (2, 2**36, 400)}), 2**40, "MB of values"),
}


def write_tiffs(folder):
    """Write each; path -> what has to be said of it."""
    told = {}
    for name, (data, words) in TIFFS.items():
        path = folder / f"{name}.tif"
        path.write_bytes(data)
        told[path] = words
    for name, (head, size, words) in SPARSE.items():
        path = folder / f"{name}.tif"
        sparse(path, head, size)
        told[path] = words
    return told


def main(most_bytes, seconds, paths):
    from seal_extract import open_slide
    from seal_extract.errors import SealExtractError

    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    for path in paths:
        signal.alarm(seconds)
        try:
            with open_slide(path, mpp=0.5) as slide:
                slide.read_region((0, 0), 0, (64, 64))
            line = ""
        except SealExtractError as exc:
            line = str(exc)
        signal.alarm(0)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), [Path(p) for p in sys.argv[3:]])
