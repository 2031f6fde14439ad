"""Damaged copies of files, and the peak memory of the process that reads them."""

import re
import resource
import zlib
from pathlib import Path

import numpy as np
import tifffile

EXTREMES = (0, 1, 2, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
WORDS = (b"-1", b"1e400", b"9" * 400, b"NaN", b"null", b"{}", b"[]", b'"x"', b"\t", b"\n", b"\xff")


def metadata_places(path):
    """(first byte, length) of what a TIFF says of itself and of its tiles' heads; of others the head."""
    places = [(0, 16)]
    if not path.name.endswith((".svs", ".tif")):
        return [*places, (0, min(path.stat().st_size, 2000))]
    with tifffile.TiffFile(path) as tif:
        for page in tif.pages:
            places.append((page.offset, 2 + 12 * len(page.tags) + 4))
            places += [(tag.valueoffset, max(4, tag.valuebytecount)) for tag in page.tags]
            places += [(offset, 40) for offset in page.dataoffsets]
    return places


def mutated(data, places, seed, is_text=False):
    """A copy with a few changes, most of them where a file says what it holds."""
    rng = np.random.default_rng(seed)
    data = bytearray(data)

    def somewhere(length=1):
        if rng.random() < 0.75:
            start, size = places[rng.integers(len(places))]
            at = start + int(rng.integers(size))
        else:
            at = int(rng.integers(len(data)))
        return max(0, min(at, len(data) - length))

    def flip():
        data[somewhere()] = int(rng.integers(256))

    def extreme():
        size = int(rng.choice([2, 4]))
        at = somewhere(size)
        data[at : at + size] = (int(rng.choice(EXTREMES)) & (256**size - 1)).to_bytes(size, "little")

    def zeros():
        length = int(rng.integers(1, 2000))
        at = somewhere(length)
        data[at : at + length] = bytes(length)

    def noise():
        length = int(rng.integers(1, 500))
        at = somewhere(length)
        data[at : at + length] = rng.bytes(length)

    def swap():
        length = int(rng.integers(1, 3000))
        a, b = somewhere(length), somewhere(length)
        data[a : a + length], data[b : b + length] = data[b : b + length], data[a : a + length]

    def word():
        words = list(re.finditer(rb"[-\d.]+|[\w*]+", data))
        if words:
            chosen = words[rng.integers(len(words))]
            data[slice(*chosen.span())] = WORDS[rng.integers(len(WORDS))]

    kinds = [flip, extreme, zeros, noise, swap] if not is_text else [flip, word, word, word, swap]
    for _ in range(int(rng.integers(1, 6))):
        kind = kinds[rng.choice(len(kinds), p=[0.35, 0.35, 0.1, 0.1, 0.1])]
        for _ in range(int(rng.integers(1, 8)) if kind is flip else 1):
            kind()
    if rng.random() < 0.1:
        del data[int(rng.integers(len(data))) :]
    return with_true_checksums(data) if data[:4] == b"\x89PNG" and rng.random() < 0.7 else bytes(data)


def with_true_checksums(png):
    """A PNG whose chunks pass, so that what is in them is looked at."""
    at = 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        if end + 4 > len(png):
            break
        png[end : end + 4] = zlib.crc32(png[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(png)


def peak_bytes():
    """Of this program alone: ru_maxrss would begin with that of the tests that started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
