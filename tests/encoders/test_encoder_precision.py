"""How far embeddings move when an encoder computes in fewer bits: the figures of the README's table.

Most real weights are gated; these are random ones in the real architectures, by the rule of the oracle. The
error of one embedding is |low - exact| / |exact| with Euclidean norms, exact being float32; the largest of
four images counts. The largest towers do not fit beside other work: plain vision transformers are computed
block by block, which gives the same numbers.
"""

import shutil

import numpy as np
import pytest
import torch
from encoder_fixtures import as_batch
from oracle_files import BACKBONES, BASE_FILES, fill_by_rule, oracle_rule

from seal_extract.encoders import Encoder, find_spec, load_encoder
from seal_extract.encoders.registry import ROWS
from seal_extract.encoders.tower import empty_tower, fill, tower_shapes
from seal_extract.encoders.transform import fit

LIMITS = {"bfloat16": 1e-2, "float16": 2e-3}
STREAMS = ("float32", *LIMITS)


def patches():
    """Two smooth images, one of noise, and a part of a larger one: uint8 [4, 3, 224, 224]."""
    images = oracle_rule().make_inputs()
    return as_batch(np.concatenate([images["img_224"], images["img_256"][:1, :224, :224]]))


def hold(encoder, precisions):
    """Every image's embedding in each precision within its limit of float32; on the CPU, or autocast's."""
    batch = patches()
    exact = encoder.encode(batch)
    for precision in precisions:
        encoder.precision = getattr(torch, precision)
        error = ((encoder.encode(batch) - exact).norm(dim=1) / exact.norm(dim=1)).max().item()
        print(f"{encoder.spec.name} {precision}: {error:.1e}")
        assert 0 < error < LIMITS[precision]


def drawn(name):
    """A base whose tower is filled under its own names."""
    spec, det = find_spec(name), oracle_rule().det
    tower = empty_tower(spec)
    fill(tower, {k: torch.from_numpy(det(k, shape, 0)) for k, shape in tower_shapes(tower).items()})
    return Encoder(spec, tower, (), torch.float32)


def test_conch_in_bfloat16():
    hold(drawn("conch"), ["bfloat16"])


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_seal_encoder_and_its_base(backbone, tmp_path):
    fill_by_rule(backbone, tmp_path)
    base = BASE_FILES.get(backbone, "pytorch_model.bin")
    for name, file in ((f"seal-{backbone}", "whole.pth"), (backbone, base)):
        hold(load_encoder(name, checkpoint=tmp_path / file, device="cpu"), LIMITS)
    shutil.rmtree(tmp_path)


PLAIN = [r.name for r in ROWS.values() if r.errors and "cls" in r.pooling and r.name not in BACKBONES]


def in_precision(precision, layer, tokens):
    low = precision != "float32"
    with torch.autocast("cpu", dtype=getattr(torch, precision) if low else None, enabled=low):
        return layer(tokens)


def drawn_layer(layer, prefix):
    layer.to_empty(device="cpu")
    for key, value in layer.state_dict().items():
        value.copy_(torch.from_numpy(oracle_rule().det(prefix + key, tuple(value.shape), 0)))
    return layer


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PLAIN if not name.startswith("seal-")])
@torch.inference_mode()
def test_a_plain_vision_transformer(name):
    """The figures are those of its row, whose recommended precision follows from them."""
    row = find_spec(name)
    tower, det = empty_tower(row), oracle_rule().det
    for key in ("cls_token", "pos_embed", "reg_token"):
        if getattr(tower, key, None) is not None:
            made = torch.from_numpy(det(key, tuple(getattr(tower, key).shape), 0))
            setattr(tower, key, torch.nn.Parameter(made, requires_grad=False))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (row.mean, row.std))
    images = fit(patches(), row.input).float().div(255).sub(mean).div(std)
    drawn_layer(tower.patch_embed, "patch_embed.")
    tokens = {p: in_precision(p, lambda x: tower._pos_embed(tower.patch_embed(x)), images) for p in STREAMS}
    for number, block in enumerate(tower.blocks):
        drawn_layer(block, f"blocks.{number}.")
        tokens = {p: in_precision(p, block, x) for p, x in tokens.items()}
        block.to_empty(device="meta")
    drawn_layer(tower.norm, "norm.")
    made = {p: in_precision(p, tower.norm, x).float() for p, x in tokens.items()}
    pooled = {p: x[:, 0] for p, x in made.items()}
    if row.pooling == "cls+mean":
        means = {p: x[:, tower.num_prefix_tokens :].mean(1) for p, x in made.items()}
        pooled = {p: torch.cat([x, means[p]], 1) for p, x in pooled.items()}
    exact = pooled.pop("float32")
    for precision, embeddings in pooled.items():
        error = ((embeddings - exact).norm(dim=1) / exact.norm(dim=1)).max().item()
        print(f"{name} {precision}: {error:.1e}")
        assert row.errors[precision] == pytest.approx(error, rel=0.15)
