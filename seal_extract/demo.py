"""The small real slide that comes with the package, and an encoder with random weights for `bench`."""

from __future__ import annotations

from pathlib import Path

import torch

from seal_extract.encoders import EncoderSpec
from seal_extract.encoders.encoder import Encoder
from seal_extract.encoders.registry import IMAGENET_MEAN, IMAGENET_STD
from seal_extract.encoders.spec import Architecture, InputRule
from seal_extract.encoders.tower import empty_tower, fill, tower_shapes

DEMO_SLIDE = "CMU-1-Small-Region.svs"

UNTRAINED = EncoderSpec(
    name="untrained-demo",
    dim=192,
    patch_px=224,
    mpp=0.5,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    precision="float32",
    licence="Apache-2.0 (random weights: for trying the pipeline, never for science)",
    source="",
    architecture=Architecture("vit_tiny_patch16_224"),
    pooling="cls",
    input=InputRule(multiple_of=16, resize_px=224),
)


def demo_slide() -> Path:
    """The real slide that comes with the package: 2220 x 2967 px at 0.499 µm/px, JPEG tiles of 240 px.

    Source: OpenSlide's test data, https://openslide.cs.cmu.edu/download/openslide-testdata/Aperio/, CC0.
    """
    # in a wheel it lies inside the package, in a checkout beside it
    places = [place / "examples" / DEMO_SLIDE for place in Path(__file__).resolve().parents[:2]]
    return next((path for path in places if path.exists()), places[0])


def untrained_encoder(spec: EncoderSpec = UNTRAINED, seed: int = 0) -> Encoder:
    """An encoder of random weights on the CPU, the same for the same seed.

    Their sizes are like those of trained weights. No tensor is zero or constant, so that each part of the
    architecture counts, and embeddings differ from patch to patch.
    """
    tower = empty_tower(spec)
    generator = torch.Generator().manual_seed(seed)
    fill(tower, {key: _random(key, shape, generator) for key, shape in tower_shapes(tower).items()})
    return Encoder(spec, tower, (), torch.float32)


# mean and standard deviation by the end of a tensor's name
SIZES = {
    "gamma": (0.1, 0.03),  # LayerScale: at 0 a block would add nothing, at 1 more than trained ones do
    "bias": (0.0, 0.05),
    "running_mean": (0.0, 0.1),
    "running_var": (1.0, 0.1),
    "pos_embed": (0.0, 0.2),
    "cls_token": (0.0, 0.5),
    "reg_token": (0.0, 0.5),
}


def _random(key: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    fan_in = max(1, torch.Size(shape[1:]).numel())
    otherwise = (1.0, 0.1) if len(shape) == 1 else (0.0, fan_in**-0.5)  # the scale of a norm; a matrix
    mean, std = next((size for end, size in SIZES.items() if key.endswith(end)), otherwise)
    return torch.randn(shape, generator=generator).mul_(std).add_(mean)
