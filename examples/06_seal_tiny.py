"""Make the bundled encoder: pretrain a small ViT on tissue without labels, then finetune it by SEAL.

python examples/06_seal_tiny.py her2st/ -o weights/seal-tiny         # on all four sections
python examples/06_seal_tiny.py her2st/ -o folds/C2 --hold-out C2    # nothing of C2 is seen

``her2st/`` holds counts, spots and images of https://github.com/almaan/her2st (Andersson et al. 2021,
CC BY 4.0). The base encoder, before alignment, is written beside the encoder as ``NAME-base``.

The base is pretrained by two tasks on windows of tissue, each seen through half of its tokens: windows of one
place are told from those of others (InfoNCE, arXiv 1807.03748), and descriptors of the window are predicted
(after MaskFeat, Wei et al., arXiv 2112.09133).
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seal_extract import find_tissue, open_slide
from seal_extract.encoders import Encoder, EncoderSpec
from seal_extract.encoders.parts import ConchTower
from seal_extract.encoders.spec import Architecture, InputRule
from seal_extract.encoders.tower import empty_tower, fill, tower_shapes
from seal_extract.train.config import (
    DataOptions,
    LoopOptions,
    LoraOptions,
    OmicsOptions,
    SealOptions,
    TrainConfig,
)
from seal_extract.train.finetune import reorient, vary_stain
from seal_extract.train.formats import load_sections
from seal_extract.train.losses import info_nce
from seal_extract.train.run import run
from seal_extract.train.sections import Section

SECTIONS = ("C2", "C3", "C4", "C5")
CARD = Path(__file__).parents[1] / "weights" / "seal-tiny.md"  # data, figures, limits

TINY = EncoderSpec(
    name="seal-tiny-base",
    dim=32,
    patch_px=224,
    mpp=0.5,
    mean=(0.75, 0.55, 0.70),
    std=(0.15, 0.20, 0.15),
    precision="float32",
    licence="CC-BY-4.0",
    source="",
    architecture=Architecture(
        "vit_tiny_patch16_224",
        {"img_size": 112, "embed_dim": 128, "depth": 6, "num_heads": 4, "dynamic_img_size": True},
    ),
    pooling="conch",
    input=InputRule(multiple_of=16, resize_px=112),
)
WINDOW_MPP = 1.0  # 224 px at 0.5 µm/px, resized to 112: what the tower sees
SIDE = 112
SHIFT_PX = 32  # how far two windows of a place may lie from it, each way
TOKENS = 25  # of 49 that the trunk sees
PLACES = 64  # of a batch
LR, WARMUP_STEPS, CLIP = 1e-3, 30, 3.0
CONTRAST, TEMPERATURE, STAIN = 0.3, 0.2, 0.05


class Places:
    """Random windows of tissue from whole sections, which are held in memory at 1 µm/px."""

    def __init__(self, sections: Sequence[Section], seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.images: list[Any] = []  # uint8 [H, W, 3] at 1 µm/px
        self.tissue: list[Any] = []  # float64 [T, 2], (x, y) in their pixels
        for section in sections:
            with open_slide(section.slide, mpp=section.mpp) as slide:
                mask = find_tissue(slide)
                whole = slide.read_region((0, 0), 0, slide.size_l0)
            scale = slide.mpp / WINDOW_MPP
            self.images.append(cv2.resize(whole, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
            self.tissue.append(np.argwhere(mask.mask)[:, ::-1] * mask.mpp / WINDOW_MPP)

    def windows(self, count: int) -> Tensor:
        """Two overlapping windows of each place: uint8 [2 * count, 3, S, S], the first ones in front."""
        windows = np.empty((2, count, SIDE, SIDE, 3), np.uint8)
        for i in range(count):
            which = self.rng.integers(len(self.images))
            image, tissue = self.images[which], self.tissue[which]
            centre = tissue[self.rng.integers(len(tissue))]
            for window in windows[:, i]:
                x, y = (centre - SIDE / 2 + self.rng.integers(-SHIFT_PX, SHIFT_PX + 1, 2)).astype(int)
                x, y = np.clip((x, y), 0, np.array(image.shape[1::-1]) - SIDE)
                window[:] = image[y : y + SIDE, x : x + SIDE]
        return torch.from_numpy(windows.reshape(-1, SIDE, SIDE, 3)).permute(0, 3, 1, 2)


def descriptors(images: Tensor) -> Tensor:
    """Images [B, 3, S, S], 0 to 1, as 29 numbers each: colours, and edges at four scales."""
    pixels = images.flatten(2)[:, :, ::7]
    quantiles = pixels.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=2).permute(1, 2, 0).flatten(1)
    numbers = [images.mean((2, 3)), images.std((2, 3)), quantiles]
    grey = images.mean(1, keepdim=True)
    for _ in range(4):
        across, down = grey.diff(dim=3).abs(), grey.diff(dim=2).abs()
        numbers += [v[:, None] for v in (across.mean((1, 2, 3)), down.mean((1, 2, 3)), across.std((1, 2, 3)))]
        grey = F.avg_pool2d(grey, 2)
    dark = [(images[:, 0] < limit).float().mean((1, 2))[:, None] for limit in (0.45, 0.6)]  # nuclei
    return torch.cat([*numbers, *dark], dim=1)


def pretrain(sections: Sequence[Section], steps: int, seed: int = 0) -> Encoder:
    """Train the encoder `TINY` on the tissue of sections, in steps of 128 windows; expression is not used."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    places = Places(sections, seed)
    tower = new_tower()
    encoder = Encoder(TINY, tower, (), torch.float32)
    tower.requires_grad_(True).train()
    project = nn.Sequential(nn.Linear(TINY.dim, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 128))
    target = descriptors(places.windows(256)[:256].float() / 255)
    middle, spread = target.mean(0), target.std(0) + 1e-6
    predict = nn.Linear(TINY.dim, target.shape[1])
    parameters = [*tower.parameters(), *project.parameters(), *predict.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.05)
    for step in range(steps):
        rate = LR * min(1, (step + 1) / WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimiser.param_groups[0]["lr"] = rate
        images = reorient(places.windows(PLACES), generator).float() / 255
        images = vary_stain(images, STAIN, generator)
        embedded = embed_some_tokens(tower, (images - encoder.mean) / encoder.std)
        one, other = project(embedded).chunk(2)
        target = ((descriptors(images) - middle) / spread).clamp(-4, 4)
        contrast, error = info_nce(one, other, TEMPERATURE), F.smooth_l1_loss(predict(embedded), target)
        loss = CONTRAST * contrast + error
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimiser.step()
        if step % 50 == 49:
            print(f"step {step + 1} of {steps}: contrast {contrast:.3f}, descriptors {error:.4f}")
    tower.eval().requires_grad_(False)
    return encoder


def new_tower() -> ConchTower:
    """With random weights."""
    tower = empty_tower(TINY)
    assert isinstance(tower, ConchTower)
    weights = {key: torch.empty(shape) for key, shape in tower_shapes(tower).items()}
    for key, value in weights.items():
        if value.ndim > 1:
            nn.init.trunc_normal_(value, std=0.02 if "pos_embed" in key or "token" in key else 0.04)
        else:
            value.fill_(1.0 if key.endswith("weight") else 0.0)
    fill(tower, weights)
    return tower


def embed_some_tokens(tower: ConchTower, images: Tensor) -> Tensor:
    """Images [B, 3, S, S] to the embeddings [B, D] of a random half of their tokens."""
    trunk: Any = tower.trunk
    tokens = trunk._pos_embed(trunk.patch_embed(images))
    chosen = torch.rand(len(tokens), tokens.shape[1] - 1).argsort(1)[:, :TOKENS] + 1  # CLS is always there
    kept = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2]))
    tokens = trunk.norm(trunk.blocks(torch.cat([tokens[:, :1], kept], dim=1)))
    embedding: Tensor = tower.ln_contrast(tower.attn_pool_contrast(tokens))
    return embedding


def main(her2st: Path, out: Path, hold_out: Sequence[str] = (), steps: int = 350, epochs: int = 12) -> None:
    """Pretrain, finetune on a small scale, write."""
    names = [name for name in SECTIONS if name not in hold_out]
    sections = load_sections([{"kind": "st-tables", "folder": str(her2st), "names": names}])
    base = out.with_name(out.name + "-base")
    if not (base / "config.json").exists():
        pretrain(sections, steps).save_pretrained(base)
    config = TrainConfig(
        name="seal-tiny",
        encoder=str(base),
        out=str(out),
        batch_size=64,
        licence="CC-BY-4.0",
        card=CARD.read_text(encoding="utf-8"),
        data=DataOptions(sections=(), genes=500),
        omics=OmicsOptions(hidden=(256, 128), epochs=40, lr=1e-3),
        seal=SealOptions(alignment=0.5, prediction=2.0, lora=LoraOptions(blocks=6)),
        loop=LoopOptions(epochs=epochs, lr=4e-3),
    )
    run(config, sections=sections, log=print)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("her2st", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--hold-out", nargs="+", choices=SECTIONS, default=())
    args = parser.parse_args()
    main(args.her2st, args.out, args.hold_out)
