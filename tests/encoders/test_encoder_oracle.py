"""The real architectures with weights that a rule fills.

conch and univ2 are held to what the authors' own code gave for them. For virchow2, h0mini and phikon2 no such
numbers exist: they are held to a build made here of timm's and transformers' own classes, with the adapters
beside the layers and not in them, and torchvision's transforms.

`emb_raw_tensor` of the oracle is left out: its input, a standard normal tensor [1, 3, 224, 224] by its look,
is not among those that `weights.py` makes.
"""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import shared
from encoder_fixtures import PREFIX, as_batch, targets
from oracle_files import BACKBONES, BASE_FILES, WRAPPED, fill_by_rule, is_own, keys_of, oracle_rule, rule_key
from PIL import Image
from torch import nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from seal_extract.encoders import find_spec, load_encoder
from seal_extract.encoders.build import read_adapters
from seal_extract.encoders.heads import OFFICIAL_KEYS, decoder_shapes
from seal_extract.encoders.state_dict import as_row_spells
from seal_extract.encoders.tower import empty_tower, tower_shapes

IMAGES = {"emb_224": "img_224", "emb_256": "img_256", "emb_448": "img_448", "emb_nolora_224": "img_224"}


def spelled(keys, layout):
    """Names and shapes of a published file as its row spells them."""
    tensors = {k: torch.empty(shape) for k, shape, _ in keys}
    return {k: tuple(v.shape) for k, v in as_row_spells(tensors, layout).items()}


def without_ignored(shapes, layout):
    return {k: s for k, s in shapes.items() if not layout.ignored or not k.startswith(layout.ignored)}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_row_expects_exactly_the_keys_of_the_published_files(backbone):
    keys, row = keys_of(backbone), find_spec(f"seal-{backbone}")
    shapes, layout = tower_shapes(empty_tower(row)), row.published
    needed = {layout.prefix + k: s for k, s in shapes.items()}
    needed |= {OFFICIAL_KEYS[k]: s for k, s in decoder_shapes(row.dim, layout.decoder).items()}
    found = without_ignored(spelled(keys["vision"], layout), layout)
    adapters = {k: torch.empty(s, device="meta") for k, s in found.items() if ".lora_" in k}
    assert {k: s for k, s in found.items() if k not in adapters} == needed
    _, updates, complaints = read_adapters(adapters, layout, shapes)
    assert complaints == []
    assert sorted(u.key for u in updates) == sorted(f"{layer}.weight" for layer in targets(row))

    base = find_spec(backbone).published
    needed = {base.prefix + k: s for k, s in shapes.items()}
    assert without_ignored(spelled(keys["base"], base), base) == needed


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


@pytest.mark.parametrize("backbone", ["conch", pytest.param("univ2", marks=pytest.mark.slow)])
def test_the_authors_code_gave_the_same(backbone, tmp_path):
    fill_by_rule(backbone, tmp_path)
    seal = load(f"seal-{backbone}", tmp_path / "whole.pth")
    hold_to_oracle(backbone, seal, ["emb_224", "emb_256", "emb_448"])
    hold_to_oracle(backbone, load(backbone, tmp_path / "pytorch_model.bin"), ["emb_nolora_224"])
    from_parts = load(f"seal-{backbone}", tmp_path / "alone.pth").state_dict()
    assert all(torch.equal(v, from_parts[k]) for k, v in seal.state_dict().items())
    shutil.rmtree(tmp_path)


MEASURE = r"""
import re, sys, time
from pathlib import Path
import seal_extract.encoders.build as build
name, path = sys.argv[1], Path(sys.argv[2])
room = bytearray(2**22)

def peak():  # of this program; ru_maxrss would begin with that of the one that started it
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def load():
    build.load_encoder(name, checkpoint=path, device="cpu")

def read():
    with path.open("rb", buffering=0) as file:
        while file.readinto(room):
            pass

def least_time(act):
    times = []
    for _ in range(7):
        began = time.perf_counter()
        act()
        times.append(time.perf_counter() - began)
    return min(times)

before = peak()
load()
grown = peak() - before
print(grown / path.stat().st_size, least_time(load) / least_time(read))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_loading_takes_little_more_memory_than_the_file(backbone, tmp_path):
    """Time is printed and not held: of later loads, to that of reading the file, both from the page cache."""
    fill_by_rule(backbone, tmp_path)
    files = {f"seal-{backbone}": "whole.pth", backbone: BASE_FILES.get(backbone, "pytorch_model.bin")}
    for name, file in files.items():
        command = [sys.executable, "-c", MEASURE, name, tmp_path / file]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        memory, time = map(float, done.stdout.split())
        print(f"{name}: peak {memory:.2f} x the file, {time:.1f} x the time of reading it")
        assert memory <= 1.2
    shutil.rmtree(tmp_path)


# --- held to an independent build ---------------------------------------------------------------------------


def swiglu_vit(name, **kwargs):
    return timm.create_model(
        name,
        img_size=224,
        num_classes=0,
        global_pool="",
        mlp_layer=timm.layers.SwiGLUPacked,
        act_layer=nn.SiLU,
        **kwargs,
    )


def build_virchow2():
    return swiglu_vit("vit_huge_patch14_224", init_values=1e-5, reg_tokens=4, mlp_ratio=5.3375)


def build_h0mini():
    return swiglu_vit("vit_base_patch14_reg4_dinov2", mlp_ratio=5.33334)


def build_phikon2():
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=16,
        image_size=224,
        layer_norm_eps=1e-6,
    )
    return transformers.Dinov2Model(config)


BUILDERS = {"virchow2": build_virchow2, "h0mini": build_h0mini, "phikon2": build_phikon2}
STATISTICS = {
    "virchow2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "h0mini": ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)),
    "phikon2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def independent(backbone, tensors):
    """The model that the authors' code would build, and the function that embeds images with it."""
    model = BUILDERS[backbone]()  # not on the meta device: timm before 1.0 reads numbers back from a linspace
    base = {rule_key(backbone, k): v for k, v in tensors.items() if not is_own(k)}
    model.load_state_dict(as_installed(model, base), strict=True, assign=True)
    model.eval().requires_grad_(False)
    mean, std = STATISTICS[backbone]
    resize = [Resize(224, InterpolationMode.BICUBIC), CenterCrop(224)] if backbone != "phikon2" else []
    transform = Compose([*resize, ToTensor(), Normalize(mean, std)])

    def embed(images):
        x = torch.stack([transform(Image.fromarray(i)) for i in images])
        with torch.no_grad():
            if backbone == "phikon2":
                return model(x).last_hidden_state[:, 0].numpy()
            tokens = model(x)
            return torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1).numpy()

    return model, embed


def as_installed(model, base):
    """The base's arrays under the names that the installed timm or transformers uses."""
    if model.state_dict().keys() == base.keys():
        return base
    parts = {"attention.query": "q_proj", "attention.key": "k_proj", "attention.value": "v_proj"}
    for old, new in {**parts, "output.dense": "o_proj"}.items():
        base = {k.replace(f"attention.{old}.", f"attention.{new}."): v for k, v in base.items()}
    return base


def add_adapters(backbone, model, tensors):
    """W x + (8 / 8) B A x, the product beside the layer."""
    prefix = PREFIX + WRAPPED[backbone]
    targets = [k.split(".lora_A")[0].removeprefix(prefix) for k in tensors if ".lora_A" in k]
    assert len(targets) == len(keys_of(backbone)["lora"])
    for target in targets:
        a, b = (tensors[f"{prefix}{target}.lora_{x}.default.weight"] for x in "AB")
        model.get_submodule(target).register_forward_hook(
            lambda m, args, out, a=a, b=b: out + args[0] @ a.T @ b.T
        )


def hold_to_build(backbone, encoder, embed, sizes):
    for size in sizes:
        images = oracle_rule().make_inputs()[f"img_{size}"]
        got, expected = encoder.encode(as_batch(images)).numpy(), embed(images)
        apart = np.abs(got - expected).max(), np.linalg.norm(got - expected) / np.linalg.norm(expected)
        print(f"{encoder.spec.name} {size} px: max abs {apart[0]:.1e}, rel {apart[1]:.1e}")
        assert apart[0] <= 1e-5, size
        assert apart[1] <= 1e-6, size


@pytest.mark.parametrize(
    "backbone",
    [
        pytest.param("virchow2", marks=pytest.mark.slow),
        "h0mini",
        pytest.param("phikon2", marks=pytest.mark.slow),
    ],
)
def test_an_independent_build_gives_the_same(backbone, tmp_path):
    tensors = fill_by_rule(backbone, tmp_path)
    model, embed = independent(backbone, tensors)
    base = load(backbone, tmp_path / BASE_FILES.get(backbone, "pytorch_model.bin"))
    hold_to_build(backbone, base, embed, [256])
    del base
    add_adapters(backbone, model, tensors)
    seal = load(f"seal-{backbone}", tmp_path / "whole.pth")
    hold_to_build(backbone, seal, embed, [224, 256, 448])
    from_parts = load(f"seal-{backbone}", tmp_path / "alone.pth").state_dict()
    assert all(torch.equal(v, from_parts[k]) for k, v in seal.state_dict().items())
    shutil.rmtree(tmp_path)
