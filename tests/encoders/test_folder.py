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
    as_batch,
    load,
    local_hub,
    needs_hub_1,
    noise_patches,
    refuse,
    save,
    seal_file,
    untrained_encoder,
)
from hub_server import GOOD_TOKEN, NARROW_TOKEN, Repo
from safetensors.torch import load_file, save_file

from seal_extract.encoders import find_spec, folder
from seal_extract.encoders.checkpoint import read_tensors
from seal_extract.errors import NetworkError, OutputError, TokenError, UsageError

pytestmark = pytest.mark.usefixtures("tiny_rows")

PANEL = tuple(f"GENE{i}" for i in range(10))


@pytest.fixture
def seal(tmp_path):
    return load("seal-tiny-vit", save(seal_file(SEAL_TINY_VIT), tmp_path / "whole.pth"))


@pytest.fixture
def own(seal, tmp_path):
    seal.genes = PANEL
    seal.save_pretrained(tmp_path / "own")
    return tmp_path / "own"


# --- what is written ----------------------------------------------------------------------------------------


def config_of(path):
    return json.loads((path / "config.json").read_text(encoding="utf-8"))


def test_decoder_and_panel_come_back(seal, own):
    again = load(own)
    assert again.genes == PANEL
    embeddings = again.encode(as_batch(noise_patches(2, 28)))
    assert torch.equal(again.predict_expression(embeddings), seal.predict_expression(embeddings))
    config = config_of(own)
    assert {p.name for p in own.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert (config["decoder"], config["genes"]) == ({"hidden": 6, "genes": 10}, list(PANEL))
    assert {k for k in load_file(own / "model.safetensors") if k.startswith("expression_decoder.")} == {
        f"expression_decoder.{layer}.{leaf}" for layer in ("hidden", "genes") for leaf in ("weight", "bias")
    }


def test_without_decoder_and_from_before_decoders_were_kept(tmp_path):
    untrained_encoder(TINY_CONCH).save_pretrained(tmp_path / "own")
    config = config_of(tmp_path / "own")
    assert (config["decoder"], config["genes"]) == (None, None)
    del config["decoder"], config["genes"], config["input"]["crop_px"]
    for _ in range(2):
        again = load(tmp_path / "own")
        assert (again.decoder, again.genes) == (None, None)
        (tmp_path / "own" / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_it_says_what_it_was_made_from_but_nothing_of_this_machine(seal, own, tmp_path):
    assert config_of(own)["made_from"] == [{"file": "whole.pth", "sha256": seal.weights[0].sha256}]
    for name in ("README.md", "config.json"):
        assert str(tmp_path) not in (own / name).read_text(encoding="utf-8")


def test_it_may_be_named_like_an_encoder(seal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seal.save_pretrained("conch")
    for asked in ("./conch", tmp_path / "conch"):
        assert load(asked).spec.name == "seal-tiny-vit"


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


def test_a_header_whose_length_begins_like_a_pickle(tmp_path):
    """One safetensors file in 32 begins with the byte 0x80."""
    letters = 1
    while True:
        save_file({"a" * letters: torch.ones(2)}, tmp_path / "w.safetensors")
        if (tmp_path / "w.safetensors").read_bytes()[0] == 0x80:
            break
        letters += 1
    assert read_tensors(tmp_path / "w.safetensors").keys() == {"a" * letters}


def card_of(path):
    text = (path / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_it_is_whose_and_made_from_what(seal, own):
    head, body = card_of(own)
    assert (head["license"], head["base_model"]) == ("cc-by-nc-nd-4.0", "lab/SEAL")
    assert head["library_name"] == "seal_extract"
    expected = ("# seal-tiny-vit", seal.weights[0].sha256, 'load_encoder("')
    for words in (*expected, "| expression decoder | 10 genes, named in config.json |"):
        assert words in body


def test_a_licence_that_the_hub_does_not_know(tmp_path):
    spec = replace(TINY_CONCH, licence=find_spec("phikon2").licence)
    untrained_encoder(spec).save_pretrained(tmp_path / "own")
    head, body = card_of(tmp_path / "own")
    assert head["license"] == "other"
    assert "| licence of the weights | Owkin non-commercial licence |" in body


def test_where_it_cannot_be_written(seal, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("taken")
    with pytest.raises(UsageError, match="is a file; give a folder"):
        seal.save_pretrained(tmp_path / "file")
    monkeypatch.setattr("seal_extract.encoders.folder.write_weights", full)
    with pytest.raises(OutputError, match="the disk is full"):
        seal.save_pretrained(tmp_path / "own")
    assert list((tmp_path / "own").iterdir()) == []


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "timm"}, "config of another tool"),
        ({"format_version": 2}, "format version 2, this package reads 1; bring your clone"),
        ({"dim": None}, "does not describe an encoder"),
        ({"name": "../../etc"}, "not a plain word"),
        ({"name": 7}, "Expected `str`, got `int` - at `$.name`"),
        ({"precision": "int8"}, "precision is 'int8'; allowed"),
        ({"input": {}}, "missing required field `multiple_of` - at `$.input`"),
        ({"mean": [1, 2]}, "three numbers each"),
        ({"genes": list(PANEL[:9])}, "the gene panel has 9 names; its decoder has 10 columns"),
        ({"genes": [*PANEL[:9], PANEL[0]]}, "names GENE0 twice"),
        ({"genes": "GENE0"}, "got `str` - at `$.genes`"),
        ({"decoder": None}, "genes without a decoder"),
        ({"decoder": {"hidden": 6}}, "its decoder has 2000 columns"),
        ({"decoder": "big"}, "does not describe an encoder"),
        ({"decoder": {"hidden": 6, "genes": -1}, "genes": None}, "allowed: sizes of 1 to"),
        (
            {"input": {"multiple_of": 14, "resize_px": 28, "filter": "bicubic", "crop_px": 99}},
            "crop_px is 99",
        ),
        ({"decoder": {"hidden": 7, "genes": 10}}, "[6, 24], not [7, 24]"),
        ({"decoder": None, "genes": None}, "4 unexpected (expression_decoder.genes.bias"),
    ],
)
def test_a_config_that_does_not_fit(own, changes, words):
    (own / "config.json").write_text(json.dumps({**config_of(own), **changes}), encoding="utf-8")
    refuse(None, words, name=own)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_config_that_is_no_json_object(own, text):
    (own / "config.json").write_text(text)
    refuse(None, "config.json", "allowed: a folder or repository", name=own)


def nan(path):
    tensors = load_file(path)
    tensors["expression_decoder.hidden.bias"][1] = float("nan")
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (nan, "1 with NaN or infinite numbers (expression_decoder.hidden.bias)"),
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), "model.safetensors is damaged, cut short"),
        (lambda path: path.unlink(), "model.safetensors: No such file"),
        (
            lambda path: save_file({"cls_token": torch.zeros(1)}, path),
            "is not a weight file of seal-tiny-vit",
        ),
    ],
)
def test_weights_that_do_not_fit(own, change, words):
    change(own / "model.safetensors")
    refuse(None, words, name=own)


def test_no_such_folder(own, tmp_path):
    words = "config.json and model.safetensors"
    refuse(None, "there is no folder", words, name=tmp_path / "none")
    refuse(None, "there is no folder ./none", words, name="./none")
    (own / "config.json").unlink()
    refuse(None, "has no config.json", words, name=own)


def test_arguments_for_something_else(own):
    with pytest.raises(UsageError, match="revision= names a revision on the Hub"):
        load(own, revision="main")
    with pytest.raises(UsageError, match="checkpoint= goes with the name of an encoder"):
        load(own, "a.pth")


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
    again = load("lab/ours")
    patches = as_batch(noise_patches(2, 28))
    assert torch.equal(again.encode(patches), seal.encode(patches))
    assert again.genes == PANEL
    assert again.weights[0].revision == repo.commit


@needs_hub_1
def test_to_a_repository_that_is_there(seal, hub):
    hub.repos["lab/ours"] = Repo({"NOTES.md": b"mine", "config.json": b"{}"})
    seal.push_to_hub("lab/ours", private=False, commit_message="Again")
    assert hub.repos["lab/ours"].files["NOTES.md"] == b"mine"
    assert load("lab/ours").spec.name == "seal-tiny-vit"


@pytest.mark.parametrize(("token", "reason"), [("hf_made_up", ""), (NARROW_TOKEN, "You may not write here")])
def test_a_token_that_may_not_write(seal, hub, monkeypatch, token, reason):
    monkeypatch.setenv("HF_TOKEN", token)
    words = rf"does not let this token write to lab/ours: .*{reason}.*hf auth login"
    with pytest.raises(TokenError, match=words):
        seal.push_to_hub("lab/ours")
    assert "lab/ours" not in hub.repos


def test_what_the_hub_refuses(seal, hub, monkeypatch):
    with pytest.raises(UsageError, match="owner/name"):
        seal.push_to_hub("lab/ours/deeper")
    monkeypatch.setattr("seal_extract.encoders.folder._HUB_LICENCES", {"nonsense"})
    seal.spec = replace(seal.spec, licence="nonsense")
    with pytest.raises(UsageError, match=r'refuses the files for lab/ours: .*"license" must be one of'):
        seal.push_to_hub("lab/ours")


def test_a_hub_out_of_reach(seal, hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    words = r"upload to lab/ours at http://127.0.0.1:9 broke off.*run it again"
    with pytest.raises(NetworkError, match=words):
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
import resource, sys
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
