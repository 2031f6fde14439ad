"""The expression half of a SEAL checkpoint: exact to the authors' code, deterministic, strict."""

import os

import numpy as np
import pytest
import torch
from conftest import shared
from encoder_fixtures import SEAL_TINY_CONCH, TINY_CONCH, base_file, local_hub, save, seal_file
from hub_server import GOOD_TOKEN, Repo
from oracle_files import keys_of, oracle_rule

from seal_extract.cli import main
from seal_extract.encoders import load_encoder
from seal_extract.encoders.hub import fetch
from seal_extract.errors import CheckpointError, MissingOnHubError, TokenError, UsageError
from seal_extract.genes.gene_lists import read_panel
from seal_extract.genes.omics import load_omics

GENES, DIM = 6, 4
WIDE, NARROW = 1024, 512


def small_file(genes=GENES, dim=DIM, seed=0):
    """An omics file for few genes: the names of the real one, and its hidden layers."""
    layers = {"encoder.0": (WIDE, genes), "encoder.4": (NARROW, WIDE)}
    layers |= {"fc_mu": (dim, NARROW), "fc_logvar": (dim, NARROW)}
    layers |= {"decoder.0": (NARROW, dim), "decoder.2": (WIDE, NARROW), "decoder.5": (genes, WIDE)}
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (outputs, inputs) in layers.items():
        tensors[f"{name}.weight"] = torch.randn(outputs, inputs, generator=draw) / inputs**0.5
        tensors[f"{name}.bias"] = torch.randn(outputs, generator=draw) / 20
    for name, width in {"encoder.1": WIDE, "encoder.5": NARROW}.items():
        tensors[f"{name}.weight"] = 1 + torch.randn(width, generator=draw) / 10
        tensors[f"{name}.bias"] = torch.randn(width, generator=draw) / 20
        tensors[f"{name}.running_mean"] = torch.randn(width, generator=draw) / 3
        tensors[f"{name}.running_var"] = 0.5 + torch.rand(width, generator=draw)
        tensors[f"{name}.num_batches_tracked"] = torch.tensor(7)
    for i in range(3):
        tensors |= {f"flows.{i}.{x}": torch.randn(dim, generator=draw) for x in "uw"}
        tensors[f"flows.{i}.b"] = torch.randn(1, generator=draw)
    return tensors


def expression(rows=3, genes=GENES):
    return np.log1p(np.random.default_rng(0).poisson(4, (rows, genes))).astype(np.float32)


@pytest.fixture
def omics(tmp_path):
    return load_omics(save(small_file(), tmp_path / "seal_small_omics.pth"))


# --- the numbers --------------------------------------------------------------------------------------------


@pytest.fixture(params=["conch", "univ2"])
def official(request, tmp_path):
    """A real-sized omics file filled by the oracle's rule, its inputs, and what the authors' code gave."""
    rule, tensors = oracle_rule(), {}
    for key, shape, dtype in keys_of(request.param)["omics"]:
        value = rule.det(key, shape, 0)
        tensors[key] = torch.from_numpy(np.zeros(shape, dtype) if value is None else value)
    path = save(tensors, tmp_path / f"seal_{request.param}_omics.pth")
    loaded = load_omics(f"seal-{request.param}", checkpoint=path)
    yield loaded, rule.make_inputs()["genes"], np.load(shared(f"oracle/{request.param}.npz"))
    path.unlink()


def test_the_official_numbers(official):
    """Mean, log variance, embedding and reconstruction: within max abs 1e-5 and relative 1e-6."""
    omics, genes, reference = official
    embeddings = omics.encode(genes)
    mu, logvar = omics.distribution(genes)
    found = {"g_mu": mu, "g_logvar": logvar, "g_z_eps0": embeddings, "g_y_eps0": omics.decode(embeddings)}
    for name, got in found.items():
        expected = reference[name]
        got = got.numpy()[: len(expected), : expected.shape[1]]
        assert np.abs(got - expected).max() <= 1e-5, name
        assert np.linalg.norm(got - expected) / np.linalg.norm(expected) <= 1e-6, name


def test_the_flows_are_planar(omics):
    mu, _ = omics.distribution(expression())
    z, w = mu.double().numpy(), {k: v.double().numpy() for k, v in small_file().items()}
    for i in range(3):
        bend = np.tanh(z @ w[f"flows.{i}.w"] + w[f"flows.{i}.b"])
        z = z + bend[:, None] * w[f"flows.{i}.u"]
    np.testing.assert_allclose(omics.encode(expression()).numpy(), z, rtol=1e-5, atol=1e-6)


def test_the_same_rows_give_the_same_embeddings(omics):
    rows = expression(4)
    first = omics.encode(rows)
    assert (first.dtype, first.shape) == (torch.float32, (4, DIM))
    assert torch.equal(omics.encode(torch.from_numpy(rows)), first)
    torch.testing.assert_close(omics.encode(rows[1:2]), first[1:2])  # its statistics are those of training
    assert omics.encode(rows[:0]).shape == (0, DIM)


def test_it_is_frozen_introduces_itself_and_one_may_train_on_its_embeddings(omics):
    assert not any(p.requires_grad for p in omics.parameters())
    assert not any(m.training for m in omics.modules())
    assert repr(omics) == "OmicsEncoder(seal_small_omics: 6 genes to 4 numbers, on cpu)"
    assert omics.weights.file == "seal_small_omics.pth"
    head = torch.nn.Linear(DIM, 2)
    head(omics.encode(expression())).sum().backward()
    assert head.weight.grad is not None


# --- where it comes from ------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["seal_conch_omics.pth", "conch-seal-omics.pth"])
def test_from_the_hub_by_either_spelling(tmp_path, monkeypatch, file):
    content = save(small_file(2000, 512), tmp_path / "made.pth").read_bytes()
    with local_hub(tmp_path / "hf", monkeypatch) as hub:
        hub.repos["MahmoodLab/SEAL"] = Repo({file: content}, gated=True)
        with pytest.raises(TokenError, match=r"MahmoodLab/SEAL.*hf auth login"):
            load_omics("seal-conch", revision="main")
        monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
        omics = load_omics("seal-conch", revision="main")
        assert (omics.name, omics.weights.file) == ("seal-conch", file)
        assert load_omics("seal-conch", revision="main", offline=True).weights == omics.weights
        del hub.repos["MahmoodLab/SEAL"].files[file]
        with pytest.raises(MissingOnHubError, match=r"seal_univ2_omics.pth or univ2-seal-omics.pth"):
            load_omics("seal-univ2", revision="main")


def test_arguments_that_cannot_be_meant(tmp_path):
    path = save(small_file(), tmp_path / "a.pth")
    for kwargs in ({"checkpoint": path}, {"revision": "main"}):
        with pytest.raises(UsageError, match="is a file; leave checkpoint= and revision= out"):
            load_omics(path, **kwargs)
    with pytest.raises(UsageError, match="conch has no expression half; those that have: seal-conch"):
        load_omics("conch", checkpoint=path)
    with pytest.raises(UsageError, match="leave one out"):
        load_omics("seal-conch", checkpoint=path, revision="main")
    with pytest.raises(UsageError, match="there is no encoder 'seal-konch'; did you mean seal-conch"):
        load_omics("seal-konch")
    with pytest.raises(UsageError, match="device is 'gpu'"):
        load_omics(path, device="gpu")


# --- both halves by one command -----------------------------------------------------------------------------


@pytest.fixture
def lab(tmp_path, monkeypatch, tiny_rows):
    """A Hub with both halves of a tiny SEAL encoder, and its base."""
    layout = SEAL_TINY_CONCH.published
    files = {
        "seal_tiny-conch_vision.pth": seal_file(SEAL_TINY_CONCH),
        "seal_tiny-conch_omics.pth": small_file(layout.decoder.genes, SEAL_TINY_CONCH.dim),
    }
    saved = {name: save(tensors, tmp_path / name).read_bytes() for name, tensors in files.items()}
    base = save(base_file(TINY_CONCH), tmp_path / "base.bin").read_bytes()
    with local_hub(tmp_path / "hf", monkeypatch) as hub:
        hub.repos["lab/SEAL"] = Repo(saved)
        hub.repos["lab/tiny-conch"] = Repo({"pytorch_model.bin": base})
        yield hub


def test_download_fetches_both_halves_for_nodes_without_network(lab, capsys):
    assert main(["download", "seal-tiny-conch"]) == 0
    out, err = capsys.readouterr()
    said = [line.split(",")[0] for line in out.splitlines()]
    files = ("seal_tiny-conch_vision.pth", "seal_tiny-conch_omics.pth")
    assert (said, err) == ([f"seal-tiny-conch: {file} of lab/SEAL" for file in files], "")
    lab.asked.clear()
    encoder = load_encoder("seal-tiny-conch", device="cpu", offline=True)
    assert load_omics("seal-tiny-conch", offline=True).dim == encoder.embedding_dim
    assert lab.asked == []


def test_download_where_there_is_no_expression_half(lab, capsys):
    del lab.repos["lab/SEAL"].files["seal_tiny-conch_omics.pth"]
    assert main(["download", "seal-tiny-conch", "tiny-conch"]) == 0
    out, err = capsys.readouterr()
    first, second, third = out.splitlines()
    assert first.startswith("seal-tiny-conch: without the expression encoder, which embeddings do not need: ")
    assert "lab/SEAL has no file seal_tiny-conch_omics.pth or tiny-conch-seal-omics.pth" in first
    assert second.startswith("seal-tiny-conch: seal_tiny-conch_vision.pth of lab/SEAL")
    assert third.startswith("tiny-conch: pytorch_model.bin of lab/tiny-conch")  # a base has none: no word
    assert err == ""


def test_download_of_an_expression_half_that_does_not_fit(lab, tmp_path, capsys):
    other = save(small_file(3, 2), tmp_path / "other.pth").read_bytes()
    lab.repos["lab/SEAL"].files["seal_tiny-conch_omics.pth"] = other
    assert main(["download", "seal-tiny-conch"]) == 1
    assert "not a weight file of the expression half of seal-tiny-conch" in capsys.readouterr().err


def test_a_copy_that_was_damaged_in_the_cache(lab):
    load_omics("seal-tiny-conch")
    blob = fetch("lab/SEAL", ["seal_tiny-conch_omics.pth"]).path.resolve()
    content = bytearray(blob.read_bytes())
    content[-2000:-1900] = bytes(100)
    blob.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged.*fetch it again"):
        load_omics("seal-tiny-conch")


# --- names --------------------------------------------------------------------------------------------------


def test_a_panel_from_a_file(omics, tmp_path):
    assert omics.genes is None
    (tmp_path / "panel.txt").write_text("ACTB\n CD3E \r\nEPCAM\nKRT8\nMS4A1\nPTPRC\n", encoding="utf-8")
    omics.genes = read_panel(tmp_path / "panel.txt")
    assert omics.genes == ("ACTB", "CD3E", "EPCAM", "KRT8", "MS4A1", "PTPRC")
    with pytest.raises(UsageError, match="has 2 names; seal_small_omics has 6 columns"):
        omics.genes = ["ACTB", "CD3E"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"ACTB\n\nCD3E", "line 2 .* is ''"),
        (b"ACTB,CD3E", "line 1 .* is 'ACTB,CD3E'; give one name per line"),
        (b"\xff\xfe", "it is not UTF-8 text"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_panel(tmp_path, content, words):
    if content is not None:
        (tmp_path / "panel.txt").write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_panel(tmp_path / "panel.txt")


# --- what is refused ----------------------------------------------------------------------------------------


def refuse(path, *words, **kwargs):
    with pytest.raises(CheckpointError) as caught:
        load_omics(path, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("fc_mu.bias", None, "1 missing (fc_mu.bias)"),
        ("flows.2.w", None, "1 missing (flows.2.w)"),
        ("flows.3.u", torch.ones(DIM), "1 unexpected (flows.3.u)"),
        ("decoder.5.bias", torch.ones(5), "decoder.5.bias [5], not [6]"),
        ("encoder.1.running_var", torch.full((WIDE,), float("nan")), "1 with NaN"),
        ("encoder.4.weight", torch.ones(NARROW, WIDE).half(), "1 not plain float32"),
    ],
)
def test_weights_that_are_not_exactly_those(tmp_path, key, value, words):
    tensors = {name: tensor for name, tensor in (small_file() | {key: value}).items() if tensor is not None}
    refuse(save(tensors, tmp_path / "a.pth"), "a.pth", words)


def test_the_file_of_another_encoder_and_the_vision_half(tmp_path, tiny_rows):
    path = save(small_file(2000, 512), tmp_path / "conch.pth")
    refuse("seal-univ2", "not a weight file of the expression half of seal-univ2", "shape", checkpoint=path)
    path = save(base_file(TINY_CONCH), tmp_path / "vision.pth")
    refuse(path, "vision.pth is not the expression half of a SEAL checkpoint; it looks like tiny-conch")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_could_run_code_and_a_truncated_file(tmp_path, zipped):
    """Weights are read by one function, which test_refusals holds to more such files."""
    path = tmp_path / "a.pth"
    torch.save({**small_file(), "bomb": os.mkdir}, path, _use_new_zipfile_serialization=zipped)
    refuse(path, "could run code, so nothing was loaded")
    refuse("seal-conch", "could run code, so nothing was loaded", checkpoint=path)
    save(small_file(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    refuse(path, "damaged, cut short", "fetch it again")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (expression(genes=5), r"expression for seal_small_omics came as float32 \[3, 5\]; allowed: float"),
        (expression()[0], r"float32 \[6\]; allowed: float \[B, 6\]"),
        (np.ones((2, GENES), np.int64), "came as int64"),
        (np.full((2, GENES), np.nan, np.float32), "hold NaN or infinity, first in row 0"),
        (np.full((2, GENES), -0.5, np.float32), "holds -0.5; allowed: log1p, 0 and above"),
    ],
)
def test_expression_that_cannot_be_meant(omics, rows, words):
    with pytest.raises(UsageError, match=words):
        omics.encode(rows)


def test_embeddings_that_cannot_be_decoded(omics):
    with pytest.raises(UsageError, match=r"embeddings for seal_small_omics came as float32 \[2, 5\]"):
        omics.decode(torch.zeros(2, 5))
