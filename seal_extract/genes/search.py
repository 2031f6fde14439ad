"""Search between images and genes over finished slides: where is a gene high, what looks like this patch.

By expression, patches are ranked by what the decoder predicts of them. By likeness, they are ranked by the
cosine of their embedding to that of a patch, an image, or an expression profile that SEAL's expression
encoder has put into the space of the images (arXiv 2602.14177).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from seal_extract.encoders.encoder import Encoder
from seal_extract.errors import UsageError
from seal_extract.features.store import SlideFeatures
from seal_extract.genes.decoder import GeneDecoder
from seal_extract.genes.omics import OmicsEncoder
from seal_extract.genes.panel import read_text
from seal_extract.genes.predict import predict_genes, signature_scores
from seal_extract.genes.signature import Signature
from seal_extract.patches.grid import MPP_TOLERANCE

TARGET_SUM = 10_000.0  # counts of a profile after scaling, as of a spot in training
LEAST_KNOWN = 0.5  # share of the panel that a profile must name


@dataclass(frozen=True)
class Found:
    """A patch that a search found.

    Attributes:
        slide: its features.
        row: which patch.
        score: of the search, higher is better.
    """

    slide: SlideFeatures
    row: int
    score: float

    @property
    def xy_l0(self) -> tuple[int, int]:
        """Its top-left corner in level-0 pixels."""
        x, y = self.slide.grid.xy_l0[self.row].tolist()
        return x, y


def search_expression(
    slides: Sequence[SlideFeatures],
    decoder: GeneDecoder,
    signature: Signature,
    k: int,
    *,
    per_slide: int | None = None,
) -> list[Found]:
    """The patches in which a gene, or a signature, is predicted to be highest.

    Args:
        slides: of the decoder's encoder.
        decoder: from `decoder_of`.
        signature: a single gene is ranked by its expression, several by `signature_scores`.
        k: how many patches.
        per_slide: at most so many of one slide.

    Raises:
        UsageError: no gene is known to the decoder, or there is no patch.
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
    """The patches of the highest scores; equal ones in the order of slides and rows.

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


def read_profile(path: Path) -> dict[str, float]:
    """Counts of one sample by gene, from a table with a gene and a count in each line.

    Raises:
        UsageError: it cannot be read, or a line is no such pair.
    """
    text = read_text(path, str(path), "a table of genes and counts, as CSV or TSV")
    counts: dict[str, float] = {}
    rows = enumerate(csv.reader(text.splitlines(), delimiter="\t" if "\t" in text else ","), 1)
    try:
        for number, row in rows:
            if not row or (number == 1 and not _is_count(row[-1])):
                continue  # its head
            gene = row[0].strip()
            if len(row) != 2 or not gene or gene in counts or not _is_count(row[1]):
                raise UsageError(
                    f"line {number} of {path} is {row}; give a gene and its count, each gene once"
                )
            counts[gene] = float(row[1])
    except csv.Error as exc:
        raise UsageError(f"{path} is no table ({exc}); give a gene and its count in each line") from exc
    if not 0 < sum(counts.values()) < float("inf"):
        raise UsageError(f"{path} holds no counts, or too large ones; give a gene and its count in each line")
    return counts


def _is_count(text: str) -> bool:
    try:
        return 0 <= float(text) < float("inf")
    except ValueError:
        return False


def embed_profile(omics: OmicsEncoder, counts: dict[str, float]) -> NDArray[np.float32]:
    """An expression profile in the space of the images, float32 [D].

    Counts are scaled to 10,000 over all genes of the profile and log1p is taken, as of the spots in training;
    genes of the panel that it does not name count as 0. It goes through the expression half's projection head
    where there is one; see `compared_behind_heads`.

    Raises:
        UsageError: nobody has named the columns of the expression encoder, or the profile names less than
            half
            of them.
    """
    if omics.genes is None:
        raise UsageError(
            f"nobody has published which gene each of the {omics.n_genes} columns of {omics.name} is; give "
            "--panel genes.txt, one name per line in the order of its training"
        )
    known = sum(gene in counts for gene in omics.genes)
    if known < LEAST_KNOWN * omics.n_genes:
        raise UsageError(
            f"the profile names {known} of the {omics.n_genes} genes of {omics.name}, such as "
            f"{omics.genes[0]}; allowed: half of them or more"
        )
    scale = TARGET_SUM / sum(counts.values())
    row = np.log1p(np.array([[counts.get(gene, 0.0) * scale for gene in omics.genes]]))
    embedded = omics.encode(row.astype(np.float32), project=omics.projection_head is not None)
    embedding: NDArray[np.float32] = embedded[0].cpu().numpy()
    return embedding


def embed_picture(encoder: Encoder, path: Path, mpp: float, like: SlideFeatures) -> NDArray[np.float32]:
    """The middle of a picture, cut and scaled as the patches of a slide were, as an embedding float32 [D].

    Args:
        encoder: that made the features of the slide.
        path: of the picture.
        mpp: its µm/px.
        like: gives the size and µm/px of a patch.

    Raises:
        UsageError: it is no picture, coarser than the patches or smaller than one; or another encoder made
            them.
    """
    made_by = like.provenance["request"]["encoder"]
    if encoder.identity != made_by:
        raise UsageError(
            f"{encoder.spec.name} is not the {made_by['name']} that made {like.path}; give that one"
        )
    patch = np.array(cut_picture(path, mpp, like))
    pixels = torch.from_numpy(patch).permute(2, 0, 1)[None]  # uint8 [1, 3, S, S]
    embedding: NDArray[np.float32] = encoder.encode(pixels)[0].cpu().numpy()
    return embedding


def cut_picture(path: Path, mpp: float, like: SlideFeatures) -> Image.Image:
    """The middle of a picture, cut and scaled as the patches of a slide were.

    Raises:
        UsageError: it is no picture, coarser than the patches or smaller than one.
    """
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError) as exc:
        raise UsageError(f"{path} cannot be read as a picture; give a PNG or JPEG") from exc
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
