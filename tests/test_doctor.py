"""The doctor tells causes apart; download fills the cache that offline nodes live on."""

from types import SimpleNamespace

import openslide
import pytest
import torch
from encoder_fixtures import SEAL_TINY_VIT, TINY_VIT, adapters, base_file, local_hub, save
from hub_server import GOOD_TOKEN, OUTSIDE_TOKEN, Repo
from synthetic_slide import write_synthetic_slide

from seal_extract import open_slide
from seal_extract.doctor import examine
from seal_extract.encoders import list_encoders


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with local_hub(tmp_path / "hf", monkeypatch) as hub:
        for source in {spec.source for spec in list_encoders()}:
            hub.repos[source] = Repo({"config.json": b"{}"}, gated=True)
        yield hub


def findings(*args, **kwargs):
    """{subject: [(state, text), ...]}"""
    found = {}
    for finding in examine(*args, **kwargs):
        found.setdefault(finding.subject, []).append((finding.state, finding.text))
    return found


def test_with_token_and_accepted_gates_all_is_well(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    found = findings()
    assert found["network"] == [("ok", f"{hub.url} answers")]
    assert found["token"] == [("ok", "of good")]
    sources = {spec.source for spec in list_encoders() if spec.layout.gated}
    assert {text.split()[0] for state, text in found["gate"] if state == "ok"} == sources


def test_no_token_is_told_from_a_refused_one_and_from_a_closed_gate(hub, monkeypatch):
    assert findings()["token"] == [("note", "there is none; gated encoders need one: type hf auth login")]
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    ((state, text),) = findings()["token"]
    assert state == "FAILS"
    assert "does not accept it" in text
    monkeypatch.setenv("HF_TOKEN", OUTSIDE_TOKEN)
    found = findings()
    assert found["token"][0][0] == "ok"
    assert all("no access yet; ask for it at https://huggingface.co/" in text for _, text in found["gate"])


def test_no_network_is_told_from_the_rest(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = findings()
    ((state, text),) = found["network"]
    assert state == "FAILS"
    assert text.startswith("cannot reach http://127.0.0.1:9")
    assert "token" not in found
    assert "network" not in findings(offline=True)


def test_a_cache_that_cannot_be_written_is_named(hub, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "below"))
    ((state, text),) = findings(offline=True)["cache"]
    assert state == "FAILS"
    assert "choose another folder with HF_HOME" in text


def test_a_slide_is_read_and_encoded(hub, place):
    ((state, text),) = findings(place / "slides" / "a.svs", offline=True)["slide"]
    assert state == "ok"
    assert text.startswith("Slide(a.svs: 3000 x 2400 px")
    assert text.endswith("first batch encoded: [8, 192]")


def test_a_card_that_cannot_compute_is_named_with_its_reason_in_one_line(hub, monkeypatch):
    """Whatever build of torch the tests run with: here it finds a card, and no kernel runs on it."""

    def refuse(*_, **__):
        raise RuntimeError(
            "CUDA error: no kernel image is available for execution\nCompile with TORCH_USE_CUDA_DSA"
        )

    card = SimpleNamespace(name="Old Card", total_memory=2**32, major=5, minor=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch, "ones", refuse)
    ((state, text),) = findings(offline=True)["device"]
    assert state == "FAILS"
    assert text.startswith("cuda:0, Old Card of compute capability 5.2, cannot multiply matrices by torch")
    assert "(CUDA error: no kernel image is available for execution Compile with" in text
    assert text.endswith("or type --device cpu")
    product = torch.full((64, 64), 7.0)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: product)
    ((state, text),) = findings(offline=True)["device"]
    assert (state, "the sum of a product is 1.28" in text) == ("FAILS", True)


@pytest.mark.gpu
def test_a_card_computes(hub):
    assert findings(offline=True)["device"][0][0] == "ok"


def test_a_bad_slide_is_a_finding_and_the_exit_status(hub, tmp_path, run):
    (tmp_path / "a.svs").write_text("no")
    status, out, err = run("doctor", tmp_path / "a.svs", "--offline")
    assert (status, err) == (1, ["seal-extract: 1 of the checks above failed"])
    assert out[-1].startswith("FAILS  slide")
    assert "it is text" in out[-1]


def test_an_encoder_tells_its_files_and_what_was_merged(hub, tmp_path, tiny_rows, run):
    save(base_file(TINY_VIT), tmp_path / "pytorch_model.bin")
    path = save(adapters(SEAL_TINY_VIT), tmp_path / "a.pth")
    status, out, _ = run("doctor", "--offline", "--encoder", "seal-tiny-vit", "--checkpoint", path)
    assert status == 0
    lines = [" ".join(line.split()) for line in out[-4:]]
    assert lines[0].startswith("ok encoder Encoder(seal-tiny-vit: 24 numbers")
    assert [line.split(" of ")[0] for line in lines[1:3]] == ["ok file a.pth", "ok file pytorch_model.bin"]
    layers = "blocks.1.attn.qkv, blocks.1.attn.proj, blocks.1.mlp.fc1, blocks.1.mlp.fc2"
    assert lines[3] == f"ok merged 4 layers of a.pth, rank 4, scale 2: {layers}"
    assert run("doctor", "--offline", "--encoder", "tiny-vit", "--checkpoint", path)[0] == 1


def test_an_openslide_with_a_known_hole_is_named_by_the_doctor_and_at_open(hub, tmp_path, monkeypatch):
    slide = write_synthetic_slide(tmp_path / "a.svs", (600, 600))
    monkeypatch.setattr(openslide, "__library_version__", "4.0.0")
    ((state, text),) = findings(offline=True)["readers"]
    assert state == "FAILS"
    assert "CVE-2026-48977" in text
    assert 'pip install "openslide-bin>=4.0.1"' in text
    with pytest.warns(RuntimeWarning, match="the OpenSlide library here is 4.0.0"):
        open_slide(slide).close()


def test_nothing_wrong_exits_with_0(hub, run):
    status, out, _ = run("doctor", "--offline")
    assert status == 0
    assert [line.split()[1] for line in out] == ["python", "readers", "device", "disk", "cache"]
