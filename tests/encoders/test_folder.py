"""This package's own format: everything kept, nothing about this machine, to the Hub and back."""

import inspect
import json
import subprocess
import sys
from dataclasses import replace

import huggingface_hub
import pytest
import torch
import yaml
from encoder_fixtures import (
    SEAL_TINY_VIT,
    TINY_CONCH,
    add_tiny_rows,
    as_batch,
    local_hub,
    needs_hub_1,
    noise_patches,
    save,
    seal_file,
    untrained_encoder,
)
from hub_server import GOOD_TOKEN, NARROW_TOKEN, Repo
from safetensors.torch import load_file, save_file

from seal_extract.encoders import find_spec, folder, load_encoder
from seal_extract.encoders.checkpoint import read_tensors
from seal_extract.errors import CheckpointError, NetworkError, TokenError, UsageError

PANEL = tuple(f"GENE{i}" for i in range(10))


@pytest.fixture(autouse=True)
def _tiny_rows(monkeypatch):
    add_tiny_rows(monkeypatch)


@pytest.fixture
def seal(tmp_path):
    path = save(seal_file(SEAL_TINY_VIT), tmp_path / "whole.pth")
    return load_encoder("seal-tiny-vit", checkpoint=path, device="cpu")


@pytest.fixture
def own(seal, tmp_path):
    seal.genes = PANEL
    seal.save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def refuse(path, *words):
    with pytest.raises(CheckpointError) as caught:
        load_encoder(path, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def edit(path, **changes):
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")


# --- round trip ---------------------------------------------------------------------------------------------


def test_weights_decoder_and_panel_come_back_bitwise(seal, own):
    again = load_encoder(own, device="cpu")
    before, after = seal.state_dict(), again.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert again.genes == PANEL
    patches = as_batch(noise_patches(2, 28))
    embeddings = again.encode(patches)
    assert torch.equal(embeddings, seal.encode(patches))
    assert torch.equal(again.predict_expression(embeddings), seal.predict_expression(embeddings))


def test_saved_twice_is_the_same_file(own, tmp_path):
    load_encoder(own, device="cpu").save_pretrained(tmp_path / "twice")
    first, second = ((folder / "model.safetensors").read_bytes() for folder in (own, tmp_path / "twice"))
    assert first == second


@pytest.mark.parametrize("letters", range(8))
def test_weights_begin_where_memory_of_ones_own_would(tmp_path, letters):
    """Else products of mapped weights differ in their last bits from those of the authors' file."""
    tensors = {
        "a" + "x" * letters: torch.ones(3),
        "b": torch.arange(32.0).view(2, 16),
        "c.num_batches_tracked": torch.tensor(7),
        "d": torch.zeros(16, 0),
        "e": torch.full((16,), 0.5),
    }
    folder.write_weights(tensors, tmp_path / "w.safetensors")
    again = load_file(tmp_path / "w.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(value, again[key]) for key, value in tensors.items())
    assert {again[key].data_ptr() % 64 for key in "be"} == {0}


def test_what_a_folder_holds(own):
    assert {p.name for p in own.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    config = json.loads((own / "config.json").read_text(encoding="utf-8"))
    assert config["decoder"] == {"hidden": 6, "genes": 10}
    assert config["genes"] == list(PANEL)
    kept = load_file(own / "model.safetensors")
    assert {k for k in kept if k.startswith("expression_decoder.")} == {
        f"expression_decoder.{layer}.{leaf}" for layer in ("hidden", "genes") for leaf in ("weight", "bias")
    }


def test_without_decoder(tmp_path):
    untrained_encoder(TINY_CONCH).save_pretrained(tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text(encoding="utf-8"))
    assert (config["decoder"], config["genes"]) == (None, None)
    again = load_encoder(tmp_path / "own", device="cpu")
    assert (again.decoder, again.genes) == (None, None)


def test_a_folder_from_before_decoders_were_kept(tmp_path):
    untrained_encoder(TINY_CONCH).save_pretrained(tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text(encoding="utf-8"))
    del config["decoder"], config["genes"], config["input"]["crop_px"]
    (tmp_path / "own" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert load_encoder(tmp_path / "own", device="cpu").decoder is None


def test_a_header_whose_length_begins_like_a_pickle(tmp_path):
    """One safetensors file in 32 begins with the byte 0x80."""
    letters = 1
    while True:
        save_file({"a" * letters: torch.ones(2)}, tmp_path / "w.safetensors")
        if (tmp_path / "w.safetensors").read_bytes()[0] == 0x80:
            break
        letters += 1
    assert read_tensors(tmp_path / "w.safetensors").keys() == {"a" * letters}


# --- the model card -----------------------------------------------------------------------------------------


def card_of(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_it_is_whose_and_made_from_what(seal, own):
    head, body = card_of(own)
    assert head["license"] == "cc-by-nc-nd-4.0"
    assert head["base_model"] == "lab/SEAL"
    assert head["library_name"] == "seal_extract"
    assert "# seal-tiny-vit" in body
    assert seal.weights[0].sha256 in body
    assert "| expression decoder | 10 genes, named in config.json |" in body
    assert 'load_encoder("' in body


def test_a_licence_that_the_hub_does_not_know(tmp_path):
    spec = replace(TINY_CONCH, licence=find_spec("phikon2").licence)
    untrained_encoder(spec).save_pretrained(tmp_path / "own")
    head, body = card_of(tmp_path / "own")
    assert head["license"] == "other"
    assert "| licence of the weights | Owkin non-commercial licence |" in body


def test_nothing_of_this_machine_is_told(own, tmp_path):
    for name in ("README.md", "config.json"):
        assert str(tmp_path) not in (own / name).read_text(encoding="utf-8")


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"genes": list(PANEL[:9])}, "the gene panel has 9 names; its decoder has 10 columns"),
        ({"genes": [*PANEL[:9], PANEL[0]]}, "names GENE0 twice"),
        ({"genes": "GENE0"}, "the gene panel has 1 names"),
        ({"decoder": None}, "genes without a decoder"),
        ({"decoder": {"hidden": 6}}, "'genes' is missing"),
        ({"decoder": "big"}, "does not describe an encoder"),
        ({"decoder": {"hidden": 6, "genes": -1}, "genes": None}, "allowed: sizes of 1 to"),
        (
            {"input": {"multiple_of": 14, "resize_px": 28, "filter": "bicubic", "crop_px": 99}},
            "crop_px is 99",
        ),
    ],
)
def test_a_config_that_does_not_fit(own, changes, words):
    edit(own, **changes)
    refuse(own, words)


def test_a_decoder_of_another_size(own):
    edit(own, decoder={"hidden": 7, "genes": 10})
    refuse(own, "model.safetensors is not a weight file of seal-tiny-vit", "[6, 24], not [7, 24]")


def test_a_decoder_that_the_config_does_not_name(own):
    edit(own, decoder=None, genes=None)
    refuse(own, "4 unexpected (expression_decoder.genes.bias")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(own, value):
    tensors = load_file(own / "model.safetensors")
    tensors["expression_decoder.hidden.bias"][1] = value
    save_file(tensors, own / "model.safetensors")
    refuse(own, "1 with NaN or infinite numbers (expression_decoder.hidden.bias)")


def test_truncated_weights(own):
    content = (own / "model.safetensors").read_bytes()
    (own / "model.safetensors").write_bytes(content[:-10])
    refuse(own, "model.safetensors is damaged, cut short")


# --- to the Hub ---------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with local_hub(tmp_path / "hf", monkeypatch) as hub:
        monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
        yield hub


@needs_hub_1
def test_to_the_hub_and_back(seal, hub):
    seal.genes = PANEL
    page = seal.push_to_hub("lab/ours")
    repo = hub.repos["lab/ours"]
    assert page == f"{hub.url}/lab/ours/commit/{repo.commit}"
    assert repo.private  # unless one says otherwise
    assert set(repo.files) == {"config.json", "model.safetensors", "README.md"}
    again = load_encoder("lab/ours", device="cpu")
    patches = as_batch(noise_patches(2, 28))
    assert torch.equal(again.encode(patches), seal.encode(patches))
    assert again.genes == PANEL
    assert again.weights[0].revision == repo.commit


@needs_hub_1
def test_to_a_repository_that_is_there(seal, hub):
    hub.repos["lab/ours"] = Repo({"NOTES.md": b"mine", "config.json": b"{}"})
    seal.push_to_hub("lab/ours", private=False, commit_message="Again")
    assert hub.repos["lab/ours"].files["NOTES.md"] == b"mine"
    assert load_encoder("lab/ours", device="cpu").spec.name == "seal-tiny-vit"


@pytest.mark.parametrize(("token", "reason"), [("hf_made_up", ""), (NARROW_TOKEN, "You may not write here")])
def test_a_token_that_may_not_write(seal, hub, monkeypatch, token, reason):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(
        TokenError, match=rf"does not let this token write to lab/ours: .*{reason}.*hf auth login"
    ):
        seal.push_to_hub("lab/ours")
    assert "lab/ours" not in hub.repos


def test_not_a_repository_id(seal, hub):
    with pytest.raises(UsageError, match="owner/name"):
        seal.push_to_hub("lab/ours/deeper")


def test_a_card_that_the_hub_refuses(seal, hub, monkeypatch):
    monkeypatch.setattr("seal_extract.encoders.folder._HUB_LICENCES", {"nonsense"})
    seal.spec = replace(seal.spec, licence="nonsense")
    with pytest.raises(UsageError, match=r'refuses the files for lab/ours: .*"license" must be one of'):
        seal.push_to_hub("lab/ours")


def test_a_hub_out_of_reach(seal, hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        NetworkError, match=r"upload to lab/ours at http://127.0.0.1:9 broke off.*run it again"
    ):
        seal.push_to_hub("lab/ours")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    hub.status = 503
    with pytest.raises(NetworkError, match="the Hub answered 503 for lab/ours"):
        seal.push_to_hub("lab/ours")


def test_the_functions_that_are_called_take_these_arguments():
    """The oldest huggingface_hub that is allowed has them as the newest has."""
    create = inspect.signature(huggingface_hub.HfApi.create_repo).parameters
    upload = inspect.signature(huggingface_hub.HfApi.upload_folder).parameters
    assert {"repo_id", "private", "exist_ok"} <= set(create)
    assert {"repo_id", "folder_path", "commit_message", "revision", "create_pr"} <= set(upload)


# --- memory -------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys, time
from pathlib import Path
import seal_extract.encoders.build as build
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024
folder, before, before_anonymous = Path(sys.argv[1]), peak(), anonymous()
encoder = build.load_encoder(folder, device="cpu")
size = (folder / "model.safetensors").stat().st_size
print((peak() - before) / size, (anonymous() - before_anonymous) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_mapped_from_the_file_not_copied(tmp_path):
    """Of 48 MB of weights hardly any is in memory of our own."""
    wide = {**TINY_CONCH.architecture.kwargs, "embed_dim": 512, "depth": 4}
    spec = replace(TINY_CONCH, architecture=replace(TINY_CONCH.architecture, kwargs=wide))
    untrained_encoder(spec).save_pretrained(tmp_path / "own")
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "own"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, anonymous = map(float, done.stdout.split())
    assert peak < 1.5
    assert anonymous < 0.5
