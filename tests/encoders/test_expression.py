"""The expression decoder of a SEAL file: exact, kept, and honest about names that nobody published."""

import numpy as np
import pytest
import torch
from conftest import shared
from encoder_fixtures import (
    SEAL_TINY_VIT,
    TINY_CONCH,
    adapters,
    as_batch,
    load,
    noise_patches,
    refuse,
    save,
    seal_file,
    untrained_encoder,
)
from oracle_files import oracle_rule

from seal_extract.encoders import find_spec
from seal_extract.encoders.encoder import Encoder
from seal_extract.encoders.heads import OFFICIAL_KEYS, decoder_shapes, filled_decoder
from seal_extract.errors import EncoderError, UsageError

pytestmark = pytest.mark.usefixtures("tiny_rows")


@pytest.fixture
def seal(tmp_path):
    return load("seal-tiny-vit", save(seal_file(SEAL_TINY_VIT), tmp_path / "a.pth"))


# --- the numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["conch", "univ2"])
def test_the_official_expression_from_the_official_embeddings(backbone):
    """The first 64 genes, for all three patch sizes, within max abs 1e-5 and relative 1e-6."""
    reference, det = np.load(shared(f"oracle/{backbone}.npz")), oracle_rule().det
    row = find_spec(f"seal-{backbone}")
    shapes = decoder_shapes(row.dim, row.published.decoder)
    tensors = {key: torch.from_numpy(det(OFFICIAL_KEYS[key], shape, 0)) for key, shape in shapes.items()}
    decoder = filled_decoder(row.dim, row.published.decoder, tensors)
    encoder = Encoder(row, torch.nn.Identity(), (), torch.float32, decoder)
    for size in (224, 256, 448):
        got = encoder.predict_expression(reference[f"emb_{size}"]).numpy()
        expected = reference[f"genes_{size}"]
        assert got.shape == (len(expected), 2000)
        assert np.abs(got[:, :64] - expected).max() <= 1e-5
        assert np.linalg.norm(got[:, :64] - expected) / np.linalg.norm(expected) <= 1e-6


def test_it_is_two_layers_with_relu(seal):
    embeddings = seal.encode(as_batch(noise_patches(3, 28)))
    w = {k: v.double() for k, v in adapters(SEAL_TINY_VIT).items()}
    first, second = ("decoder.decoder.0", "decoder.decoder.3")
    hidden = (embeddings.double() @ w[f"{first}.weight"].T + w[f"{first}.bias"]).clamp(min=0)
    expected = (hidden @ w[f"{second}.weight"].T + w[f"{second}.bias"]).clamp(min=0)
    got = seal.predict_expression(embeddings)
    assert (got.dtype, got.shape) == (torch.float32, (3, 10))
    assert got.min() >= 0
    assert got.max() > 0
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_arrays_and_lower_precision_are_taken(seal):
    embeddings = seal.encode(as_batch(noise_patches(2, 28)))
    expected = seal.predict_expression(embeddings)
    assert torch.equal(seal.predict_expression(embeddings.numpy()), expected)
    low = seal.predict_expression(embeddings.half())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, expected, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(seal.predict_expression(embeddings), expected)
    assert seal.predict_expression(torch.empty(0, 24)).shape == (0, 10)


# --- names --------------------------------------------------------------------------------------------------


def test_no_name_is_invented_and_a_panel_may_be_given_and_taken_back(seal):
    assert seal.genes is None
    names = [f"GENE{i}" for i in range(10)]
    seal.genes = names
    assert seal.genes == tuple(names)
    seal.genes = None
    assert seal.genes is None


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["A"] * 9, "the gene panel has 9 names; seal-tiny-vit has 10 columns"),
        ("ABCDEFGHIJ", "has 1 names"),
        ([*"ABCDEFGHI", "A"], "names A twice"),
        ([*"ABCDEFGHI", ""], "holds ''; allowed: one name per column"),
        ([*"ABCDEFGHI", 7], "holds 7"),
    ],
)
def test_a_panel_that_does_not_fit(seal, names, words):
    with pytest.raises(UsageError, match=words):
        seal.genes = names
    assert seal.genes is None


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("embeddings", "words"),
    [
        (torch.zeros(2, 23), r"embeddings for seal-tiny-vit came as float32 \[2, 23\]; allowed: float"),
        (torch.zeros(24), r"float32 \[24\]; allowed: float \[B, 24\]"),
        (torch.zeros(2, 24, dtype=torch.int64), "int64"),
        (torch.tensor([[0.0] * 24, [float("nan")] * 24]), "hold NaN or infinity, first in row 1"),
    ],
)
def test_embeddings_that_cannot_be_meant(seal, embeddings, words):
    with pytest.raises(UsageError, match=words):
        seal.predict_expression(embeddings)


def test_an_encoder_without_decoder():
    encoder = untrained_encoder(TINY_CONCH)
    words = (
        r"^tiny-conch has no expression decoder; those that have: seal-conch, .*seal-tiny-vit, .*seal-tiny$"
    )
    with pytest.raises(EncoderError, match=words):
        encoder.predict_expression(torch.zeros(1, 16))
    with pytest.raises(EncoderError, match="no expression decoder"):
        encoder.genes = ["A"]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("decoder.decoder.3.bias", torch.full((10,), float("nan")), "1 with NaN"),
        ("decoder.decoder.0.weight", torch.ones(6, 24).half(), "1 not plain float32"),
        ("decoder.decoder.3.weight", torch.ones(11, 6), "[11, 6], not [10, 6]"),
        ("decoder.decoder.6.bias", torch.ones(1), "1 unexpected (decoder.decoder.6.bias)"),
    ],
)
def test_decoder_weights_are_held_like_all_others(tmp_path, key, value, words):
    path = save(seal_file(SEAL_TINY_VIT) | {key: value}, tmp_path / "a.pth")
    refuse(path, words, name="seal-tiny-vit")
