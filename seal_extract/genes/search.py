"""Search of finished slides by genes, expression profiles and pictures.

A gene or signature ranks patches by the expression that the decoder predicts. A picture or profile becomes
an embedding, and `seal_extract.genes.index` ranks patches by its cosine to their embeddings. SEAL's
expression encoder maps profiles to the space of the images (arXiv 2602.14177).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from seal_extract.encoders.encoder import Encoder
from seal_extract.errors import UsageError, first_line
from seal_extract.features.store import SlideFeatures
from seal_extract.genes.decoder import GeneDecoder
from seal_extract.genes.gene_lists import Signature
from seal_extract.genes.index import Found
from seal_extract.genes.omics import OmicsEncoder
from seal_extract.genes.predict import predict_genes, signature_scores
from seal_extract.patches.grid import MPP_TOLERANCE

TARGET_SUM = 10_000.0  # counts of a profile after scaling, as for the spots in training
MIN_KNOWN = 0.5  # share of the panel that a profile must name


def search_expression(
    slides: Sequence[SlideFeatures],
    decoder: GeneDecoder,
    signature: Signature,
    k: int,
    *,
    per_slide: int | None = None,
) -> list[Found]:
    """The patches with the highest predicted expression of a gene or a signature.

    Args:
        slides: features made by the decoder's encoder.
        decoder: from `decoder_of`.
        signature: a single gene is ranked by its expression, several genes by `signature_scores`.
        k: number of patches.
        per_slide: highest number of patches from one slide.

    Raises:
        UsageError: the decoder predicts none of the genes, or there is no patch.
    """
    columns, weights = signature.known_to(decoder)
    if len(columns) == 1:
        sign = 1.0 if weights[0] > 0 else -1.0
        scores = [sign * predict_genes(slide, decoder, columns)[:, 0] for slide in slides]
    else:
        scores = signature_scores(slides, decoder, signature)
    return best(slides, scores, k, per_slide=per_slide)


def best(
    slides: Sequence[SlideFeatures],
    scores: Sequence[NDArray[np.floating]],
    k: int,
    *,
    per_slide: int | None = None,
) -> list[Found]:
    """The patches with the highest scores; patches with equal scores in the order of slides and rows.

    Raises:
        UsageError: ``k`` or ``per_slide`` is below 1.
    """
    if k < 1 or (per_slide is not None and per_slide < 1):
        raise UsageError(f"{min(k, per_slide or k)} patches were asked for; allowed: 1 or more")
    found = []
    for slide, values in zip(slides, scores, strict=True):
        chosen = np.argsort(-values, kind="stable")[: min(k, per_slide or k)]
        found += [Found(slide, int(row), float(values[row])) for row in chosen]
    return sorted(found, key=lambda one: -one.score)[:k]


def embed_profile(omics: OmicsEncoder, counts: dict[str, float]) -> NDArray[np.float32]:
    """Embed an expression profile in the space of the images, float32 [D].

    Counts are scaled to 10,000 over all genes of the profile and log1p is taken, as for spots in training.
    Genes of the panel that the profile does not name count as 0. The projection head of the expression
    encoder is applied if it has one; see `compared_behind_heads`.

    Args:
        omics: the expression encoder.
        counts: count of each gene, from `read_profile`.

    Raises:
        UsageError: the genes of the expression encoder are not known, or the profile names less than half of
            them.
    """
    genes = omics.named()
    known = sum(gene in counts for gene in genes)
    if known < MIN_KNOWN * omics.n_genes:
        raise UsageError(
            f"the profile names {known} of the {omics.n_genes} genes of {omics.name}, such as "
            f"{genes[0]}; allowed: half of them or more"
        )
    scale = TARGET_SUM / sum(counts.values())
    row = np.log1p(np.array([[counts.get(gene, 0.0) * scale for gene in genes]]))
    embedded = omics.encode(row.astype(np.float32), project=omics.projection_head is not None)
    embedding: NDArray[np.float32] = embedded[0].cpu().numpy()
    return embedding


def embed_picture(encoder: Encoder, path: Path, mpp: float, like: SlideFeatures) -> NDArray[np.float32]:
    """Embed the middle of a picture, cut and scaled as the patches of a slide were, float32 [D].

    Args:
        encoder: the encoder that made the features of the slide.
        path: the picture.
        mpp: µm/px of the picture.
        like: features of the slide, which give the size and µm/px of a patch.

    Raises:
        UsageError: the file is not a picture, or is coarser than the patches or smaller than one; or another
            encoder made the features.
    """
    made_by = like.provenance["request"]["encoder"]
    if encoder.identity != made_by:
        raise UsageError(
            f"{encoder.spec.name} is not the {made_by['name']} that made {like.path}; give that encoder"
        )
    patch = np.array(cut_picture(path, mpp, like))
    pixels = torch.from_numpy(patch).permute(2, 0, 1)[None]  # uint8 [1, 3, S, S]
    embedding: NDArray[np.float32] = encoder.encode(pixels)[0].cpu().numpy()
    return embedding


def cut_picture(path: Path, mpp: float, like: SlideFeatures) -> Image.Image:
    """Cut and scale the middle of a picture as the patches of a slide; see `embed_picture`."""
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as exc:
        raise UsageError(
            f"{path} cannot be read as a picture ({first_line(exc)}); give a PNG or JPEG"
        ) from exc
    grid, scale = like.grid, mpp / like.grid.mpp
    width, height = (round(side * scale) for side in picture.size)
    if scale > 1 + MPP_TOLERANCE or min(width, height) < grid.patch_px:
        raise UsageError(
            f"{path} is {picture.width} x {picture.height} px at {mpp:.4g} µm/px; allowed: "
            f"{grid.mpp:.4g} µm/px or finer, and at least {grid.patch_px * grid.mpp:.4g} µm wide and high"
        )
    left, top = (width - grid.patch_px) // 2, (height - grid.patch_px) // 2
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    cut: Image.Image = resized.crop((left, top, left + grid.patch_px, top + grid.patch_px))
    return cut
