"""Mutated slides: every one ends in features or in one of our errors; none crashes, hangs or eats memory.

Run as a program, ``python tests/test_fuzz.py SLIDE FIRST COUNT``, it prints what became of each copy.
"""

import faulthandler
import json
import re
import resource
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
from slide_helpers import Checksums

from seal_extract import ExtractOptions
from seal_extract.errors import SealExtractError
from seal_extract.extract import extract_many
from seal_extract.synthetic import write_synthetic_slide

HANG_S = 60  # per copy; one takes less than a second
MOST_BYTES = 2 * 2**30  # of the whole process
EXTREMES = (0, 1, 2, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
PER_PROCESS = 100


def metadata_places(path):
    """(first byte, length) of the header, of each directory, of each value beside it, of each tile's head."""
    places = [(0, 16)]
    with tifffile.TiffFile(path) as tif:
        for page in tif.pages:
            places.append((page.offset, 2 + 12 * len(page.tags) + 4))
            places += [(tag.valueoffset, max(4, tag.valuebytecount)) for tag in page.tags]
            places += [(offset, 40) for offset in page.dataoffsets]
    return places


def mutated(data, places, seed):
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

    kinds = [flip, extreme, zeros, noise, swap]
    for _ in range(int(rng.integers(1, 6))):
        kind = kinds[rng.choice(len(kinds), p=[0.35, 0.35, 0.1, 0.1, 0.1])]
        for _ in range(int(rng.integers(1, 8)) if kind is flip else 1):
            kind()
    if rng.random() < 0.1:
        del data[int(rng.integers(len(data))) :]
    return bytes(data)


def outcome(path, out, max_read_errors):
    """What became of a copy, in a word and a line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # patches of another µm/px than the encoder's
            (result,) = extract_many(
                [path], [Checksums()], out, options=ExtractOptions(max_read_errors=max_read_errors)
            )
    except SealExtractError as exc:
        return f"raised {type(exc).__name__}", str(exc)
    if result.error is not None:
        return type(result.error).__name__, str(result.error)
    (features,) = result.features
    if not np.isfinite(features.features).all() or len(features.features) != len(features.grid):
        return "wrong features", ""
    return "features", f"{len(features.grid)} rows, {features.provenance['read_errors']} unreadable"


def main(slide, first, count):
    data, places = slide.read_bytes(), metadata_places(slide)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + count):
            path, out = Path(folder, str(seed), "small.svs"), Path(folder, str(seed), "out")
            path.parent.mkdir()
            path.write_bytes(mutated(data, places, seed))
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            kind, text = outcome(path, out, (0, 0, 3, 10**6)[seed % 4])
            faulthandler.cancel_dump_traceback_later()
            left = [str(p) for p in out.rglob("*.part")]
            told = {"seed": seed, "kind": kind, "text": text, "left": left, "peak": peak_bytes()}
            print(json.dumps(told), flush=True)


def peak_bytes():
    """Of this program alone: ru_maxrss would begin with that of the tests that started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024


@pytest.fixture(scope="module")
def svs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("svs")
    return write_synthetic_slide(folder / "small.svs", (1500, 1200), mpp=0.5, downsamples=(1, 4))


def run_copies(svs, first, count):
    """All lines that a process of its own prints."""
    program = [sys.executable, "-X", "faulthandler", __file__, str(svs), str(first), str(count)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=HANG_S * 5)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {told[-1:]}: {done.stderr[-4000:]}"
    assert len(told) == count
    return told


def check(told):
    kinds = Counter(line["kind"] for line in told)
    assert len(kinds) >= 4, kinds  # the mutations reach features, opening, reading, resolution
    for line in told:
        assert not line["kind"].startswith(("raised", "wrong")), line
        assert "\n" not in line["text"], line
        assert not line["left"], line
        assert line["peak"] < MOST_BYTES, line


def test_forty_mutated_slides_end_in_features_or_in_our_errors(svs):
    check(run_copies(svs, 0, 40))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1500, PER_PROCESS))
def test_mutated_slides_end_in_features_or_in_our_errors(svs, first):
    check(run_copies(svs, first, PER_PROCESS))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
