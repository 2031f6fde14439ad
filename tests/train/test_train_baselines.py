"""ST-Net, BLEEP and PathOmCLIP, each held to its authors' code, and sixteen pairs learnt by heart."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_train_methods import learn, omics_model, total
from train_fixtures import GENES, TINY, pairs, tiny_encoder

from seal_extract.demo import untrained_encoder
from seal_extract.encoders.spec import Architecture
from seal_extract.errors import UsageError
from seal_extract.train.baselines import (
    BleepModel,
    PathOmClipModel,
    StNetModel,
    nearest_expression,
    neighbour_sets,
)
from seal_extract.train.config import BaselineOptions, LoraOptions
from seal_extract.train.losses import bleep_loss
from seal_extract.train.pairs import Batches

MEAN = torch.arange(GENES) / 10
SMALL = BaselineOptions(projection_dim=16, dropout=0.0)


def make(method, encoder=None, options=SMALL):
    torch.manual_seed(0)
    encoder = encoder or tiny_encoder()
    if method == "stnet":
        return StNetModel(encoder, options, MEAN)
    if method == "bleep":
        return BleepModel(encoder, options, GENES)
    return PathOmClipModel(encoder, omics_model(encoder.spec.dim), options, GENES)


def batch_of(method, count=16):
    """All pairs of a square, or their regions."""
    return Batches(pairs(count), 4, regions=method == "pathomclip").take(np.arange(count))


@pytest.mark.parametrize("method", ["stnet", "bleep", "pathomclip"])
@pytest.mark.parametrize("train", ["all", "lora", "nothing"])
def test_of_the_encoder_all_adapters_or_nothing_is_trained(method, train):
    model = make(method, options=BaselineOptions(train=train, lora=LoraOptions(dropout=0.0)))
    if method == "stnet":
        torch.nn.init.normal_(model.decoder.weight)  # from weights of zero nothing flows back
    total(model(batch_of(method), seed=1)).backward()
    with_gradient = {n for n, p in model.encoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert bool(with_gradient) == (train != "nothing")
    assert any("patch_embed" in name for name in with_gradient) == (train == "all")
    assert all("lora_" in name for name in with_gradient) or train == "all"


@pytest.mark.parametrize("method", ["stnet", "bleep", "pathomclip"])
def test_sixteen_pairs_are_learnt_by_heart(method):
    model = make(method)
    first = total(model(batch_of(method))).item()
    assert learn(model, batch_of(method), 25) < 0.8 * first


# --- ST-Net -----------------------------------------------------------------------------------


def test_st_net_begins_at_the_mean_and_its_loss_is_that_of_its_code_over_the_batch():
    """Its code: ``torch.sum((pred - gene) ** 2) / outputs``, of a batch."""
    model, batch = make("stnet"), batch_of("stnet")
    published = ((MEAN - batch.expression) ** 2).sum() / GENES
    assert model(batch)["prediction"].item() * len(batch) == pytest.approx(published.item(), rel=1e-5)


def test_st_nets_densenet_121_is_trained_whole():
    spec = replace(TINY, architecture=Architecture("densenet121", {}), pooling="own", dim=1024)
    model = make("stnet", untrained_encoder(spec))
    before = {name: value.clone() for name, value in model.encoder.tower.state_dict().items()}
    learn(model.train(), batch_of("stnet"), 3)
    after = model.encoder.tower.state_dict()
    moved = {name.rpartition(".")[2] for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


# --- BLEEP ------------------------------------------------------------------------------------


def test_bleeps_loss_is_that_of_its_code():
    """Numbers of ``CLIPModel`` of bowang-lab/BLEEP with identities for its encoders and projections."""
    images = torch.arange(12.0).reshape(4, 3).sin()
    spots = (torch.arange(12.0).reshape(4, 3) * 1.7).cos()
    assert bleep_loss(images, spots).item() == pytest.approx(2.0363019, abs=1e-5)
    assert bleep_loss(images, spots, 0.5).item() == pytest.approx(3.2162962, abs=1e-5)


def test_the_nearest_spots_are_averaged():
    expression = torch.tensor([[1.0], [3.0], [100.0]])
    spots = torch.tensor([[1.0, 0.1], [5.0, -0.2], [-1.0, 0.0]])
    assert nearest_expression(torch.tensor([[2.0, 0.0]]), spots, expression, 2).tolist() == [[2.0]]
    assert nearest_expression(torch.tensor([[2.0, 0.0]]), spots, expression, 50).shape == (1, 1)


def test_bleep_finds_spots_that_it_learnt_by_heart():
    model = make("bleep", options=BaselineOptions(projection_dim=16, dropout=0.0, nearest=1))
    learn(model, batch_of("bleep"), 50)
    batches = Batches(pairs(16), 16)
    predicted = model.predict(batches, batches)
    assert (
        torch.corrcoef(torch.stack([predicted.flatten(), batch_of("bleep").expression.flatten()]))[0, 1] > 0.6
    )


# --- PathOmCLIP -------------------------------------------------------------------------------


def test_regions_become_sets_with_gaps():
    rows = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])
    first, sets, missing = neighbour_sets(rows, torch.tensor([0, 0, 1, 1, 1]))
    assert first.tolist() == [0, 2]
    assert sets[..., 0].tolist() == [[1, 2, 0], [3, 4, 5]]
    assert missing.tolist() == [[False, False, True], [False, False, False]]


def test_a_patch_attends_to_its_neighbours_and_to_nothing_else():
    model, rows = make("pathomclip").eval(), torch.randn(5, 32)
    _, sets, missing = neighbour_sets(rows, torch.tensor([0, 0, 1, 1, 1]))
    together = model.local(sets, src_key_padding_mask=missing)[:, 0]
    alone = [model.local(rows[part][None])[0, 0] for part in (slice(0, 2), slice(2, 5))]
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)


def test_seals_variant_attends_across_the_batch():
    """As ``PathomClipWrapper`` of mahmoodlab/SEAL: the layer is given [B, D]."""
    model, batch = make("pathomclip", options=BaselineOptions(context="batch")).eval(), batch_of("bleep")
    seals = torch.nn.TransformerEncoderLayer(32, nhead=8, dim_feedforward=2048, dropout=0.1).eval()
    seals.load_state_dict(model.local.state_dict())
    expected = (model.predict(seals(model.embed(batch, None))) - batch.expression).square().mean()
    assert model(batch)["prediction"].item() == pytest.approx(expected.item(), rel=1e-4)
    turned = batch_of("bleep")
    rest = model.embed(turned, None)[8:]
    assert not torch.allclose(
        model.local(rest[None])[0, 0], model.local(model.embed(batch, None)[None])[0, 8]
    )


def test_pathomclip_takes_embeddings_of_another_model_and_refuses_what_its_heads_do_not_divide():
    table = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
    batch = Batches(replace(pairs(16), embeddings=table), 4, regions=True).take(np.arange(16))
    model = PathOmClipModel(tiny_encoder(), None, SMALL, GENES, 5)
    assert set(model(batch)) == {"alignment", "prediction"}
    encoder = tiny_encoder()
    encoder.spec = replace(encoder.spec, dim=33)
    with pytest.raises(UsageError, match="has 33 dimensions; pathomclip allows multiples of 8"):
        PathOmClipModel(encoder, omics_model(33), SMALL, GENES)
