"""Mutated files: each ends in what it holds or in one of our errors; none crashes, hangs or eats memory.

Run as a program, ``python tests/test_fuzz.py FILE FIRST COUNT``, it prints what became of each copy; circles
and bombs are in ``bombs.py``.
"""

import faulthandler
import json
import re
import resource
import shutil
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import DrawnSlide, run_file, shared
from PIL import Image
from slide_helpers import Checksums
from synthetic_slide import write_synthetic_slide

from seal_extract import ExtractOptions, open_slide, read_features
from seal_extract.errors import SealExtractError
from seal_extract.genes.gene_lists import read_gmt
from seal_extract.patches.grid import read_grid
from seal_extract.run.extract import extract_many
from seal_extract.tissue.mask import TissueMask

HANG_S = 60  # per copy; one takes less than a second
MOST_BYTES = 2 * 2**30  # of the whole process
EXTREMES = (0, 1, 2, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
PER_PROCESS = 100
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


def extracted(path, out, max_read_errors):
    """Features of a slide, in words.

    Raises:
        SealExtractError: what became of it instead.
    """
    options = ExtractOptions(max_read_errors=max_read_errors, slide_mpp=0.5)
    (result,) = extract_many([path], [Checksums()], out, options=options)
    if result.error is not None:
        raise result.error
    (features,) = result.features
    assert np.isfinite(features.features).all()
    assert len(features.features) == len(features.grid)
    return f"{len(features.grid)} rows, {features.provenance['read_errors']} unreadable"


def features_read(path):
    features = read_features(path)
    assert len(features.features) == len(features.grid)
    return f"{features.features.shape} features"


SLIDE = DrawnSlide(np.zeros((1200, 1500, 3), np.uint8), 0.5)
READ = {
    "features.h5": features_read,
    "coordinates.h5": lambda path: f"{len(read_grid(path, SLIDE))} patches",
    "tissue.geojson": lambda path: f"{TissueMask.from_geojson(path, SLIDE).mask.sum()} px",
    "sets.gmt": lambda path: f"{len(read_gmt(path))} sets",
}


def outcome(path, out, max_read_errors):
    """What became of a copy, in a word and a line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # patches of another µm/px than the encoder's
            read = READ.get(path.name)
            return "read", extracted(path, out, max_read_errors) if read is None else read(path)
    except SealExtractError as exc:
        return type(exc).__name__, str(exc)


def main(original, first, count):
    data, places = original.read_bytes(), metadata_places(original)
    is_text = original.suffix in (".geojson", ".gmt")
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + count):
            path, out = Path(folder, str(seed), original.name), Path(folder, str(seed), "out")
            path.parent.mkdir()
            path.write_bytes(mutated(data, places, seed, is_text))
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
    done = run_file(__file__, str(svs), str(first), str(count), timeout=HANG_S * 5)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {told[-1:]}: {done.stderr[-4000:]}"
    assert len(told) == count
    return told


def check(told, kinds):
    assert len({line["kind"] for line in told}) >= kinds  # the mutations reach the pixels, opening and more
    for line in told:
        assert "\n" not in line["text"], line
        assert len(line["text"]) < 2000, line
        assert not line["left"], line
        assert line["peak"] < MOST_BYTES, line


def test_forty_mutated_slides_end_in_features_or_in_our_errors(svs):
    check(run_copies(svs, 0, 40), kinds=4)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1500, PER_PROCESS))
def test_mutated_slides_end_in_features_or_in_our_errors(svs, first):
    check(run_copies(svs, first, PER_PROCESS), kinds=4)


@pytest.fixture(scope="module")
def originals(svs, tmp_path_factory):
    """A small file of each other format."""
    folder = tmp_path_factory.mktemp("originals")
    with open_slide(svs) as slide:
        pixels = slide.read_region((300, 200), 0, (900, 700))
    Image.fromarray(pixels).save(folder / "small.png")
    Image.fromarray(pixels).save(folder / "small.jpg", quality=85)
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    jpeg = {"compression": "jpeg", "photometric": "rgb", "tile": (256, 256)}
    tifffile.imwrite(folder / "small.ome.tif", pixels, ome=True, metadata=metadata, **jpeg)
    run = folder / "run"
    extracted(svs, run, 0)
    shutil.copy(next(run.rglob("features_*/*.h5")), folder / "features.h5")
    shutil.copy(next(run.rglob("patches/*.h5")), folder / "coordinates.h5")
    shutil.copy(next(run.rglob("*.geojson")), folder / "tissue.geojson")
    (folder / "sets.gmt").write_text("A\tof tests\tEPCAM\tKRT8\nB\t\tCD3E\tCD8A\tCD4\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small.ome.tif", "small.png", "small.jpg", *READ])
def test_a_hundred_mutated_copies_of_other_formats_end_well_too(originals, name):
    """HDF5 2.0 itself hangs over one features file in 300, beyond this hundred: a free object of 0 bytes."""
    check(run_copies(originals / name, 0, PER_PROCESS), kinds=2)


@pytest.mark.slow
def test_a_hundred_mutated_dicom_slides_end_well_too():
    check(run_copies(shared("data/wsi/openslide-python_boxes_0.dcm"), 0, PER_PROCESS), kinds=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
