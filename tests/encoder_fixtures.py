"""Small encoders with the key layout of the real ones, and files of theirs in every published form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from hub_server import FakeHub, serve
from numpy.typing import NDArray
from torch import Tensor

from seal_extract.encoders import Encoder, load_encoder
from seal_extract.encoders.registry import ROWS
from seal_extract.encoders.spec import Decoder, EncoderSpec, Shapes
from seal_extract.encoders.tower import empty_tower, fill, tower_shapes
from seal_extract.errors import CheckpointError

PREFIX = "encoder.base_model.model."
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
R = 4  # of the adapters in the tiny files; alpha is 8, so the scale is 2


def tiny(of: str, name: str, dim: int, **kwargs: object) -> EncoderSpec:
    """A base with a tower of two blocks."""
    row = ROWS[of]
    own = {**row.architecture.kwargs, "depth": 2, "num_heads": 2, **kwargs}
    return replace(
        row,
        name=name,
        dim=dim,
        source=f"lab/{name}",
        published=replace(row.published, commit=None, sha256={}),
        architecture=replace(row.architecture, kwargs=own),
        input=replace(row.input, resize_px=row.input.resize_px and 28),
    )


def tiny_seal(of: str, base: EncoderSpec) -> EncoderSpec:
    """The SEAL row of an encoder on a tiny base."""
    layout = replace(
        ROWS[f"seal-{of}"].published,
        files=(f"seal_{base.name}_vision.pth", f"{base.name}-seal-vision.pth"),
        base=base.name,
        decoder=Decoder(hidden=6, genes=10),
        commit=None,
        sha256={},
    )
    return replace(base, name=f"seal-{base.name}", source="lab/SEAL", published=layout)


TINY_CONCH = tiny("conch", "tiny-conch", 16, img_size=64, embed_dim=32)
TINY_VIT = tiny("univ2", "tiny-vit", 24, img_size=28, embed_dim=24, mlp_ratio=4.0)
TINY_VIRCHOW = tiny("virchow2", "tiny-virchow2", 48, img_size=28, embed_dim=24, mlp_ratio=4.0)
TINY_H0 = tiny("h0mini", "tiny-h0mini", 48, img_size=28, embed_dim=24, mlp_ratio=4.0)
TINY_PHIKON = tiny("phikon2", "tiny-phikon2", 48, img_size=64, embed_dim=48)
BASES = (TINY_CONCH, TINY_VIT, TINY_VIRCHOW, TINY_H0, TINY_PHIKON)
SEALS = tuple(map(tiny_seal, ("conch", "univ2", "virchow2", "h0mini", "phikon2"), BASES))
SEAL_TINY_CONCH, SEAL_TINY_VIT, SEAL_VIRCHOW, SEAL_H0, SEAL_PHIKON = SEALS


# --- tensors ------------------------------------------------------------------------------------------------


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Numbers of a size that keeps activations lively."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) / max(1, torch.Size(shape[1:]).numel()) ** 0.5
        for key, shape in shapes.items()
    }


@cache
def shapes_of(spec: EncoderSpec) -> Shapes:
    """The tensors of a tower."""
    return tower_shapes(empty_tower(spec))


def tower_tensors(spec: EncoderSpec, seed: int = 0) -> dict[str, Tensor]:
    """A base, under the tower's own names."""
    return random_tensors(shapes_of(spec), seed)


def untrained_encoder(spec: EncoderSpec, seed: int = 0) -> Encoder:
    """An encoder that no file was needed for."""
    tower = empty_tower(spec)
    fill(tower, tower_tensors(spec, seed))
    return Encoder(spec, tower, (), torch.float32)


def targets(spec: EncoderSpec) -> tuple[str, ...]:
    """The layers with adapters in the tiny files and in the real ones: those of the last block."""
    layers = ("mlp.fc1", "mlp.fc2") if _is_transformers(spec) else LAYERS
    front = "trunk." if spec.pooling == "conch" else ""
    last = max(int(key.removeprefix(front).split(".")[1]) for key in shapes_of(spec) if "blocks." in key)
    return tuple(f"{front}blocks.{last}.{layer}" for layer in layers)


def lora_shapes(spec: EncoderSpec, on: Sequence[str] = (), r: int = R) -> dict[str, tuple[int, ...]]:
    """Names and shapes of adapters on these layers of a tower."""
    shapes: dict[str, tuple[int, ...]] = {}
    for target in on or targets(spec):
        outputs, inputs = shapes_of(spec)[f"{target}.weight"]
        shapes[f"{target}.lora_A.default.weight"] = (r, inputs)
        shapes[f"{target}.lora_B.default.weight"] = (outputs, r)
    return shapes


def _is_transformers(spec: EncoderSpec) -> bool:
    return spec.published.layer_names == "transformers"


def as_published(spec: EncoderSpec, tensors: dict[str, Tensor], version: int = 4) -> dict[str, Tensor]:
    """The tensors of a ViT under the names of the row's files: transformers' own, or Meta's."""
    names = spec.published.layer_names
    if names in ("timm", "titan"):
        return tensors
    if names == "open_clip":
        return {_open_clip_key(key): _as_open_clip(key, value) for key, value in tensors.items()}
    if "reg_token" in tensors:  # here the class token's position is 0
        tensors = {**tensors, "pos_embed": torch.cat([0 * tensors["cls_token"], tensors["pos_embed"]], 1)}
    if names == "dinov2":
        return {
            key.replace("reg_token", "register_tokens").replace("fc1", "w12").replace("fc2", "w3"): value
            for key, value in tensors.items()
        }
    named = {}
    old = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "output.dense"}
    attention = old if version == 4 else {part: f"{part}_proj" for part in "qkvo"}
    for key, value in tensors.items():
        key = key.replace("blocks.", "encoder.layer.").replace(".ls", ".layer_scale")
        key = key.replace(".gamma", ".lambda1").replace(".attn.proj.", f".attention.{attention['o']}.")
        key = key.replace("patch_embed.proj.", "embeddings.patch_embeddings.projection.")
        key = key.replace("cls_token", "embeddings.cls_token")
        key = key.replace("reg_token", "embeddings.register_tokens")
        key = key.replace("pos_embed", "embeddings.position_embeddings")
        key = "layernorm." + key.removeprefix("norm.") if key.startswith("norm.") else key
        if ".attn.qkv." in key:
            parts = zip("qkv", value.chunk(3), strict=True)
            named |= {key.replace("attn.qkv", f"attention.{attention[p]}"): v.clone() for p, v in parts}
        else:
            named[key] = value
    return named


OPEN_CLIP = {
    "trunk.": "",
    "patch_embed.proj": "conv1",
    "norm_pre": "ln_pre",
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "blocks.": "transformer.resblocks.",
    ".norm": ".ln_",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "attn_pool_contrast": "attn_pool",
    "ln_contrast": "ln_post",
    "head.0.weight": "proj",
}


def _open_clip_key(key: str) -> str:
    key = "ln_post." + key.removeprefix("norm.") if key.startswith("norm.") else key
    for timm, theirs in OPEN_CLIP.items():
        key = key.replace(timm, theirs)
    return key


def _as_open_clip(key: str, value: Tensor) -> Tensor:
    if key.endswith(("cls_token", "pos_embed")):
        return value.squeeze()
    return value.T if key == "head.0.weight" else value


# --- files --------------------------------------------------------------------------------------------------


def base_file(spec: EncoderSpec, seed: int = 0, version: int = 4) -> dict[str, Tensor]:
    """The weight file of a base, with what the real one holds beside the image tower."""
    tower = as_published(spec, tower_tensors(spec, seed), version)
    ignored = {key: torch.ones(2) for key in spec.published.ignored if not key.endswith(".")}
    return {spec.published.prefix + key: value for key, value in tower.items()} | ignored


def adapters(
    spec: EncoderSpec,
    seed: int = 1,
    on: Sequence[str] = (),
    r: int = R,
    prefix: str | None = None,
    version: int = 4,
) -> dict[str, Tensor]:
    """Adapters, on the layers ``on`` if given, and decoder, under the names of a SEAL file."""
    prefix, decoder = prefix or spec.published.prefix, spec.published.decoder
    lora = as_published(spec, random_tensors(lora_shapes(spec, on, r), seed), version)
    head = {
        "decoder.decoder.0.weight": (decoder.hidden, spec.dim),
        "decoder.decoder.0.bias": (decoder.hidden,),
        "decoder.decoder.3.weight": (decoder.genes, decoder.hidden),
        "decoder.decoder.3.bias": (decoder.genes,),
    }
    return {prefix + key: value for key, value in lora.items()} | random_tensors(head, seed + 1)


def seal_file(
    spec: EncoderSpec, seed: int = 0, prefix: str | None = None, version: int = 4
) -> dict[str, Tensor]:
    """The whole vision file of a SEAL row: base, adapters, decoder, and CONCH's unused heads."""
    wrapped = {}
    for key, value in tower_tensors(spec, seed).items():
        module, _, leaf = key.rpartition(".")
        wrapped[f"{module}.base_layer.{leaf}" if module in targets(spec) else key] = value
    named = as_published(spec, wrapped, version)
    for key in spec.published.ignored:
        inner = key.removeprefix(spec.published.prefix)
        named[inner + ("query" if inner.endswith(".") else "")] = torch.ones(2)
    prefix = prefix or spec.published.prefix
    return {prefix + k: v for k, v in named.items()} | adapters(spec, prefix=prefix, version=version)


def save(tensors: object, path: Path) -> Path:
    """Write a ``.pth`` and hand back its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path)
    return path


def load(name: object, checkpoint: object = None, **kwargs: object) -> Encoder:
    """`load_encoder` on the CPU."""
    return load_encoder(name, checkpoint=checkpoint, device="cpu", **kwargs)


def refuse(path: Path | None, *words: str, name: object = "seal-tiny-conch", **kwargs: object) -> None:
    """The file is refused, in one line that holds these words and where it lies."""
    with pytest.raises(CheckpointError) as caught:
        load(name, path, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path.parent) if path and not kwargs else "", *words):
        assert word in message, message


# --- patches and the Hub ------------------------------------------------------------------------------------


def noise_patches(batch: int, side: int, seed: int = 0) -> NDArray[np.uint8]:
    """uint8 [batch, side, side, 3]: a colour gradient with noise over it."""
    rng = np.random.default_rng([side, seed])
    ramp = np.linspace(60, 200, side)
    field = ramp[:, None, None] * 0.5 + ramp[None, :, None] * 0.4 + rng.normal(0, 20, (batch, side, side, 3))
    return np.clip(np.rint(field), 0, 255).astype(np.uint8)


def as_batch(patches: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, H, W, 3] to uint8 [B, 3, H, W]."""
    return torch.from_numpy(patches).permute(0, 3, 1, 2).contiguous()


needs_hub_1 = pytest.mark.skipif(
    int(huggingface_hub.__version__.split(".")[0]) < 1,
    reason="before huggingface_hub 1 uploads take HF_ENDPOINT of the moment at which it was imported",
)


@contextmanager
def local_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub on this machine, its cache under ``home``, no token, and nothing of the user's own settings."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between retries
    _close_session()
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub
    _close_session()


def _close_session() -> None:
    """Have the next request use a new connection; the function has another name before huggingface_hub 1."""
    before_1 = getattr(huggingface_hub.utils, "reset_sessions", None)
    (getattr(huggingface_hub, "close_session", None) or before_1)()
