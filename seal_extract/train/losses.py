"""The losses of SEAL, of multi-scale alignment and of BLEEP, each as its formula.

Sources: SEAL, arXiv 2602.14177 (its published configuration); InfoNCE after van den Oord et al.,
arXiv 1807.03748; the correlation loss after Zbontar et al., arXiv 2103.03230; planar flows after Rezende and
Mohamed, arXiv 1505.05770.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CORRELATION_WEIGHT = 0.05
MSE_WEIGHT = 5.0
EXPRESSION_SCALE = 0.1
EPS = 1e-6


def info_nce(images: Tensor, expression: Tensor, temperature: float = 0.05) -> Tensor:
    """Symmetric contrast: each image picks its expression out of the batch, and the other way round.

    With s[i, j] = cos(image i, expression j) / temperature, half of the mean over i of
    -log softmax(s[i, :])[i] and -log softmax(s[:, i])[i] each.

    Args:
        images: [B, D], of any length.
        expression: [B, D], row by row the partner.
        temperature: above 0.

    Returns:
        A scalar; log B where nothing is told apart.
    """
    similarity = F.normalize(images.float(), dim=1) @ F.normalize(expression.float(), dim=1).T / temperature
    partner = torch.arange(len(similarity), device=similarity.device)
    return (F.cross_entropy(similarity, partner) + F.cross_entropy(similarity.T, partner)) / 2


def bleep_loss(images: Tensor, spots: Tensor, temperature: float = 1.0) -> Tensor:
    """Contrast with soft targets: pairs that resemble each other count as partners in part.

    With s = spots @ images^T / T and targets t = softmax over rows of (images @ images^T + spots @ spots^T) /
    (2 T), half of the mean over i of -sum_j t[i, j] log softmax(s)[i, j] and
    -sum_j t[j, i] log softmax(s^T)[i, j] each. Source: BLEEP (arXiv 2306.01859) and its code, whose targets
    are not normalised for the second direction, and carry gradients.

    Args:
        images: [B, D]; their length counts.
        spots: [B, D], row by row the partner.
        temperature: above 0.
    """
    images, spots = images.float(), spots.float()
    logits = spots @ images.T / temperature
    targets = ((images @ images.T + spots @ spots.T) / (2 * temperature)).softmax(dim=-1)
    by_spot = -(targets * logits.log_softmax(dim=-1)).sum(1)
    by_image = -(targets.T * logits.T.log_softmax(dim=-1)).sum(1)
    return ((by_spot + by_image) / 2).mean()


def correlation_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """0.05 x sum over genes g of (1 - c[g])^2, where c[g] is the correlation of the gene over the batch.

    The diagonal of Barlow Twins' cross-correlation matrix Z1^T Z2 / B; SEAL gives the rest a weight of 0. A
    gene that does not vary in the batch counts as uncorrelated.

    Args:
        predicted: [B, G].
        true: [B, G].
    """
    c = (_standardised(predicted) * _standardised(true)).mean(0)  # [G]
    return CORRELATION_WEIGHT * (1 - c).square().sum()


def _standardised(columns: Tensor) -> Tensor:
    centred = columns - columns.mean(0)
    return centred / (centred.square().mean(0) + EPS).sqrt()


def standardised_mse(predicted: Tensor, true: Tensor, sd: Tensor) -> Tensor:
    """Mean over spots and genes of ((predicted - true) / sd)^2.

    Args:
        predicted: [B, G].
        true: [B, G].
        sd: [G], of each gene over the training spots; the mean that would be taken off both cancels.
    """
    return ((predicted - true) / sd).square().mean()


def expression_loss(predicted: Tensor, true: Tensor, sd: Tensor) -> Tensor:
    """0.1 x (`correlation_loss` + 5 x `standardised_mse`), SEAL's reconstruction of expression."""
    parts = correlation_loss(predicted, true) + MSE_WEIGHT * standardised_mse(predicted, true, sd)
    return EXPRESSION_SCALE * parts


def flow_kl(z0: Tensor, mu: Tensor, logvar: Tensor, zk: Tensor, log_det: Tensor) -> Tensor:
    """Divergence of the flowed posterior from N(0, 1), by the sample drawn (arXiv 1505.05770, equation 15).

    log q0(z0) - sum of log|det| - log p(zk), the mean over the batch.

    Args:
        z0: [B, D], the sample of N(mu, exp(logvar)).
        mu: [B, D].
        logvar: [B, D].
        zk: [B, D], z0 after the flows.
        log_det: [B], the sum over the flows.
    """
    log_q0 = -0.5 * (logvar + (z0 - mu).square() / logvar.exp() + math.log(2 * math.pi)).sum(1)
    log_p = -0.5 * (zk.square() + math.log(2 * math.pi)).sum(1)
    return (log_q0 - log_det - log_p).mean()


def to_parent(patches: Tensor, regions: Tensor, parent: Tensor) -> Tensor:
    """Mean of 1 - cos(patch, its parent region): each patch is drawn to the region around it.

    Args:
        patches: [M, D].
        regions: [R, D].
        parent: int64 [M], row of each patch's region.
    """
    return (1 - F.cosine_similarity(patches.float(), regions.float()[parent], dim=1)).mean()
