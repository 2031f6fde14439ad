"""Predicted expression of genes, scores of signatures, and genes that differ in a region of a slide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import shapely
import torch
from numpy.typing import NDArray

from seal_extract.errors import UsageError
from seal_extract.features.store import SlideFeatures, read_pieces
from seal_extract.genes.decoder import GeneDecoder, column_names
from seal_extract.genes.gene_lists import Signature
from seal_extract.patches.grid import PatchGrid
from seal_extract.tissue.geojson import fill_polygons, inside_polygons

BLOCK_ROWS = 4096  # rows predicted at a time: 33 MB of 2,000 genes
KEEP_BYTES = 2**30  # expression that `signature_scores` keeps in memory instead of predicting it twice
CELLS = 2048  # side of the raster on which areas are counted

Membership = NDArray[np.bool_]


# --- predictions ----------------------------------------------------------------------------------


def predicted(
    features: SlideFeatures, decoder: GeneDecoder, columns: Sequence[int] | None = None
) -> Iterator[NDArray[np.float32]]:
    """Predicted expression in the order of the patches, float32 [B, G] at a time."""
    for piece in read_pieces(features.path):
        for start in range(0, len(piece), BLOCK_ROWS):
            yield decoder.predict(piece[start : start + BLOCK_ROWS], columns)


def predict_genes(
    features: SlideFeatures, decoder: GeneDecoder, columns: Sequence[int]
) -> NDArray[np.float32]:
    """Predicted expression of a few genes, float32 [N, G]."""
    return np.concatenate([np.empty((0, len(columns)), np.float32), *predicted(features, decoder, columns)])


def moments(
    slides: Sequence[SlideFeatures], decoder: GeneDecoder, columns: Sequence[int] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each gene over all patches of all slides, float64 [G] each.

    Source: Chan, Golub and LeVeque 1983, for joining the moments of blocks without loss.

    Raises:
        UsageError: there is no patch.
    """
    return _moments(block for slide in slides for block in predicted(slide, decoder, columns))


def _moments(blocks: Iterable[NDArray[np.float32]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    count, mean, squares = 0, np.zeros(1), np.zeros(1)
    for block in blocks:
        n, rows = len(block), block.astype(np.float64)
        if not n:
            continue
        block_mean = rows.mean(0)
        gap = block_mean - mean
        squares = squares + ((rows - block_mean) ** 2).sum(0) + gap**2 * (count * n / (count + n))
        mean = mean + gap * (n / (count + n))
        count += n
    if not count:
        raise UsageError("there is no patch in these slides; choose others")
    return mean, np.sqrt(squares / count)


# --- signatures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FittedSignature:
    """A signature with the moments that standardise its genes, so that scores can be computed again.

    Attributes:
        name: name of the signature.
        weights: weight of each gene that the decoder predicts.
        mean: mean of each gene over the patches of the fit, in log1p of counts per 10,000.
        deviation: standard deviation of each gene over these patches.
    """

    name: str
    weights: dict[str, float]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def read(cls, entry: dict[str, Any]) -> FittedSignature:
        """From JSON, as `dataclasses.asdict` gives it."""
        return cls(entry["name"], entry["weights"], tuple(entry["mean"]), tuple(entry["deviation"]))

    def scores_like(self, other: FittedSignature) -> bool:
        """Whether both give the same scores, apart from rounding on another machine."""
        mine, theirs = ((*one.mean, *one.deviation) for one in (self, other))
        named = (self.name, list(self.weights.items())) == (other.name, list(other.weights.items()))
        return named and np.allclose(mine, theirs, rtol=1e-5, atol=1e-7)

    def score(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """The weighted mean of its standardised genes: float [B, K] to float32 [B]."""
        deviation, weights = np.array(self.deviation), np.array(list(self.weights.values()))
        varies = deviation > 0
        per_gene = np.where(varies, weights / np.where(varies, deviation, 1), 0) / np.abs(weights).sum()
        return np.asarray((rows - np.array(self.mean)) @ per_gene, np.float32)


def fit_signatures(
    slides: Sequence[SlideFeatures], decoder: GeneDecoder, signatures: Sequence[Signature]
) -> list[FittedSignature]:
    """Standardise the genes of signatures over all patches of all ``slides`` together.

    Genes that the decoder does not predict are left out.

    Raises:
        UsageError: the decoder predicts no gene of a signature, or there is no patch.
    """
    known = [signature.known_to(decoder)[0] for signature in signatures]
    columns = sorted({column for some in known for column in some})
    mean, deviation = moments(slides, decoder, columns)
    places = [[columns.index(column) for column in some] for some in known]
    return [
        _fitted(signature, decoder, mean[place], deviation[place])
        for signature, place in zip(signatures, places, strict=True)
    ]


def _fitted(
    signature: Signature, decoder: GeneDecoder, mean: NDArray[np.float64], deviation: NDArray[np.float64]
) -> FittedSignature:
    columns, weights = signature.known_to(decoder)
    names = [decoder.named()[column] for column in columns]
    by_gene = dict(zip(names, weights, strict=True))
    return FittedSignature(signature.name, by_gene, tuple(mean.tolist()), tuple(deviation.tolist()))


class SignatureScores:
    """Scores of signatures in each patch of a slide, of which none is computed twice."""

    def __init__(self, features: SlideFeatures, decoder: GeneDecoder) -> None:
        """``decoder`` is that of the encoder that made the features."""
        self._features, self._decoder = features, decoder
        self._known: list[tuple[FittedSignature, NDArray[np.float32]]] = []  # with the scores, float32 [N]

    def of(self, signatures: Sequence[FittedSignature]) -> list[NDArray[np.float32]]:
        """Float32 [N] of each signature; the features are read once for all that are new."""
        known = [signature for signature, _ in self._known]
        new = [signature for signature in signatures if signature not in known]
        self._known += zip(new, self._scores(new), strict=True)
        return [next(scores for one, scores in self._known if one == wanted) for wanted in signatures]

    def _scores(self, signatures: Sequence[FittedSignature]) -> NDArray[np.float32]:
        """Float32 [S, N]."""
        columns = [self._decoder.columns(list(signature.weights)) for signature in signatures]
        scores = [np.empty((len(signatures), 0), np.float32)]
        for piece in read_pieces(self._features.path) if signatures else ():
            for start in range(0, len(piece), BLOCK_ROWS):
                blocks = self._decoder.predict_each(piece[start : start + BLOCK_ROWS], columns)
                scores.append(np.stack([s.score(b) for s, b in zip(signatures, blocks, strict=True)]))
        return np.concatenate(scores, axis=1)


def signature_scores(
    slides: Sequence[SlideFeatures], decoder: GeneDecoder, signature: Signature
) -> list[NDArray[np.float32]]:
    """Score of a signature in each patch, float32 [N] for each slide.

    Each gene is standardised over all patches of all ``slides`` together, so that highly expressed genes do
    not count more. The score is the weighted mean over the genes, in standard deviations. Genes that the
    decoder does not predict are left out; genes that it predicts equal everywhere count as 0.

    Raises:
        UsageError: the decoder predicts none of the genes, or there is no patch.
    """
    columns, _ = signature.known_to(decoder)

    def predict(i: int) -> NDArray[np.float32]:
        return predict_genes(slides[i], decoder, columns)

    fits = sum(len(slide.grid) for slide in slides) * len(columns) * 4 <= KEEP_BYTES
    expression = cache(predict) if fits else predict
    fitted = _fitted(signature, decoder, *_moments(map(expression, range(len(slides)))))
    return [fitted.score(expression(i)) for i in range(len(slides))]


# --- regions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RegionGenes:
    """Each gene inside a region against outside, the largest effect first.

    Attributes:
        genes: names, or ``column 0``, ... if the decoder's columns have no names.
        inside: mean of the predicted log1p expression in the region, float64 [G].
        outside: mean in the rest of the slide, float64 [G].
        effect: Cohen's d, the difference in pooled standard deviations, float64 [G]; 0 if nothing varies.
        p_patches: share of random sets of single patches with at least this difference, float64 [G];
            one-sided.
        p_pieces: the same share of connected random regions.
        patches: number of patches inside.
        permutations: number of random draws of each kind; no p is below 1 / (this + 1).
    """

    genes: tuple[str, ...]
    inside: NDArray[np.float64]
    outside: NDArray[np.float64]
    effect: NDArray[np.float64]
    p_patches: NDArray[np.float64]
    p_pieces: NDArray[np.float64]
    patches: int
    permutations: int

    @property
    def q_patches(self) -> NDArray[np.float64]:
        """`benjamini_hochberg` of ``p_patches`` over all genes, float64 [G]."""
        return benjamini_hochberg(self.p_patches)

    @property
    def q_pieces(self) -> NDArray[np.float64]:
        """`benjamini_hochberg` of ``p_pieces`` over all genes, float64 [G]."""
        return benjamini_hochberg(self.p_pieces)

    def __repr__(self) -> str:
        return f"RegionGenes({len(self.genes)} genes, {self.patches} patches inside, {self.genes[0]} first)"


def region_genes(
    slide: SlideFeatures,
    decoder: GeneDecoder,
    inside: Membership,
    *,
    permutations: int = 999,
) -> RegionGenes:
    """Compare a region with the rest of its slide, gene by gene.

    Patches are not independent samples, so each gene has two p-values. The first compares the region with
    random sets of as many single patches; it is small for almost any region, because neighbouring patches are
    alike. The second compares it with connected regions of as many patches around random places, which
    preserves spatial correlation. Use the second if the two disagree. q-values correct both for the number of
    genes.

    A p-value counts the observed draw too (Phipson and Smyth 2010), so it is never 0.

    Args:
        slide: features of the slide.
        decoder: decoder of the encoder that made them.
        inside: bool [N], the patches of the region.
        permutations: number of random draws of each kind.

    Raises:
        UsageError: the region holds no patch or all of them, or ``permutations`` is below 1.
    """
    count, members = len(slide.grid), int(inside.sum())
    if not 0 < members < count:
        what = "no patch" if not members else "every patch"
        raise UsageError(f"the region holds {what} of {slide.path.stem}; draw one with some of its {count}")
    if permutations < 1:
        raise UsageError(f"permutations is {permutations}; allowed: 1 or more")
    draws = _draws(slide.grid, inside, permutations)  # bool [1 + 2 P, N]
    sums, total, squares = _sums(slide, decoder, draws)
    mean_in, mean_out = sums[0] / members, (total - sums[0]) / (count - members)
    within = squares[0] - members * mean_in**2 + squares[1] - (count - members) * mean_out**2
    deviation = np.sqrt(np.maximum(within, 0) / max(1, count - 2))
    varies = deviation > 1e-6 * np.maximum(1, np.abs(mean_in))
    effect = np.where(varies, (mean_in - mean_out) / np.where(varies, deviation, 1), 0)
    # a draw with a larger sum inside has the larger difference, because all draws have as many patches
    slack = 1e-5 * np.maximum(1, np.abs(sums[0]))  # sums of float32: equal draws need not give equal sums
    as_large = sums[1:] >= sums[0] - slack
    p_patches, p_pieces = (
        (1 + as_large[k * permutations : (k + 1) * permutations].sum(0)) / (1 + permutations) for k in (0, 1)
    )
    order = np.argsort(-effect, kind="stable")
    names = column_names(decoder)
    return RegionGenes(
        tuple(names[i] for i in order),
        *(mean_in[order], mean_out[order], effect[order], p_patches[order], p_pieces[order]),
        patches=members,
        permutations=permutations,
    )


def benjamini_hochberg(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """The q-value of each p-value, float64 [G]: the lowest false discovery rate that still includes it.

    Source: Benjamini and Hochberg 1995, as adjusted p-values.
    """
    order = np.argsort(-p)
    adjusted = p[order] * len(p) / np.arange(len(p), 0, -1)
    q = np.empty_like(p)
    q[order] = np.minimum.accumulate(np.minimum(adjusted, 1))
    return q


def areas_mm2(
    region: Sequence[shapely.Polygon], tissue: Sequence[shapely.Polygon] | None, mpp: float
) -> tuple[float, float | None]:
    """Area of a region and of the tissue in it, in mm²; None as the second if the tissue is not known.

    Overlapping polygons count once. Areas are counted on 2,048 x 2,048 cells, which is exact to about 0.1 %
    for a compact region; an exact union takes minutes for outlines that cross themselves often.

    Args:
        region: outlines of the region in level-0 pixels.
        tissue: outlines of the tissue in level-0 pixels.
        mpp: µm/px at level 0.
    """
    x0, y0, x1, y1 = shapely.total_bounds(region)
    origin = np.array([x0, y0])
    scale = CELLS / np.maximum([x1 - x0, y1 - y0], 1e-9)  # cells per level-0 pixel, of x and of y
    mm2 = (mpp / 1000) ** 2 / scale.prod()
    inside, on_tissue = (
        fill_polygons(shapely.transform(polygons, lambda xy: (xy - origin) * scale), (CELLS, CELLS))
        for polygons in (region, tissue or ())
    )
    in_tissue = None if tissue is None else float((inside & on_tissue).sum() * mm2)
    return float(inside.sum() * mm2), in_tissue


def patches_inside(grid: PatchGrid, polygons: Sequence[shapely.Polygon]) -> Membership:
    """Whether the centre of each patch lies in one of the polygons, which are in level-0 pixels: bool [N]."""
    return inside_polygons(polygons, grid.xy_l0 + grid.patch_size_l0 / 2)


def _draws(grid: PatchGrid, inside: Membership, permutations: int) -> Membership:
    """Patches of the region, then of sets of single patches, then of connected regions: bool [1 + 2 P, N]."""
    count, members, rng = len(grid), int(inside.sum()), np.random.default_rng(0)
    draws = np.zeros((1 + 2 * permutations, count), np.bool_)
    draws[0] = inside
    xy = grid.xy_l0.astype(np.float64)
    for k in range(1, 1 + permutations):
        draws[k, rng.choice(count, members, replace=False)] = True
        far = ((xy - xy[rng.integers(count)]) ** 2).sum(1)
        draws[permutations + k, np.argpartition(far, members - 1)[:members]] = True
    return draws


def _sums(
    slide: SlideFeatures, decoder: GeneDecoder, draws: Membership
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Sums of each draw [1 + 2 P, G] and of all [G]; sums of squares inside and outside the region [2, G]."""
    sums = np.zeros((len(draws), decoder.n_genes))
    total, squares, done = np.zeros(decoder.n_genes), np.zeros((2, decoder.n_genes)), 0
    for block in predicted(slide, decoder):
        part = draws[:, done : done + len(block)]
        sums += (torch.from_numpy(part.astype(np.float32)) @ torch.from_numpy(block)).numpy()
        exact = block.astype(np.float64)
        total += exact.sum(0)
        chosen = part[0]
        squares += np.stack([(exact[chosen] ** 2).sum(0), (exact[~chosen] ** 2).sum(0)])
        done += len(block)
    return sums, total, squares
