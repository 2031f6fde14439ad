"""How far embeddings move when an encoder computes in fewer bits: the figures of the README's table.

The real weights are gated; these are random ones in the real architectures, by the rule of the oracle. The
error of one embedding is |low - exact| / |exact| with Euclidean norms, exact being float32; the largest of
four images counts.
"""

import shutil

import numpy as np
import pytest
import torch
from encoder_fixtures import as_batch
from oracle_files import BACKBONES, BASE_FILES, fill_by_rule, oracle_rule

from seal_extract.encoders import Encoder, find_spec, load_encoder
from seal_extract.encoders.tower import empty_tower, fill, tower_shapes

LIMITS = {"bfloat16": 1e-2, "float16": 2e-3}


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
    """A base whose tower is filled under its own names; the oracle has no file of `uni`."""
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


@pytest.mark.slow
def test_uni():
    hold(drawn("uni"), LIMITS)
