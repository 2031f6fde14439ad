"""The layout of the SEAL files on the Hub: adapters alone, on any layers, wrapped, with a projection head.

Files of the real architectures are written by the rule beside the oracle, and held to a build made here of
timm's own classes, with the adapters beside the layers.
"""

import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import shared
from encoder_fixtures import (
    PREFIX,
    SEAL_TINY_CONCH,
    SEAL_TINY_VIT,
    TINY_VIT,
    adapters,
    as_batch,
    base_file,
    noise_patches,
    random_tensors,
    refuse,
    save,
    seal_file,
    tower_tensors,
)
from oracle_files import oracle_rule
from PIL import Image
from torch import nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from seal_extract.encoders import load_encoder
from seal_extract.errors import CheckpointError, EncoderError
from seal_extract.genes.omics import load_omics

pytestmark = pytest.mark.usefixtures("tiny_rows")


# --- the real architectures ---------------------------------------------------------------------------------


def publish(backbone, folder):
    """The vision and omics files of the Hub's layout, and the base."""
    script = [sys.executable, str(shared("oracle/make_checkpoints.py")), backbone, str(folder)]
    subprocess.run([*script, "--base", "--published"], check=True, capture_output=True)
    return folder / f"seal_{backbone}_vision.pth", folder / f"seal_{backbone}_omics.pth"


def state_of(path):
    state = torch.load(path, weights_only=True, mmap=True)
    state = state.get("state_dict", state)
    return {key.removeprefix("module."): value for key, value in state.items()}


class Conch(nn.Module):
    """Its image tower as the paper draws it: trunk, attentional pooler with one query, LayerNorm."""

    def __init__(self):
        super().__init__()
        size = {"img_size": 448, "num_classes": 0, "dynamic_img_size": True}
        self.trunk = timm.create_model("vit_base_patch16_224", **size)
        self.query = nn.Parameter(torch.empty(1, 512))
        self.attn = nn.MultiheadAttention(512, 8, kdim=768, vdim=768, batch_first=True)
        self.ln_q, self.ln_k, self.ln_contrast = nn.LayerNorm(512), nn.LayerNorm(768), nn.LayerNorm(512)

    def forward(self, x):
        keys = self.ln_k(self.trunk.forward_features(x))
        query = self.ln_q(self.query).expand(len(x), -1, -1)
        return self.ln_contrast(self.attn(query, keys, keys, need_weights=False)[0][:, 0])


def conch(base):
    visual = {k.removeprefix("visual."): v for k, v in base.items() if k.startswith("visual.")}
    model = Conch()
    named = {k.replace("attn_pool_contrast.", ""): v for k, v in visual.items()}
    model.load_state_dict({k: named[k] for k in model.state_dict()}, strict=True, assign=True)
    clip = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    return model, Compose([ToTensor(), Normalize(*clip)])


class Cls(nn.Module):
    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk

    def forward(self, x):
        return self.trunk.forward_features(x)[:, 0]


def univ2(base):
    with torch.device("meta"):
        trunk = timm.create_model(
            "vit_giant_patch14_224",
            img_size=224,
            patch_size=14,
            depth=24,
            num_heads=24,
            init_values=1e-5,
            embed_dim=1536,
            mlp_ratio=2.66667 * 2,
            num_classes=0,
            no_embed_class=True,
            mlp_layer=timm.layers.SwiGLUPacked,
            act_layer=nn.SiLU,
            reg_tokens=8,
            dynamic_img_size=True,
        )
    trunk.load_state_dict(base, strict=True, assign=True)
    resize = [Resize(224, InterpolationMode.BILINEAR), CenterCrop(224)]
    return Cls(trunk), Compose([*resize, ToTensor(), Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])


def hook(model, state, blocks):
    """The adapters of these blocks beside their layers; how many."""
    layers = [key.split(".lora_A")[0] for key in state if ".lora_A" in key]
    layers = [layer for layer in layers if int(layer.split("blocks.")[1].split(".")[0]) in blocks]
    for layer in layers:
        a, b = (state[f"{layer}.lora_{x}.default.weight"] for x in "AB")
        name = layer.removeprefix(PREFIX)
        model.get_submodule(name if hasattr(model, "attn") else f"trunk.{name}").register_forward_hook(
            lambda m, args, out, a=a, b=b: out + args[0] @ a.T @ b.T
        )
    return len(layers)


def apart(got, expected):
    return float(torch.linalg.norm(got - expected) / torch.linalg.norm(expected))


@pytest.mark.parametrize(
    ("backbone", "build", "blocks"),
    [("conch", conch, {11}), pytest.param("univ2", univ2, {21, 22, 23}, marks=pytest.mark.slow)],
)
def test_the_published_files_give_what_an_independent_merge_gives(backbone, build, blocks, tmp_path):
    vision, omics_path = publish(backbone, tmp_path)
    state = state_of(vision)
    base = torch.load(tmp_path / "pytorch_model.bin", weights_only=True, mmap=True)
    seal = load_encoder(f"seal-{backbone}", checkpoint=vision, device="cpu", precision="float32")
    model, transform = build(base)
    model.eval().requires_grad_(False)
    images = oracle_rule().make_inputs()["img_224"]
    x = torch.stack([transform(Image.fromarray(image)) for image in images])
    got = seal.encode(as_batch(images))
    hooked = hook(model, state, {max(blocks)})
    last_block_alone = model(x)
    hooked += hook(model, state, blocks - {max(blocks)})
    expected = model(x)
    assert hooked == 4 * len(blocks)
    print(f"{backbone}: rel {apart(got, expected):.1e}; last block {apart(last_block_alone, expected):.1e}")
    assert apart(got, expected) <= 1e-5
    if len(blocks) > 1:  # what the authors' code gives for this file
        assert apart(last_block_alone, expected) > 1e-2
    (merged,) = seal.description["merged"]
    assert (merged["rank"], merged["scale"], len(merged["layers"])) == (8, 1.0, hooked)
    assert {int(layer.split("blocks.")[1].split(".")[0]) for layer in merged["layers"]} == blocks

    w = {k: v.double() for k, v in state.items() if ".lora_" not in k}
    e = expected.double()
    hidden = (e @ w["decoder.decoder.0.weight"].T + w["decoder.decoder.0.bias"]).clamp(min=0)
    genes = (hidden @ w["decoder.decoder.3.weight"].T + w["decoder.decoder.3.bias"]).clamp(min=0)
    assert apart(seal.predict_expression(got).double(), genes) <= 1e-5
    projected = e @ w["projection_head.weight"].T + w["projection_head.bias"]
    assert apart(seal.project(got).double(), projected) <= 1e-5

    omics = load_omics(f"seal-{backbone}", checkpoint=omics_path)
    expression, reference = (
        oracle_rule().make_inputs()["genes"][:2],
        np.load(shared(f"oracle/{backbone}.npz")),
    )
    z = torch.from_numpy(reference["g_z_eps0"]).double()
    assert apart(omics.encode(expression).double(), z) <= 1e-5
    head = {k: v.double() for k, v in state_of(omics_path).items() if k.startswith("projection_head.")}
    z = z @ head["projection_head.weight"].T + head["projection_head.bias"]
    assert apart(omics.encode(expression, project=True).double(), z) <= 1e-5


# --- which layers are adapted -------------------------------------------------------------------------------

ALL = [f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
HEADS = {
    "linear": {"weight": (24, 24), "bias": (24,)},
    "no hidden layer": {"0.weight": (24, 24), "0.bias": (24,)},
    "mlp": {"0.weight": (32, 24), "0.bias": (32,), "2.weight": (24, 32), "2.bias": (24,)},
    "mlp with dropout": {"0.weight": (32, 24), "0.bias": (32,), "3.weight": (12, 32), "3.bias": (12,)},
}


def published(folder, tensors, spec=SEAL_TINY_VIT):
    """A vision file of the Hub's layout beside its base."""
    save(base_file(TINY_VIT), folder / "pytorch_model.bin")
    wrapped = {"state_dict": {f"module.{key}": value for key, value in tensors.items()}}
    return save(wrapped, folder / spec.published.files[0])


def head_tensors(shapes, seed=7):
    return {f"projection_head.{k}": v for k, v in random_tensors(shapes, seed).items()}


def load(path, name="seal-tiny-vit"):
    return load_encoder(name, checkpoint=path, device="cpu", precision="float32")


@pytest.mark.parametrize("on", [["blocks.0.mlp.fc1"], ALL[:4], ALL], ids=["one layer", "one block", "all"])
@pytest.mark.parametrize("r", [1, 4, 16])
def test_the_file_says_which_layers_are_adapted_and_with_which_rank(tmp_path, on, r):
    tensors = adapters(SEAL_TINY_VIT, on=on, r=r)
    encoder, base = load(published(tmp_path, tensors)), tower_tensors(TINY_VIT)
    for key, value in encoder.tower.state_dict().items():
        layer, expected = key.removesuffix(".weight"), base[key].double()
        if layer in on:
            a, b = (tensors[f"{PREFIX}{layer}.lora_{x}.default.weight"].double() for x in "AB")
            expected = expected + 8 / r * b @ a
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-5)
    file = SEAL_TINY_VIT.published.files[0]
    assert encoder.description["merged"] == [{"file": file, "rank": r, "scale": 8 / r, "layers": list(on)}]


def test_ranks_may_differ_from_layer_to_layer(tmp_path):
    tensors = adapters(SEAL_TINY_VIT, on=ALL[:1], r=2) | adapters(SEAL_TINY_VIT, on=ALL[1:2], r=16)
    merged = load(published(tmp_path, tensors)).merged
    assert [(one["rank"], one["scale"], one["layers"]) for one in merged] == [
        (2, 4.0, ALL[:1]),
        (16, 0.5, ALL[1:2]),
    ]


def test_what_was_merged_is_kept_when_saved(tmp_path):
    seal = load(published(tmp_path, adapters(SEAL_TINY_VIT, on=ALL)))
    seal.save_pretrained(tmp_path / "own")
    assert load_encoder(tmp_path / "own", device="cpu").merged == seal.merged


def key(layer, half):
    return f"{PREFIX}{layer}.lora_{half}.default.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({key(ALL[5], "B"): None}, ["1 half pairs (blocks.1.attn.proj: lora_A [4, 24])"]),
        ({key(ALL[5], "A"): (5, 24)}, ["1 adapters of two ranks in a pair", "[5, 24], lora_B [24, 4]"]),
        (
            {key("blocks.2.mlp.fc1", "A"): (4, 24), key("blocks.2.mlp.fc1", "B"): (96, 4)},
            ["1 adapters on layers that the tower does not have (blocks.2.mlp.fc1"],
        ),
        (
            {key("encoder.layer.0.mlp.fc1", "A"): (4, 24), key("encoder.layer.0.mlp.fc1", "B"): (96, 4)},
            ["1 adapters on layers that the tower does not have"],
        ),
        (
            {key("blocks.0.norm1", "A"): (4, 24), key("blocks.0.norm1", "B"): (24, 4)},
            ["1 adapters on what is no Linear layer (blocks.0.norm1"],
        ),
        (
            {key("patch_embed.proj", "A"): (4, 588), key("patch_embed.proj", "B"): (24, 4)},
            ["1 adapters on what is no Linear layer (patch_embed.proj"],
        ),
        ({key(ALL[5], "B"): (25, 4)}, ["1 adapters that do not fit their layer", "lora_B [25, 4]"]),
        ({key(ALL[5], "A"): (4, 23)}, ["1 adapters that do not fit their layer", "lora_A [4, 23]"]),
        ({key(ALL[5], "A"): (4,)}, ["1 adapters of two ranks in a pair"]),
        ({f"{PREFIX}{ALL[5]}.lora_magnitude_vector.default.weight": (24,)}, ["1 unexpected", "magnitude"]),
        ({f"{PREFIX}{ALL[5]}.lora_A.weight": (4, 24)}, ["1 unexpected"]),
        ({"text_head.weight": (4, 4)}, ["1 unexpected (text_head.weight)"]),
        ({"projection_head.weight": (24, 23)}, ["projection_head.", "not 24 columns"]),
        ({"projection_head.weight": (24, 24)}, ["projection_head. has {'weight': (24, 24)}"]),
        ({"projection_head.norm.weight": (24,)}, ["projection_head.norm.weight is of no Linear layer"]),
        (
            {"projection_head.1.weight": (24, 24), "projection_head.1.bias": (24,)},
            ["projection_head.* has layers [1]; allowed: from 0 on"],
        ),
        (
            {"projection_head.0.weight": (24, 24), "projection_head.0.bias": (24,)}
            | {"projection_head.999.weight": (24, 24), "projection_head.999.bias": (24,)},
            ["projection_head.* has layers [0, 999]"],
        ),
    ],
)
def test_what_is_refused(tmp_path, change, words):
    tensors = adapters(SEAL_TINY_VIT)
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.ones(shape)
    for form in (published(tmp_path, tensors), save(whole_with(tensors), tmp_path / "whole.pth")):
        refuse(form, *words, name="seal-tiny-vit")


def whole_with(tensors):
    """The same file with the base in it."""
    base = {k: v for k, v in seal_file(SEAL_TINY_VIT).items() if k not in adapters(SEAL_TINY_VIT)}
    return base | tensors


@pytest.mark.parametrize("spec", [SEAL_TINY_VIT, SEAL_TINY_CONCH], ids=lambda s: s.name)
def test_no_adapter_at_all(tmp_path, spec):
    none = {k: v for k, v in adapters(spec).items() if ".lora_" not in k}
    whole = {k: v for k, v in seal_file(spec).items() if ".lora_" not in k}
    for tensors in (none, whole):
        path = save(tensors, tmp_path / "a.pth")
        refuse(path, "no adapters; the file holds no pair of lora_A and lora_B", name=spec.name)


# --- projection heads ---------------------------------------------------------------------------------------


def by_hand(tensors, x):
    """The head in float64: Linear layers in the order of their numbers, ReLU between."""
    places = sorted({k.removeprefix("projection_head.").rpartition(".")[0] for k in tensors})
    for i, place in enumerate(places):
        front = f"projection_head.{place}." if place else "projection_head."
        x = x.clamp(min=0) if i else x
        x = x @ tensors[f"{front}weight"].double().T + tensors[f"{front}bias"].double()
    return x


@pytest.mark.parametrize("kind", HEADS)
def test_embeddings_go_through_the_head_of_the_file_and_are_the_backbones_without(tmp_path, kind):
    head = head_tensors(HEADS[kind])
    plain = load(published(tmp_path / "plain", adapters(SEAL_TINY_VIT)))
    seal = load(published(tmp_path / "head", adapters(SEAL_TINY_VIT) | head))
    patches = as_batch(noise_patches(3, 28))
    embeddings = seal.encode(patches)
    assert torch.equal(embeddings, plain.encode(patches))
    got = seal.project(embeddings.numpy())
    torch.testing.assert_close(got.double(), by_hand(head, embeddings.double()), rtol=1e-5, atol=1e-5)
    seal.save_pretrained(tmp_path / "own")
    again = load_encoder(tmp_path / "own", device="cpu")
    assert torch.equal(again.project(embeddings), got)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in seal.state_dict().items())


def test_an_encoder_without_a_head_says_so(tmp_path):
    plain = load(published(tmp_path, adapters(SEAL_TINY_VIT)))
    with pytest.raises(EncoderError, match="seal-tiny-vit has no projection head"):
        plain.project(torch.zeros(1, 24))


def test_a_folder_that_lost_its_head(tmp_path):
    """The config says that there is one."""
    head = head_tensors(HEADS["linear"])
    load(published(tmp_path, adapters(SEAL_TINY_VIT) | head)).save_pretrained(tmp_path / "own")
    load(published(tmp_path, adapters(SEAL_TINY_VIT))).save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").replace(tmp_path / "own" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"2 missing \(projection_head.bias, projection_head.weight\)"):
        load_encoder(tmp_path / "own", device="cpu")
