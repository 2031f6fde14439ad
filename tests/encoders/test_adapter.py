"""Adapters in PEFT's folders: merged into what they were trained on, or refused by the field in the way."""

import itertools
import json
import math

import pytest
import torch
from encoder_fixtures import (
    LAYERS,
    SEAL_TINY_VIT,
    TINY_CONCH,
    TINY_H0,
    TINY_PHIKON,
    TINY_VIT,
    as_batch,
    base_file,
    local_hub,
    noise_patches,
    random_tensors,
    save,
    seal_file,
    shapes_of,
    tower_tensors,
    untrained_encoder,
)
from encoder_fixtures import refuse as refused
from hub_server import Repo
from safetensors.torch import save_file
from torch import nn

from seal_extract.encoders import load_encoder
from seal_extract.encoders.request import EncoderRequest
from seal_extract.encoders.state_dict import find_places
from seal_extract.errors import MissingOnHubError

pytestmark = pytest.mark.usefixtures("tiny_rows")

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["qkv", "proj", "fc1", "fc2"]}


@pytest.fixture
def base(tmp_path):
    """The weight file of the tiny vision transformer."""
    return save(base_file(TINY_VIT), tmp_path / "base" / "pytorch_model.bin")


def halves(shapes, r=4, seed=3):
    """A and B of layers given as {name: (out, in)}, under PEFT's names."""
    wanted = {}
    for layer, (outputs, inputs) in shapes.items():
        wanted[f"base_model.model.{layer}.lora_A.weight"] = (r, inputs)
        wanted[f"base_model.model.{layer}.lora_B.weight"] = (outputs, r)
    return random_tensors(wanted, seed)


def vit_layers(*endings, front="blocks"):
    return {
        f"{front}.{i}.{e}": shapes_of(TINY_VIT)[f"blocks.{i}.{e}.weight"] for i in (0, 1) for e in endings
    }


def write(folder, tensors, **changes):
    """An adapter's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {k: v for k, v in {**CONFIG, **changes}.items() if v is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def load(name, checkpoint, adapter, **kwargs):
    return load_encoder(name, checkpoint=checkpoint, adapter=adapter, device="cpu", **kwargs)


def every_layer():
    return halves(vit_layers(*LAYERS))


def product(tensors, layer):
    a, b = (tensors[f"base_model.model.{layer}.lora_{half}.weight"].double() for half in "AB")
    return b @ a


def hold(encoder, expected):
    """The tower's weights are the base's, but for these."""
    before, after = tower_tensors(TINY_VIT), encoder.tower.state_dict()
    for key, value in before.items():
        update = expected.get(key.removesuffix(".weight"))
        if update is None:
            assert torch.equal(after[key], value), key
        else:
            assert not torch.equal(after[key], value)
            torch.testing.assert_close(after[key].double(), value.double() + update, rtol=0, atol=1e-6)


# --- what is merged -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / math.sqrt(4))])
def test_every_adapted_layer_gets_its_product(base, tmp_path, rslora, scale):
    tensors = every_layer()
    encoder = load("tiny-vit", base, write(tmp_path / "a", tensors, use_rslora=rslora))
    hold(encoder, {layer: scale * product(tensors, layer) for layer in vit_layers(*LAYERS)})


def test_patterns_of_rank_and_alpha(base, tmp_path):
    narrow, wide = vit_layers("attn.qkv"), vit_layers("mlp.fc1")
    tensors = halves(narrow, r=4) | halves(wide, r=2)
    adapter = write(
        tmp_path / "a",
        tensors,
        target_modules=r".*\.(qkv|fc1)",
        rank_pattern={"fc1": 2},
        alpha_pattern={r"blocks\.1\.attn\.qkv": 3.0},
    )
    scales = {"blocks.0.attn.qkv": 8 / 4, "blocks.1.attn.qkv": 3 / 4} | dict.fromkeys(wide, 8 / 2)
    hold(load("tiny-vit", base, adapter), {k: s * product(tensors, k) for k, s in scales.items()})


def test_q_and_v_apart_are_rows_of_the_fused_layer(base, tmp_path):
    """As trained on the model of transformers, by its names."""
    names = {
        f"encoder.layer.{i}.attention.attention.{q}": (24, 24) for i in (0, 1) for q in ("query", "value")
    }
    tensors = halves(names)
    encoder = load("tiny-vit", base, write(tmp_path / "a", tensors, target_modules=["query", "value"]))
    expected = {}
    for i in (0, 1):
        update = torch.zeros(72, 24, dtype=torch.float64)
        update[:24] = 2 * product(tensors, f"encoder.layer.{i}.attention.attention.query")
        update[48:] = 2 * product(tensors, f"encoder.layer.{i}.attention.attention.value")
        expected[f"blocks.{i}.attn.qkv"] = update
    hold(encoder, expected)


SHAPES = shapes_of(TINY_VIT)


@pytest.mark.parametrize(
    ("layer", "key", "rows"),
    [
        ("model.blocks.1.attn.qkv", "blocks.1.attn.qkv.weight", (0, 72)),
        ("layer.1.attention.v_proj", "blocks.1.attn.qkv.weight", (48, 72)),
        ("dinov2.encoder.layer.1.attention.o_proj", "blocks.1.attn.proj.weight", (0, 24)),
        ("encoder.layer.0.intermediate.dense", "blocks.0.mlp.fc1.weight", (0, 96)),
    ],
)
def test_where_layers_of_other_builds_lie(layer, key, rows):
    (found,) = find_places({layer: (rows[1] - rows[0], SHAPES[key][1])}, SHAPES).values()
    assert (found.key, found.rows) == (key, rows)


def test_trained_on_the_trunk_of_conch_alone(tmp_path):
    checkpoint = save(base_file(TINY_CONCH), tmp_path / "c" / "pytorch_model.bin")
    tensors = halves({"blocks.1.attn.qkv": (96, 32)})
    encoder = load("tiny-conch", checkpoint, write(tmp_path / "a", tensors, target_modules=["qkv"]))
    key = "trunk.blocks.1.attn.qkv.weight"
    expected = tower_tensors(TINY_CONCH)[key].double() + 2 * product(tensors, "blocks.1.attn.qkv")
    torch.testing.assert_close(encoder.tower.state_dict()[key].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_in_half_precision_are_merged_in_float32(base, tmp_path, dtype):
    tensors = {k: v.to(dtype) for k, v in halves(vit_layers("mlp.fc2")).items()}
    encoder = load("tiny-vit", base, write(tmp_path / "a", tensors, target_modules=["fc2"]))
    hold(encoder, {layer: 2 * product(tensors, layer) for layer in vit_layers("mlp.fc2")})


def test_on_top_of_the_adapters_of_a_seal_file(tmp_path):
    checkpoint = save(seal_file(SEAL_TINY_VIT), tmp_path / "whole.pth")
    tensors = halves(vit_layers("attn.qkv"))
    adapter = write(tmp_path / "a", tensors, target_modules=["qkv"])
    plain, both = load("seal-tiny-vit", checkpoint, None), load("seal-tiny-vit", checkpoint, adapter)
    for layer in vit_layers("attn.qkv"):
        before, after = (e.tower.state_dict()[f"{layer}.weight"].double() for e in (plain, both))
        torch.testing.assert_close(after, before + 2 * product(tensors, layer), rtol=0, atol=1e-6)
    assert both.decoder is not None


def test_on_a_folder_of_our_own_and_saved_again(base, tmp_path):
    adapter = write(tmp_path / "mine", every_layer())
    load("tiny-vit", base, None).save_pretrained(tmp_path / "own")
    merged = load(tmp_path / "own", None, adapter)
    merged.save_pretrained(tmp_path / "merged")
    again = load_encoder(tmp_path / "merged", device="cpu")
    assert again.spec.name == "tiny-vit+mine"
    patches = as_batch(noise_patches(2, 28))
    assert torch.equal(again.encode(patches), load("tiny-vit", base, adapter).encode(patches))


def test_fields_without_effect_are_let_pass(base, tmp_path):
    neutral = {
        "auto_mapping": {"parent_library": "timm"},
        "lora_dropout": 0.1,
        "bias": "none",
        "init_lora_weights": "gaussian",
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "loftq_config": {},
        "task_type": None,
        "some_future_field": False,
    }
    load("tiny-vit", base, write(tmp_path / "a", every_layer(), **neutral))


# --- what is recorded ---------------------------------------------------------------------------------------


def test_the_adapter_counts_in_name_weights_and_identity(base, tmp_path):
    adapter = write(tmp_path / "my stain", every_layer())
    plain, merged = load("tiny-vit", base, None), load("tiny-vit", base, adapter)
    assert merged.spec.name == merged.enc_name == "tiny-vit+my-stain"
    assert [w.file for w in merged.weights] == [
        "pytorch_model.bin",
        "adapter_model.safetensors",
        "adapter_config.json",
    ]
    assert merged.identity["weights"][:1] == plain.identity["weights"]
    write(adapter, every_layer(), lora_alpha=16)
    assert load("tiny-vit", base, adapter).identity != merged.identity


def test_a_request_knows_the_identity_without_loading(base, tmp_path):
    adapter = write(tmp_path / "a", every_layer())
    request = EncoderRequest("tiny-vit", checkpoint=base, adapter=adapter, device="cpu")
    assert request.spec.name == "tiny-vit+a"
    encoder = request.load()
    recorded = encoder.description["weights"]
    assert request.identity_if_unchanged(recorded) == encoder.identity
    without = EncoderRequest("tiny-vit", checkpoint=base, device="cpu")
    assert without.identity_if_unchanged(recorded) is None
    assert request.identity_if_unchanged(without.load().description["weights"]) is None
    write(adapter, every_layer(), lora_alpha=16)
    assert request.identity_if_unchanged(recorded) is None


# --- what is refused ----------------------------------------------------------------------------------------


def refuse(base, adapter, *words):
    refused(base, *words, name="tiny-vit", adapter=adapter)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", "PROMPT_TUNING"),
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["norm"]),
        ("fan_in_fan_out", True),
        ("target_parameters", ["experts"]),
        ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", [1]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("loftq_config", {"loftq_bits": 4}),
        ("use_qalora", True),
        ("megatron_config", {"a": 1}),
        ("some_future_field", "on"),
    ],
)
def test_another_kind_of_adapter(base, tmp_path, field, value):
    adapter = write(tmp_path / "a", every_layer(), **{field: value})
    refuse(base, adapter, f"has {field} {json.dumps(value)}", "not merged", "plain LoRA on Linear layers")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": ...}, "missing required field `peft_type`"),
        ({"r": 0}, "Expected `int` >= 1 - at `$.r`"),
        ({"r": "8"}, "Expected `int`, got `str` - at `$.r`"),
        ({"lora_alpha": None}, "got `null` - at `$.lora_alpha`"),
        ({"rank_pattern": {"fc1": 1.5}}, "Expected `int`, got `float` - at `$.rank_pattern[...]`"),
        ({"rank_pattern": ["fc1"]}, "got `array` - at `$.rank_pattern`"),
        ({"target_modules": None}, "got `null` - at `$.target_modules`"),
        ({"target_modules": "(qkv"}, "does not describe an adapter"),
        ({"target_modules": [3]}, "got `int` - at `$.target_modules[0]`"),
    ],
)
def test_a_config_that_does_not_fit(base, tmp_path, changes, words):
    refuse(base, write(tmp_path / "a", every_layer(), **changes), words)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_config_that_is_no_json_object(base, tmp_path, text):
    adapter = write(tmp_path / "a", every_layer())
    (adapter / "adapter_config.json").write_text(text)
    refuse(base, adapter, "adapter_config.json", "allowed: a folder of PEFT")


@pytest.mark.parametrize(
    ("layers", "targets", "words"),
    [
        (
            {"trunk.blocks.1.attn.qkv": (96, 32)},
            ["qkv"],
            ["trained on lab/x", "does not fit tiny-vit", "[96, 32]", "[72, 24]", "it fits tiny-conch"],
        ),
        (
            {"h.0.attn.c_attn": (96, 32)},
            ["c_attn"],
            ["has no layer h.0.attn.c_attn", "fits none of the named encoders"],
        ),
        (
            {f"blocks.{i}.mlp.fc2": (24, 48) for i in range(9)},
            ["fc2"],
            ["has no layer blocks.2.mlp.fc2 and 6 more"],
        ),
        (
            {"patch_embed.proj": (24, 588)},
            ["proj"],
            ["patch_embed.proj was adapted as [24, 588]", "[24, 3, 14, 14]"],
        ),
    ],
    ids=["another base", "nothing here", "more blocks", "no Linear layer"],
)
def test_layers_that_the_tower_does_not_have(base, tmp_path, layers, targets, words):
    changes = {"target_modules": targets, "base_model_name_or_path": "lab/x"}
    refuse(base, write(tmp_path / "a", halves(layers), **changes), *words)


LAYER = "base_model.model.blocks.0.attn.qkv"


def change(tensors, key, value):
    if value is None:
        return {k: v for k, v in tensors.items() if k != key}
    return tensors | {key: value}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (f"{LAYER}.lora_B.weight", None, "blocks.0.attn.qkv has no lora_B"),
        (f"{LAYER}.lora_A.weight", torch.ones(5, 24), "blocks.0.attn.qkv has rank 5 and 4, not 4"),
        (f"{LAYER}.lora_A.weight", torch.full((4, 24), math.nan), "lora_A.weight holds NaN"),
        (f"{LAYER}.lora_A.weight", torch.ones(4, 24, dtype=torch.float64), "is float64, not float32"),
        (f"{LAYER}.lora_magnitude_vector", torch.ones(72), "is no LoRA weight of a Linear layer"),
        ("base_model.model.norm.weight", torch.ones(24), "norm.weight is no LoRA weight"),
        (f"{LAYER}.lora_A.weight", torch.ones(4, 3, 14, 14), "has 4 dimensions, as of a convolution"),
        ("base_model.model.head.lora_A.weight", torch.ones(4, 24), "head has no lora_B"),
    ],
)
def test_weights_that_do_not_belong_to_the_config(base, tmp_path, key, value, words):
    refuse(base, write(tmp_path / "a", change(every_layer(), key, value)), words)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (CONFIG["target_modules"], "no weights for proj of target_modules"),
        (r".*\.1\..*", "blocks.0.attn.qkv is not among its target_modules"),
    ],
)
def test_targets_and_weights_that_differ(base, tmp_path, targets, words):
    adapter = write(tmp_path / "a", halves(vit_layers("attn.qkv")), target_modules=targets)
    refuse(base, adapter, words)


def test_a_truncated_file(base, tmp_path):
    adapter = write(tmp_path / "a", every_layer())
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refuse(base, adapter, "adapter_model.safetensors is damaged, cut short")


def test_not_an_adapter(base, tmp_path):
    refuse(base, tmp_path / "none", "does not exist", "adapter_config.json and adapter_model.safetensors")
    refuse(base, base, "is a file", "allowed: a folder of PEFT")
    refuse(base, tmp_path, "holds no adapter")


# --- held to PEFT itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["list", "regex", "patterns", "rslora"])
def test_peft_gives_the_same(base, tmp_path, kind):
    peft = pytest.importorskip("peft", reason="peft is not installed; it is needed by no other test")
    settings = {
        "list": {"target_modules": list(LAYERS)},
        "regex": {"target_modules": r"blocks\.1\..*\.(qkv|fc2)"},
        "patterns": {
            "target_modules": ["qkv", "fc1"],
            "rank_pattern": {"fc1": 2},
            "alpha_pattern": {"blocks.1.attn.qkv": 3},
        },
        "rslora": {
            "target_modules": ["proj", "qkv"],
            "exclude_modules": ["patch_embed.proj"],
            "use_rslora": True,
        },
    }[kind]
    torch.manual_seed(0)
    model: nn.Module = untrained_encoder(TINY_VIT).tower
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **settings}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    wrapped.save_pretrained(tmp_path / "a")
    encoder = load("tiny-vit", base, tmp_path / "a")
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = wrapped.base_model.model.forward_features(images)[:, 0]
        got = encoder(images)
    assert (got - expected).norm() / expected.norm() < 1e-6


# --- adapters of others: several seeds in folders of one repository -----------------------------------------

SPECTRA = {"base_model_name_or_path": None, "r": 32, "lora_alpha": 64, "lora_dropout": 0.0, "bias": "none"}


TIMM = {"attn.qkv": ["attn.qkv"], "attn.proj": ["attn.proj"], "mlp.fc1": ["mlp.fc1"], "mlp.fc2": ["mlp.fc2"]}
DINOV2 = {
    **{"attn.qkv": [f"attention.attention.{part}" for part in ("query", "key", "value")]},
    **{"attn.proj": ["attention.output.dense"], "mlp.fc1": ["mlp.fc1"], "mlp.fc2": ["mlp.fc2"]},
}
SWIGLU = {**DINOV2, "mlp.fc1": ["mlp.weights_in"], "mlp.fc2": ["mlp.weights_out"]}


def spectra(folder, row, names=TIMM, seed=1):
    """An adapter of MedARC's layout, and the rows of the tower that each of its layers is for.

    Alpha is twice the rank, and beside it lies a file that is no strict JSON.
    """
    block = "blocks.{}." if names is TIMM else "encoder.layer.{}."
    front = "trunk." if row.pooling == "conch" else ""
    places = {}
    for i, (layer, parts) in itertools.product(range(2), names.items()):
        key = f"{front}blocks.{i}.{layer}.weight"
        rows = shapes_of(row)[key][0] // len(parts)
        for j, part in enumerate(parts):
            places[front + block.format(i) + part] = (key, slice(j * rows, (j + 1) * rows))
    shapes = {name: (at.stop - at.start, shapes_of(row)[key][1]) for name, (key, at) in places.items()}
    tensors = halves(shapes, 32, seed)
    ends = sorted({".".join(name.split(".")[-2:]) for name in places})
    write(folder, tensors, **SPECTRA, target_modules=ends)
    (folder / "training_config.json").write_text('{"best_score": -Infinity}')
    return tensors, places


@pytest.mark.parametrize(
    ("row", "names"),
    [
        (TINY_VIT, TIMM),
        (TINY_VIT, DINOV2),
        (TINY_VIT, SWIGLU),
        (TINY_PHIKON, DINOV2),
        (TINY_H0, TIMM),
        (TINY_CONCH, TIMM),
    ],
    ids=["timm", "transformers", "swiglu of transformers", "phikon", "h0mini", "conch"],
)
def test_adapters_of_spectra_merge_into_any_row_that_fits(tmp_path, row, names):
    checkpoint = save(base_file(row), tmp_path / "base" / "pytorch_model.bin")
    tensors, places = spectra(tmp_path / "spectra" / "seed1", row, names)
    encoder = load(row.name, checkpoint, tmp_path / "spectra" / "seed1")
    expected = {key: value.double() for key, value in tower_tensors(row).items()}
    for layer, (key, rows) in places.items():
        expected[key][rows] += 2 * product(tensors, layer)
    for key, value in encoder.tower.state_dict().items():
        torch.testing.assert_close(value.double(), expected[key], rtol=0, atol=1e-5)
    (merged,) = encoder.merged
    assert (merged["rank"], merged["scale"], len(merged["layers"])) == (32, 2.0, 8)


def test_seeds_of_a_repository_are_told_apart(base, tmp_path, monkeypatch):
    files = {}
    for seed in range(3):
        spectra(tmp_path / "spectra" / f"seed{seed}", TINY_VIT, seed=seed)
        for path in (tmp_path / "spectra" / f"seed{seed}").iterdir():
            files[f"seed{seed}/{path.name}"] = path.read_bytes()
    with local_hub(tmp_path / "hf", monkeypatch) as hub:
        hub.repos["lab/spectra"] = Repo(files)
        first, second = (load("tiny-vit", base, f"lab/spectra/seed{i}") for i in (1, 2))
        hub.asked.clear()
        again = load("tiny-vit", base, "lab/spectra/seed1", offline=True)
        assert hub.asked == []
        with pytest.raises(MissingOnHubError, match="in a folder of it is typed lab/spectra/FOLDER"):
            load("tiny-vit", base, "lab/spectra")
        with pytest.raises(MissingOnHubError, match=r"no file seed7/adapter_config.json"):
            load("tiny-vit", base, "lab/spectra/seed7")
        request = EncoderRequest("tiny-vit", checkpoint=base, adapter="lab/spectra/seed1", device="cpu")
        assert request.identity_if_unchanged(first.description["weights"]) == first.identity
    assert [e.spec.name for e in (first, second)] == ["tiny-vit+spectra-seed1", "tiny-vit+spectra-seed2"]
    assert again.identity == first.identity != second.identity
    here = load("tiny-vit", base, tmp_path / "spectra" / "seed1")
    assert all(torch.equal(v, here.state_dict()[k]) for k, v in first.state_dict().items())
    refuse(
        base, tmp_path / "spectra", "holds no adapter itself; it holds seed0, seed1, seed2: type", "seed0;"
    )
