"""A file beside the weights: what it states counts, is recorded, or contradicts the row and is refused."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from encoder_fixtures import (
    SEAL_H0,
    TINY_H0,
    R,
    adapters,
    base_file,
    load,
    lora_shapes,
    random_tensors,
    refuse,
    save,
    seal_file,
    tower_tensors,
)

from seal_extract.encoders.request import EncoderRequest

pytestmark = pytest.mark.usefixtures("tiny_rows")


def with_config(folder, text, spec=SEAL_H0, name="config.yaml"):
    path = save(seal_file(spec), folder / "a.pth")
    (folder / name).write_text(text, encoding="utf-8")
    return path


def test_a_config_that_agrees_changes_nothing(tmp_path):
    agreeing = (
        "encoder: tiny-h0mini\nout_dim: 48\nlora: {r: 4, lora_alpha: 8, lora_dropout: 0.15}\nlr: 1.0e-4\n"
    )
    plain = load(SEAL_H0.name, save(seal_file(SEAL_H0), tmp_path / "plain" / "a.pth"))
    told = load(SEAL_H0.name, with_config(tmp_path, agreeing))
    assert [w.file for w in told.weights] == ["a.pth"]
    assert told.identity == plain.identity


def test_a_stated_alpha_counts_and_is_recorded(tmp_path):
    encoder = load(SEAL_H0.name, with_config(tmp_path, "lora: {lora_alpha: 24.0}"))
    lora = random_tensors(lora_shapes(SEAL_H0), 1)
    a, b = (lora[f"blocks.1.mlp.fc1.lora_{x}.default.weight"] for x in "AB")
    expected = tower_tensors(SEAL_H0)["blocks.1.mlp.fc1.weight"] + 24 / R * b @ a
    torch.testing.assert_close(
        encoder.tower.state_dict()["blocks.1.mlp.fc1.weight"], expected, rtol=0, atol=1e-5
    )
    assert [w.file for w in encoder.weights] == ["a.pth", "config.yaml"]  # its hash tells the results apart
    plain = load(SEAL_H0.name, save(seal_file(SEAL_H0), tmp_path / "plain" / "a.pth"))
    assert encoder.identity != plain.identity


def test_a_finished_slide_is_known_again_until_the_config_changes(tmp_path):
    path = with_config(tmp_path, "lora: {lora_alpha: 24}")
    encoder = load(SEAL_H0.name, path)
    recorded = [asdict(w) for w in encoder.weights]

    def again():
        request = EncoderRequest(SEAL_H0.name, path, device="cpu")
        return request.identity_if_unchanged(recorded)

    assert again() == encoder.identity
    (tmp_path / "config.yaml").write_text("lora: {lora_alpha: 16.0}")
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
        ("out_dim: 512", ["states out_dim 512, and seal-tiny-h0mini gives 48 numbers"]),
        ("lora: {r: 8}", ["adapters of another rank than the r 8 of config.yaml"]),
        ("lora: {r: 2.5}", ["Expected `int | null`, got `float` - at `$.lora.r`"]),
        ("lora: {r: eight}", ["Expected `int | null`, got `str` - at `$.lora.r`"]),
        ("lora: {lora_alpha: .inf}", ["Expected `float` <= 1000000000.0 - at `$.lora.lora_alpha`"]),
        ("lora: {use_rslora: true}", ["states use_rslora true, which is not merged"]),
        ("lora: 8", ["Expected `object | null`, got `int` - at `$.lora`"]),
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
    refuse(with_config(tmp_path, text), "config.yaml", *words, name=SEAL_H0.name)
    assert not (tmp_path / "made").exists()


BOMB = "\n".join(["a0: &a0 [1, 1]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)])


@pytest.mark.parametrize("text", ["", "7", "- 1", "lora: null", "a: &a [*a]", BOMB])
def test_a_config_that_says_nothing_of_it(tmp_path, text):
    assert load(SEAL_H0.name, with_config(tmp_path, text)).spec == SEAL_H0


def timm_config(**stated):
    return json.dumps({"architecture": TINY_H0.architecture.timm, "pretrained_cfg": stated})


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
    path = save(base_file(TINY_H0), tmp_path / "tiny-h0mini" / "pytorch_model.bin")
    (path.parent / "config.json").write_text(text)
    base, seal = load(TINY_H0.name, path), load(SEAL_H0.name, save(adapters(SEAL_H0), tmp_path / "a.pth"))
    for encoder in (base, seal):
        stated = encoder.spec.input
        assert (stated.resize_px, stated.filter, stated.crop_px, stated.multiple_of) == (*rule, 14)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (timm_config(interpolation="lanczos"), "Invalid enum value 'lanczos' - at `$.interpolation`"),
        (timm_config(crop_pct=0), "Expected `float` > 0.05 - at `$.crop_pct`"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_base_that_says_what_cannot_be(tmp_path, text, words):
    path = save(base_file(TINY_H0), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(text)
    refuse(path, "config.json", words, name=TINY_H0.name)
