"""Small Virchow2, H0-mini and Phikon-v2 with the key layout of the real ones, and files of theirs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from encoder_fixtures import LAYERS, adapter_shapes, random_tensors, wrapped_key

from seal_extract.encoders import load_encoder
from seal_extract.encoders.rows import H0MINI, PHIKON2, ROWS, VIRCHOW2
from seal_extract.encoders.spec import Decoder
from seal_extract.encoders.tower import empty_tower, tower_shapes
from seal_extract.errors import CheckpointError

P = "encoder.base_model.model."


def tiny(row, **kwargs):
    """A row with a tower of two blocks."""
    architecture = replace(
        row.architecture, kwargs={**row.architecture.kwargs, "depth": 2, "num_heads": 2, **kwargs}
    )
    rule = replace(row.input, resize_px=row.input.resize_px and 28)
    name = f"tiny-{row.name}"
    own = {"published": replace(row.published, commit=None, sha256={}), "source": f"lab/{name}"}
    return replace(row, name=name, dim=48, architecture=architecture, input=rule, **own)


def tiny_seal(row, base):
    """The SEAL row on a tiny base, laid out as the real one."""
    real = ROWS[f"seal-{row.name}"].published
    layout = replace(real, base=base.name, decoder=Decoder(hidden=6, genes=10))
    return replace(base, name=f"seal-{base.name}", source="lab/SEAL", published=layout)


VIRCHOW = tiny(VIRCHOW2, img_size=28, embed_dim=24, mlp_ratio=4.0)
H0 = tiny(H0MINI, img_size=28, embed_dim=24, mlp_ratio=4.0)
PHIKON = tiny(PHIKON2, img_size=64, embed_dim=48)
SEAL_VIRCHOW, SEAL_H0, SEAL_PHIKON = (
    tiny_seal(real, base) for real, base in ((VIRCHOW2, VIRCHOW), (H0MINI, H0), (PHIKON2, PHIKON))
)
SEALS = (SEAL_VIRCHOW, SEAL_H0, SEAL_PHIKON)


def targets(spec):
    """The adapted layers of their files, and of the real ones'."""
    last = {"seal-univ2": 23, "seal-phikon2": 23, "seal-virchow2": 31, "seal-h0mini": 11, "seal-conch": 11}
    layers = ("mlp.fc1", "mlp.fc2") if spec.published.layer_names == "transformers" else LAYERS
    front = "trunk." if spec.pooling == "conch" else ""
    return tuple(f"{front}blocks.{last.get(spec.name, 1)}.{layer}" for layer in layers)


@cache
def shapes_of(spec):
    return tower_shapes(empty_tower(spec))


def tower_tensors(spec):
    """A base, under the tower's own names."""
    return random_tensors(shapes_of(spec), 0)


def in_transformers_names(tensors, version=4):
    """The tensors of a ViT under the names of Dinov2Model, q, k and v apart."""
    named = {}
    old = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "output.dense"}
    new = {part: f"{part}_proj" for part in "qkvo"}
    attention = old if version == 4 else new
    for key, value in tensors.items():
        key = key.replace("blocks.", "encoder.layer.").replace(".ls", ".layer_scale")
        key = key.replace(".gamma", ".lambda1").replace(".attn.proj.", f".attention.{attention['o']}.")
        key = key.replace("patch_embed.proj.", "embeddings.patch_embeddings.projection.")
        key = key.replace("cls_token", "embeddings.cls_token").replace(
            "pos_embed", "embeddings.position_embeddings"
        )
        key = "layernorm." + key.removeprefix("norm.") if key.startswith("norm.") else key
        if ".attn.qkv." in key:
            parts = zip("qkv", value.chunk(3), strict=True)
            named |= {key.replace("attn.qkv", f"attention.{attention[p]}"): v.clone() for p, v in parts}
        else:
            named[key] = value
    return named


def as_published(spec, tensors, version=4):
    return (
        in_transformers_names(tensors, version) if spec.published.layer_names == "transformers" else tensors
    )


def base_file(spec, version=4):
    mask = (
        {"embeddings.mask_token": torch.zeros(1, 48)} if spec.published.layer_names == "transformers" else {}
    )
    return as_published(spec, tower_tensors(spec), version) | mask


def own_tensors(spec):
    """Adapters under the tower's names, and the decoder."""
    head = {"0.weight": (6, spec.dim), "0.bias": (6,), "3.weight": (10, 6), "3.bias": (10,)}
    lora = random_tensors(adapter_shapes(shapes_of(spec), targets(spec), 8), 1)
    return lora, random_tensors({f"decoder.decoder.{k}": s for k, s in head.items()}, 2)


def adapters_file(spec, prefix="model.", version=4):
    lora, head = own_tensors(spec)
    return {P + prefix + k: v for k, v in as_published(spec, lora, version).items()} | head


def seal_file(spec, prefix="model.", version=4):
    wrapped = {wrapped_key(k, targets(spec)): v for k, v in tower_tensors(spec).items()}
    named = as_published(spec, wrapped, version)
    return {P + prefix + k: v for k, v in named.items()} | adapters_file(spec, prefix, version)


def load(name, path, **kwargs):
    return load_encoder(name, checkpoint=path, device="cpu", **kwargs)


def refuse(name, path, *words):
    with pytest.raises(CheckpointError) as caught:
        load(name, path)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def add_tiny_vits(monkeypatch):
    """Make them known by name for one test."""
    for row in (VIRCHOW, H0, PHIKON, *SEALS):
        monkeypatch.setitem(ROWS, row.name, row)
