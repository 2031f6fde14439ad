"""Make the bundled encoder: pretrain a small ViT on tissue without labels, then align it with expression.

python examples/06_seal_tiny.py her2st/ -o weights/seal-tiny --more a.svs b.svs    # on all four sections
python examples/06_seal_tiny.py her2st/ -o folds/C2 --hold-out C2    # nothing of C2 is seen

``her2st/`` holds counts, spots and images of https://github.com/almaan/her2st (Andersson et al. 2021,
CC BY 4.0); ``--more`` names other slides to pretrain on. The base encoder, before alignment, is written
beside the encoder as ``NAME-base``, the places of each slide once as ``places/SLIDE.npz``. The same command
continues a stopped run, to the same weights.

The base is pretrained by two tasks, most often on half of the tokens (arXiv 2212.00794): two windows of one
place are told from those of others (InfoNCE, arXiv 1807.03748), and handcrafted features of the window and of
its surroundings are predicted (after MaskFeat, Wei et al., arXiv 2112.09133).

The alignment is linear and in closed form: reduced-rank regression (Izenman, J. Multivar. Anal. 1975, 5: 248)
from the base's embedding to expression that is smoothed over neighbouring spots. The decoder is the least
squares behind it. The expression half is pretrained on all tables of counts, those without an image too, and
trained by SEAL against this embedding.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from timm.layers.patch_dropout import PatchDropout
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from seal_extract import find_tissue, load_encoder, make_grid, open_slide
from seal_extract.encoders import Encoder, EncoderSpec
from seal_extract.encoders.spec import Architecture, Head, InputRule
from seal_extract.encoders.tower import empty_tower, fill, tower_shapes
from seal_extract.encoders.transform import fit
from seal_extract.evaluate.handcrafted import FEATURES, handcrafted_features
from seal_extract.patches.reader import open_patch_reader
from seal_extract.patches.stream import stream_batches
from seal_extract.publish import publish
from seal_extract.train.config import LoopOptions, SealOptions
from seal_extract.train.finetune import reorient, vary_stain
from seal_extract.train.formats import load_sections
from seal_extract.train.loop import train
from seal_extract.train.losses import info_nce
from seal_extract.train.pairs import Batches, Pairs, TrainBatch, make_pairs
from seal_extract.train.run import MIN_SD, write_encoder
from seal_extract.train.seal import Losses, OmicsModel, SealModel, new_omics
from seal_extract.train.sections import TARGET_SUM, choose_panel

SECTIONS = ("C2", "C3", "C4", "C5")
CARD = Path(__file__).parents[1] / "weights" / "seal-tiny.md"  # data, figures, limits

TINY = EncoderSpec(
    name="seal-tiny-base",
    dim=128,
    patch_px=224,
    mpp=0.5,
    mean=(0.75, 0.55, 0.70),
    std=(0.15, 0.20, 0.15),
    precision="float32",
    licence="CC-BY-4.0",
    source="",
    architecture=Architecture(
        "vit_tiny_patch16_224",
        {"img_size": 112, "embed_dim": 128, "depth": 6, "num_heads": 4, "dynamic_img_size": True}
        | {"embed_layer": "ConvStem"},
    ),
    pooling="conch",
    input=InputRule(multiple_of=16, resize_px=112),
)
SIDE = 112  # px of a window as the tower sees it, 224 at 0.5 µm/px
SHIFTS = [(y, x) for y in (0, 28, 56, 84) for x in (0, 28, 56, 84)]  # px, of windows within a place
PLACE = SIDE + 84
PLACES = 64  # of a batch: as many pairs of windows
AROUND_UM = 180  # between the middles of a place and of its surroundings, which are 112 µm apart or more
CONTRAST, AROUND_WEIGHT, TEMPERATURE = 0.3, 0.5, 0.2
PARTIAL = 0.7  # of the steps see half of the tokens
STAIN, BLURRED, SIGMA_PX = 0.05, 0.3, 0.75  # augmentation; see `vary`
GENES = 500
RANK, COMPONENTS, ALPHA, VIEWS = 6, 32, 10.0, 8  # of the alignment


class Places:
    """Places of tissue of some slides, cut and described, and batches of two windows of each."""

    def __init__(self, slides: Sequence[tuple[Path, float | None]], folder: Path) -> None:
        """Cut them, or read what was cut before into ``folder``."""
        pixels, targets = [], []
        for path, mpp in slides:
            images, features, xy_um = cut_places(path, mpp, folder / f"{path.name}.npz")
            flat = features.reshape(-1, features.shape[-1])
            own = ((features - flat.mean(0)) / (flat.std(0) + 1e-6)).clip(-4, 4)
            near = cKDTree(xy_um).query_ball_point(xy_um, AROUND_UM)
            around = np.stack([own[rows].mean((0, 1)) for rows in near])
            around = (around - around.mean(0)) / (around.std(0) + 1e-6)
            pixels.append(images)
            targets.append(np.concatenate([own, np.broadcast_to(around[:, None], own.shape)], 2))
        self.pixels, self.targets = np.concatenate(pixels), np.concatenate(targets).astype(np.float32)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return max(1, len(self.pixels) // PLACES)

    def epoch(self, number: int, rank: int = 0, ranks: int = 1) -> Iterator[TrainBatch]:
        """Each place once, by two of its windows, which differ from epoch to epoch."""
        rng = np.random.default_rng(number)
        order = rng.permutation(len(self.pixels))
        shifts = rng.permuted(np.tile(np.arange(len(SHIFTS)), (len(order), 1)), axis=1)
        for i in range(rank, len(self) - len(self) % ranks, ranks):
            rows = np.tile(order[i * PLACES : (i + 1) * PLACES], 2)
            which = shifts[rows, np.repeat((0, 1), len(rows) // 2)]
            windows = [
                self.pixels[row, :, y : y + SIDE, x : x + SIDE]
                for row, (y, x) in zip(rows, np.array(SHIFTS)[which], strict=True)
            ]
            yield TrainBatch(*map(torch.from_numpy, (np.stack(windows), self.targets[rows, which], rows)))


def cut_places(path: Path, mpp: float | None, cache: Path) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Places uint8 [N, 3, P, P], handcrafted features of their windows [N, 16, F], corners in µm."""
    if not cache.exists():
        pixels, features = [], []
        zoom = TINY.patch_px // SIDE
        with open_slide(path, mpp=mpp) as slide:
            side_px, overlap_px = PLACE * zoom, (PLACE - SIDE) * zoom
            grid = make_grid(slide, find_tissue(slide), side_px, overlap_px=overlap_px, allow_upsampling=True)
            reader = open_patch_reader(slide, grid, torch.device("cpu"))
            for batch in stream_batches([reader], 64):
                pixels.append(fit(batch.patches, InputRule(multiple_of=16, resize_px=PLACE)).numpy())
                whole, side = batch.patches.numpy(), TINY.patch_px
                windows = [whole[:, :, y : y + side, x : x + side] for y, x in zoom * np.array(SHIFTS)]
                features.append(np.stack([handcrafted_features(w) for w in windows], 1))
        with publish(cache) as part, part.open("wb") as file:
            images, described = np.concatenate(pixels), np.concatenate(features)
            np.savez(file, pixels=images, features=described, xy_um=grid.xy_l0 * slide.mpp)
    with np.load(cache) as held:
        return held["pixels"], held["features"], held["xy_um"]


class Pretraining(nn.Module):
    """The base encoder and the heads of its tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(TINY, new_tower(), (), torch.float32)
        self.encoder.tower.requires_grad_(True)
        self.drop = self.encoder.tower.trunk.patch_drop = PatchDropout()  # type: ignore[union-attr]
        self.project = nn.Sequential(
            nn.Linear(TINY.dim, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 128)
        )
        self.describe = nn.Linear(TINY.dim, 2 * len(FEATURES))

    def forward(self, batch: TrainBatch, seed: int) -> Losses:
        """The terms of the loss."""
        self.drop.prob = 0.5 if np.random.default_rng(seed).random() < PARTIAL else 0.0
        embedded = self.encoder((vary(batch.patches, seed) - self.encoder.mean) / self.encoder.std)
        one, other = self.project(embedded).chunk(2)
        own, around = (self.describe(embedded) - batch.expression).chunk(2, dim=1)
        return {
            "contrast": CONTRAST * info_nce(one, other, TEMPERATURE),
            "own": F.smooth_l1_loss(own, torch.zeros_like(own)),
            "around": AROUND_WEIGHT * F.smooth_l1_loss(around, torch.zeros_like(around)),
        }


def new_tower() -> nn.Module:
    """With random weights."""
    tower = empty_tower(TINY)
    weights = {key: torch.empty(shape) for key, shape in tower_shapes(tower).items()}
    for key, value in weights.items():
        if value.ndim == 4:
            nn.init.kaiming_normal_(value)
        elif value.ndim > 1:
            nn.init.trunc_normal_(value, std=0.02 if "pos_embed" in key or "token" in key else 0.04)
        else:
            value.fill_(1.0 if key.endswith(("weight", "running_var")) else 0.0)
    fill(tower, weights)
    return tower


def vary(patches: Tensor, seed: int) -> Tensor:
    """Patches uint8 [B, 3, S, S] in other orientations, stains and focus: float, 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    images = vary_stain(reorient(patches, generator).float() / 255, STAIN, generator)
    blurred = torch.rand(len(images), generator=generator) < BLURRED
    images[blurred] = gaussian_blur(images[blurred], [5, 5], [SIGMA_PX])
    return images


def pretrain(places: Places, folder: Path, steps: int) -> Encoder:
    """The base, trained on places for whole epochs; its checkpoint is in ``folder``."""
    torch.manual_seed(0)
    model = Pretraining()
    options = LoopOptions(epochs=math.ceil(steps / len(places)), lr=1e-3, weight_decay=0.05, clip=3.0)
    train(model, places, None, folder, options, on_epoch=lambda row: print(json.dumps(row)))  # type: ignore[arg-type]
    model.encoder.tower.eval().requires_grad_(False)
    return model.encoder


# --- alignment ----------------------------------------------------------------------------------------


def align(base: Encoder, pairs: Pairs) -> tuple[Encoder, nn.Linear]:
    """The base with a Linear layer behind it, from which ``RANK`` dimensions predict expression best.

    With X the embeddings of the patches as `vary` shows them, standardised, and Y the expression in its first
    principal components, P = X B is the ridge's prediction of Y. The embedding is P in its own first ``RANK``
    principal components, rotated at random so that all its numbers carry the same.

    Returns:
        The encoder, and the decoder that predicts the expression from its embeddings by least squares.
    """
    patches = fit(torch.from_numpy(pairs.patches), TINY.input)
    with torch.no_grad():
        varied = ((vary(patches, seed) - base.mean) / base.std for seed in range(VIEWS))
        views = [base(images).double().numpy() for images in varied]
    x = np.concatenate(views)  # [V N, D]
    mean, sd = x.mean(0), x.std(0)
    x = (x - mean) / sd
    expression = pairs.expression.astype(np.float64)  # [N, G]
    means = [expression[pairs.section == i].mean(0) for i in range(len(pairs.names))]
    y = expression - np.stack(means)[pairs.section]
    y /= y.std(0) + MIN_SD
    y = y @ np.linalg.svd(y, full_matrices=False)[2][:COMPONENTS].T  # [N, C]
    y, expression = np.tile(y / y.std(0)[0], (VIEWS, 1)), np.tile(expression, (VIEWS, 1))
    b = np.linalg.solve(x.T @ x + VIEWS * ALPHA * np.eye(len(sd)), x.T @ y)  # [D, C]
    b = b @ np.linalg.svd(x @ b, full_matrices=False)[2][:RANK].T  # [D, R]
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(TINY.dim, RANK)))[0]  # [D, R]
    rotation *= np.sqrt(TINY.dim / np.var(x @ b, axis=0).sum())  # to a variance of 1
    weight = rotation @ b.T / sd  # [D, D] of rank R
    slopes = np.linalg.lstsq(x @ b, expression - expression.mean(0), rcond=None)[0]  # [R, G]
    spec = replace(TINY, architecture=replace(TINY.architecture, head=Head((TINY.dim,))))
    tower, decoder = empty_tower(spec), nn.Linear(TINY.dim, len(pairs.panel))
    head = {"head.0.weight": weight, "head.0.bias": -weight @ mean}
    fill(tower, {**base.tower.state_dict(), **{k: torch.from_numpy(v).float() for k, v in head.items()}})
    decoded = {"weight": np.linalg.pinv(rotation).T @ slopes, "bias": expression.mean(0)}
    decoder.load_state_dict({k: torch.from_numpy(v.T).float() for k, v in decoded.items()})
    return Encoder(spec, tower, base.weights, torch.float32), decoder


def expression_of_all(her2st: Path, pairs: Pairs, hold_out: Sequence[str]) -> Pairs:
    """The spots of all tables of counts, as ``pairs`` without patches; 0 for a gene that a table lacks."""
    found = []
    tables = [path for path in her2st.glob("counts/*.tsv.gz") if path.name.split(".")[0] not in hold_out]
    for path in sorted(tables):
        counts = pd.read_csv(path, sep="\t", index_col=0)
        expression = np.log1p(TARGET_SUM * counts.div(counts.sum(axis=1).clip(lower=1), axis=0))
        found.append(expression.reindex(columns=list(pairs.panel), fill_value=0).to_numpy(np.float32))
    together = np.concatenate(found)
    return replace(pairs, expression=together, patches=np.empty((len(together), 0), np.uint8))


def main(
    her2st: Path, out: Path, hold_out: Sequence[str] = (), more: Sequence[Path] = (), steps: int = 600
) -> None:
    """Pretrain, align, train the expression half, write."""
    names = [name for name in SECTIONS if name not in hold_out]
    sections = load_sections([{"kind": "st-tables", "folder": str(her2st), "names": names}])
    base = out.with_name(out.name + "-base")
    if not (base / "config.json").exists():
        slides = [(s.slide, s.mpp) for s in sections] + [(path, None) for path in more]
        places = Places(slides, out.parent / "places")
        pretrain(places, out.with_name(out.name + "-pretraining"), steps).save_pretrained(base)
    pairs = make_pairs(sections, choose_panel(sections, GENES), smooth=True)
    encoder, decoder = align(load_encoder(base), pairs)
    sd = torch.from_numpy(pairs.expression.std(0)).clamp_min(MIN_SD)
    torch.manual_seed(0)
    omics = OmicsModel(new_omics(TINY.dim, GENES, (256, 128)), sd)
    spots = Batches(expression_of_all(her2st, pairs, hold_out), 256)
    train(omics, spots, None, out / "stage_1", LoopOptions(epochs=20, lr=1e-3))
    model = SealModel(encoder, omics, sd, SealOptions(alignment=5.0, prediction=0.0, lora=None))
    model.decoder = decoder
    train(model, Batches(pairs, 64), None, out / "stage_2", LoopOptions(epochs=12, lr=4e-3))
    summary = f"## Training\n\n{len(pairs)} pairs of patch and spot of {', '.join(names)}, {GENES} genes.\n\n"
    summary += CARD.read_text(encoding="utf-8")
    form: dict[str, Any] = {"patch_px": TINY.patch_px, "mpp": TINY.mpp, "licence": TINY.licence}
    training = {"summary": summary, "sections": names, "config": {"data": {"smooth": True}}}
    write_encoder(out, "seal-tiny", model, **form, panel=pairs.panel, training=training)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("her2st", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--hold-out", nargs="+", choices=SECTIONS, default=())
    parser.add_argument("--more", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    main(args.her2st, args.out, args.hold_out, args.more)
