"""The rows of public encoders, held to their authors' cards and to builds of timm's and transformers' own.

The builds have two blocks of the real width, for a giant's 40 take 4.5 GB. The numbers of tensors and of
parameters of whole towers are held to the published ones. All weights are random.
"""

import hashlib
import math
import re
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from encoder_fixtures import as_batch, local_hub, noise_patches, random_tensors, refuse, save, shapes_of
from hub_server import GOOD_TOKEN, OUTSIDE_TOKEN, Repo
from PIL import Image
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn
from torchvision.models import resnet50
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from seal_extract.encoders import find_spec, load_encoder
from seal_extract.encoders.registry import ROWS
from seal_extract.encoders.transform import PatchTransform, fit
from seal_extract.errors import CheckpointError, GateError, MissingOnHubError, TokenError, UsageError

BICUBIC = InterpolationMode.BICUBIC
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
HOPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
HIBOU = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))
LUNIT = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))

# tensors and millions of parameters of the tower, where a source has counted those of the published file
COUNTED = {
    "h-optimus-0": (567, 1134.77),
    "h-optimus-1": (567, 1134.77),
    "gigapath": (566, None),
    "gigapath-flash": (174, 21.68),
    "virchow": (454, 631.23),
    "midnight-12k": (566, 1136.48),  # of 727 in the file: q, k and v are apart, and there is a mask token
    "openmidnight": (567, None),  # of 568: a mask token
    "gpfm": (342, None),
    "phikon": (150, 85.80),
    "hibou-b": (None, 85.74),
    "hibou-l": (None, 303.66),
    "conch-v1.5": (353, 306.11),  # of 352 in the file: k and v of the pooler are one
    "omiclip": (307, 306.72),
    "keep": (346, 304.73),
    "plip": (152, 87.85),  # of 200: q, k and v are apart, and the positions have numbers
    "quiltnet-b32": (152, 87.85),
    "ctranspath": (None, 27.52),
}

# What the authors do to a patch, in torchvision's words: before ToTensor, and for Normalize. Without a list,
# patches of 224 px go in as they are.
RECIPES = {
    "h-optimus-0": ([], HOPTIMUS),
    "h-optimus-1": ([], HOPTIMUS),
    "gigapath": ([Resize(256, BICUBIC), CenterCrop(224)], IMAGENET),
    "gigapath-flash": ([Resize(256, BICUBIC), CenterCrop(224)], IMAGENET),
    "virchow": ([Resize(224, BICUBIC), CenterCrop(224)], IMAGENET),
    "midnight-12k": ([Resize(224), CenterCrop(224)], HALF),
    "openmidnight": ([Resize((224, 224))], IMAGENET),
    "openpath": ([Resize(224), CenterCrop(224)], IMAGENET),
    "phikon": ([Resize((224, 224))], IMAGENET),
    "hibou-b": ([Resize(224, BICUBIC), CenterCrop(224)], HIBOU),
    "hibou-l": ([Resize(224, BICUBIC), CenterCrop(224)], HIBOU),
    **{f"kaiko-vit{k}": ([Resize(224), CenterCrop(224)], HALF) for k in ("s8", "s16", "b8", "b16", "l14")},
    "lunit-vits8": ([], LUNIT),
    "lunit-vits16": ([], LUNIT),
    "gpfm": ([Resize((224, 224), BICUBIC)], IMAGENET),
    "mstar": ([Resize(224), CenterCrop(224)], IMAGENET),
    "pathorchestra": ([Resize(224), CenterCrop(224)], IMAGENET),
    "sp22m": ([Resize(224, BICUBIC), CenterCrop(224)], IMAGENET),
    "retccl": ([Resize(256), CenterCrop(256)], IMAGENET),
    "resnet50": ([Resize(224), CenterCrop(224)], IMAGENET),
    "conch-v1.5": ([Resize(448), CenterCrop(448)], IMAGENET),  # not CLIP's, as CONCH has
    "keep": ([Resize(224, BICUBIC), CenterCrop(224)], IMAGENET),
    "ctranspath": ([Resize(224, BICUBIC), CenterCrop(224)], IMAGENET),
    **{name: ([Resize(224, BICUBIC), CenterCrop(224)], CLIP) for name in ("omiclip", "plip", "quiltnet-b32")},
    "virchow2": ([Resize(224, BICUBIC), CenterCrop(224)], IMAGENET),
    **{f"dinov2-vit{kind}14": ([Resize(224, BICUBIC), CenterCrop(224)], IMAGENET) for kind in "blg"},
    "dinov3-vitb16": ([Resize(256, BICUBIC), CenterCrop(256)], IMAGENET),
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_tower_has_as_many_tensors_and_parameters_as_are_published(name):
    shapes = shapes_of(find_spec(name))
    tensors, millions = COUNTED[name]
    assert tensors in (None, len(shapes))
    assert millions in (None, round(sum(map(math.prod, shapes.values())) / 1e6, 2))


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("gigapath", "patch_embed.proj.weight", (1536, 3, 16, 16)),  # whatever its architecture is called
        ("kaiko-vitl14", "pos_embed", (1, 1369, 1024)),  # of 518 px
        ("virchow", "pos_embed", (1, 257, 1280)),
        ("virchow2", "reg_token", (1, 4, 1280)),
    ],
)
def test_the_shape_that_tells_an_architecture_from_its_likes(name, key, shape):
    assert shapes_of(find_spec(name))[key] == shape
    assert "reg_token" not in shapes_of(find_spec("virchow"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_patch_is_prepared_as_the_authors_do(name):
    """As an image and on the device; oblong ones too, where the authors do anything with them."""
    row, (steps, statistics) = find_spec(name), RECIPES[name]
    theirs = Compose([*steps, ToTensor(), Normalize(*statistics)])
    for width, height in [(224, 224), (256, 256), (301, 420)][: 3 if steps else 1]:
        patch = np.ascontiguousarray(noise_patches(1, 420)[0, :height, :width])
        expected = theirs(Image.fromarray(patch))
        torch.testing.assert_close(PatchTransform.of(row)(Image.fromarray(patch)), expected)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (row.mean, row.std))
        on_device = fit(as_batch(patch[None]), row.input)[0].float().div(255).sub(mean).div(std)
        torch.testing.assert_close(on_device, expected)


# --- builds of their own ------------------------------------------------------------------------------------


def drawn(model):
    """Random weights that keep activations lively; returns the model's state."""
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if v.is_floating_point()}
    tensors = random_tensors(shapes)
    for key, value in tensors.items():
        if value.ndim == 1:  # scales and biases of norms, LayerScales, running statistics
            tensors[key] = 0.1 * value + ("bias" not in key and "running_mean" not in key)
    model.load_state_dict(tensors, strict=False)
    return model.eval().state_dict()


def of_timm(architecture, **kwargs):
    depth = {} if architecture.startswith("resnet") else {"depth": 2}
    return timm.create_model(architecture, num_classes=0, **depth, **kwargs)


def swiglu(ratio):
    return {"mlp_ratio": ratio, "mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}


def of_transformers(kind, **sizes):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(num_hidden_layers=2, layer_norm_eps=1e-6, **sizes)
    without = {"add_pooling_layer": False} if kind == "ViT" else {}
    return getattr(transformers, f"{kind}Model")(config, **without)


def cls(model, images):
    return model(images)


def cls_and_mean(begin):
    def pool(model, images):
        out = model.forward_features(images) if hasattr(model, "forward_features") else model(images)
        tokens = getattr(out, "last_hidden_state", out)
        return torch.cat([tokens[:, 0], tokens[:, begin:].mean(1)], 1)

    return pool


def first_token(model, images):
    return model(images).last_hidden_state[:, 0]


GIANT = {"hidden_size": 1536, "num_attention_heads": 24, "patch_size": 14, "use_swiglu_ffn": True}
BASE = {"hidden_size": 768, "num_attention_heads": 12}
LARGE = {"hidden_size": 1024, "num_attention_heads": 16}
REG = "vit_giant_patch14_reg4_dinov2"
L16 = ("vit_large_patch16_224", {"init_values": 1e-5, "dynamic_img_size": True})
DINOV2 = {"img_size": 518, "dynamic_img_size": True}

# the model that the authors' card builds, and what is taken of its output
BUILDS = {
    "h-optimus-0": (lambda: of_timm(REG, img_size=224, init_values=1e-5, dynamic_img_size=False), cls),
    "h-optimus-1": (lambda: of_timm(REG, img_size=224, init_values=1e-5, dynamic_img_size=False), cls),
    "gigapath": (
        lambda: of_timm(
            "vit_giant_patch14_dinov2", img_size=224, patch_size=16, init_values=1e-5, mlp_ratio=5.33334
        ),
        cls,
    ),
    "gigapath-flash": (
        lambda: of_timm("vit_small_patch16_224", init_values=1e-5, **swiglu(2048 / 384)),
        cls,
    ),
    "virchow": (
        lambda: of_timm("vit_huge_patch14_224", init_values=1e-5, **swiglu(5.3375)),
        cls_and_mean(1),
    ),
    "virchow2": (
        lambda: of_timm("vit_huge_patch14_224", init_values=1e-5, reg_tokens=4, **swiglu(5.3375)),
        cls_and_mean(5),
    ),
    "midnight-12k": (lambda: of_transformers("Dinov2", image_size=518, **GIANT), cls_and_mean(1)),
    "phikon": (lambda: of_transformers("ViT", **BASE, patch_size=16, image_size=224), first_token),
    **{
        f"hibou-{kind}": (
            lambda size=size: of_transformers(
                "Dinov2WithRegisters", **size, patch_size=14, image_size=224, use_swiglu_ffn=True
            ),
            first_token,
        )
        for kind, size in (("b", BASE), ("l", LARGE))
    },
    **{
        f"{owner}-vit{letter}{patch}": (
            lambda size=size, patch=patch: of_timm(f"vit_{size}_patch{patch}_224", dynamic_img_size=True),
            cls,
        )
        for owner, letter, size, patch in (
            *(
                ("kaiko", letter, size, p)
                for letter, size in (("s", "small"), ("b", "base"))
                for p in (8, 16)
            ),
            ("lunit", "s", "small", 8),
            ("lunit", "s", "small", 16),
        )
    },
    "kaiko-vitl14": (lambda: of_timm("vit_large_patch14_reg4_dinov2", **DINOV2), cls),
    "gpfm": (lambda: of_timm("vit_large_patch14_dinov2", img_size=224, init_values=1e-5), cls),
    "mstar": (lambda: of_timm(L16[0], **L16[1]), cls),
    "pathorchestra": (lambda: of_timm(L16[0], **L16[1]), cls),
    "sp22m": (lambda: of_timm("vit_small_patch16_224"), cls),
    "dinov2-vitb14": (lambda: of_timm("vit_base_patch14_dinov2", **DINOV2), cls),
    "dinov2-vitl14": (lambda: of_timm("vit_large_patch14_dinov2", **DINOV2), cls),
    "dinov2-vitg14": (lambda: of_timm("vit_giant_patch14_dinov2", **DINOV2), cls),
    "dinov3-vitb16": (lambda: of_timm("vit_base_patch16_dinov3"), cls),  # its own pooling: the mean
}


def two_blocks(name, monkeypatch, **sizes):
    """The row with a tower of two blocks, known under its name."""
    row = find_spec(name)
    kwargs = {**row.architecture.kwargs, "depth": 2, **sizes}
    dim = sizes.get("embed_dim", row.dim) * (1 + (row.pooling == "cls+mean" and "embed_dim" in sizes))
    published = replace(row.published, commit=None, sha256={})
    row = replace(row, dim=dim, architecture=replace(row.architecture, kwargs=kwargs), published=published)
    monkeypatch.setitem(ROWS, name, row)
    return row


def hold(name, file, model, pool):
    """What `load_encoder` makes of a published file equals the authors' recipe in front of their model."""
    steps, statistics = RECIPES[name]
    encoder = load_encoder(name, checkpoint=file, device="cpu")
    patches = noise_patches(2, 256 if steps else 224)
    prepare = Compose([*steps, ToTensor(), Normalize(*statistics)])
    with torch.inference_mode():
        expected = pool(model, torch.stack([prepare(Image.fromarray(patch)) for patch in patches]))
    got = encoder.encode(as_batch(patches))
    assert got.shape == (2, encoder.spec.dim)
    error = (got - expected).norm(dim=1) / expected.norm(dim=1)
    apart = (expected[0] - expected[1]).norm() / expected[0].norm()
    print(f"{name}: {error.max():.1e} beside {apart:.1e} between two patches")
    assert error.max() <= 1e-5 < 1e-3 < apart


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDS)
def test_a_row_gives_what_its_authors_model_gives(name, monkeypatch, tmp_path):
    row, (build, pool) = two_blocks(name, monkeypatch), BUILDS[name]
    if not timm.is_model(row.architecture.timm):
        pytest.skip("this timm has no such architecture")
    model = build()
    state = drawn(model)
    path = tmp_path / row.published.files[0]
    if row.published.layer_names == "transformers":
        model.save_pretrained(tmp_path)  # under the names of version 4, as the published files
    elif path.suffix == ".safetensors":
        save_file(dict(state), path)
    else:
        save({row.published.prefix + key: value for key, value in state.items()}, path)
    hold(name, path, model, pool)


SMALL = {"hidden_size": 48, "num_attention_heads": 2, "image_size": 56}


@pytest.mark.parametrize("of_version_4", [True, False])
@pytest.mark.parametrize(
    ("name", "kind", "pool"),
    [
        ("midnight-12k", "Dinov2", cls_and_mean(1)),
        ("hibou-b", "Dinov2WithRegisters", first_token),
        ("phikon", "ViT", first_token),
    ],
)
def test_files_of_transformers(name, kind, pool, of_version_4, monkeypatch, tmp_path):
    """Gate and value of SwiGLU are one tensor in version 4, and q, k and v have other names."""
    sizes = {"patch_size": 16, "intermediate_size": 192, **SMALL, "image_size": 64}
    model = of_transformers(
        kind, **(sizes if kind == "ViT" else SMALL | {"patch_size": 14, "use_swiglu_ffn": True})
    )
    two_blocks(name, monkeypatch, embed_dim=48, num_heads=2, img_size=64 if kind == "ViT" else 56)
    state = drawn(model)
    if of_version_4:
        model.save_pretrained(tmp_path)
    else:
        save_file(dict(state), tmp_path / "model.safetensors")
    encoder = load_encoder(name, checkpoint=tmp_path, device="cpu")
    sides = (56, 28, 98) if name == "midnight-12k" else (64,) if kind == "ViT" else (56,)
    for side in sides:  # positions are resampled without antialiasing
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(side))
        with torch.inference_mode():
            torch.testing.assert_close(encoder(images), pool(model, images), rtol=1e-5, atol=1e-5)


def metas(width=48, grid=4):
    """A teacher of Meta's DINOv2 code with registers and two blocks: names, and random numbers."""
    block = {
        **{f"{part}.{leaf}": (width,) for part in ("norm1", "norm2") for leaf in ("weight", "bias")},
        **{f"ls{i}.gamma": (width,) for i in (1, 2)},
        **{"attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,)},
        **{"attn.proj.weight": (width, width), "attn.proj.bias": (width,)},
        **{"mlp.w12.weight": (256, width), "mlp.w12.bias": (256,)},
        **{"mlp.w3.weight": (width, 128), "mlp.w3.bias": (width,)},
    }
    top = {
        **{"cls_token": (1, 1, width), "register_tokens": (1, 4, width), "mask_token": (1, width)},
        **{"pos_embed": (1, 1 + grid**2, width), "norm.weight": (width,), "norm.bias": (width,)},
        **{"patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,)},
    }
    return random_tensors(top | {f"blocks.{i}.{key}": shape for i in (0, 1) for key, shape in block.items()})


def in_chunks(tensors):
    """As FSDP training has them: block 1 is in chunk 1; with the heads of the training."""
    named = {"backbone." + re.sub(r"blocks\.(\d)", r"blocks.\1.\1", key): v for key, v in tensors.items()}
    return named | {"dino_head.mlp.0.weight": torch.ones(2, 2), "ibot_head.mlp.0.bias": torch.ones(2)}


@pytest.mark.parametrize("name", ["openmidnight", "openpath"])
def test_files_of_metas_code(name, monkeypatch, tmp_path):
    """Converted by timm's own function for the same files, for comparison."""
    row, tensors = two_blocks(name, monkeypatch, embed_dim=48, num_heads=2, img_size=56), metas()
    published = tensors if name == "openmidnight" else {"teacher": in_chunks(tensors)}
    path = save(published, tmp_path / row.published.files[0])
    theirs = of_timm(REG, img_size=56, embed_dim=48, num_heads=2)
    theirs.load_state_dict(checkpoint_filter_fn(dict(tensors), theirs))
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs.eval()(images)
        torch.testing.assert_close(load_encoder(name, checkpoint=path, device="cpu")(images), expected)


def test_a_file_of_timm_is_none_of_metas(monkeypatch, tmp_path):
    """H-optimus-0 has the shapes of OpenMidnight, tensor by tensor."""
    two_blocks("openmidnight", monkeypatch, embed_dim=48, num_heads=2, img_size=56)
    state = drawn(of_timm(REG, img_size=56, embed_dim=48, num_heads=2))
    path = save(dict(state), tmp_path / "teacher_checkpoint_load.pt")
    refuse(path, "reg_token (as timm names it)", name="openmidnight")


@pytest.mark.parametrize(
    ("name", "front"),
    [("retccl", None), ("resnet50", 7)],
    ids=["RetCCL", "the third stage, as CLAM cuts it off"],
)
def test_convolutional_networks_are_torchvisions(name, front, tmp_path):
    row, whole = find_spec(name), resnet50()
    if front is None:
        whole.fc = nn.Identity()
    state = drawn(whole)
    parts = [*list(whole.children())[:front], nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*parts) if front else whole
    path = tmp_path / row.published.files[0]
    save_file(dict(state), path) if path.suffix == ".safetensors" else save(dict(state), path)
    steps, statistics = RECIPES["resnet50" if row.patch_px == 224 else "retccl"]
    patches = noise_patches(1, 256)
    prepare = Compose([*steps, ToTensor(), Normalize(*statistics)])
    with torch.inference_mode():
        expected = model(prepare(Image.fromarray(patches[0]))[None])
    got = load_encoder(name, checkpoint=path, device="cpu").encode(as_batch(patches))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert got.shape == (1, row.dim)


def test_a_checkpoint_of_dino(monkeypatch, tmp_path):
    """With student, heads and the options of the training; positions are resampled by DINO's own formula."""
    row = two_blocks("hipt", monkeypatch, embed_dim=48, num_heads=2, img_size=64)
    model = of_timm("vit_small_patch16_224", img_size=96, embed_dim=48, num_heads=2)
    state = dict(drawn(model))
    positions = state["pos_embed"][:, :17].clone()  # of a grid of 4 x 4
    grid = positions[:, 1:].reshape(1, 4, 4, 48).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, scale_factor=(6.1 / 4, 6.1 / 4), mode="bicubic")
    of_patches = grid.permute(0, 2, 3, 1).reshape(1, 36, 48)
    model.load_state_dict(state | {"pos_embed": torch.cat([positions[:, :1], of_patches], 1)})
    teacher = {f"module.backbone.{key}": value for key, value in (state | {"pos_embed": positions}).items()}
    teacher |= {"module.head.mlp.0.weight": torch.ones(2, 2)}
    content = {"teacher": teacher, "student": {}, "epoch": 3, "args": Namespace(lr=0.1, arch="vit_small")}
    path = save(content, tmp_path / row.published.files[0])
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        encoder = load_encoder("hipt", checkpoint=path, device="cpu")
        torch.testing.assert_close(encoder(images), model(images), rtol=1e-5, atol=1e-5)
    content["args"] = Namespace(fn=print)
    refuse(save(content, path), "loading it could run code", name="hipt")


# --- what must not load -------------------------------------------------------------------------------------


def test_weights_that_are_not_on_the_hub_are_asked_for_by_their_page():
    with pytest.raises(
        UsageError, match=r"fetch bt_rn50_ep200.torch from https://github.com/lunit-io/.*checkpoint="
    ):
        load_encoder("lunit-bt")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A gated repository of the real name, with the file of a small tower and a config that misleads."""
    row = two_blocks("mstar", monkeypatch, embed_dim=48, num_heads=2, img_size=32)
    save_file(random_tensors(shapes_of(row)), tmp_path / "model.safetensors")
    weights = (tmp_path / "model.safetensors").read_bytes()
    config = b'{"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "crop_pct": 0.9, "interpolation": "bicubic"}}'
    with local_hub(tmp_path / "hf", monkeypatch) as hub:
        repo = Repo({"model.safetensors": weights, "config.json": config}, gated=True)
        hub.repos["Wangyh/mSTAR"] = repo
        published = replace(row.published, commit=repo.commit, sha256={"model.safetensors": sha(weights)})
        monkeypatch.setitem(ROWS, "mstar", replace(row, published=published))
        yield hub


def sha(content):
    return hashlib.sha256(content).hexdigest()


def test_the_hubs_config_changes_nothing(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    encoder = load_encoder("mstar", device="cpu")
    assert (encoder.spec.mean, encoder.spec.std, encoder.spec.input.crop_px) == (*IMAGENET, None)
    assert not [request for request in hub.asked if "config.json" in request]


def test_a_closed_gate_another_commit_and_another_model(hub, monkeypatch):
    repo, page = hub.repos["Wangyh/mSTAR"], "https://huggingface.co/Wangyh/mSTAR"

    def refused(error, words, **kwargs):
        with pytest.raises(error, match=words) as caught:
            load_encoder("mstar", device="cpu", **kwargs)
        assert "\n" not in str(caught.value)

    refused(TokenError, f"hf auth login, then accept the terms at {page}")
    monkeypatch.setenv("HF_TOKEN", OUTSIDE_TOKEN)
    refused(GateError, f"no access yet; ask for it at {page}")
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    repo.files["model.safetensors"] = b"PK another content"
    refused(MissingOnHubError, "has no revision .*, or type --revision main")
    row = find_spec("mstar")
    monkeypatch.setitem(ROWS, "mstar", replace(row, published=replace(row.published, commit=repo.commit)))
    refused(CheckpointError, f"sha256 {sha(b'PK another content')}, but the checked and pinned")
    tensors = random_tensors(shapes_of(find_spec("lunit-vits16")))
    repo.push({"model.safetensors": safetensors.torch.save(tensors)})
    refused(CheckpointError, "of another shape.*it looks like kaiko-vits16 or lunit-vits16", revision="main")
    refused(MissingOnHubError, "has no revision 'cafe'", revision="cafe")
