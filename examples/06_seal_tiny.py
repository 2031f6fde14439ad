"""Make the bundled encoder: pretrain a small ViT on tissue without labels, then finetune it by SEAL.

python examples/06_seal_tiny.py her2st/ -o weights/seal-tiny         # on all four sections
python examples/06_seal_tiny.py her2st/ -o folds/C2 --hold-out C2    # nothing of C2 is seen

``her2st/`` holds counts, spots and images of https://github.com/almaan/her2st (Andersson et al. 2021,
CC BY 4.0). Beside the encoder stays its base, before alignment, as ``NAME-base``.
"""

import argparse
import math
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from seal_extract import Encoder, EncoderSpec, find_tissue, open_slide
from seal_extract.demo import untrained_encoder
from seal_extract.encoders.registry import Architecture, InputRule
from seal_extract.train.augment import stained, turned
from seal_extract.train.formats import load_sections
from seal_extract.train.losses import info_nce

SECTIONS = ("C2", "C3", "C4", "C5")
BASE = EncoderSpec(
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
SHIFT_PX = 32  # how far apart two views of a place may lie, 32 µm
TOKENS = 25  # of 49 that the trunk sees in pretraining
PAIRS = 64


class Places:
    """Windows of tissue out of whole sections, at random."""

    def __init__(self, sections, seed):
        self.rng = np.random.default_rng(seed)
        self.images, self.tissue = [], []
        for section in sections:
            with open_slide(section.slide, mpp=section.mpp) as slide:
                mask = find_tissue(slide)
                whole = slide.read_region((0, 0), 0, slide.size_l0)
            scale = section.mpp / WINDOW_MPP
            self.images.append(cv2.resize(whole, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
            self.tissue.append(np.argwhere(mask.mask)[:, ::-1] * mask.mpp / WINDOW_MPP)

    def views(self, count):
        """Two overlapping windows of each place: two uint8 [count, 3, S, S]."""
        windows = np.empty((2, count, SIDE, SIDE, 3), np.uint8)
        for i in range(count):
            which = self.rng.integers(len(self.images))
            image, tissue = self.images[which], self.tissue[which]
            centre = tissue[self.rng.integers(len(tissue))]
            for view in windows[:, i]:
                x, y = (centre - SIDE / 2 + self.rng.integers(-SHIFT_PX, SHIFT_PX + 1, 2)).astype(int)
                x, y = np.clip((x, y), 0, np.array(image.shape[1::-1]) - SIDE)
                view[:] = image[y : y + SIDE, x : x + SIDE]
        return (torch.from_numpy(v).permute(0, 3, 1, 2) for v in windows)


def described(images):
    """What a window looks like, in 29 numbers: its colours, and its edges at four scales.

    float [B, 3, S, S] of 0..1 to [B, 29]; the target of pretraining.
    """
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


def some_tokens(tower, images):
    """The tower's embedding of a random half of the tokens: [B, D]."""
    trunk = tower.trunk
    tokens = trunk._pos_embed(trunk.patch_embed(images))
    chosen = torch.rand(len(tokens), tokens.shape[1] - 1).argsort(1)[:, :TOKENS] + 1
    kept = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2]))
    tokens = trunk.norm(trunk.blocks(torch.cat([tokens[:, :1], kept], dim=1)))
    return tower.ln_contrast(tower.attn_pool_contrast(tokens))


def pretrain(sections, steps, seed=0):
    """Without labels: windows of one place are told from those of others, and their looks are foretold."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    places = Places(sections, seed)
    encoder = untrained_encoder(BASE, seed)
    tower = encoder.tower
    for key, value in tower.state_dict().items():  # timm's own scale of new weights
        if value.ndim > 1:
            nn.init.trunc_normal_(value, std=0.02 if "pos_embed" in key or "token" in key else 0.04)
    tower.requires_grad_(True).train()
    project = nn.Sequential(nn.Linear(BASE.dim, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 128))
    look = described(next(iter(places.views(256))).float() / 255)
    middle, spread = look.mean(0), look.std(0) + 1e-6
    foretell = nn.Linear(BASE.dim, look.shape[1])
    parameters = [*tower.parameters(), *project.parameters(), *foretell.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 30) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        images = turned(torch.cat(list(places.views(PAIRS))), generator).float() / 255
        images = stained(images, 0.05, generator)
        embedded = some_tokens(tower, (images - encoder.mean) / encoder.std)
        one, other = project(embedded).chunk(2)
        looks = ((described(images) - middle) / spread).clamp(-4, 4)
        contrast, foretold = info_nce(one, other, 0.2), F.smooth_l1_loss(foretell(embedded), looks)
        loss = 0.3 * contrast + foretold
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 3.0)
        optimiser.step()
        if step % 50 == 49 or not step:
            print(f"step {step + 1} of {steps}: contrast {contrast:.3f}, looks {foretold:.4f}", flush=True)
    tower.eval().requires_grad_(False)
    return Encoder(BASE, tower, (), torch.float32)


def finetuning(base, out):
    """SEAL's two stages, on a small scale."""
    return TrainConfig(
        name="seal-tiny",
        encoder=str(base),
        out=str(out),
        batch_size=128,
        licence="CC-BY-4.0",
        data=DataOptions(sections=(), genes=500),
        omics=OmicsOptions(hidden=(256, 128), epochs=40, lr=1e-3),
        seal=SealOptions(lora=LoraOptions(blocks=2)),
        loop=LoopOptions(epochs=20, lr=1e-3),
    )


def main():
    """Pretrain, finetune, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("her2st", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--hold-out", choices=SECTIONS)
    parser.add_argument("--steps", type=int, default=350)
    args = parser.parse_args()
    names = [name for name in SECTIONS if name != args.hold_out]
    sections = load_sections([{"kind": "st-tables", "folder": str(args.her2st), "names": names}])
    base = args.out.with_name(args.out.name + "-base")
    if not (base / "config.json").exists():
        pretrain(sections, args.steps).save_pretrained(base)
    run(finetuning(base, args.out), sections=sections, tell=print)


if __name__ == "__main__":
    main()
