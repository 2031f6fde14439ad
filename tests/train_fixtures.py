"""Pairs whose expression can be seen in their patches, and encoders small enough to train in a test."""

import numpy as np

from seal_extract.demo import untrained_encoder
from seal_extract.encoders.spec import Architecture, EncoderSpec, InputRule
from seal_extract.train.pairs import Pairs

TINY = EncoderSpec(
    name="tiny",
    dim=32,
    patch_px=32,
    mpp=0.5,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    precision="float32",
    licence="Apache-2.0",
    source="",
    architecture=Architecture(
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        | {"dynamic_img_size": True},
    ),
    pooling="cls",
    input=InputRule(multiple_of=8),
)
GENES = 12


def tiny_encoder(seed=0):
    return untrained_encoder(TINY, seed)


def pairs(count=16, seed=0, sections=1, side=32):
    """Patches of a colour and a stripe of their own; expression is a mixture of the colour."""
    rng = np.random.default_rng(seed)
    colour = rng.uniform(40, 220, (count, 3))
    patches = np.repeat(colour[:, :, None, None], side, 2).repeat(side, 3)
    patches[:, :, ::4] *= rng.uniform(0.5, 1, (count, 1, 1, 1))
    mixing = np.random.default_rng(99).normal(size=(3, GENES))
    expression = np.maximum((colour - 130) / 60 @ mixing + 1, 0)
    columns = int(np.ceil(np.sqrt(count)))
    places = np.stack(np.divmod(np.arange(count), columns), 1)[:, ::-1] * 100.0
    return Pairs(
        patches=patches.astype(np.uint8),
        expression=expression.astype(np.float32),
        section=np.arange(count) * sections // count,
        names=tuple(f"S{i}" for i in range(sections)),
        patients=("P",) * sections,
        panel=tuple(f"GENE{i}" for i in range(GENES)),
        xy_um=places,
        row=np.arange(count),
    )
