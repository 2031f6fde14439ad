"""Virchow2, H0-mini and Phikon-v2 in every published form, on small towers with the real key layout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from encoder_fixtures import adapter_shapes, as_batch, local_hub, noise_patches, save, wrapped_key
from hub_server import GOOD_TOKEN, Repo
from safetensors.torch import save_file
from vit_fixtures import (
    H0,
    PHIKON,
    SEAL_H0,
    SEAL_PHIKON,
    SEAL_VIRCHOW,
    SEALS,
    VIRCHOW,
    P,
    adapters_file,
    add_tiny_vits,
    as_published,
    base_file,
    in_transformers_names,
    load,
    own_tensors,
    refuse,
    seal_file,
    shapes_of,
    targets,
    tower_tensors,
)

from seal_extract.encoders import find_spec, load_encoder, locate
from seal_extract.encoders.checkpoint import looks_like
from seal_extract.encoders.rows import ALIASES, PHIKON2
from seal_extract.encoders.spec import Architecture
from seal_extract.encoders.tower import empty_tower, fill
from seal_extract.errors import TokenError, UsageError


@pytest.fixture(autouse=True)
def _tiny_rows(monkeypatch):
    add_tiny_vits(monkeypatch)


@pytest.fixture
def no_hub(monkeypatch):
    """A test in which the Hub must not be asked."""

    def asked(*args, **kwargs):
        raise AssertionError(f"the Hub was asked for {args}")

    monkeypatch.setattr(locate, "_fetch", asked)
    monkeypatch.setattr("seal_extract.encoders.hub.fetch", asked)


# --- what loads ---------------------------------------------------------------------------------------------


def whole(spec, folder):
    return save(seal_file(spec), folder / "a.pth")


def of_transformers_5(spec, folder):
    return save(seal_file(spec, version=5), folder / "a.pth")


def nested_behind_module(spec, folder):
    inner = {f"module.{key}": value for key, value in seal_file(spec).items()}
    return save({"state_dict": inner, "epoch": 3}, folder / "a.pth")


def with_the_other_prefix(spec, folder):
    return save(seal_file(spec, prefix="encoder."), folder / "a.pth")


def safetensors(spec, folder):
    save_file(seal_file(spec), folder / "a.safetensors")
    return folder / "a.safetensors"


def torch_file_that_is_named_safetensors(spec, folder):
    return save(seal_file(spec), folder / "a.safetensors")


def folder_of_the_current_name(spec, folder):
    name = f"seal_{spec.published.base}_vision.pth".replace("tiny-", "")
    return save(seal_file(spec), folder / name).parent


def folder_of_the_older_name(spec, folder):
    name = f"{spec.published.base}-seal-vision.pth".replace("tiny-", "")
    return save(seal_file(spec), folder / name).parent


def adapters_beside_base(spec, folder):
    base = find_spec(spec.published.base)
    save(base_file(base), folder / base.published.files[-1])
    return save(adapters_file(spec), folder / "a.pth")


def adapters_with_the_other_prefix_nested(spec, folder):
    base = find_spec(spec.published.base)
    save(base_file(base, version=5), folder / base.name / base.published.files[0])
    inner = {f"module.{k}": v for k, v in adapters_file(spec, prefix="encoder.").items()}
    return save({"state_dict": inner}, folder / "a.pth")


FORMS = [
    whole,
    of_transformers_5,
    nested_behind_module,
    with_the_other_prefix,
    safetensors,
    torch_file_that_is_named_safetensors,
    folder_of_the_current_name,
    folder_of_the_older_name,
    adapters_beside_base,
    adapters_with_the_other_prefix_nested,
]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("spec", SEALS, ids=lambda s: s.name)
@pytest.mark.usefixtures("no_hub")
def test_every_form_gives_the_adapters_merged_into_the_base(spec, form, tmp_path):
    encoder = load(spec.name, form(spec, tmp_path))
    base, (lora, _) = tower_tensors(spec), own_tensors(spec)
    filled = encoder.tower.state_dict()
    assert filled.keys() == base.keys()
    for key, value in base.items():
        target = key.removesuffix(".weight")
        if target in targets(spec):
            a, b = (lora[f"{target}.lora_{x}.default.weight"].double() for x in "AB")
            value = (value.double() + b @ a).float()  # alpha / r is 1
        torch.testing.assert_close(filled[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("spec", [VIRCHOW, H0, PHIKON], ids=lambda s: s.name)
@pytest.mark.usefixtures("no_hub")
def test_a_base_from_its_own_file(spec, version, tmp_path):
    encoder = load(spec.name, save(base_file(spec, version), tmp_path / "base.bin"))
    filled = encoder.tower.state_dict()
    assert all(torch.equal(filled[key], value) for key, value in tower_tensors(spec).items())


@pytest.mark.parametrize("spec", SEALS, ids=lambda s: s.name)
def test_a_file_that_holds_the_base_does_not_fetch_the_gated_one(spec, tmp_path, monkeypatch):
    base, content = find_spec(spec.published.base), {}
    for name, tensors in (
        ("whole", seal_file(spec)),
        ("alone", adapters_file(spec)),
        ("base", base_file(base)),
    ):
        content[name] = save(tensors, tmp_path / name).read_bytes()
    with local_hub(tmp_path / "hf", monkeypatch) as hub:
        hub.repos["lab/SEAL"] = Repo({spec.published.files[0]: content["whole"]})
        hub.repos[base.source] = Repo({base.published.files[-1]: content["base"]}, gated=True)
        load_encoder(spec.name, device="cpu")
        assert not [a for a in hub.asked if base.source in a]

        hub.repos["lab/SEAL"] = Repo({spec.published.files[1]: content["alone"]})
        with pytest.raises(TokenError, match=f"holds adapters only and needs its base {base.name}"):
            load_encoder(spec.name, device="cpu")
        monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
        encoder = load_encoder(spec.name, device="cpu")
    assert [w.source for w in encoder.weights] == ["lab/SEAL", base.source]


def test_phikon_is_found_under_both_spellings(tmp_path):
    assert ALIASES["seal-phikonv2"] == "seal-phikon2"
    assert find_spec("phikonv2") is PHIKON2
    assert {"seal_phikonv2_vision.pth", "phikonv2-seal-vision.pth"} <= set(SEAL_PHIKON.published.files)
    folder = save(seal_file(SEAL_PHIKON), tmp_path / "phikonv2-seal-vision.pth").parent
    assert load(SEAL_PHIKON.name, folder).weights[0].file == "phikonv2-seal-vision.pth"


# --- what does not ------------------------------------------------------------------------------------------


def test_a_part_of_the_attention_is_missing(tmp_path):
    tensors, key = seal_file(SEAL_PHIKON), f"{P}model.encoder.layer.0.attention.attention"
    del tensors[f"{key}.query.weight"]
    path = save(tensors, tmp_path / "a.pth")
    refuse(SEAL_PHIKON.name, path, "blocks.0.attn.qkv.weight", "2 unexpected", f"{key}.key.weight")


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(48, 47),
        torch.zeros(48, 48).half(),
        torch.zeros(48, 48).to_sparse(),
        torch.zeros(()).expand(48, 48),
    ],
)
def test_a_part_of_the_attention_is_unlike_the_others(tmp_path, value):
    tensors, key = base_file(PHIKON, version=5), "encoder.layer.1.attention.k_proj.weight"
    path = save(tensors | {key: value}, tmp_path / "a.pth")
    refuse(PHIKON.name, path, "1 missing (blocks.1.attn.qkv.weight)", "3 unexpected", key)


@pytest.mark.parametrize("key", ["attention.output.dense.bias", "attention.attention.value.bias"])
def test_one_weight_in_both_spellings(tmp_path, key):
    old, new = (in_transformers_names(tower_tensors(PHIKON), version) for version in (4, 5))
    twice = f"encoder.layer.0.{key}"
    path = save(new | {twice: old[twice]}, tmp_path / "a.pth")
    refuse(PHIKON.name, path, f"1 unexpected ({twice})")


def test_nan_in_a_part_of_the_attention(tmp_path):
    tensors = base_file(PHIKON)
    tensors["encoder.layer.0.attention.attention.query.bias"][3] = float("nan")
    refuse(PHIKON.name, save(tensors, tmp_path / "a.pth"), "1 with NaN", "blocks.0.attn.qkv.bias")


def test_two_prefixes_in_one_file(tmp_path):
    tensors = seal_file(SEAL_VIRCHOW)
    tensors[f"{P}encoder.cls_token"] = tensors.pop(f"{P}model.cls_token")
    refuse(
        SEAL_VIRCHOW.name,
        save(tensors, tmp_path / "a.pth"),
        "1 missing",
        f"1 unexpected ({P}encoder.cls_token)",
    )


def test_a_vision_transformer_of_the_same_shape_is_not_phikon(tmp_path):
    """UNI has the shapes of Phikon-v2, tensor by tensor; only the names tell them apart."""
    refuse(
        PHIKON.name,
        save(tower_tensors(PHIKON), tmp_path / "a.pth"),
        "missing",
        "blocks.0.attn.qkv.bias (as timm names it)",
    )


def test_a_folder_without_a_vision_file(tmp_path):
    refuse(
        SEAL_H0.name,
        tmp_path,
        str(tmp_path),
        "is a folder without",
        "seal_h0mini_vision.pth",
        "h0mini-seal-vision.pth",
    )


BACKBONES = ("conch", "univ2", "virchow2", "h0mini", "phikon2")


def file_of_real_shapes(name, adapters_only):
    """A file of a real SEAL encoder, with one number in place of each tensor's many."""
    row = find_spec(f"seal-{name}")
    layout, shapes = row.published, shapes_of(row)
    names = {} if adapters_only else {wrapped_key(k, targets(row)): s for k, s in shapes.items()}
    names |= adapter_shapes(shapes, targets(row), 8)
    tensors = {k: torch.zeros(()).expand(s) for k, s in names.items()}
    head = {"decoder.decoder.0.weight": torch.zeros(()).expand(512, row.dim)}
    return {layout.prefix + k: v for k, v in as_published(row, tensors).items()} | head


@pytest.mark.parametrize("adapters_only", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("name", BACKBONES)
def test_the_file_of_another_backbone_is_named(name, adapters_only, tmp_path):
    tensors = file_of_real_shapes(name, adapters_only)
    assert looks_like(tensors) == f"seal-{name}"
    path = save(tensors, tmp_path / "a.pth")
    other = BACKBONES[BACKBONES.index(name) - 1 - adapters_only]
    refuse(f"seal-{other}", path, "missing", f"it looks like seal-{name}")


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (32, 32), (80, 48)])
def test_phikon_is_dinov2_of_transformers(size, tmp_path):
    """Positions resampled without antialiasing, on larger, smaller and oblong patches."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=16,
        image_size=64,
        layer_norm_eps=1e-6,
    )
    model = transformers.Dinov2Model(config).eval()
    tensors = {
        k: torch.randn(v.shape, generator=torch.Generator().manual_seed(i)) * 0.3
        for i, (k, v) in enumerate(model.state_dict().items())
    }
    model.load_state_dict(tensors)
    encoder = load(PHIKON.name, save(tensors, tmp_path / "a.bin"))
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-5)


def test_antialiased_positions_would_be_seen():
    tensors, images = (
        tower_tensors(PHIKON),
        torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)),
    )
    towers = [
        empty_tower(replace(PHIKON, architecture=replace(PHIKON.architecture, antialias=a))) for a in (0, 1)
    ]
    for tower in towers:
        fill(tower, dict(tensors))
    plain, antialiased = (tower.forward_features(images)[:, 0] for tower in towers)
    assert (plain - antialiased).norm() / plain.norm() > 3e-5


@pytest.mark.parametrize("spec", [VIRCHOW, PHIKON], ids=lambda s: s.name)
def test_a_round_trip_is_bitwise(spec, tmp_path):
    encoder = load(spec.name, save(base_file(spec), tmp_path / "a.bin"))
    encoder.save_pretrained(tmp_path / "own")
    again = load_encoder(tmp_path / "own", device="cpu")
    assert again.spec == replace(spec, published=None)
    patches = as_batch(noise_patches(2, 96))
    assert np.array_equal(again.encode(patches), encoder.encode(patches))


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture("vit_tiny_patch16_224", {"img_size": 64}, antialias=False),
        Architecture(
            "vit_tiny_patch16_224", {"dynamic_img_size": True, "no_embed_class": True}, antialias=False
        ),
        Architecture("vit_relpos_small_patch16_224", {}, antialias=False),
    ],
)
def test_plain_positions_are_for_some_towers_only(architecture):
    with pytest.raises(UsageError, match="antialias is False; allowed"):
        empty_tower(replace(PHIKON, architecture=architecture))
