"""Every published form of a weight file gives the same weights: whole or adapters alone, old or new names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from encoder_fixtures import (
    BASES,
    PREFIX,
    SEAL_H0,
    SEAL_PHIKON,
    SEAL_TINY_CONCH,
    SEAL_TINY_VIT,
    SEAL_VIRCHOW,
    SEALS,
    TINY_CONCH,
    TINY_PHIKON,
    TINY_VIT,
    adapters,
    as_published,
    base_file,
    load,
    local_hub,
    lora_shapes,
    random_tensors,
    refuse,
    save,
    seal_file,
    shapes_of,
    targets,
    tower_tensors,
)
from hub_server import GOOD_TOKEN, Repo
from safetensors.torch import save_file
from torch import nn

from seal_extract.encoders import find_spec, load_encoder
from seal_extract.encoders.recognise import looks_like
from seal_extract.encoders.registry import ROWS
from seal_extract.encoders.spec import Architecture
from seal_extract.encoders.tower import empty_tower
from seal_extract.errors import TokenError, UsageError

pytestmark = pytest.mark.usefixtures("tiny_rows")


@pytest.fixture
def no_hub(monkeypatch):
    """A test in which the Hub is out of reach."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


# --- what loads ---------------------------------------------------------------------------------------------


def nested(tensors):
    return {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in tensors.items()}}


def whole(spec, folder):
    return save(seal_file(spec), folder / "a.pth")


def of_transformers_5(spec, folder):
    return save(seal_file(spec, version=5), folder / "a.pth")


def nested_and_prefixed(spec, folder):
    return save(nested(seal_file(spec)), folder / "a.pth")


def with_the_other_prefix(spec, folder):
    other = next(iter(spec.published.other_prefixes), None)
    return save(seal_file(spec, prefix=other), folder / "a.pth")


def safetensors_by_any_name(spec, folder):
    save_file(seal_file(spec), folder / "a.pth")
    return folder / "a.pth"


def torch_file_that_is_named_safetensors(spec, folder):
    return save(seal_file(spec), folder / "a.safetensors")


def before_torch_1_6(spec, folder):
    torch.save(seal_file(spec), folder / "a.bin", _use_new_zipfile_serialization=False)
    return folder / "a.bin"


def as_parameters(spec, folder):
    return save({key: nn.Parameter(value) for key, value in seal_file(spec).items()}, folder / "a.pth")


def without_unused_heads(spec, folder):
    unused = spec.published.ignored or ("-",)
    return save({k: v for k, v in seal_file(spec).items() if not k.startswith(unused)}, folder / "a.pth")


def folder_of_the_current_name(spec, folder):
    return save(seal_file(spec), folder / spec.published.files[0]).parent


def folder_of_the_older_name(spec, folder):
    return save(seal_file(spec), folder / spec.published.files[1]).parent


def adapters_beside_base(spec, folder):
    base = find_spec(spec.published.base)
    save(base_file(base), folder / base.published.files[-1])
    return save(adapters(spec), folder / "a.pth")


def adapters_beside_folder_of_base(spec, folder):
    base = find_spec(spec.published.base)
    save({"of": torch.zeros(1)}, folder / base.published.files[0])  # of some other encoder
    save(base_file(base, version=5), folder / base.name / base.published.files[0])
    other = next(iter(spec.published.other_prefixes), None)
    return save(nested(adapters(spec, prefix=other)), folder / "a.pth")


FORMS = [
    whole,
    of_transformers_5,
    nested_and_prefixed,
    with_the_other_prefix,
    safetensors_by_any_name,
    torch_file_that_is_named_safetensors,
    before_torch_1_6,
    as_parameters,
    without_unused_heads,
    folder_of_the_current_name,
    folder_of_the_older_name,
    adapters_beside_base,
    adapters_beside_folder_of_base,
]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("spec", SEALS, ids=lambda s: s.name)
@pytest.mark.usefixtures("no_hub")
def test_every_form_gives_the_adapters_merged_into_the_base(spec, form, tmp_path):
    filled = load(spec.name, form(spec, tmp_path)).tower.state_dict()
    base, lora = tower_tensors(spec), random_tensors(lora_shapes(spec), 1)
    assert filled.keys() == base.keys()
    for key, value in base.items():
        target = key.removesuffix(".weight")
        if target in targets(spec):
            a, b = (lora[f"{target}.lora_{x}.default.weight"].double() for x in "AB")
            value = (value.double() + 8 / 4 * b @ a).float()
            assert not torch.equal(filled[key], base[key])
        torch.testing.assert_close(filled[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("spec", BASES, ids=lambda s: s.name)
@pytest.mark.usefixtures("no_hub")
def test_a_base_from_its_own_file(spec, version, tmp_path):
    filled = load(spec.name, save(base_file(spec, version=version), tmp_path / "base.bin")).tower.state_dict()
    assert all(torch.equal(filled[key], value) for key, value in tower_tensors(spec).items())


def test_the_base_in_the_file_wins_over_one_beside_it(tmp_path):
    save(base_file(TINY_CONCH, seed=5), tmp_path / "pytorch_model.bin")
    encoder = load("seal-tiny-conch", whole(SEAL_TINY_CONCH, tmp_path))
    assert [w.file for w in encoder.weights] == ["a.pth"]
    own = tower_tensors(TINY_CONCH)["trunk.cls_token"]
    assert torch.equal(encoder.tower.state_dict()["trunk.cls_token"], own)


@pytest.mark.parametrize("spec", [SEAL_TINY_CONCH, SEAL_VIRCHOW, SEAL_PHIKON], ids=lambda s: s.name)
def test_only_a_file_without_the_base_fetches_the_gated_one(spec, tmp_path, monkeypatch):
    base, content = find_spec(spec.published.base), {}
    for name, made in {"whole": seal_file(spec), "alone": adapters(spec), "base": base_file(base)}.items():
        content[name] = save(made, tmp_path / name).read_bytes()
    with local_hub(tmp_path / "hf", monkeypatch) as hub:
        hub.repos["lab/SEAL"] = Repo({spec.published.files[0]: content["whole"]})
        hub.repos[base.source] = Repo({base.published.files[-1]: content["base"]}, gated=True)
        from_whole = load(spec.name)
        assert not [a for a in hub.asked if base.source in a]

        hub.repos["lab/SEAL"] = Repo({spec.published.files[1]: content["alone"]})
        with pytest.raises(TokenError, match=f"holds adapters only.*base {base.name}.*hf auth login.*beside"):
            load(spec.name)
        monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
        encoder = load(spec.name)
    assert [w.source for w in encoder.weights] == ["lab/SEAL", base.source]
    assert all(torch.equal(v, encoder.state_dict()[k]) for k, v in from_whole.state_dict().items())


def test_phikon_is_found_under_both_spellings():
    assert find_spec("phikonv2") is ROWS["phikon2"]
    assert find_spec("seal-phikonv2") is ROWS["seal-phikon2"]
    files = ROWS["seal-phikon2"].published.files
    assert {"seal_phikonv2_vision.pth", "phikonv2-seal-vision.pth"} <= set(files)


# --- what does not ------------------------------------------------------------------------------------------

PHIKON_KEY = f"{PREFIX}model.encoder.layer.0.attention.attention"
VIT_BLOCK = f"{PREFIX}blocks.1"


def moved(old, new):
    return lambda tensors: {new if key == old else key: value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("spec", "change", "words"),
    [
        (
            SEAL_PHIKON,
            lambda t: {k: v for k, v in t.items() if k != f"{PHIKON_KEY}.query.weight"},
            ["blocks.0.attn.qkv.weight", "2 unexpected", f"{PHIKON_KEY}.key.weight"],
        ),
        (
            SEAL_VIRCHOW,
            moved(f"{PREFIX}model.cls_token", f"{PREFIX}encoder.cls_token"),
            ["1 missing", f"1 unexpected ({PREFIX}encoder.cls_token)"],
        ),
        (
            SEAL_TINY_VIT,
            moved(f"{VIT_BLOCK}.attn.proj.base_layer.weight", f"{VIT_BLOCK}.attn.proj.weight"),
            ["attn.proj.weight (not wrapped)"],
        ),
        (
            SEAL_TINY_VIT,
            moved(f"{PREFIX}blocks.0.attn.qkv.weight", f"{PREFIX}blocks.0.attn.qkv.base_layer.weight"),
            ["1 missing", "1 unexpected", "blocks.0.attn.qkv.base_layer.weight"],
        ),
        (
            SEAL_TINY_CONCH,
            lambda t: {k.replace("trunk.", "module.trunk.", 1): v for k, v in t.items()},
            ["missing", "unexpected", f"{PREFIX}module.trunk."],
        ),
        (
            SEAL_TINY_CONCH,
            moved(f"{PREFIX}trunk.cls_token", f"module.{PREFIX}trunk.cls_token"),
            [f"1 missing ({PREFIX}trunk.cls_token)", f"1 unexpected (module.{PREFIX}trunk.cls_token)"],
        ),
    ],
    ids=["a part of q, k, v", "two prefixes", "not wrapped", "no adapters", "inner prefix", "one prefixed"],
)
def test_names_that_are_not_understood(tmp_path, spec, change, words):
    refuse(save(change(seal_file(spec)), tmp_path / "a.pth"), *words, name=spec.name)


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
    tensors, key = base_file(TINY_PHIKON, version=5), "encoder.layer.1.attention.k_proj.weight"
    path = save(tensors | {key: value}, tmp_path / "a.pth")
    refuse(path, "1 missing (blocks.1.attn.qkv.weight)", "3 unexpected", key, name="tiny-phikon2")


@pytest.mark.parametrize("key", ["attention.output.dense.bias", "attention.attention.value.bias"])
def test_one_weight_in_both_spellings(tmp_path, key):
    old, new = (as_published(TINY_PHIKON, tower_tensors(TINY_PHIKON), version) for version in (4, 5))
    twice = f"encoder.layer.0.{key}"
    path = save(new | {twice: old[twice]}, tmp_path / "a.pth")
    refuse(path, f"1 unexpected ({twice})", name="tiny-phikon2")


def test_nan_in_a_part_of_the_attention(tmp_path):
    tensors = base_file(TINY_PHIKON)
    tensors["encoder.layer.0.attention.attention.query.bias"][3] = float("nan")
    path = save(tensors, tmp_path / "a.pth")
    refuse(path, "1 with NaN", "blocks.0.attn.qkv.bias", name="tiny-phikon2")


def test_a_vision_transformer_of_the_same_shape_is_not_phikon(tmp_path):
    """UNI has the shapes of Phikon-v2, tensor by tensor; only the names tell them apart."""
    path = save(tower_tensors(TINY_PHIKON), tmp_path / "a.pth")
    refuse(path, "missing", "blocks.0.attn.qkv.bias (as timm names it)", name="tiny-phikon2")


def test_a_folder_without_a_vision_file(tmp_path):
    words = ("is a folder without", "seal_tiny-h0mini_vision.pth", "tiny-h0mini-seal-vision.pth")
    refuse(tmp_path, str(tmp_path), *words, name=SEAL_H0.name)


BACKBONES = ("conch", "univ2", "virchow2", "h0mini", "phikon2")


@pytest.mark.parametrize("adapters_only", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("name", BACKBONES)
def test_the_file_of_another_backbone_is_named(name, adapters_only, tmp_path):
    """Files of the real shapes, with one number in place of each tensor's many."""
    row = find_spec(f"seal-{name}")
    shapes = lora_shapes(row, r=8) | ({} if adapters_only else shapes_of(row))
    tensors = as_published(row, {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()})
    tensors = {row.published.prefix + key: value for key, value in tensors.items()}
    tensors["decoder.decoder.0.weight"] = torch.zeros(()).expand(512, row.dim)
    assert looks_like(tensors) == (f"seal-{name}",)
    other = BACKBONES[BACKBONES.index(name) - 1 - adapters_only]
    path = save(tensors, tmp_path / "a.pth")
    refuse(path, "missing", f"it looks like seal-{name}", name=f"seal-{other}")


# --- positions without antialiasing -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (32, 32), (80, 48)])
def test_phikon_is_dinov2_of_transformers(size, tmp_path):
    """On larger, smaller and oblong patches too."""
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
    encoder = load("tiny-phikon2", save(tensors, tmp_path / "a.bin"))
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64}),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True, "no_embed_class": True}),
        ("vit_relpos_small_patch16_224", {}),
    ],
)
def test_plain_positions_are_for_some_towers_only(name, kwargs):
    with pytest.raises(UsageError, match="antialias is False; allowed"):
        empty_tower(replace(TINY_PHIKON, architecture=Architecture(name, kwargs, antialias=False)))


@pytest.mark.parametrize(
    "spec", [TINY_VIT, SEAL_TINY_CONCH, SEAL_TINY_VIT, TINY_PHIKON], ids=lambda s: s.name
)
def test_a_round_trip_is_bitwise(spec, tmp_path):
    made = base_file(spec) if spec in BASES else seal_file(spec)
    encoder = load(spec.name, save(made, tmp_path / "a.bin"))
    encoder.save_pretrained(tmp_path / "own")
    again = load_encoder(tmp_path / "own", device="cpu")
    assert again.spec == replace(spec, published=None)
    before, after = encoder.state_dict(), again.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    patches = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    assert torch.equal(again.encode(patches), encoder.encode(patches))
    again.save_pretrained(tmp_path / "twice")
    first, second = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("own", "twice"))
    assert first == second
