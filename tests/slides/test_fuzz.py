"""Mutated files: each ends in what it holds or in one of our errors; none crashes, hangs or eats memory.

Run as a program, ``python tests/slides/test_fuzz.py FILE FIRST COUNT``, it prints what became of each copy.
Circles and bombs are in ``bombs.py``.
"""

import faulthandler
import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import DrawnSlide, run_file, shared
from mutations import metadata_places, mutated, peak_bytes
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
PER_PROCESS = 100
DICOM = "openslide-python_boxes_0.dcm"


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
@pytest.mark.parametrize("name", ["small.ome.tif", "small.png", "small.jpg", DICOM, *READ])
def test_a_hundred_mutated_copies_of_other_formats_end_well_too(originals, name):
    """HDF5 2.0 itself hangs over one features file in 300, beyond this hundred: a free object of 0 bytes."""
    path = shared("data/wsi", name) if name == DICOM else originals / name
    check(run_copies(path, 0, PER_PROCESS), kinds=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
