"""The real architectures against what the authors' own code gave for weights that a rule fills.

`emb_raw_tensor` of the oracle is left out: its input, a standard normal tensor [1, 3, 224, 224] by its look,
is not among those that `weights.py` makes.
"""

import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import shared
from encoder_fixtures import PREFIX, as_batch
from PIL import Image

from seal_extract.encoders import find_spec, load_encoder
from seal_extract.encoders.lora import adapter_shapes, wrapped_key
from seal_extract.encoders.tower import empty_tower, tower_shapes

IMAGES = {"emb_224": "img_224", "emb_256": "img_256", "emb_448": "img_448", "emb_nolora_224": "img_224"}


def oracle_rule():
    """`weights.py` beside the reference numbers: how to fill weights and draw images."""
    spec = importlib.util.spec_from_file_location("oracle_weights", shared("oracle/weights.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys_of(backbone):
    return json.loads(shared(f"oracle/{backbone}_keys.json").read_text())


@pytest.mark.parametrize("backbone", ["conch", "univ2"])
def test_a_row_expects_exactly_the_keys_of_the_published_files(backbone):
    keys = {part: {k: tuple(s) for k, s, _ in keys_of(backbone)[part]} for part in ("vision", "base")}
    row = find_spec(f"seal-{backbone}")
    shapes, layout = tower_shapes(empty_tower(row)), row.published
    needed = {PREFIX + wrapped_key(k, layout.lora): s for k, s in shapes.items()}
    needed |= {PREFIX + k: s for k, s in adapter_shapes(shapes, layout.lora).items()}
    head = {k: s for k, s in keys["vision"].items() if k.startswith("decoder.")}
    unused = {k: s for k, s in keys["vision"].items() if layout.ignored and k.startswith(layout.ignored)}
    assert needed | head | unused == keys["vision"]

    base = find_spec(backbone).published
    unused = {k: s for k, s in keys["base"].items() if base.ignored and k.startswith(base.ignored)}
    assert {base.prefix + k: s for k, s in shapes.items()} | unused == keys["base"]


def fill_by_rule(backbone, folder):
    """The three files of a backbone: whole, adapters alone, and the image tower of the base."""
    det, keys = oracle_rule().det, keys_of(backbone)
    visual = "visual." if backbone == "conch" else ""
    tensors = {}
    for key, shape, _ in keys["vision"]:
        own = ".lora_" in key or key.startswith("decoder.")
        rule_key = key if own else visual + key.removeprefix(PREFIX).replace(".base_layer.", ".")
        tensors[key] = torch.from_numpy(det(rule_key, shape, 0))
    alone = {k: v for k, v in tensors.items() if ".lora_" in k or k.startswith("decoder.")}
    base = {
        visual + k.removeprefix(PREFIX).replace(".base_layer.", "."): v
        for k, v in tensors.items()
        if k not in alone
    }
    torch.save(tensors, folder / "whole.pth")
    torch.save(alone, folder / "alone.pth")
    torch.save(base, folder / "pytorch_model.bin")


@pytest.fixture(scope="module")
def conch_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conch")
    fill_by_rule("conch", folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def univ2_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("univ2")
    fill_by_rule("univ2", folder)
    yield folder
    shutil.rmtree(folder)


def hold_to_oracle(backbone, encoder, arrays):
    """Both paths within max abs 1e-5 and relative 1e-6, in float32 on the CPU."""
    reference, inputs = np.load(shared(f"oracle/{backbone}.npz")), oracle_rule().make_inputs()
    for array in arrays:
        images, expected = inputs[IMAGES[array]], reference[array]
        got_by = [encoder.encode(as_batch(images)).numpy()]
        by_pil = torch.stack([encoder.transform(Image.fromarray(i)) for i in images])
        if encoder.spec.input.resize_px or array == "emb_224":  # else the same tensor goes in
            got_by.append(encoder(by_pil).numpy())
        for got in got_by:
            assert np.abs(got - expected).max() <= 1e-5, array
            assert np.linalg.norm(got - expected) / np.linalg.norm(expected) <= 1e-6, array


def load(name, path):
    return load_encoder(name, checkpoint=path, device="cpu", precision="float32")


def test_conch(conch_files):
    seal = load("seal-conch", conch_files / "whole.pth")
    hold_to_oracle("conch", seal, ["emb_224", "emb_256", "emb_448"])
    hold_to_oracle("conch", load("conch", conch_files / "pytorch_model.bin"), ["emb_nolora_224"])
    from_parts = load("seal-conch", conch_files / "alone.pth").state_dict()
    assert all(torch.equal(v, from_parts[k]) for k, v in seal.state_dict().items())


@pytest.mark.slow
def test_univ2(univ2_files):
    hold_to_oracle("univ2", load("seal-univ2", univ2_files / "whole.pth"), ["emb_224", "emb_256", "emb_448"])
    hold_to_oracle("univ2", load("univ2", univ2_files / "pytorch_model.bin"), ["emb_nolora_224"])


MEASURE = """
import resource, sys
from pathlib import Path
import seal_extract.encoders.build as build
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
build.load_encoder(sys.argv[1], checkpoint=sys.argv[2], device="cpu")
print((peak() - before) / Path(sys.argv[2]).stat().st_size)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["seal-univ2", "univ2"])
def test_loading_takes_little_more_memory_than_the_file(univ2_files, name):
    path = univ2_files / ("whole.pth" if name.startswith("seal-") else "pytorch_model.bin")
    done = subprocess.run([sys.executable, "-c", MEASURE, name, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1.2
