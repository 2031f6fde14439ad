"""What each method trains and what it leaves alone; sixteen pairs learnt by heart."""

import dataclasses

import numpy as np
import pytest
import torch
from train_fixtures import GENES, pairs, tiny_encoder

from seal_extract.demo import untrained_encoder
from seal_extract.encoders.registry import find_spec
from seal_extract.encoders.tower import embed
from seal_extract.errors import UsageError
from seal_extract.train.config import BASELINES, LoraOptions, MultiScaleOptions, SealOptions
from seal_extract.train.finetune import add_adapters, embed_patches, merge_adapters
from seal_extract.train.multiscale import MultiScaleModel, first_of_each, mean_of
from seal_extract.train.pairs import Batches, TrainBatch
from seal_extract.train.seal import OmicsModel, SealModel, as_expression_decoder, new_omics

SD = torch.ones(GENES)
LORA = LoraOptions(dropout=0.0)


def omics_model(dim=32, kl=0.0):
    torch.manual_seed(0)
    return OmicsModel(new_omics(dim, GENES, (64, 32)), SD, kl)


def total(losses):
    return torch.stack(list(losses.values())).sum()


def learn(model, batch, steps, lr=3e-3):
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        loss = total(model(batch))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return loss.item()


@pytest.fixture
def batch():
    return next(Batches(pairs(16), 16).epoch(0))


def test_adapters_begin_at_the_base_and_merge_to_what_they_were():
    encoder, x = tiny_encoder(), torch.randn(2, 3, 32, 32)
    before = embed(encoder.tower, "cls", x)
    add_adapters(encoder.tower, LORA)
    assert torch.equal(embed(encoder.tower, "cls", x), before)
    names = {n.removesuffix(".lora_A") for n in encoder.tower.state_dict() if n.endswith("lora_A")}
    assert names == {f"blocks.1.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    for parameter in encoder.tower.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    trained = embed(encoder.tower, "cls", x)
    assert not torch.allclose(trained, before, atol=1e-3)
    merge_adapters(encoder.tower)
    assert encoder.tower.state_dict().keys() == tiny_encoder().tower.state_dict().keys()
    assert torch.allclose(embed(encoder.tower, "cls", x), trained, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        (SealOptions(), {"encoder", "omics", "decoder"}),
        (BASELINES["clip"], {"encoder", "omics"}),
        (BASELINES["regression"], {"encoder", "decoder"}),
        (BASELINES["probe"], {"decoder"}),
    ],
)
def test_gradients_are_where_they_belong(batch, options, trained):
    torch.manual_seed(0)
    model = SealModel(tiny_encoder(), omics_model(), SD, options)
    model.train()
    total(model(batch, seed=1)).backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {n.split(".")[0] for n in with_gradient} == trained
    inside = {n for n in with_gradient if n.startswith("encoder")}
    assert all("lora_" in n and "blocks.1." in n for n in inside)
    assert all(p.grad is None for n, p in model.encoder.named_parameters() if "lora_" not in n)


def test_sixteen_pairs_are_learnt_by_heart(batch):
    torch.manual_seed(0)
    options = SealOptions(lora=LoraOptions(blocks=2, dropout=0.0), decoder_hidden=64)
    model = SealModel(tiny_encoder(), omics_model(), SD, options)
    first = total(model(batch)).item()
    assert learn(model, batch, 250) < 0.2 * first
    images, expression = embed_patches(model.encoder, batch.patches), model.omics.losses(batch.expression)[0]
    similarity = torch.cosine_similarity(images[:, None], expression[None], dim=2)
    assert (similarity.argmax(1) == torch.arange(16)).float().mean() >= 0.9
    predicted = torch.stack([model.decoder(images).flatten(), batch.expression.flatten()])
    assert torch.corrcoef(predicted)[0, 1] > 0.9


def test_stage_1_learns_to_give_expression_back(batch):
    model = omics_model().eval()  # the mean of the latent, and BatchNorm as it stands
    first = model(batch)["reconstruction"].item()
    assert learn(model, batch, 200) < 0.3 * first
    assert model.losses(batch.expression)[0].shape == (16, 32)


def test_the_divergence_is_asked_for_by_its_weight(batch):
    assert set(omics_model()(batch)) == {"reconstruction"}
    assert set(omics_model(kl=0.1)(batch)) == {"reconstruction", "kl"}


def test_variation_depends_on_its_seed_alone(batch):
    encoder = tiny_encoder()
    assert torch.allclose(embed_patches(encoder, batch.patches), encoder.encode(batch.patches), atol=1e-6)
    one, again, other = (embed_patches(encoder, batch.patches, 0.1, seed) for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)


# --- multi-scale ------------------------------------------------------------------------------


def test_a_mean_over_groups_and_the_first_of_each():
    rows = torch.tensor([[1.0], [3.0], [5.0]])
    assert mean_of(rows, torch.tensor([0, 0, 1])).tolist() == [[2.0], [5.0]]
    assert first_of_each(torch.tensor([7, 3, 7, 9, 3])).tolist() == [0, 1, 3]


def regions(**over):
    """A batch of the sixteen regions of a lattice of 4 x 4."""
    return Batches(dataclasses.replace(pairs(16), **over), 4, regions=True).take(np.arange(16))


def test_multi_scale_learns_and_names_its_terms():
    torch.manual_seed(0)
    options = MultiScaleOptions(lora=LoraOptions(blocks=2, dropout=0.0))
    model = MultiScaleModel(tiny_encoder(), omics_model(), options)
    first = model(regions())
    assert set(first) == {"reconstruction", "patch", "region", "hierarchy"}
    assert learn(model, regions(), 80) < 0.6 * total(first).item()


def test_multi_scale_takes_embeddings_of_another_model():
    table = torch.randn(16, 5).numpy()
    model = MultiScaleModel(tiny_encoder(), None, MultiScaleOptions(lora=LORA), embedding_dim=5)
    assert set(model(regions(embeddings=table))) == {"patch", "region", "hierarchy"}
    with pytest.raises(UsageError, match="have no embeddings; name their key as obsm"):
        model(regions())


def test_what_cannot_be_aligned_is_refused():
    for message, call in [
        (
            "3, but the encoder has 2 blocks",
            lambda: add_adapters(tiny_encoder().tower, LoraOptions(blocks=3)),
        ),
        ("both need the same number", lambda: SealModel(tiny_encoder(), omics_model(16), SD, SealOptions())),
        ("nothing to align with", lambda: MultiScaleModel(tiny_encoder(), None, MultiScaleOptions())),
        ("one of them has to", lambda: SealOptions(alignment=0, reconstruction=0, prediction=0)),
    ]:
        with pytest.raises(UsageError, match=message):
            call()


def test_a_linear_decoder_is_kept_as_one_of_two_layers_exactly():
    linear, x = torch.nn.Linear(32, GENES), torch.randn(5, 32)
    assert torch.allclose(as_expression_decoder(linear)(x), linear(x).relu(), atol=1e-5)


@pytest.mark.slow  # CONCH's architecture
def test_stage_2_of_a_conch_fits_a_card_of_24_gb_at_batch_64():
    # counted: weights, gradients, moments of AdamW; 32 times what the backward pass keeps of 2 patches
    genes = 2000
    omics = OmicsModel(new_omics(512, genes, (1024, 512)), torch.ones(genes))
    model = SealModel(untrained_encoder(find_spec("conch")), omics, torch.ones(genes), SealOptions())
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    patches = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    batch = TrainBatch(patches, torch.rand(2, genes), torch.arange(2))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total(model(batch, seed=1))
    activations = 32 * sum(size for place, size in kept.items() if place not in weights)
    held = sum(p.nbytes * (4 if p.requires_grad else 1) for p in model.parameters())
    # one frozen block at a time has its own passing tensors: qkv, attention, the MLP's hidden layer
    passing = 64 * 197 * 768 * 4 * 12
    total_gb = (activations + held + passing) / 1e9
    print(f"\n{total_gb:.1f} GB: {activations / 1e9:.1f} kept for the backward pass, {held / 1e9:.1f} held")
    assert total_gb < 24
