"""Towers with a pooler, a head or a stem, held to builds of torch's, timm's and transformers' own classes.

The builds are small, have the names of the published files, and random weights. The whole models of
open_clip, transformers and TRIDENT were held to the rows in the same way, within 6e-6.
"""

import json
from collections import OrderedDict
from dataclasses import replace

import pytest
import timm
import torch
from encoder_fixtures import as_batch, noise_patches, refuse, save
from safetensors.torch import save_file
from test_public_rows import drawn
from torch import nn
from torch.nn import functional as F

from seal_extract.encoders import find_spec, load_encoder
from seal_extract.encoders.registry import ROWS
from seal_extract.encoders.tower import empty_tower
from seal_extract.errors import UsageError

WIDTH, DIM = 48, 32
TEXT = {"text.transformer.w": torch.ones(2), "logit_scale": torch.ones(())}


def shrunk(name, monkeypatch, side, **kwargs):
    """The row with a tower of two blocks and images of ``side`` px, known under its name."""
    row, sizes = find_spec(name), {"depth": 2, "embed_dim": WIDTH, "num_heads": 2, **kwargs}
    head = row.architecture.head and replace(
        row.architecture.head, widths=(DIM,) * len(row.architecture.head.widths)
    )
    own = {**row.architecture.kwargs, **sizes}
    architecture = replace(row.architecture, kwargs=own, head=head)
    row = replace(
        row,
        dim=DIM,
        architecture=architecture,
        input=replace(row.input, multiple_of=min(row.input.multiple_of, side), resize_px=side),
        published=replace(row.published, commit=None, sha256={}),
    )
    monkeypatch.setitem(ROWS, name, row)
    return row


def hold(name, path, model, side):
    """`load_encoder` gives what the build gives, and what tells two patches apart."""
    encoder = load_encoder(name, checkpoint=path, device="cpu")
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(images)
        torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-5)
    assert (expected[0] - expected[1]).norm() > 1e-2 * expected[0].norm()
    return encoder, images, expected


# --- builds -------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block as open_clip has it."""

    def __init__(self, act):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        layers = {"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "act": act, "c_proj": nn.Linear(4 * WIDTH, WIDTH)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed)[0]
        return x + self.mlp(self.ln_2(x))


class QuickGelu(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Pooler(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.empty(256, DIM))
        self.attn = nn.MultiheadAttention(DIM, 8, kdim=WIDTH, vdim=WIDTH, batch_first=True)
        self.ln_q, self.ln_k = nn.LayerNorm(DIM), nn.LayerNorm(WIDTH)

    def forward(self, x):
        keys = self.ln_k(x)
        return self.attn(self.ln_q(self.query).expand(len(x), -1, -1), keys, keys)[0]  # all 256 queries


class OpenClip(nn.Module):
    """The image half of open_clip's CLIP; with ``pool`` that of its CoCa."""

    def __init__(self, patch, side, *, pool):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(WIDTH))
        self.positional_embedding = nn.Parameter(torch.empty((side // patch) ** 2 + 1, WIDTH))
        self.ln_pre = nn.LayerNorm(WIDTH)
        blocks = nn.ModuleList(Block(nn.GELU() if pool else QuickGelu()) for _ in range(2))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_post = nn.LayerNorm(DIM if pool else WIDTH)
        self.proj = nn.Parameter(torch.empty(DIM if pool else WIDTH, DIM))
        self.attn_pool = Pooler() if pool else None

    def forward(self, images):
        x = self.conv1(images).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer["resblocks"]:
            x = block(x)
        if self.attn_pool is None:
            return self.ln_post(x)[:, 0] @ self.proj
        return F.normalize(self.ln_post(self.attn_pool(x))[:, 0] @ self.proj, dim=-1)


class Titan(nn.Module):
    """CONCH v1.5 as the code of TITAN and TRIDENT computes it; ``side`` is that of the stored positions."""

    def __init__(self, side):
        super().__init__()
        sizes = {"img_size": side, "depth": 2, "embed_dim": WIDTH, "num_heads": 2, "init_values": 1.0}
        self.trunk = timm.create_model("vit_large_patch16_224", num_classes=0, **sizes)
        self.attn_pool_contrast = nn.ModuleDict(
            {
                "ln_q": nn.LayerNorm(DIM),
                "ln_k": nn.LayerNorm(WIDTH),
                "to_q": nn.Linear(DIM, DIM, bias=False),
                "to_kv": nn.Linear(WIDTH, 2 * DIM, bias=False),
                "to_out": nn.Linear(DIM, DIM, bias=False),
            }
        )
        self.attn_pool_contrast.query = nn.Parameter(torch.empty(1, DIM))
        self.ln_contrast = nn.LayerNorm(DIM)

    def positions(self, rows, columns):
        stored = self.trunk.pos_embed
        side = int((stored.shape[1] - 1) ** 0.5)
        if (rows, columns) == (side, side):
            return stored
        grid = stored[:, 1:].reshape(1, side, side, WIDTH).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)  # DINO's guard against rounding
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([stored[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, WIDTH)], 1)

    def forward(self, images):
        x = self.trunk.patch_embed.proj(images)
        positions = self.positions(*x.shape[2:])
        x = torch.cat([self.trunk.cls_token.expand(len(x), -1, -1), x.flatten(2).mT], 1) + positions
        x = self.trunk.norm(self.trunk.blocks(x))
        pool = self.attn_pool_contrast
        q = pool["to_q"](pool["ln_q"](pool.query)).unflatten(1, (8, -1))  # [1, heads, d]
        k, v = (part.unflatten(2, (8, -1)) for part in pool["to_kv"](pool["ln_k"](x)).chunk(2, -1))
        weights = torch.einsum("qhd,bnhd->bhqn", q * q.shape[-1] ** -0.5, k).softmax(-1)
        mixed = torch.einsum("bhqn,bnhd->bqhd", weights, v).flatten(2)
        return self.ln_contrast(pool["to_out"](mixed)[:, 0])


# --- the rows -----------------------------------------------------------------------------------------------


def conch15(monkeypatch, path, side=32, stored=32):
    shrunk("conch-v1.5", monkeypatch, side, img_size=32)
    model = Titan(stored)
    return save(dict(drawn(model)), path / "conch_v1_5_pytorch_model.bin"), model


def omiclip(monkeypatch, path):
    shrunk("omiclip", monkeypatch, 28, img_size=28)
    model = OpenClip(14, 28, pool=True)
    named = {f"module.visual.{key}": value for key, value in drawn(model).items()}
    named |= {f"module.{key}": value for key, value in TEXT.items()}
    return save({"epoch": 3, "name": "run", "state_dict": named}, path / "checkpoint.pt"), model


def quiltnet(monkeypatch, path):
    shrunk("quiltnet-b32", monkeypatch, 64, img_size=64)
    model = OpenClip(32, 64, pool=False)
    text = {"positional_embedding": torch.ones(7, 4), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}
    named = {f"visual.{key}": value for key, value in drawn(model).items()} | text
    return save(named | {"logit_scale": torch.ones(())}, path / "open_clip_pytorch_model.bin"), model


def plip(monkeypatch, path):
    transformers = pytest.importorskip("transformers")
    shrunk("plip", monkeypatch, 64, img_size=64)
    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 4 * WIDTH,
    }
    words = {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=sizes | words,
        vision_config=sizes | {"image_size": 64, "patch_size": 32},
        projection_dim=DIM,
    )
    whole = transformers.CLIPModel(config)
    state = dict(drawn(whole)) | {"vision_model.embeddings.position_ids": torch.arange(5)[None]}

    def model(images):
        return whole.visual_projection(whole.vision_model(pixel_values=images).pooler_output)

    return save(state, path / "pytorch_model.bin"), model


def keep(monkeypatch, path):
    shrunk("keep", monkeypatch, 32, img_size=32)
    sizes = {"img_size": 32, "depth": 2, "embed_dim": WIDTH, "num_heads": 2, "init_values": 1e-5}
    visual = timm.create_model("vit_large_patch16_224", num_classes=0, **sizes)
    head = nn.Sequential(nn.Linear(WIDTH, DIM), nn.GELU(), nn.Linear(DIM, DIM))
    named = {f"visual.{key}".replace(".gamma", ".weight"): value for key, value in drawn(visual).items()}
    named |= {f"visual_head.{key}": value for key, value in drawn(head).items()} | TEXT
    save_file(named, path / "model.safetensors")
    return path / "model.safetensors", lambda images: F.normalize(head(visual(images)), dim=-1)


MAKERS = {"conch-v1.5": conch15, "omiclip": omiclip, "quiltnet-b32": quiltnet, "plip": plip, "keep": keep}
SIDES = {"conch-v1.5": 32, "omiclip": 28, "quiltnet-b32": 64, "plip": 64, "keep": 32}


@pytest.mark.parametrize("name", MAKERS)
def test_a_row_gives_what_a_build_under_the_names_of_its_file_gives(name, monkeypatch, tmp_path):
    path, model = MAKERS[name](monkeypatch, tmp_path)
    encoder, images, expected = hold(name, path, model, SIDES[name])
    is_unit = torch.allclose(expected.norm(dim=1), torch.ones(2))
    assert is_unit == (name in ("omiclip", "keep"))  # the authors divide by the length in these two alone
    encoder.save_pretrained(tmp_path / "ours")
    assert torch.equal(load_encoder(tmp_path / "ours", device="cpu")(images), encoder(images))
    patches = as_batch(noise_patches(2, 80))
    assert encoder.encode_tokens(patches).shape[3] == WIDTH
    assert encoder.attention_maps(patches).shape[:2] == (2, 8 if "contrast" in str(encoder.tower) else 2)


@pytest.mark.parametrize("side", [32, 48, 64])
def test_positions_of_conch_v15_are_enlarged_as_dino_does(side, monkeypatch, tmp_path):
    path, model = conch15(monkeypatch, tmp_path, side)
    hold("conch-v1.5", path, model, side)


def test_positions_of_conch_v15_that_a_file_has_enlarged_already(monkeypatch, tmp_path):
    path, model = conch15(monkeypatch, tmp_path, side=64, stored=64)
    encoder, *_ = hold("conch-v1.5", path, model, 64)
    assert encoder.spec.architecture.kwargs["img_size"] == 64
    path, _ = conch15(monkeypatch, tmp_path, side=64, stored=48)
    refuse(path, "trunk.pos_embed [1, 10, 48], not [1, 5, 48]", name="conch-v1.5")


@pytest.mark.parametrize("is_old", [False, True], ids=["of timm", "of the authors"])
def test_ctranspath_is_swin_behind_three_convolutions(is_old, monkeypatch, tmp_path):
    row = find_spec("ctranspath")
    kwargs = {**row.architecture.kwargs, "embed_dim": 24}
    published = replace(row.published, commit=None, sha256={})
    architecture = replace(row.architecture, kwargs=kwargs)
    monkeypatch.setitem(
        ROWS, "ctranspath", replace(row, dim=192, architecture=architecture, published=published)
    )
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, embed_dim=24)
    stem = [
        *(nn.Conv2d(3, 3, 3, 2, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU()),
        *(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Conv2d(6, 24, 1),
    ]
    proj = nn.Sequential(*stem)
    model.patch_embed.proj = proj
    model.patch_embed.forward = lambda images: model.patch_embed.norm(proj(images).permute(0, 2, 3, 1))
    named = dict(drawn(model))
    if is_old:  # the step down at the end of a stage, and buffers that timm computes now
        for stage in (1, 2, 3):
            for key in [key for key in named if key.startswith(f"layers.{stage}.downsample")]:
                named[key.replace(f"layers.{stage}.", f"layers.{stage - 1}.")] = named.pop(key)
        named["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    save_file({key: value.contiguous() for key, value in named.items()}, tmp_path / "model.safetensors")
    hold("ctranspath", tmp_path / "model.safetensors", model, 224)


@pytest.mark.parametrize(
    ("kwargs", "said"), [({"patch_size": 32}, "patches of 32 px"), ({"embed_dim": 100}, "width 100; allowed")]
)
def test_a_stem_of_convolutions_has_few_sizes(kwargs, said):
    row = find_spec("seal-tiny")
    architecture = replace(row.architecture, kwargs={**row.architecture.kwargs, **kwargs})
    with pytest.raises(UsageError, match=said):
        empty_tower(replace(row, architecture=architecture))


# --- adapters, and what must not load -----------------------------------------------------------------------

ADAPTED = {  # a layer by the name that it has in the authors' model, and its weight in the tower
    "conch-v1.5": ("trunk.blocks.1.attn.qkv", "trunk.blocks.1.attn.qkv", slice(None)),
    "omiclip": ("visual.transformer.resblocks.1.mlp.c_fc", "trunk.blocks.1.mlp.fc1", slice(None)),
    "quiltnet-b32": ("visual.transformer.resblocks.1.mlp.c_proj", "blocks.1.mlp.fc2", slice(None)),
    "plip": ("vision_model.encoder.layers.1.self_attn.k_proj", "blocks.1.attn.qkv", slice(WIDTH, 2 * WIDTH)),
    "keep": ("visual.blocks.1.mlp.fc1", "blocks.1.mlp.fc1", slice(None)),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_is_merged_by_the_names_of_the_authors_model(name, monkeypatch, tmp_path):
    path, _ = MAKERS[name](monkeypatch, tmp_path)
    layer, key, rows = ADAPTED[name]
    plain = load_encoder(name, checkpoint=path, device="cpu").tower.state_dict()[f"{key}.weight"]
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, plain.shape[1], generator=generator)
    b = torch.randn(len(plain[rows]), 4, generator=generator)
    front = f"base_model.model.{layer}.lora_"
    (tmp_path / "lora").mkdir()
    save_file({f"{front}A.weight": a, f"{front}B.weight": b}, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [layer.split(".")[-1]]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    merged = load_encoder(name, checkpoint=path, adapter=tmp_path / "lora", device="cpu").tower
    expected = plain.clone()
    expected[rows] += 2 * b @ a
    torch.testing.assert_close(merged.state_dict()[f"{key}.weight"], expected)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("omiclip", {"state_dict": {}}, "holds"),
        ("quiltnet-b32", {"visual.proj": torch.ones(DIM, WIDTH)}, "head.0.weight [48, 32], not [32, 48]"),
        ("quiltnet-b32", {"visual.cls_token": torch.ones(1, 1, WIDTH)}, "cls_token (as timm names it)"),
        (
            "plip",
            {"vision_model.head.0.weight": torch.ones(DIM, WIDTH)},
            "1 unexpected (visual_projection.weight)",
        ),
        ("conch-v1.5", {"attn_pool_contrast.to_kv.weight": torch.ones(3, WIDTH)}, "to_kv.weight"),
    ],
)
def test_a_file_with_a_wrong_tensor_is_refused_in_one_line(name, change, words, monkeypatch, tmp_path):
    path, _ = MAKERS[name](monkeypatch, tmp_path)
    content = torch.load(path, weights_only=True)
    refuse(save({**content, **change}, path), words, name=name)
