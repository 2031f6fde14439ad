"""The real architectures with weights that a rule fills.

conch and univ2 are held to what the authors' own code gave for them. For virchow2, h0mini and phikon2 no such
numbers exist: they are held to a build made here of timm's and transformers' own classes, with the adapters
beside the layers and not in them, and torchvision's transforms.

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
import timm
import torch
from conftest import shared
from encoder_fixtures import PREFIX, as_batch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from seal_extract.encoders import find_spec, load_encoder
from seal_extract.encoders.expression import decoder_shapes, official_key
from seal_extract.encoders.lora import adapter_shapes, wrapped_key
from seal_extract.encoders.spellings import as_row_spells
from seal_extract.encoders.tower import empty_tower, tower_shapes

BACKBONES = ["conch", "univ2", "virchow2", "h0mini", "phikon2"]
WRAPPED = {"virchow2": "model.", "h0mini": "model.", "phikon2": "model."}
BASE_FILES = {"phikon2": "model.safetensors"}
IMAGES = {"emb_224": "img_224", "emb_256": "img_256", "emb_448": "img_448", "emb_nolora_224": "img_224"}


def oracle_rule():
    """`weights.py` beside the reference numbers: how to fill weights and draw images."""
    spec = importlib.util.spec_from_file_location("oracle_weights", shared("oracle/weights.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys_of(backbone):
    return json.loads(shared(f"oracle/{backbone}_keys.json").read_text())


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
    needed = {layout.prefix + wrapped_key(k, layout.lora): s for k, s in shapes.items()}
    needed |= {layout.prefix + k: s for k, s in adapter_shapes(shapes, layout.lora).items()}
    needed |= {official_key(k): s for k, s in decoder_shapes(row.dim, layout.decoder).items()}
    assert without_ignored(spelled(keys["vision"], layout), layout) == needed

    base = find_spec(backbone).published
    needed = {base.prefix + k: s for k, s in shapes.items()}
    assert without_ignored(spelled(keys["base"], base), base) == needed


def rule_key(backbone, key):
    """The key under which the rule draws an array of the vision file: the base repository's own."""
    if ".lora_" in key or key.startswith("decoder."):
        return key
    base = key.removeprefix(PREFIX + WRAPPED.get(backbone, "")).replace(".base_layer.", ".")
    return ("visual." if backbone == "conch" else "") + base


def arrays_by_rule(backbone):
    """The whole vision file."""
    det = oracle_rule().det
    return {
        key: torch.from_numpy(det(rule_key(backbone, key), shape, 0))
        for key, shape, _ in keys_of(backbone)["vision"]
    }


def is_own(key):
    """An array that is not the base's."""
    return ".lora_" in key or key.startswith("decoder.")


def fill_by_rule(backbone, folder):
    """The three files of a backbone: whole, adapters alone, and the image tower of the base."""
    tensors = arrays_by_rule(backbone)
    torch.save(tensors, folder / "whole.pth")
    torch.save({k: v for k, v in tensors.items() if is_own(k)}, folder / "alone.pth")
    base = {rule_key(backbone, k): v for k, v in tensors.items() if not is_own(k)}
    if backbone in BASE_FILES:
        save_file(base, folder / BASE_FILES[backbone])
    else:
        torch.save(base, folder / "pytorch_model.bin")
    return tensors


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


MEASURE = r"""
import re, sys
from pathlib import Path
import seal_extract.encoders.build as build
def peak():  # of this program; ru_maxrss would begin with that of the one that started it
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
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
    with torch.device("meta"):
        model = BUILDERS[backbone]()
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
