"""How far embeddings move when an encoder computes in fewer bits: the figures of the README's table.

Most real weights are gated; these are random ones in the real architectures, by the rule of the oracle. The
error of one embedding is |low - exact| / |exact| with Euclidean norms, exact being float32; the largest of
four images counts.
"""

import shutil

import numpy as np
import pytest
import torch
from encoder_fixtures import as_batch
from oracle_files import BACKBONES, BASE_FILES, fill_by_rule, oracle_rule
from torch.nn.functional import interpolate

from seal_extract.encoders import Encoder, find_spec, load_encoder
from seal_extract.encoders.registry import ROWS
from seal_extract.encoders.tower import empty_tower, fill, tower_shapes

LIMITS = {"bfloat16": 1e-2, "float16": 2e-3}
BASES = [row for row in ROWS.values() if not row.name.startswith("seal-")]


def patches(side_px):
    """Two smooth images, one of noise, and a part of a larger one: uint8 [4, 3, side_px, side_px]."""
    images = oracle_rule().make_inputs()
    batch = as_batch(np.concatenate([images["img_224"], images["img_256"][:1, :224, :224]]))
    return interpolate(batch, (side_px, side_px))


def hold(encoder, precisions, side_px=224):
    """Every image's embedding in each precision within its limit of float32; returns the largest errors."""
    batch = patches(side_px)
    exact, errors = encoder.encode(batch), {}
    for precision in precisions:
        encoder.precision = getattr(torch, precision)
        error = ((encoder.encode(batch) - exact).norm(dim=1) / exact.norm(dim=1)).max().item()
        print(f"{encoder.spec.name} {precision}: {error:.1e}")
        assert 0 < error < LIMITS[precision]
        errors[precision] = error
    return errors


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


@pytest.mark.slow
@pytest.mark.parametrize("name", [row.name for row in BASES if row.errors and row.name not in BACKBONES])
def test_another_encoder(name):
    """The figures are those of its row, whose recommended precision follows from them."""
    row = find_spec(name)
    assert hold(drawn(name), LIMITS, row.patch_px) == pytest.approx(dict(row.errors), rel=0.15)
