"""Genes that differ in a region: predicted expression of its patches against the rest of the slide.

Patches are not independent samples, so each gene has two p-values. The first compares the region with random
sets of as many single patches; it is small for almost any region, because neighbouring patches are alike. The
second compares it with connected regions of as many patches around random places, which preserves spatial
correlation. Use the second if the two disagree. q-values correct both for the number of genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely
import torch
from numpy.typing import NDArray

from seal_extract.errors import UsageError
from seal_extract.features.store import SlideFeatures
from seal_extract.genes.decoder import GeneDecoder, column_names
from seal_extract.genes.predict import predicted
from seal_extract.patches.grid import PatchGrid
from seal_extract.tissue.geojson import fill_polygons, inside_polygons

PERMUTATIONS = 999
CELLS = 2048  # side of the raster on which areas are counted

Membership = NDArray[np.bool_]


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
        q_patches: `benjamini_hochberg` of ``p_patches`` over all genes.
        q_pieces: `benjamini_hochberg` of ``p_pieces`` over all genes.
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
        """q-values of ``p_patches``, float64 [G]."""
        return benjamini_hochberg(self.p_patches)

    @property
    def q_pieces(self) -> NDArray[np.float64]:
        """q-values of ``p_pieces``, float64 [G]."""
        return benjamini_hochberg(self.p_pieces)

    def __repr__(self) -> str:
        return f"RegionGenes({len(self.genes)} genes, {self.patches} patches inside, {self.genes[0]} first)"


def region_genes(
    slide: SlideFeatures,
    decoder: GeneDecoder,
    inside: Membership,
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> RegionGenes:
    """Compare a region with the rest of its slide, gene by gene.

    A p-value counts the observed draw too (Phipson and Smyth 2010), so it is never 0.

    Args:
        slide: features of the slide.
        decoder: decoder of the encoder that made them.
        inside: bool [N], the patches of the region.
        permutations: number of random draws of each kind.
        seed: seed of the random draws.

    Raises:
        UsageError: the region holds no patch or all of them, or ``permutations`` is below 1.
    """
    count, members = len(slide.grid), int(inside.sum())
    if not 0 < members < count:
        what = "no patch" if not members else "every patch"
        raise UsageError(f"the region holds {what} of {slide.path.stem}; draw one with some of its {count}")
    if permutations < 1:
        raise UsageError(f"permutations is {permutations}; allowed: 1 or more")
    draws = _draws(slide.grid, inside, permutations, np.random.default_rng(seed))  # bool [1 + 2 P, N]
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


def _draws(grid: PatchGrid, inside: Membership, permutations: int, rng: np.random.Generator) -> Membership:
    """Patches of the region, then of sets of single patches, then of connected regions: bool [1 + 2 P, N]."""
    count, members = len(grid), int(inside.sum())
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
