"""Slide encoders by name: the rows, the weights from a Hub, and features of the right encoder."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from conftest import one_line
from encoder_fixtures import local_hub
from hub_server import GOOD_TOKEN, Repo
from mil_models import MilLab, model_of, rows_of, write_features
from safetensors.torch import save

from seal_extract.encoders.registry import ROWS
from seal_extract.encoders.slide_encoders import SLIDE_ENCODERS, find_slide_encoder
from seal_extract.errors import CheckpointError, NetworkError, TokenError, UsageError
from seal_extract.pooling import open_pooling, pool_slide, read_slide_level

FEATHER = SLIDE_ENCODERS["feather-uni"]


def feather(dim=1024):
    """An ABMIL of FEATHER's sizes, without a classifier, and its file on the Hub."""
    torch.manual_seed(5)
    model = MilLab(dim, hidden=512, inner=384, heads=1).eval()
    model.patch_embed = model.patch_embed[:2]
    del model.classifier
    return model, save({f"model.{key}": value for key, value in model.state_dict().items()})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that has FEATHER's repository, and a row that is pinned to what it holds."""
    with local_hub(tmp_path / "hf", monkeypatch) as hub:
        model, content = feather()
        repo = hub.repos[FEATHER.source] = Repo({"model.safetensors": content}, gated=True)
        hub.model = model
        published = replace(FEATHER.published, commit=repo.commit, sha256={})
        monkeypatch.setitem(SLIDE_ENCODERS, FEATHER.name, replace(FEATHER, published=published))
        monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
        yield hub


def test_rows_fit_the_encoders_that_they_name():
    for row in SLIDE_ENCODERS.values():
        encoder = ROWS.get(row.encoder)
        if encoder is not None:
            assert encoder.dim == row.encoder_dim, row.name
            assert row.input in ("", str(encoder.input)), row.name
        assert (row.published is None) == (not row.network)
        for sha256 in row.layout.sha256.values():
            assert len(sha256) == 64
        assert row.layout.commit is None or len(row.layout.commit) == 40
    assert find_slide_encoder("feather_uni_v2").name == "feather-univ2"  # as TRIDENT writes it


def test_feather_is_fetched_by_name_and_records_what_it_was_trained_on(hub, tmp_path):
    x = rows_of(50, 1024)
    pooling = open_pooling("feather-uni")
    made = pool_slide(write_features(tmp_path, x, encoder="uni"), pooling, tmp_path / "s.h5")
    with torch.inference_mode():
        want, scores = hub.model.pooled(torch.from_numpy(x))
    np.testing.assert_allclose(made.features, want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(made.scores, scores, atol=1e-6)
    said = read_slide_level(made.path).provenance
    assert said["pooling"]["made_for"] == {
        "encoder": "uni", "columns": 1024, "patches": "256 px at 0.5 µm/px"
    }  # fmt: skip
    assert (said["pooling"]["name"], said["pooling"]["source"]) == ("feather-uni", FEATHER.source)
    assert said["pooling"]["revision"] == hub.repos[FEATHER.source].commit
    assert said["mismatch"] is None
    hub.asked.clear()
    assert open_pooling("feather-uni", offline=True).identity == pooling.identity
    assert hub.asked == []


def test_features_of_another_encoder_or_another_width_are_refused_with_the_command(hub, tmp_path):
    pooling = open_pooling("feather-uni")
    for encoder, dim in (("seal-uni", 1024), ("uni+adapter", 1024), ("uni", 24)):
        features = write_features(tmp_path / encoder, rows_of(9, dim), encoder=encoder)
        with pytest.raises(UsageError) as caught:
            pool_slide(features, pooling, tmp_path / "s.h5")
        assert f"takes features of uni (1024 columns), these are of {encoder} ({dim})" in str(caught.value)
        assert "--encoder uni --patch-px 256 --mpp 0.5 --slide-level feather-uni" in str(caught.value)


def test_patches_of_another_size_are_pooled_and_told(hub, tmp_path):
    features = write_features(tmp_path, rows_of(9, 1024), encoder="uni")
    features = replace(features, grid=replace(features.grid, patch_px=224, mpp=1.0))
    made = pool_slide(features, open_pooling("feather-uni"), tmp_path / "s.h5")
    assert made.provenance["mismatch"] == (
        "feather-uni was trained on patches of 256 px at 0.5 µm/px; these are 224 px at 1 µm/px"
    )


def test_gate_pin_and_missing_network_are_one_line_each(hub, tmp_path, monkeypatch):
    with pytest.raises(NetworkError, match=r"offline, and MahmoodLab/abmil.base.uni.pc108-24k"):
        open_pooling("feather-uni", offline=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(TokenError, match=r"no token was sent.*huggingface.co/MahmoodLab/abmil.base.uni"):
        open_pooling("feather-uni")
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    row = SLIDE_ENCODERS["feather-uni"]
    pinned = replace(row.published, sha256=dict(FEATHER.published.sha256))
    monkeypatch.setitem(SLIDE_ENCODERS, row.name, replace(row, published=pinned))
    with pytest.raises(CheckpointError, match=r"pinned file has 19b7edb4582e.*nothing was loaded"):
        open_pooling("feather-uni")


def test_download_keeps_it_for_machines_without_network(hub, run):
    status, out, _ = run("download", "feather-uni")
    assert (status, len(out)) == (0, 1)
    assert out[0].startswith("feather-uni: AttentionPooling(model.safetensors: ABMIL as MIL-Lab saves it")
    assert open_pooling("feather-uni", offline=True).dim == 1024


def test_the_command_checks_encoders_before_a_slide_is_read_and_tells_of_other_patches(
    hub, run, drawn_slides, encoder_folder, tmp_path, monkeypatch
):
    command = (drawn_slides[0], "-o", tmp_path, "--encoder", encoder_folder, "--slide-level", "feather-uni")
    words = (
        r"takes features of uni \(1024 columns\), these are of untrained-demo \(192\); make its features with"
    )
    one_line(run(*command), 2, words)
    assert not list(tmp_path.glob("*/features_*"))
    _, content = feather(192)
    repo = hub.repos[FEATHER.source]
    repo.push({"model.safetensors": content})
    row = replace(SLIDE_ENCODERS["feather-uni"], encoder="untrained-demo", encoder_dim=192)
    row = replace(row, published=replace(row.published, commit=repo.commit))
    monkeypatch.setitem(SLIDE_ENCODERS, row.name, row)
    status, out, _ = run(*command)
    told = (
        "(mind that feather-uni was trained on patches of 256 px at 0.5 µm/px; these are 224 px at 0.5 µm/px)"
    )
    assert status == 0
    assert f"0.svs: slide level by feather-uni, 512 {told} -> " in out[1]


def test_a_file_of_its_own_serves_a_name_and_another_models_file_does_not(tmp_path):
    model = model_of("CHIEF", dim=768)
    torch.save(model.state_dict(), tmp_path / "CHIEF_pretraining.pth")
    x = rows_of(20, 768)
    features = write_features(tmp_path, x, encoder="ctranspath")
    made = pool_slide(features, open_pooling(f"chief={tmp_path}/CHIEF_pretraining.pth"), tmp_path / "s.h5")
    np.testing.assert_allclose(made.features, model.pooled(torch.from_numpy(x))[0].detach(), atol=1e-6)
    assert (made.provenance["pooling"]["name"], made.provenance["pooling"]["pinned"]) == ("chief", False)
    with h5py.File(made.path) as file:
        assert str(tmp_path) not in file.attrs["seal_extract"]
    other = tmp_path / "CHIEF_pretraining.pth"
    for asked, words in (
        (
            f"tangle={other}",
            "holds CHIEF in CHIEF's layout on 768 columns; tangle is in TANGLE's layout on 1024",
        ),
        (f"chief={tmp_path}/none.pth", "cannot read .*none.pth"),
    ):
        with pytest.raises(CheckpointError, match=words):
            open_pooling(asked)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("chief", "the weights of chief are not fetched; download CHIEF_pretraining.pth .* chief=FILE"),
        (
            "titan",
            r"titan runs code of its authors.*--encoder conch-v1.5 --patch-px 512.*verify OUT --for titan",
        ),
    ],
)
def test_names_that_cannot_be_opened_say_what_to_type(asked, words):
    with pytest.raises(UsageError, match=words):
        open_pooling(asked)
