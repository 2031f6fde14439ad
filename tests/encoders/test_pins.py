"""Rows are pinned to a commit and to hashes: what is fetched is that, is refused, or says that it is not."""

import hashlib
import re
import shutil
from dataclasses import replace

import pytest
from encoder_fixtures import SEAL_TINY_VIT, TINY_VIT, adapters, base_file, local_hub, random_tensors, save
from hub_server import Repo

from seal_extract.encoders import load_encoder
from seal_extract.encoders.hub import fetch
from seal_extract.encoders.registry import ROWS
from seal_extract.errors import CheckpointError, MissingOnHubError, UsageError
from seal_extract.genes.decoder import decoder_of

FILE = SEAL_TINY_VIT.published.files[0]


def vision(folder, seed=1):
    """The bytes of a vision file of the Hub's layout: adapters alone, wrapped, with a head."""
    head = random_tensors({"projection_head.weight": (24, 24), "projection_head.bias": (24,)}, seed)
    state = {f"module.{key}": value for key, value in (adapters(SEAL_TINY_VIT, seed) | head).items()}
    return save({"state_dict": state}, folder / f"{seed}.pth").read_bytes()


def sha(content):
    return hashlib.sha256(content).hexdigest()


def pin(monkeypatch, row, **fields):
    monkeypatch.setitem(ROWS, row.name, replace(row, published=replace(row.published, **fields)))


@pytest.fixture
def hub(tmp_path, monkeypatch, tiny_rows):
    """The two repositories, and rows that are pinned to what is in them."""
    with local_hub(tmp_path / "hf", monkeypatch) as hub:
        base = save(base_file(TINY_VIT), tmp_path / "base.bin").read_bytes()
        hub.repos["lab/SEAL"] = seal = Repo({FILE: vision(tmp_path), "README.md": b"1"})
        hub.repos["lab/tiny-vit"] = bare = Repo({"pytorch_model.bin": base})
        pin(monkeypatch, SEAL_TINY_VIT, commit=seal.commit, sha256={FILE: sha(seal.files[FILE])})
        pin(monkeypatch, TINY_VIT, commit=bare.commit, sha256={"pytorch_model.bin": sha(base)[:12]})
        yield hub


def load(**kwargs):
    return load_encoder("seal-tiny-vit", device="cpu", **kwargs)


def test_the_pinned_commit_is_taken_wherever_main_has_gone(hub, tmp_path):
    seal, bare = hub.repos["lab/SEAL"], hub.repos["lab/tiny-vit"]
    commits = [seal.commit, bare.commit]
    seal.push({FILE: vision(tmp_path, 2)})
    bare.push({"pytorch_model.bin": b"new"})
    encoder = load()
    assert [w.revision for w in encoder.weights] == commits
    assert [w.pinned for w in encoder.weights] == [True, True]
    assert encoder.projection is not None
    hub.asked.clear()
    assert load(offline=True).weights == encoder.weights
    assert hub.asked == []
    assert [w["pinned"] for w in encoder.description["weights"]] == [True, True]


def test_main_is_taken_where_it_is_asked_for_and_recorded_as_another(hub, tmp_path):
    pinned = load()
    hub.repos["lab/SEAL"].push({FILE: vision(tmp_path, 2)})
    now = load(revision="main")
    assert [w.pinned for w in now.weights] == [False, True]
    assert now.weights[0].revision == hub.repos["lab/SEAL"].commit
    assert now.identity != pinned.identity
    decoder = decoder_of({"encoder": now.description})  # of the file that made them
    assert decoder.weights.sha256 == now.weights[0].sha256
    assert decoder_of({"encoder": pinned.description}).weights.pinned is True


@pytest.mark.parametrize("of", ["lab/SEAL", "lab/tiny-vit"])
def test_another_hash_is_refused_with_both_before_anything_is_read(hub, monkeypatch, of):
    """What lies there would be refused for what it holds, if it were looked at."""
    repo = hub.repos[of]
    name = next(iter(repo.files))
    row = ROWS["seal-tiny-vit" if of == "lab/SEAL" else "tiny-vit"]
    expected, content = sha(repo.files[name]), b"PK\x03\x04 no weights at all"
    repo.files[name] = content
    pin(monkeypatch, row, commit=repo.commit, sha256={name: expected})
    with pytest.raises(
        CheckpointError, match=f"{sha(content)}.*{expected}.*Type --revision main to take the present file"
    ):
        load()
    with pytest.raises(CheckpointError, match="damaged, cut short"):
        load(revision="main")


def test_a_download_that_was_cut_short_is_called_damaged(hub):
    path = fetch("lab/SEAL", [FILE], hub.repos["lab/SEAL"].commit).path.resolve()
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"is damaged: its sha256 begins with.*fetch it again"):
        load()


def test_a_commit_that_is_gone_names_the_way_out(hub, monkeypatch):
    pin(monkeypatch, ROWS["seal-tiny-vit"], commit="0" * 40)
    with pytest.raises(MissingOnHubError, match=r"no revision '0{40}'.*--revision main"):
        load()
    assert load(revision="main").weights[0].pinned is True


def test_a_cache_that_was_filled_from_main_will_do_offline_if_it_holds_the_pinned_bytes(hub, tmp_path):
    """As by the version before pins."""
    seal, same = hub.repos["lab/SEAL"], hub.repos["lab/SEAL"].files[FILE]
    seal.push({FILE: same, "README.md": b"2"})
    fetch("lab/SEAL", [FILE])
    fetch("lab/tiny-vit", ["pytorch_model.bin"])
    assert [w.pinned for w in load(offline=True).weights] == [True, True]
    seal.push({FILE: vision(tmp_path, 2)})
    fetch("lab/SEAL", [FILE])
    shutil.rmtree(next((tmp_path / "hf").rglob("models--lab--SEAL")) / "snapshots" / list(seal.history)[1])
    with pytest.raises(CheckpointError, match="but the checked and pinned file has"):
        load(offline=True)


def test_files_on_this_disk_are_not_held_to_a_pin_and_recorded(hub, tmp_path):
    for seed, pinned in ((1, True), (2, False)):
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / "any.pth").write_bytes(vision(tmp_path, seed))
        base = hub.repos["lab/tiny-vit"].files["pytorch_model.bin"]
        (tmp_path / "b" / "pytorch_model.bin").write_bytes(base)
        assert [w.pinned for w in load(checkpoint=tmp_path / "b" / "any.pth").weights] == [pinned, True]


def test_a_row_without_pins_is_taken_from_main(hub, monkeypatch):
    pin(monkeypatch, ROWS["seal-tiny-vit"], commit=None, sha256={})
    assert [w.pinned for w in load().weights] == [None, True]


@pytest.mark.parametrize("sha256", ["e7ae736968c", "E7AE736968C3", "x" * 64, "a" * 65])
def test_a_hash_that_is_none(sha256):
    with pytest.raises(UsageError, match="12 to 64 hex digits"):
        replace(SEAL_TINY_VIT.published, sha256={FILE: sha256})


# the hashes of these files are known to nobody who could be asked; the last ones are not even on the Hub
BY_COMMIT = {f"kaiko-vit{kind}" for kind in ("s8", "s16", "b8", "b16")} | {
    "resnet50",
    "dinov2-vitb14",
    "dinov2-vitg14",
}
NOT_PINNED = {"dinov3-vitb16", "omiclip"}


def test_the_real_rows_are_pinned():
    seal = {"conch": "0f7c1386ff79", "univ2": "e7ae736968c3"}
    for row in ROWS.values():
        layout = row.published
        assert (row.mpp is None) == (row.mpp_basis == "")
        assert all(re.fullmatch("[0-9a-f]{64}", value) for value in layout.sha256.values())
        if row.name.startswith("seal-"):
            assert row.licence == "CC-BY-NC-ND-4.0"
            expected = [seal[layout.base]] if layout.base in seal else []
            assert [value[:12] for value in layout.sha256.values()] == expected
            assert layout.commit == ("c20762e7a04551e21e62c083a9c443bdbc48cb89" if layout.sha256 else None)
            continue
        assert (layout.commit is None) == (row.name in NOT_PINNED or not row.on_hub), row.name
        assert (not layout.sha256) == (row.name in BY_COMMIT | NOT_PINNED), row.name
        assert set(layout.sha256) <= {layout.files[0]}
        assert layout.commit is None or re.fullmatch("[0-9a-f]{40}", layout.commit)
