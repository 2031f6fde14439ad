"""What the table says of each encoder, and what happens to a patch before its tower sees it."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import timm
import torch
from encoder_fixtures import TINY_CONCH, as_batch, noise_patches
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from seal_extract.demo import UNTRAINED, untrained_encoder
from seal_extract.encoders import EncoderSpec, find_spec, list_encoders, load_encoder, registry
from seal_extract.encoders.folder import read_config, to_config
from seal_extract.encoders.registry import ROWS
from seal_extract.encoders.spec import Architecture, Head, InputRule, Pooler, Published, recommended_precision
from seal_extract.encoders.tower import empty_tower, tower_shapes
from seal_extract.encoders.transform import PatchTransform, fit
from seal_extract.errors import UsageError

ALL = {row.name: row for row in list_encoders()}
SEAL = ("seal-conch", "seal-univ2", "seal-virchow2", "seal-h0mini", "seal-phikon2")
BASES = ("conch", "univ2", "virchow2", "h0mini", "phikon2", "uni")
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
H0 = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))


def test_the_table_has_no_key_that_nobody_reads():
    """A mistyped one would be ignored, and its default taken."""
    table = msgspec.toml.decode(Path(registry.__file__).with_name("encoders.toml").read_bytes())
    also = {"like", "group", "statistics", "also_called", "seal"}
    for name, row in table.items():
        for values, kind in (
            ({k: v for k, v in row.items() if k not in also}, EncoderSpec),
            (row.get("architecture", {}), Architecture),
            (row.get("input", {}), InputRule),
            (row["published"], Published),
        ):
            assert values.keys() <= {field.name for field in fields(kind)}, name


def test_all_names_the_seal_encoders_first():
    assert tuple(row.name for row in list_encoders())[:11] == SEAL + BASES


@pytest.mark.parametrize(
    ("name", "dim", "statistics", "source"),
    [
        ("conch", 512, CLIP, "MahmoodLab/conch"),
        ("univ2", 1536, IMAGENET, "MahmoodLab/UNI2-h"),
        ("virchow2", 2560, IMAGENET, "paige-ai/Virchow2"),
        ("h0mini", 1536, H0, "bioptimus/H0-mini"),
        ("phikon2", 1024, IMAGENET, "owkin/phikon-v2"),
        ("uni", 1024, IMAGENET, "MahmoodLab/UNI"),
    ],
)
def test_the_facts_of_a_base_and_of_its_finetune(name, dim, statistics, source):
    rows = [find_spec(name)] + ([find_spec(f"seal-{name}")] if f"seal-{name}" in ROWS else [])
    for row in rows:
        assert (row.dim, (row.mean, row.std)) == (dim, statistics)
        assert row.input == rows[0].input
        assert row.architecture == rows[0].architecture
    assert rows[0].source == source
    assert rows[0].page == f"https://huggingface.co/{source}"


@pytest.mark.parametrize(
    ("errors", "precision"),
    [
        ({}, "float32"),
        ({"float16": 1e-3, "bfloat16": 1e-3, "tf32": 1e-4}, "float16"),
        ({"float16": 2e-3, "bfloat16": 9e-4, "tf32": 1e-4}, "bfloat16"),
        ({"float16": 1.1e-3, "bfloat16": 5e-3, "tf32": 9e-4}, "tf32"),
        ({"bfloat16": 5e-3}, "float32"),
    ],
)
def test_the_fastest_precision_whose_error_was_measured_and_is_small_is_recommended(errors, precision):
    assert recommended_precision(errors) == precision


@pytest.mark.parametrize("name", SEAL + BASES)
def test_a_named_encoder_is_computed_in_the_precision_that_its_errors_allow(name):
    row = find_spec(name)
    assert row.errors.keys() == {"float16", "bfloat16"}
    assert row.errors_basis == "random weights, on a CPU"
    assert row.precision_for("cuda") == recommended_precision(row.errors) == "float16"
    assert row.precision_for("cpu") == "float32"
    with pytest.raises(UsageError, match="tf32 is of NVIDIA GPUs; type --precision float32 on cpu"):
        row.precision_for("cpu", "tf32")


@pytest.mark.parametrize("name", SEAL + BASES)
def test_a_row_states_licence_and_paper(name):
    row = find_spec(name)
    licence = r"CC-BY-NC-ND-4\.0|Owkin non-commercial licence"
    assert re.search(f"({licence})$", row.licence)
    assert re.match(r"(doi 10\.|arXiv \d{4}\.)", row.paper)


def test_the_list_is_grouped_and_fits_a_terminal(run):
    status, out, _ = run("encoders")
    assert status == 0
    assert max(map(len, out)) <= 80
    assert re.search(r"virchow2 +2560 +224 +0.5 0.25 1 2 +gated +CC-BY-NC-ND-4.0$", "\n".join(out), re.M)
    groups = [line for line in out[1:-3] if line and not line.startswith(" ")]
    assert groups[:: len(groups) - 1] == ["finetuned with spatial transcriptomics", "bundled"]
    assert [line.split()[0] for line in out if line.startswith("  ")] == ["name", *_by_group(groups)]


def _by_group(groups):
    return [row.name for group in groups for row in list_encoders() if registry.group_of(row.name) == group]


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        (["virchow"], ["seal-virchow2", "virchow2", "virchow"]),
        (["hoptimus0"], ["h-optimus-0"]),
        (["histai/"], ["hibou-b", "hibou-l"]),
        (["h-optimus", "--licence", "open"], ["h-optimus-0"]),
        (["kaiko-vitb", "--licence", "KAIKO"], ["kaiko-vitb8", "kaiko-vitb16"]),
        (["hibou", "midnight", "--ungated"], ["midnight-12k"]),
        (["--cached"], ["seal-tiny"]),
    ],
)
def test_the_list_is_filtered(typed, names, run, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    status, out, _ = run("encoders", *typed, "--json")
    assert status == 0
    assert [row["name"] for row in json.loads("\n".join(out))] == names


def test_nothing_to_list_names_the_nearest(run):
    status, _, err = run("encoders", "hibou-x")
    assert status == 2
    assert re.search(
        "no encoder matches; did you mean hibou-[bl].*; for all .* type: seal-extract encoders", err[-1]
    )


def test_a_download_is_listed_as_cached(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    row = find_spec("phikon2")
    place = tmp_path / "models--owkin--phikon-v2" / "snapshots" / row.published.commit
    place.mkdir(parents=True)
    (place / "model.safetensors").touch()
    assert [f["cached"] for f in json.loads("\n".join(run("encoders", "phikon-v2", "--json")[1]))] == [True]
    _, out, _ = run("encoders", "owkin/phikon-v2")
    assert out[0] == "phikon2"
    assert "  pinned to    commit 2ae989a9c40c, sha256 261ae680fa69 of model.safetensors" in out
    assert "  on a GPU     float16: at most 3.7e-04 from float32" in out
    assert "  other names  phikonv2, phikon_v2" in out


@pytest.mark.parametrize("name", SEAL)
def test_a_seal_row(name):
    row = find_spec(name)
    base = name.removeprefix("seal-")
    assert (row.patch_px, row.mpp, row.also_mpp, row.source) == (224, 0.5, (), "MahmoodLab/SEAL")
    assert row.published.files[:2] == (f"seal_{base}_vision.pth", f"{base}-seal-vision.pth")
    assert (row.published.lora.alpha, row.published.lora.r) == (8.0, None)
    assert row.published.base == base


def test_the_tower_of_uni_is_that_of_its_authors_example():
    theirs = timm.create_model(
        "vit_large_patch16_224",
        img_size=224,
        patch_size=16,
        init_values=1e-5,
        num_classes=0,
        dynamic_img_size=True,
    )
    ours = empty_tower(find_spec("uni"))
    assert tower_shapes(ours) == tower_shapes(theirs)
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("name", ALL)
def test_a_row_is_data_that_json_can_hold(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_config(ALL[name])))
    assert read_config(tmp_path / "config.json") == replace(ALL[name], published=None)


@pytest.mark.parametrize("name", ALL)
def test_a_row_introduces_itself_in_one_line(name):
    assert repr(ALL[name]).startswith(f"EncoderSpec({name}: {ALL[name].dim} numbers per patch of ")
    source = ALL[name].source  # empty if bundled
    assert ALL[name].page == (f"https://huggingface.co/{source}" if ALL[name].on_hub else source)


@pytest.mark.parametrize("name", ALL)
def test_a_tower_takes_no_memory_until_it_is_filled(name):
    if not timm.is_model(ALL[name].architecture.timm):
        pytest.skip("this timm has no such architecture")
    tower = empty_tower(ALL[name])
    if name != "dinov3-vitb16":  # its rotary frequencies are in no file, so that timm has to compute them
        assert {p.device.type for p in tower.parameters()} == {"meta"}
    assert not tower.training


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [("seal-conc", "seal-conch"), ("UNIV2", "univ2"), ("uni2", "univ2"), ("zzz", "For all")],
)
def test_an_unknown_name_is_answered_with_the_nearest(asked, nearest):
    with pytest.raises(UsageError, match=rf"no encoder '{asked}'.*{nearest}.*type: seal-extract encoders"):
        find_spec(asked)
    with pytest.raises(UsageError, match=nearest):
        load_encoder(asked)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"precision": "float64"}, "precision is 'float64'; allowed: float32, tf32, bfloat16, float16"),
        ({"pooling": "mean"}, r"pooling is 'mean'; allowed: cls, cls\+mean, conch"),
        ({"input": InputRule(16, 224, "lanczos")}, "filter is 'lanczos'; allowed: bilinear, bicubic"),
        ({"input": InputRule(16, -1)}, "resize_px is -1; allowed: above 0"),
        ({"std": (1.0, 1.0, 0.0)}, "std above 0"),
        ({"mpp": 0.0}, "mpp is 0.0; allowed: above 0"),
    ],
)
def test_a_row_checks_itself(change, complaint):
    with pytest.raises(UsageError, match=complaint):
        replace(TINY_CONCH, **change)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"architecture": Architecture("hf-hub:lab/x")}, "unknown to timm"),
        ({"architecture": Architecture("resnet18")}, "allowed: vision transformers of timm"),
        (
            {"architecture": Architecture("vit_tiny_patch16_224", {"pretrained": True})},
            "passes pretrained to timm",
        ),
        ({"architecture": Architecture("vit_tiny_patch16_224", {"depth": "x"})}, "has depth 'x'; allowed"),
        (
            {"architecture": Architecture("vit_tiny_patch16_224", {"mlp_layer": "os"})},
            "mlp_layer is 'os'; allowed: Mlp",
        ),
        (
            {"architecture": Architecture("resnet18", head=Head((4,))), "pooling": "own", "dim": 4},
            "has a head behind own pooling; allowed: cls",
        ),
        ({"dim": 100, "pooling": "cls"}, r"cls pooling gives 32 numbers.*allowed: dim 100"),
        ({"dim": Pooler().heads + 1}, "cannot be built"),
    ],
)
def test_an_architecture_that_cannot_be_built(change, complaint):
    with pytest.raises(UsageError, match=complaint):
        empty_tower(replace(TINY_CONCH, **change))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Head(()), r"widths of a head are \(\); allowed: 1 to 64 from 1 to"),
        (lambda: Head((4, 0)), r"widths of a head are \(4, 0\); allowed: "),
        (lambda: Pooler(heads=0), r"heads and queries of a pooler are \(0, 1\); allowed: "),
        (lambda: Architecture("vit_tiny_patch16_224", position_offset=0.1), "below 1, antialias false"),
    ],
)
def test_parts_of_a_row_check_themselves(make, complaint):
    with pytest.raises(UsageError, match=complaint):
        make()


# --- patches of another size --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "patch_px", "mpp", "told"),
    [
        ("seal-conch", 224, 0.5, None),
        ("seal-conch", 224, 0.4958, None),
        ("seal-conch", 256, 0.5, "224 px at 0.5 µm/px; these are 256 px at 0.5 µm/px"),
        ("seal-univ2", 224, 0.25, "224 px at 0.5 µm/px; these are 224 px at 0.25 µm/px"),
        ("conch", 448, 0.5, None),
        ("conch", 224, 0.5, "448 px at 0.5 µm/px; these are 224 px at 0.5 µm/px"),
        ("virchow2", 224, 0.25, None),
        ("virchow2", 224, 0.75, "224 px at 0.5, 0.25, 1, 2 µm/px; these are 224 px at 0.75 µm/px"),
        ("seal-virchow2", 224, 0.25, "224 px at 0.5 µm/px; these are 224 px at 0.25 µm/px"),
    ],
)
def test_patches_unlike_those_of_the_training_are_told(name, patch_px, mpp, told):
    expected = told and f"{name} was trained on patches of {told}"
    assert find_spec(name).mismatch(patch_px, mpp) == expected


# --- what the tower sees ------------------------------------------------------------------------------------

BILINEAR, BICUBIC = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC
RESIZED = {"univ2": BILINEAR, "uni": BILINEAR, "virchow2": BICUBIC, "h0mini": BICUBIC}
OWN_SIZE = ("conch", "phikon2")


@pytest.mark.parametrize("size", [(224, 224), (256, 256), (448, 448), (100, 100), (301, 420)])
@pytest.mark.parametrize("name", RESIZED)
def test_pixels_are_those_of_torchvision(name, size):
    patch = np.ascontiguousarray(noise_patches(1, max(size))[0, : size[0], : size[1]])
    by_torchvision = Compose([Resize(224, RESIZED[name]), CenterCrop(224)])(Image.fromarray(patch))
    expected = np.asarray(by_torchvision).astype(int)
    for row in (find_spec(name), ROWS.get(f"seal-{name}", find_spec(name))):
        on_device = fit(as_batch(patch[None]), row.input)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(on_device, expected)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (row.mean, row.std))
        by_pil = (PatchTransform.of(row)(Image.fromarray(patch)) * std + mean) * 255
        assert np.array_equal(by_pil.round().permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("size", [224, 256, 448])
@pytest.mark.parametrize("name", OWN_SIZE)
def test_a_patch_keeps_its_own_size(name, size):
    patches = noise_patches(2, size)
    for row in (find_spec(name), find_spec(f"seal-{name}")):
        assert np.array_equal(fit(as_batch(patches), row.input), as_batch(patches))
        assert PatchTransform.of(row)(Image.fromarray(patches[0])).shape == (3, size, size)


@pytest.mark.parametrize("name", [*BASES, "vit_tiny", "resnet18", "xcit_nano_12_p16_224"])
def test_an_untrained_tower_tells_patches_apart(name):
    """By the class token alone too: each block adds something. Two blocks of each row's real width."""
    row = UNTRAINED if name == "vit_tiny" else find_spec(name if name in BASES else "conch")
    kwargs = {**row.architecture.kwargs, "depth": 2}
    row = replace(row, architecture=replace(row.architecture, kwargs=kwargs))
    if name not in (*BASES, "vit_tiny"):
        dim = {"resnet18": 512, "xcit_nano_12_p16_224": 128}[name]
        row = replace(row, architecture=Architecture(name), pooling="own", input=InputRule(32), dim=dim)
    patches = np.concatenate([noise_patches(2, 224), 255 - noise_patches(1, 224)])
    embeddings = untrained_encoder(row).encode(as_batch(patches))
    cls = embeddings[:, : row.dim // 2] if row.pooling == "cls+mean" else embeddings
    apart = torch.cdist(cls, cls) / cls.norm(dim=1)
    assert apart[~torch.eye(3, dtype=torch.bool)].min() > 0.005


@pytest.mark.gpu
@pytest.mark.parametrize("size", [256, 448, 301])
@pytest.mark.parametrize("name", RESIZED)
def test_the_gpu_resizes_to_the_same_pixels(name, size):
    patches, rule = as_batch(noise_patches(2, size)), find_spec(name).input
    assert torch.equal(fit(patches.cuda(), rule).cpu(), fit(patches, rule))
