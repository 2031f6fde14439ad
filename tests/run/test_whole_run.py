"""Whole runs at full size: the official architectures on a real slide, a large slide in bounded memory."""

import os
import re
import shutil
import subprocess
import sys

import h5py
import numpy as np
import openslide
import pytest
import torch
from cohort_fixtures import write_untrained_encoder
from conftest import shared
from hub_server import GOOD_TOKEN, Repo, serve

from seal_extract import load_encoder, read_features
from seal_extract.bench.large_slide import write_large_slide
from seal_extract.demo import UNTRAINED

pytestmark = pytest.mark.slow
GIGABYTE = 2**30
RUN = """
import sys
from seal_extract.cli import main
status = main(sys.argv[1:])
print(open("/proc/self/status").read())  # not getrusage: what the parent held before exec counts there
sys.exit(status)
"""


def seal_extract(*words, **environment):
    """Run the command in a process of its own: (standard output, peak resident bytes)."""
    command = [sys.executable, "-c", RUN, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) * 1024


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Official files of conch and univ2, filled by the oracle's rule."""
    folder, script = tmp_path_factory.mktemp("official"), shared("oracle/make_checkpoints.py")
    for backbone in ("conch", "univ2"):
        subprocess.run([sys.executable, script, backbone, folder], check=True)
    yield folder
    shutil.rmtree(folder)  # 3 GB


def test_a_large_slide_in_at_most_2_gb(tmp_path):
    slide = write_large_slide(tmp_path / "large.svs", (40_000, 40_000))
    write_untrained_encoder(tmp_path / "encoder", UNTRAINED)
    out, peak = seal_extract(slide, "-o", tmp_path / "out", "--encoder", tmp_path / "encoder")
    assert int(re.search(r"large.svs: (\d+) patches", out)[1]) > 1000
    assert peak < 2 * GIGABYTE


@pytest.mark.parametrize("backbone", ["conch", "univ2"])
def test_official_weights_on_a_real_slide(backbone, checkpoints, tmp_path):
    path, file = shared("data/wsi/CMU-1-Small-Region.svs"), checkpoints / f"seal_{backbone}_vision.pth"
    seal_extract(path, "-o", tmp_path, "--encoder", f"seal-{backbone}", "--checkpoint", file)
    result = read_features(next(tmp_path.rglob("features_*/*.h5")))
    assert 40 <= len(result.grid) <= 70
    encoder = load_encoder(f"seal-{backbone}", checkpoint=file, device="cpu")
    rows = [0, len(result.grid) // 2, len(result.grid) - 1]
    with openslide.OpenSlide(path) as slide, torch.inference_mode():
        regions = [
            slide.read_region(result.grid.xy_l0[r].tolist(), 0, (224, 224)).convert("RGB") for r in rows
        ]
        want = encoder(torch.stack([encoder.transform(region) for region in regions])).numpy()
    np.testing.assert_allclose(result.features[rows], want, atol=1e-5)


def test_weights_from_the_hub_then_offline(checkpoints, tmp_path):
    path = shared("data/wsi/CMU-1-Small-Region.svs")
    weights = (checkpoints / "seal_conch_vision.pth").read_bytes()
    home = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": GOOD_TOKEN, "HF_HUB_DISABLE_XET": "1"}
    with serve() as hub:
        hub.repos["MahmoodLab/SEAL"] = Repo({"seal_conch_vision.pth": weights}, gated=True)
        words = (path, "--encoder", "seal-conch", "--revision", "main", "-o")
        seal_extract(*words, tmp_path / "online", HF_ENDPOINT=hub.url, **home)
    seal_extract(*words, tmp_path / "offline", "--offline", HF_ENDPOINT="http://127.0.0.1:9", **home)
    features = []
    for folder in ("online", "offline"):
        with h5py.File(next((tmp_path / folder).rglob("features_*/*.h5"))) as written:
            features.append(written["features"][()])
    np.testing.assert_array_equal(*features)
