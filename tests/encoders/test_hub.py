"""Weights from a Hub: the real huggingface_hub against a server on this machine."""

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from encoder_fixtures import (
    SEAL_TINY_CONCH,
    TINY_CONCH,
    adapters,
    add_tiny_rows,
    as_batch,
    base_file,
    local_hub,
    noise_patches,
    save,
    seal_file,
    untrained_encoder,
)
from hub_server import GOOD_TOKEN, NARROW_TOKEN, OUTSIDE_TOKEN, Repo

from seal_extract.encoders import load_encoder
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


@pytest.fixture
def log_in(monkeypatch):
    return lambda token: monkeypatch.setenv("HF_TOKEN", token)


# --- what comes ---------------------------------------------------------------------------------------------


def test_download_gives_the_bytes_and_the_commit(hub):
    found = fetch("lab/open", ["weights.pth"])
    assert found.path.read_bytes() == CONTENT
    assert (found.source, found.revision) == ("lab/open", hub.repos["lab/open"].commit)


def test_second_call_takes_the_cached_copy(hub):
    first = fetch("lab/open", ["weights.pth"])
    hub.asked.clear()
    assert fetch("lab/open", ["weights.pth"]) == first
    assert [a.split()[0] for a in hub.asked] == ["HEAD"]  # is it current? nothing more


def test_a_commit_in_the_cache_asks_nothing(hub):
    commit = fetch("lab/open", ["weights.pth"]).revision
    hub.asked.clear()
    assert fetch("lab/open", ["weights.pth"], revision=commit).revision == commit
    assert hub.asked == []


def test_the_first_spelling_that_exists_is_taken(hub):
    hub.repos["lab/open"].files[SPELLINGS[1]] = b"old spelling"
    assert fetch("lab/open", SPELLINGS).path.read_bytes() == b"old spelling"
    hub.repos["lab/open"].files[SPELLINGS[0]] = b"new spelling"
    assert fetch("lab/open", SPELLINGS).path.read_bytes() == b"new spelling"


def test_a_token_opens_the_gate(hub, log_in):
    log_in(GOOD_TOKEN)
    assert fetch("lab/gated", ["weights.pth"]).path.read_bytes() == CONTENT


def test_a_users_own_environment_counts(hub, tmp_path):
    """As typed in a shell: endpoint and cache set before the import."""
    code = "from seal_extract.encoders.hub import fetch; print(fetch('lab/open', ['weights.pth']).path)"
    env = {**os.environ, "HF_HOME": str(tmp_path / "own")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "own" / "hub")


def test_hf_hub_cache_is_respected(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert fetch("lab/open", ["weights.pth"]).path.is_relative_to(tmp_path / "elsewhere")


def test_importing_asks_nothing(hub):
    code = "import seal_extract.encoders.hub, seal_extract.encoders.build"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, hub.asked) == (0, [])


def test_the_server_speaks_the_model_api_too(hub):
    info = huggingface_hub.HfApi(endpoint=hub.url).model_info("lab/open", revision="main")
    assert info.sha == hub.repos["lab/open"].commit
    assert {s.rfilename for s in info.siblings} == {"weights.pth", "config.json"}


# --- what is refused ----------------------------------------------------------------------------------------


def test_no_token(hub):
    with pytest.raises(
        TokenError, match=r"lab/gated.*no token.*hf auth login.*https://huggingface.co/lab/gated"
    ):
        fetch("lab/gated", ["weights.pth"])


def test_a_token_the_hub_does_not_know(hub, log_in):
    log_in("hf_made_up")
    with pytest.raises(TokenError, match=r"does not accept the token.*hf auth login"):
        fetch("lab/open", ["weights.pth"])


def test_a_token_without_the_right_to_read_gated_repositories(hub, log_in):
    log_in(NARROW_TOKEN)
    with pytest.raises(TokenError, match=r"enable access to public gated.*settings/tokens"):
        fetch("lab/gated", ["weights.pth"])


def test_an_account_that_was_not_let_through(hub, log_in):
    log_in(OUTSIDE_TOKEN)
    with pytest.raises(
        GateError, match=r"lab/gated is gated.*ask for it at https://huggingface.co/lab/gated$"
    ):
        fetch("lab/gated", ["weights.pth"])


def test_no_such_repository(hub, log_in):
    with pytest.raises(TokenError, match=r"lab/none is gated, private or does not exist, and no token"):
        fetch("lab/none", ["weights.pth"])
    log_in(GOOD_TOKEN)
    with pytest.raises(MissingOnHubError, match="there is no repository lab/none"):
        fetch("lab/none", ["weights.pth"])


def test_no_such_revision(hub):
    with pytest.raises(MissingOnHubError, match=r"lab/open has no revision 'v9'.*commits/main"):
        fetch("lab/open", ["weights.pth"], revision="v9")


def test_no_such_file_names_all_spellings(hub):
    with pytest.raises(MissingOnHubError, match=r"no file seal_x_vision.pth or x-seal-vision.pth.*tree/main"):
        fetch("lab/open", SPELLINGS)


def test_not_a_repository_id(hub):
    with pytest.raises(UsageError, match="owner/name"):
        fetch("lab/open/much/too/deep", ["weights.pth"])


def test_dead_port(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NetworkError, match=r"cannot reach http://127.0.0.1:9 for lab/open.*--offline"):
        fetch("lab/open", ["weights.pth"])


def test_dead_port_with_a_cached_copy_of_the_other_spelling(hub, monkeypatch):
    hub.repos["lab/open"].files[SPELLINGS[1]] = b"kept"
    fetch("lab/open", SPELLINGS)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch("lab/open", SPELLINGS).path.read_bytes() == b"kept"


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_in_trouble(hub, status):
    hub.status = status
    with pytest.raises(NetworkError, match=rf"the Hub answered {status} for lab/open"):
        fetch("lab/open", ["weights.pth"])


def test_an_endpoint_that_is_no_hub(hub):
    hub.foreign = True
    with pytest.raises(NetworkError, match=r"no Hugging Face Hub; check HF_ENDPOINT"):
        fetch("lab/open", ["weights.pth"])


def test_download_cut_short_leaves_nothing_in_the_cache(hub):
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


# --- offline ------------------------------------------------------------------------------------------------


def test_offline_with_a_cached_copy_asks_nothing(hub):
    found = fetch("lab/open", ["weights.pth"])
    hub.asked.clear()
    assert fetch("lab/open", ["weights.pth"], offline=True) == found
    assert hub.asked == []


def test_offline_takes_either_spelling(hub):
    hub.repos["lab/open"].files[SPELLINGS[1]] = b"kept"
    fetch("lab/open", SPELLINGS)
    assert fetch("lab/open", SPELLINGS, offline=True).path.read_bytes() == b"kept"


def test_offline_without_a_copy_names_the_command(hub):
    command = r"hf download lab/open weights.pth --revision v1$"
    with pytest.raises(
        NetworkError, match=rf"offline, and lab/open weights.pth is not in the cache.*{command}"
    ):
        fetch("lab/open", ["weights.pth"], revision="v1", offline=True)
    assert hub.asked == []


def test_hf_hub_offline_means_the_same(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NetworkError, match="offline, and lab/open"):
        fetch("lab/open", ["weights.pth"])
    assert hub.asked == []


# --- encoders from there ------------------------------------------------------------------------------------


@pytest.fixture
def lab(hub, tmp_path, monkeypatch):
    """A Hub with a tiny SEAL encoder and its gated base."""
    add_tiny_rows(monkeypatch)
    whole = save(seal_file(SEAL_TINY_CONCH), tmp_path / "whole.pth").read_bytes()
    base = save(base_file(TINY_CONCH), tmp_path / "base.bin").read_bytes()
    hub.repos["lab/SEAL"] = Repo({"tiny-conch-seal-vision.pth": whole})
    hub.repos["lab/tiny-conch"] = Repo({"pytorch_model.bin": base}, gated=True)
    return hub


def test_a_whole_file_does_not_ask_for_its_gated_base(lab):
    encoder = load_encoder("seal-tiny-conch", device="cpu")
    assert not [a for a in lab.asked if "lab/tiny-conch" in a]
    (weights,) = encoder.weights
    content = lab.repos["lab/SEAL"].files["tiny-conch-seal-vision.pth"]
    assert (weights.source, weights.file) == ("lab/SEAL", "tiny-conch-seal-vision.pth")
    assert (weights.revision, weights.size) == (lab.repos["lab/SEAL"].commit, len(content))
    assert weights.sha256 == hashlib.sha256(content).hexdigest()


def test_adapters_alone_fetch_their_base(lab, tmp_path, log_in):
    alone = save(adapters(SEAL_TINY_CONCH), tmp_path / "alone.pth")
    lab.repos["lab/SEAL"] = Repo({"seal_tiny-conch_vision.pth": alone.read_bytes()})
    with pytest.raises(TokenError, match=r"holds adapters only.*base tiny-conch.*hf auth login.*beside it"):
        load_encoder("seal-tiny-conch", device="cpu")
    log_in(GOOD_TOKEN)
    encoder = load_encoder("seal-tiny-conch", device="cpu")
    assert [w.source for w in encoder.weights] == ["lab/SEAL", "lab/tiny-conch"]
    whole = load_encoder("seal-tiny-conch", checkpoint=tmp_path / "whole.pth", device="cpu")
    patches = as_batch(noise_patches(2, 32))
    assert torch.equal(encoder.encode(patches), whole.encode(patches))


def test_encoder_offline(lab):
    with pytest.raises(NetworkError, match=r"hf download lab/SEAL seal_tiny-conch_vision.pth"):
        load_encoder("seal-tiny-conch", device="cpu", offline=True)
    load_encoder("seal-tiny-conch", device="cpu")
    lab.asked.clear()
    assert load_encoder("seal-tiny-conch", device="cpu", offline=True).spec == SEAL_TINY_CONCH
    assert lab.asked == []


def test_own_format_from_the_hub(lab, tmp_path):
    made = untrained_encoder(TINY_CONCH)
    made.save_pretrained(tmp_path / "own")
    files = {name: (tmp_path / "own" / name).read_bytes() for name in ("config.json", "model.safetensors")}
    lab.repos["lab/own"] = Repo(files)
    loaded = load_encoder("lab/own", device="cpu", revision="main")
    patches = as_batch(noise_patches(2, 32))
    assert torch.equal(loaded.encode(patches), made.encode(patches))
    assert loaded.weights[0].revision == lab.repos["lab/own"].commit


def test_a_repository_of_another_tool(lab):
    lab.repos["lab/timm"] = Repo({"config.json": b'{"architecture": "vit"}'})
    with pytest.raises(CheckpointError, match=r"config of another tool.*config.json and model.safetensors"):
        load_encoder("lab/timm", device="cpu")


def test_a_repository_that_has_a_name_here(lab):
    with pytest.raises(UsageError, match="type tiny-conch"):
        load_encoder("lab/tiny-conch", device="cpu")


def test_neither_folder_nor_repository(lab, log_in):
    log_in(GOOD_TOKEN)
    with pytest.raises(MissingOnHubError, match=r"no folder lab/nothing here.*no repository lab/nothing"):
        load_encoder("lab/nothing", device="cpu")


def test_a_copy_that_was_damaged_in_the_cache(lab):
    (weights,) = load_encoder("seal-tiny-conch", device="cpu").weights
    blob = fetch("lab/SEAL", [weights.file]).path.resolve()
    content = bytearray(blob.read_bytes())
    content[-2000:-1900] = bytes(100)
    blob.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged.*fetch it again"):
        load_encoder("seal-tiny-conch", device="cpu")
