"""Weights from a Hub: the real huggingface_hub against a server on this machine."""

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from encoder_fixtures import (
    SEAL_TINY_CONCH,
    TINY_CONCH,
    as_batch,
    base_file,
    load,
    local_hub,
    noise_patches,
    save,
    seal_file,
    untrained_encoder,
)
from hub_server import GOOD_TOKEN, NARROW_TOKEN, OUTSIDE_TOKEN, Repo

from seal_extract.encoders.hub import fetch
from seal_extract.errors import (
    CheckpointError,
    GateError,
    MissingOnHubError,
    NetworkError,
    OutputError,
    TokenError,
    UsageError,
)

CONTENT = bytes(range(256)) * 400
SPELLINGS = ("seal_x_vision.pth", "x-seal-vision.pth")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with local_hub(tmp_path / "hf", monkeypatch) as hub:
        hub.repos["lab/open"] = Repo({"weights.pth": CONTENT, "config.json": b"{}"})
        hub.repos["lab/gated"] = Repo({"weights.pth": CONTENT}, gated=True)
        yield hub


# --- what comes ---------------------------------------------------------------------------------------------


def test_a_download_is_cached_with_its_commit(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "snapshots" / "hf"))  # a folder with a name of the cache
    found = fetch("lab/open", ["weights.pth"])
    assert found.path.read_bytes() == CONTENT
    assert (found.source, found.revision) == ("lab/open", hub.repos["lab/open"].commit)
    hub.asked.clear()
    assert fetch("lab/open", ["weights.pth"]) == found
    assert [a.split()[0] for a in hub.asked] == ["HEAD"]  # is it current? nothing more
    hub.asked.clear()
    assert fetch("lab/open", ["weights.pth"], revision=found.revision).revision == found.revision
    assert fetch("lab/open", ["weights.pth"], offline=True) == found
    assert hub.asked == []


def test_the_first_spelling_that_exists_is_taken(hub, monkeypatch):
    for spelling in reversed(SPELLINGS):
        hub.repos["lab/open"].files[spelling] = spelling.encode()
        assert fetch("lab/open", SPELLINGS).path.read_bytes() == spelling.encode()


def test_a_cached_copy_of_the_other_spelling_without_a_network(hub, monkeypatch):
    hub.repos["lab/open"].files[SPELLINGS[1]] = b"kept"
    fetch("lab/open", SPELLINGS)
    assert fetch("lab/open", SPELLINGS, offline=True).path.read_bytes() == b"kept"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch("lab/open", SPELLINGS).path.read_bytes() == b"kept"


def test_a_token_opens_the_gate(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    assert fetch("lab/gated", ["weights.pth"]).path.read_bytes() == CONTENT


def test_a_users_own_environment_counts(hub, tmp_path, monkeypatch):
    """As typed in a shell: endpoint and cache set before the import; the import itself asks nothing."""
    code = "import seal_extract.encoders.build; from seal_extract.encoders.hub import fetch; input()\n"
    code += "print(fetch('lab/open', ['weights.pth']).path)"
    env = {**os.environ, "HF_HOME": str(tmp_path / "own")}
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True, env=env) as child:
        assert hub.asked == []
        path, _ = child.communicate("\n")
    assert Path(path.strip()).is_relative_to(tmp_path / "own" / "hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert fetch("lab/open", ["weights.pth"]).path.is_relative_to(tmp_path / "elsewhere")


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "repo", "error", "words"),
    [
        (None, "lab/gated", TokenError, r"no token.*hf auth login.*https://huggingface.co/lab/gated"),
        ("hf_made_up", "lab/open", TokenError, r"does not accept the token.*hf auth login"),
        (NARROW_TOKEN, "lab/gated", TokenError, r"enable access to public gated.*settings/tokens"),
        (OUTSIDE_TOKEN, "lab/gated", GateError, r"is gated.*ask for it at https://huggingface.co/lab/gated$"),
        (None, "lab/none", TokenError, r"lab/none is gated, private or does not exist, and no token"),
        (GOOD_TOKEN, "lab/none", MissingOnHubError, "there is no repository lab/none"),
        (None, "lab/open/much/too/deep", UsageError, "owner/name"),
    ],
)
def test_token_gate_and_absence_are_told_apart(hub, monkeypatch, token, repo, error, words):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(error, match=words):
        fetch(repo, ["weights.pth"])


def test_no_such_revision_or_file(hub):
    with pytest.raises(MissingOnHubError, match=r"lab/open has no revision 'v9'.*commits/main"):
        fetch("lab/open", ["weights.pth"], revision="v9")
    with pytest.raises(MissingOnHubError, match=r"no file seal_x_vision.pth or x-seal-vision.pth.*tree/main"):
        fetch("lab/open", SPELLINGS)


def test_a_hub_in_trouble(hub, monkeypatch):
    for status in (500, 503, 429):
        hub.status = status
        with pytest.raises(NetworkError, match=rf"the Hub answered {status} for lab/open"):
            fetch("lab/open", ["weights.pth"])
    hub.status, hub.foreign = None, True
    with pytest.raises(NetworkError, match=r"no Hugging Face Hub; check HF_ENDPOINT"):
        fetch("lab/open", ["weights.pth"])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NetworkError, match=r"cannot reach http://127.0.0.1:9 for lab/open.*--offline"):
        fetch("lab/open", ["weights.pth"])


def test_a_download_cut_short_leaves_nothing_in_the_cache(hub):
    hub.cut_at = 1000
    with pytest.raises(NetworkError, match=r"download of weights.pth from lab/open broke off"):
        fetch("lab/open", ["weights.pth"])
    hub.cut_at = None
    assert fetch("lab/open", ["weights.pth"]).path.read_bytes() == CONTENT


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_cache_that_cannot_be_written(hub, monkeypatch, tmp_path, code):
    def full(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(OutputError, match=rf"cannot keep weights.pth in {tmp_path}.*HF_HOME"):
        fetch("lab/open", ["weights.pth"])


def test_offline_without_a_copy_names_the_command(hub, monkeypatch):
    words = r"offline, and lab/open weights.pth is not in the cache.*hf download lab/open weights.pth"
    with pytest.raises(NetworkError, match=words + " --revision v1$"):
        fetch("lab/open", ["weights.pth"], revision="v1", offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NetworkError, match=words):
        fetch("lab/open", ["weights.pth"])
    assert hub.asked == []


# --- encoders from there ------------------------------------------------------------------------------------


@pytest.fixture
def lab(hub, tmp_path, tiny_rows):
    """A Hub with a tiny SEAL encoder and its base."""
    whole = save(seal_file(SEAL_TINY_CONCH), tmp_path / "whole.pth").read_bytes()
    base = save(base_file(TINY_CONCH), tmp_path / "base.bin").read_bytes()
    hub.repos["lab/SEAL"] = Repo({"tiny-conch-seal-vision.pth": whole})
    hub.repos["lab/tiny-conch"] = Repo({"pytorch_model.bin": base})
    return hub


def test_an_encoder_online_and_offline(lab):
    with pytest.raises(NetworkError, match=r"hf download lab/SEAL seal_tiny-conch_vision.pth"):
        load("seal-tiny-conch", offline=True)
    (weights,) = load("seal-tiny-conch").weights
    content = lab.repos["lab/SEAL"].files["tiny-conch-seal-vision.pth"]
    assert (weights.source, weights.file) == ("lab/SEAL", "tiny-conch-seal-vision.pth")
    assert (weights.revision, weights.size) == (lab.repos["lab/SEAL"].commit, len(content))
    assert weights.sha256 == hashlib.sha256(content).hexdigest()
    lab.asked.clear()
    assert load("seal-tiny-conch", offline=True).spec == SEAL_TINY_CONCH
    assert lab.asked == []


def test_our_own_format(lab, tmp_path):
    made = untrained_encoder(TINY_CONCH)
    made.save_pretrained(tmp_path / "own")
    files = {name: (tmp_path / "own" / name).read_bytes() for name in ("config.json", "model.safetensors")}
    lab.repos["lab/own"] = Repo(files)
    loaded = load("lab/own", revision="main")
    patches = as_batch(noise_patches(2, 32))
    assert torch.equal(loaded.encode(patches), made.encode(patches))
    assert loaded.weights[0].revision == lab.repos["lab/own"].commit


def test_repositories_of_others(lab, monkeypatch):
    lab.repos["lab/timm"] = Repo({"config.json": b'{"architecture": "vit"}'})
    with pytest.raises(CheckpointError, match=r"config of another tool.*config.json and model.safetensors"):
        load("lab/timm")
    with pytest.raises(UsageError, match="type tiny-conch"):
        load("lab/tiny-conch")
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    with pytest.raises(MissingOnHubError, match=r"no folder lab/nothing here.*no repository lab/nothing"):
        load("lab/nothing")
