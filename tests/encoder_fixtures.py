"""Small encoders with the key layout of the real ones, and files of theirs in every published form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from hub_server import FakeHub, serve
from numpy.typing import NDArray
from torch import Tensor

from seal_extract.encoders import Encoder
from seal_extract.encoders.rows import CONCH, ROWS, UNIV2
from seal_extract.encoders.spec import Architecture, Decoder, EncoderSpec, Lora, Published
from seal_extract.encoders.tower import empty_tower, fill, tower_shapes

PREFIX = "encoder.base_model.model."
LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

TINY_CONCH = replace(
    CONCH,
    name="tiny-conch",
    dim=16,
    source="lab/tiny-conch",
    published=replace(CONCH.published, commit=None, sha256={}),
    architecture=Architecture(
        "vit_base_patch16_224",
        {"img_size": 64, "dynamic_img_size": True, "embed_dim": 32, "depth": 2, "num_heads": 2},
    ),
)
TINY_VIT = replace(
    UNIV2,
    name="tiny-vit",
    dim=24,
    source="lab/tiny-vit",
    published=replace(UNIV2.published, commit=None, sha256={}),
    architecture=Architecture(
        "vit_giant_patch14_224",
        {
            **UNIV2.architecture.kwargs,
            **{"img_size": 28, "depth": 2, "num_heads": 2, "embed_dim": 24, "mlp_ratio": 4.0},
        },
    ),
    input=replace(UNIV2.input, resize_px=28),
)


R = 4  # of the tiny rows' adapters


def targets(spec: EncoderSpec) -> tuple[str, ...]:
    """The adapted layers of the tiny rows' files."""
    block = "trunk.blocks.1" if spec.pooling == "conch" else "blocks.1"
    return tuple(f"{block}.{layer}" for layer in LAYERS)


def adapter_shapes(tower: dict[str, tuple[int, ...]], targets: Sequence[str], r: int) -> dict[str, tuple]:
    """Names, behind the prefix, and shapes of adapters on these layers of a tower."""
    shapes: dict[str, tuple[int, ...]] = {}
    for target in targets:
        outputs, inputs = tower[f"{target}.weight"]
        shapes[f"{target}.lora_A.default.weight"] = (r, inputs)
        shapes[f"{target}.lora_B.default.weight"] = (outputs, r)
    return shapes


def wrapped_key(key: str, targets: Sequence[str]) -> str:
    """The name of a tower's tensor once PEFT has wrapped these layers."""
    module, _, leaf = key.rpartition(".")
    return f"{module}.base_layer.{leaf}" if module in targets else key


def tiny_seal(base: EncoderSpec) -> EncoderSpec:
    """A SEAL row on a tiny base: its file has the layout of `SEAL_CHECKPOINTS.md`."""
    unused = ("proj_contrast", "attn_pool_caption.", "ln_caption.") if base.pooling == "conch" else ()
    return replace(
        base,
        name=f"seal-{base.name}",
        source="lab/SEAL",
        published=Published(
            files=(f"seal_{base.name}_vision.pth", f"{base.name}-seal-vision.pth"),
            prefix=PREFIX,
            ignored=tuple(PREFIX + key for key in unused),
            base=base.name,
            lora=Lora(alpha=8.0),
            decoder=Decoder(hidden=6, genes=10),
        ),
    )


SEAL_TINY_CONCH = tiny_seal(TINY_CONCH)
SEAL_TINY_VIT = tiny_seal(TINY_VIT)
TINY_ROWS = (TINY_CONCH, TINY_VIT, SEAL_TINY_CONCH, SEAL_TINY_VIT)


def add_tiny_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tiny encoders known by name for one test."""
    for row in TINY_ROWS:
        monkeypatch.setitem(ROWS, row.name, row)


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Numbers of a size that keeps activations lively."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) / max(1, torch.Size(shape[1:]).numel()) ** 0.5
        for key, shape in shapes.items()
    }


def tower_tensors(spec: EncoderSpec, seed: int = 0) -> dict[str, Tensor]:
    """A base, under the tower's own names."""
    return random_tensors(tower_shapes(empty_tower(spec)), seed)


def untrained_encoder(spec: EncoderSpec, seed: int = 0) -> Encoder:
    """An encoder that no file was needed for."""
    tower = empty_tower(spec)
    fill(tower, tower_tensors(spec, seed))
    return Encoder(spec, tower, (), torch.float32)


def base_file(spec: EncoderSpec, seed: int = 0) -> dict[str, Tensor]:
    """The weight file of a base, with what the real one of CONCH holds beside the image tower."""
    tower = tower_tensors(spec, seed)
    if spec.pooling != "conch":
        return tower
    text = {
        "logit_scale": torch.tensor(4.0),
        "text.cls_emb": torch.zeros(3),
        "visual.proj_contrast": torch.eye(2),
    }
    return {f"visual.{key}": value for key, value in tower.items()} | text


def adapters(spec: EncoderSpec, seed: int = 1, on: Sequence[str] = (), r: int = R) -> dict[str, Tensor]:
    """Adapters, on the layers ``on`` if given, and decoder, under the names of a SEAL file."""
    decoder = spec.published.decoder
    lora = adapter_shapes(tower_shapes(empty_tower(spec)), on or targets(spec), r)
    shapes: dict[str, tuple[int, ...]] = {PREFIX + key: shape for key, shape in lora.items()}
    shapes["decoder.decoder.0.weight"] = (decoder.hidden, spec.dim)
    shapes["decoder.decoder.0.bias"] = (decoder.hidden,)
    shapes["decoder.decoder.3.weight"] = (decoder.genes, decoder.hidden)
    shapes["decoder.decoder.3.bias"] = (decoder.genes,)
    return random_tensors(shapes, seed)


def seal_file(spec: EncoderSpec, seed: int = 0) -> dict[str, Tensor]:
    """The whole vision file of a SEAL row: base, adapters, decoder, and CONCH's unused heads."""
    tower = tower_tensors(spec, seed)
    wrapped = {PREFIX + wrapped_key(key, targets(spec)): value for key, value in tower.items()}
    unused = {key + ("query" if key.endswith(".") else ""): torch.ones(2) for key in spec.published.ignored}
    return wrapped | unused | adapters(spec)


def save(tensors: object, path: Path) -> Path:
    """Write a ``.pth`` and hand back its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path)
    return path


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
