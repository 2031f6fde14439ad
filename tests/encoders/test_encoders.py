"""Encoders from local files: every published form gives the same numbers, and those are the right ones."""

import copy
import json
import pickle
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from encoder_fixtures import (
    PREFIX,
    SEAL_TINY_CONCH,
    SEAL_TINY_VIT,
    TINY_CONCH,
    TINY_VIT,
    adapters,
    as_batch,
    base_file,
    load,
    noise_patches,
    save,
    seal_file,
    targets,
    tower_tensors,
    untrained_encoder,
)
from PIL import Image
from torch import nn

from seal_extract.encoders import Encoder, EncoderSpec, load_encoder
from seal_extract.encoders.parts import AttentionalPooler
from seal_extract.encoders.precision import in_precision
from seal_extract.encoders.registry import CLIP_MEAN, CLIP_STD
from seal_extract.encoders.spec import Pooler
from seal_extract.encoders.tower import empty_tower
from seal_extract.encoders.transform import middle, scaled_size
from seal_extract.errors import EncoderError, UsageError

pytestmark = pytest.mark.usefixtures("tiny_rows")


@pytest.fixture
def seal_conch(tmp_path):
    return load("seal-tiny-conch", save(seal_file(SEAL_TINY_CONCH), tmp_path / "whole.pth"))


@pytest.fixture
def seal_vit(tmp_path):
    return load("seal-tiny-vit", save(seal_file(SEAL_TINY_VIT), tmp_path / "whole.pth"))


def test_merged_equals_unmerged(seal_vit):
    """The adapters as PEFT runs them: beside the layer, not in it."""
    bare = empty_tower(TINY_VIT)
    bare.load_state_dict(tower_tensors(TINY_VIT), assign=True)
    extra = adapters(SEAL_TINY_VIT)
    for target in targets(SEAL_TINY_VIT):
        a, b = (extra[f"{PREFIX}{target}.lora_{x}.default.weight"] for x in "AB")
        bare.get_submodule(target).register_forward_hook(
            lambda m, args, out, a=a, b=b: out + 8 / 4 * (args[0] @ a.T @ b.T)
        )
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(seal_vit(images), bare.forward_features(images)[:, 0], rtol=1e-6, atol=1e-5)


def test_weight_files_are_recorded(tmp_path):
    save(base_file(TINY_CONCH), tmp_path / "pytorch_model.bin")
    path = save(adapters(SEAL_TINY_CONCH), tmp_path / "a.pth")
    first, second = load("seal-tiny-conch", path).weights
    assert (first.file, second.file, first.source) == ("a.pth", "pytorch_model.bin", str(tmp_path))
    assert (first.size, first.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)
    digest = subprocess.run(["sha256sum", path], capture_output=True, text=True).stdout.split()[0]
    assert first.sha256 == digest


# --- the numbers --------------------------------------------------------------------------------------------


def test_conch_pooler_is_textbook_attention_with_one_query():
    generator = torch.Generator().manual_seed(0)
    pooler = AttentionalPooler(16, 32, Pooler()).eval()
    for p in pooler.parameters():
        p.data = torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
    tokens = torch.randn(2, 7, 32, generator=generator)
    w = {k: v.detach().double().numpy() for k, v in pooler.state_dict().items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    bias_q, bias_k, bias_v = np.split(w["attn.in_proj_bias"], 3)
    keys = norm(tokens.double().numpy(), "ln_k")
    q = (norm(w["query"], "ln_q") @ w["attn.q_proj_weight"].T + bias_q).reshape(8, 2)
    k = (keys @ w["attn.k_proj_weight"].T + bias_k).reshape(2, 7, 8, 2)
    v = (keys @ w["attn.v_proj_weight"].T + bias_v).reshape(2, 7, 8, 2)
    score = np.exp(np.einsum("hd,bnhd->bhn", q, k) / np.sqrt(2))
    mixed = np.einsum("bhn,bnhd->bhd", score / score.sum(-1, keepdims=True), v).reshape(2, 16)
    expected = mixed @ w["attn.out_proj.weight"].T + w["attn.out_proj.bias"]
    np.testing.assert_allclose(pooler(tokens).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_cls_beside_the_mean_of_the_patch_tokens():
    spec = replace(TINY_VIT, dim=48, pooling="cls+mean")
    encoder = untrained_encoder(spec)
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    tokens = encoder.tower.forward_features(images)
    assert tokens.shape == (2, 1 + 8 + 4, 24)  # CLS, registers, patches
    assert torch.equal(encoder(images), torch.cat([tokens[:, 0], tokens[:, 9:].mean(1)], 1))


@pytest.mark.parametrize("side", [32, 48, 64, 80])
def test_two_paths_one_result_at_the_patchs_own_size(seal_conch, side):
    patches = noise_patches(3, side)
    by_pil = seal_conch(torch.stack([seal_conch.transform(Image.fromarray(p)) for p in patches]))
    assert by_pil.shape == (3, 16)
    assert torch.equal(seal_conch.encode(as_batch(patches)), by_pil)


@pytest.mark.parametrize("size", [(28, 28), (40, 40), (100, 100), (17, 17), (40, 60)])
def test_two_paths_one_result_with_a_resize(seal_vit, size):
    """Oblong patches keep their middle square."""
    patches = np.ascontiguousarray(noise_patches(3, max(size))[:, : size[0], : size[1]])
    by_pil = seal_vit(torch.stack([seal_vit.transform(Image.fromarray(p)) for p in patches]))
    torch.testing.assert_close(seal_vit.encode(as_batch(patches)), by_pil, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(30, 45), (45, 30), (224, 224), (100, 333)])
def test_resize_and_crop_round_as_torchvision_does(size):
    from torchvision.transforms.v2.functional import center_crop, resize

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    short = resize(image, [28], interpolation=Image.Resampling.BILINEAR)
    assert scaled_size(*size, 28) == (short.height, short.width)
    spec = replace(TINY_VIT, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    ours = untrained_encoder(spec).transform(image).mul(255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(ours, np.asarray(center_crop(short, [28, 28])))
    assert middle(31, 28) == 2  # torchvision rounds 1.5 to the even number


def test_normalisation(seal_conch):
    x = seal_conch.transform(Image.new("RGB", (32, 32), (255, 0, 51)))
    assert x.dtype == torch.float32
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = [(v - m) / s for v, m, s in zip((1.0, 0.0, 0.2), mean, std, strict=True)]
    assert x[:, 5, 7].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "CMYK", "1"])
def test_pil_images_of_any_8_bit_mode_become_rgb(seal_conch, mode):
    image = Image.fromarray(noise_patches(1, 32)[0]).convert(mode)
    assert torch.equal(seal_conch.transform(image), seal_conch.transform(image.convert("RGB")))


def test_the_transform_for_a_patch_size_resizes_first_as_patches_of_slides_are(seal_conch):
    image = Image.fromarray(noise_patches(1, 64)[0])
    for_32 = pickle.loads(pickle.dumps(seal_conch.transform_for(32)))
    small = image.resize((32, 32), Image.Resampling.BICUBIC)
    assert torch.equal(for_32(image), seal_conch.transform(small))
    assert torch.equal(for_32(small), seal_conch.transform(small))
    with pytest.raises(UsageError, match="the patch is 64 x 40 px; allowed: a square, which becomes 32 x 32"):
        for_32(image.crop((0, 0, 64, 40)))
    with pytest.raises(UsageError, match="patch_px is 0; allowed: 1 or more, for example"):
        seal_conch.transform_for(0)


@pytest.mark.parametrize(("short", "full"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_precision_has_short_names(tmp_path, short, full):
    path = save(seal_file(SEAL_TINY_CONCH), tmp_path / "whole.pth")
    kinds = [load("seal-tiny-conch", path, precision=p).precision for p in (short, full)]
    assert kinds == [getattr(torch, full)] * 2


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_stays_near(tmp_path, precision):
    path = save(seal_file(SEAL_TINY_CONCH), tmp_path / "whole.pth")
    patches = as_batch(noise_patches(4, 32))
    exact, low = load("seal-tiny-conch", path), load("seal-tiny-conch", path, precision=precision)
    out = low.encode(patches)
    assert (out.dtype, exact.precision) == (torch.float32, torch.float32)
    assert 0 < (out - exact.encode(patches)).norm() / out.norm() < 2e-2
    # a GPU computes with a tower whose matrices lie in that precision already: to the same bits
    tower = in_precision(exact.tower, low.precision)
    assert tower.trunk.blocks[0].attn.qkv.weight.dtype == low.precision
    assert exact.tower.trunk.blocks[0].attn.qkv.weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=low.precision):
        images = patches.float().div(255).sub(exact.mean).div(exact.std)
        assert torch.equal(out, tower(images).float())


def test_float32_stays_float32_inside_somebody_elses_autocast(seal_conch):
    patches = as_batch(noise_patches(2, 32))
    alone = seal_conch.encode(patches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(seal_conch.encode(patches), alone)


def test_an_empty_batch_gives_no_rows(seal_conch):
    assert seal_conch.encode(torch.empty(0, 3, 32, 32, dtype=torch.uint8)).shape == (0, 16)


def test_nan_names_its_row_in_the_batch(seal_conch, monkeypatch):
    def poisoned(images):
        out = torch.zeros(len(images), 16)
        out[3, 2], out[4, 0] = float("nan"), float("inf")
        return out

    monkeypatch.setattr(seal_conch.tower, "forward", poisoned)
    with pytest.raises(
        EncoderError, match=r"NaN or infinity for 2 of 5 patches, the first in row 3.*float32"
    ):
        seal_conch.encode(as_batch(noise_patches(5, 32)))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 1e-5), ("tf32", 5e-3), ("bfloat16", 3e-2), ("float16", 5e-3)]
)
@pytest.mark.parametrize(("spec", "side"), [(SEAL_TINY_CONCH, 48), (SEAL_TINY_VIT, 28), (SEAL_TINY_VIT, 50)])
def test_gpu_agrees_with_cpu(spec, side, precision, tolerance, tmp_path):
    """Resizing on the GPU may differ by 1 grey level, which moves an embedding by less than 1e-3."""
    path, patches = save(seal_file(spec), tmp_path / "whole.pth"), as_batch(noise_patches(4, side))
    on_gpu = load_encoder(spec.name, checkpoint=path, device="cuda:0", precision=precision)
    assert on_gpu.device == torch.device("cuda:0")
    got, expected = on_gpu.encode(patches).cpu(), load(spec.name, path).encode(patches)
    assert (got - expected).norm() / expected.norm() < tolerance + 1e-3 * (side == 50)


@pytest.mark.gpu
def test_gpu_is_the_default_with_the_recommended_precision(tmp_path):
    encoder = load_encoder("seal-tiny-vit", checkpoint=save(seal_file(SEAL_TINY_VIT), tmp_path / "whole.pth"))
    assert (encoder.device.type, encoder.precision) == ("cuda", torch.bfloat16)


# --- a drop-in ----------------------------------------------------------------------------------------------


def test_what_trident_reads(seal_vit):
    assert seal_vit.enc_name == "seal-tiny-vit"
    assert seal_vit.embedding_dim == 24
    assert seal_vit.precision is torch.float32
    assert seal_vit.eval_transforms is seal_vit.transform


def test_it_is_frozen_and_in_evaluation_mode(seal_conch):
    assert isinstance(seal_conch, nn.Module)
    assert not any(p.requires_grad for p in seal_conch.parameters())
    assert not any(m.training for m in seal_conch.modules())


def test_one_may_train_on_its_embeddings(seal_conch):
    head = nn.Linear(16, 2)
    head(seal_conch.encode(as_batch(noise_patches(2, 32)))).sum().backward()
    assert head.weight.grad is not None


def test_repr_is_one_line(seal_conch):
    assert repr(seal_conch) == (
        "Encoder(seal-tiny-conch: 16 numbers per patch of 448 px at 0.5 µm/px, float32 on cpu, whole.pth)"
    )


def test_identity_and_description_are_json(seal_conch):
    assert json.loads(json.dumps(seal_conch.identity)) == {
        "name": "seal-tiny-conch",
        "weights": [seal_conch.weights[0].sha256],
        "precision": "float32",
        "input": f"own size, sides a multiple of 16 px; mean {list(CLIP_MEAN)}, std {list(CLIP_STD)}",
        "pooling": "conch",
    }
    described = json.loads(json.dumps(seal_conch.description))
    assert described["input"] == "own size, sides a multiple of 16 px"
    assert described["weights"][0]["file"] == "whole.pth"


def test_transform_and_encoder_travel(seal_conch):
    image = Image.fromarray(noise_patches(1, 32)[0])
    sent = pickle.loads(pickle.dumps(seal_conch.transform))
    assert torch.equal(sent(image), seal_conch.transform(image))
    patches = as_batch(noise_patches(2, 32))
    assert torch.equal(copy.deepcopy(seal_conch).encode(patches), seal_conch.encode(patches))


def test_a_public_name_is_imported_when_it_is_used():
    import seal_extract.encoders as package

    assert package.Encoder is Encoder
    assert package.EncoderSpec is EncoderSpec
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing
