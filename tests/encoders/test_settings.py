"""A file beside the weights: what it states counts, is recorded, or contradicts the row and is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from encoder_fixtures import local_hub, save
from hub_server import Repo
from vit_fixtures import (
    H0,
    SEAL_H0,
    adapters_file,
    add_tiny_vits,
    base_file,
    load,
    own_tensors,
    refuse,
    seal_file,
    tower_tensors,
)

from seal_extract.encoders import load_encoder
from seal_extract.encoders.registry import ROWS
from seal_extract.encoders.request import EncoderRequest
from seal_extract.encoders.settings import stated_lora
from seal_extract.errors import CheckpointError


@pytest.fixture(autouse=True)
def _tiny_rows(monkeypatch):
    add_tiny_vits(monkeypatch)


def with_config(folder, text, spec=SEAL_H0, name="config.yaml"):
    path = save(seal_file(spec), folder / "a.pth")
    (folder / name).write_text(text, encoding="utf-8")
    return path


AGREEING = """\
model:
  encoder: Tiny-H0mini   # case and dashes aside
  out_dim: 48
  lora: {r: 8, alpha: 8, dropout: 0.1}
train: {lr: 1.0e-4, r: [1, 2], name: whatever}
"""


def test_a_config_that_agrees_changes_nothing(tmp_path):
    plain = load(SEAL_H0.name, save(seal_file(SEAL_H0), tmp_path / "plain" / "a.pth"))
    told = load(SEAL_H0.name, with_config(tmp_path, AGREEING))
    assert [w.file for w in told.weights] == ["a.pth"]
    assert told.identity == plain.identity


@pytest.mark.parametrize(
    ("name", "spellings"),
    [
        ("conch", ["conch", "CONCH", "seal_conch"]),
        ("univ2", ["univ2", "UNI2-h", "uni_v2"]),
        ("virchow2", ["Virchow2"]),
        ("h0mini", ["H0-mini", "h0mini"]),
        ("phikon2", ["phikon2", "phikonv2", "phikon-v2"]),
    ],
)
def test_an_encoder_goes_by_several_names(tmp_path, name, spellings):
    path = tmp_path / "config.yaml"
    for spelling in spellings:
        path.write_text(f"encoder: {spelling}\nlora: {{alpha: 4}}\n")
        for row in (row for row in ROWS.values() if row.source == "MahmoodLab/SEAL"):
            if row.published.base == name:
                assert stated_lora(path, row) == replace(row.published.lora, alpha=4.0)
            else:
                with pytest.raises(
                    CheckpointError, match=f"states encoder {name}, and {row.name} is built on"
                ):
                    stated_lora(path, row)


@pytest.mark.parametrize(
    "text", ["lora_alpha: 24", "lora: {alpha: 24, r: 8}", "model: {lora: {lora_alpha: 24.0}}"]
)
def test_a_stated_alpha_counts_and_is_recorded(tmp_path, text):
    encoder = load(SEAL_H0.name, with_config(tmp_path, text))
    lora, _ = own_tensors(SEAL_H0)
    a, b = (lora[f"blocks.1.mlp.fc1.lora_{x}.default.weight"] for x in "AB")
    expected = tower_tensors(SEAL_H0)["blocks.1.mlp.fc1.weight"] + 3 * b @ a
    torch.testing.assert_close(
        encoder.tower.state_dict()["blocks.1.mlp.fc1.weight"], expected, rtol=0, atol=1e-5
    )
    assert [w.file for w in encoder.weights] == ["a.pth", "config.yaml"]  # its hash tells the results apart
    assert (
        encoder.identity
        != load(SEAL_H0.name, save(seal_file(SEAL_H0), tmp_path / "plain" / "a.pth")).identity
    )


def test_a_finished_slide_is_known_again_until_the_config_changes(tmp_path):
    path = with_config(tmp_path, "lora_alpha: 24")
    encoder = load(SEAL_H0.name, path)
    recorded = [asdict(w) for w in encoder.weights]

    def again():
        request = EncoderRequest(SEAL_H0.name, path, device="cpu")
        return request.identity_if_unchanged(recorded)

    assert again() == encoder.identity
    (tmp_path / "config.yaml").write_text("lora_alpha: 16.0")
    assert again() is None
    (tmp_path / "config.yaml").unlink()
    assert again() is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "encoder: univ2",
            ["states encoder univ2, and seal-tiny-h0mini is built on tiny-h0mini", "type seal-univ2"],
        ),
        ("model: {encoder: {name: UNI2-h}}", ["states encoder univ2"]),
        ("out_dim: 512", ["states out_dim 512, and seal-tiny-h0mini gives 48 numbers"]),
        ("lora: {r: 4}", ["adapters of another rank than the r 4 of config.yaml"]),
        ("lora: {r: 2.5}", ["states r 2.5; allowed: a whole number"]),
        ("lora_r: eight", ["states lora_r 'eight'; allowed: a number above 0"]),
        ("lora_alpha: .inf", ["allowed: a number above 0"]),
        ("a: {lora_alpha: 8}\nb: {lora_alpha: 16}", ["states alpha 8 and 16; allowed: one of them"]),
        ("a: [1, 2", ["cannot be read as YAML"]),
        (
            "!!python/object/apply:os.mkdir [made]",
            ["cannot be read as YAML", "could not determine a constructor"],
        ),
        ("x: " + "y" * 2**20, ["longer than"]),
    ],
)
def test_a_config_that_contradicts(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    refuse(
        SEAL_H0.name,
        with_config(tmp_path, text),
        "config.yaml",
        *words,
    )
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("text", ["", "7", "- 1", "encoder: nobody-knows", "a: &a [*a]"])
def test_a_config_that_says_nothing_of_it(tmp_path, text):
    assert load(SEAL_H0.name, with_config(tmp_path, text)).spec == SEAL_H0


def test_aliases_do_not_make_a_short_config_endless(tmp_path):
    lines = ["a0: &a0 [1, 1]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    assert load(SEAL_H0.name, with_config(tmp_path, "\n".join(lines))).spec == SEAL_H0


@pytest.mark.parametrize(
    ("text", "alpha"), [("lora_alpha: 16", 16.0), ("encoder: conch\nlora_alpha: 16", 8.0), (None, 8.0)]
)
def test_a_config_in_the_repository(tmp_path, monkeypatch, text, alpha):
    """What is said of another encoder of that repository is left alone, and absence is remembered."""
    content = save(seal_file(SEAL_H0), tmp_path / "a.pth").read_bytes()
    config = {} if text is None else {"config.yaml": text.encode()}
    with local_hub(tmp_path / "hf", monkeypatch) as hub:
        hub.repos["lab/SEAL"] = Repo({SEAL_H0.published.files[0]: content, **config})
        assert load_encoder(SEAL_H0.name, device="cpu").spec.published.lora.alpha == alpha
        hub.asked.clear()
        assert load_encoder(SEAL_H0.name, device="cpu").spec.published.lora.alpha == alpha
        assert not [a for a in hub.asked if "config.yaml" in a]
        hub.asked.clear()
        assert load_encoder(SEAL_H0.name, device="cpu", offline=True).spec.published.lora.alpha == alpha
        assert hub.asked == []


def timm_config(**stated):
    return json.dumps({"architecture": H0.architecture.timm, "pretrained_cfg": stated})


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (timm_config(interpolation="bilinear", crop_pct=0.875), (32, "bilinear", 28)),
        (timm_config(interpolation="bicubic", crop_pct=1.0), (28, "bicubic", None)),
        (timm_config(), (28, "bicubic", None)),
        (
            json.dumps({"architecture": "resnet18", "pretrained_cfg": {"crop_pct": 0.5}}),
            (28, "bicubic", None),
        ),
        ("[]", (28, "bicubic", None)),
    ],
)
def test_the_base_says_how_it_is_fed(tmp_path, text, rule):
    path = save(base_file(H0), tmp_path / "tiny-h0mini" / "pytorch_model.bin")
    (path.parent / "config.json").write_text(text)
    base, seal = load(H0.name, path), load(SEAL_H0.name, save(adapters_file(SEAL_H0), tmp_path / "a.pth"))
    for encoder in (base, seal):
        stated = encoder.spec.input
        assert (stated.resize_px, stated.filter, stated.crop_px, stated.multiple_of) == (*rule, 14)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (timm_config(interpolation="lanczos"), "interpolation 'lanczos'; allowed: bilinear, bicubic"),
        (timm_config(crop_pct=0), "crop_pct 0; allowed: above 0"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_base_that_says_what_cannot_be(tmp_path, text, words):
    path = save(base_file(H0), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(text)
    refuse(H0.name, path, "config.json", words)
