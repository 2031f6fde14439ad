"""Figures of slide-level predictions, for the samples as they are and for resampled patients at once.

Every figure takes weights [B, N], how often each of N samples counts in each of B resamples: a row of ones
gives the figure itself. AUC and C-index are one formula, the share of comparable pairs in the right order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

AUC, BALANCED, F1 = "AUC", "balanced accuracy", "weighted F1"
KAPPA, C_INDEX = "quadratic kappa", "C-index"
BOOTSTRAPS = 1000
TIED = 1e-8  # risks that differ by less are equal, as in scikit-survival
Array = NDArray[Any]
Floats = NDArray[np.float64]
Figures = Mapping[str, Floats]  # by name


def figures_of(classes: int) -> tuple[str, ...]:
    """The figures of a task, the one to compare encoders by first; no classes stand for survival."""
    if not classes:
        return (C_INDEX,)
    return (AUC, BALANCED, F1, KAPPA) if classes == 2 else (BALANCED, AUC, F1, KAPPA)


def score(weights: Array, truth: Array, predicted: Array) -> dict[str, Floats]:
    """All figures of a task: float64 [B] each, NaN where there is nothing to compare.

    Args:
        weights: [B, N].
        truth: int [N], classes; or [N, 2], times and events.
        predicted: [N, K], probabilities of classes; or [N], risks.

    Returns:
        The AUC is of the second class of two, else the mean of each class against the others. Balanced
        accuracy is the mean recall over the classes there. F1 is weighted by the samples of each class.
    """
    if predicted.ndim == 1:
        return {C_INDEX: _in_order(weights, _outlives(truth), predicted, TIED)}
    classes = predicted.shape[1]
    of = np.arange(1 if classes == 2 else 0, classes)
    auc = [_in_order(weights, (truth == k)[:, None] & (truth != k), predicted[:, k], 0.0) for k in of]
    return {AUC: _mean(np.stack(auc, 1)), **_by_confusion(weights, truth, predicted.argmax(1), classes)}


def _outlives(truth: Array) -> Array:
    """Whether i is known to have had the event before j: bool [N, N]."""
    time, event = truth[:, 0], truth[:, 1] > 0
    later = (time[:, None] < time) | ((time[:, None] == time) & ~event)
    outlives: Array = event[:, None] & later
    return outlives


def _in_order(weights: Array, comparable: Array, ranked: Array, tied: float) -> Floats:
    """The share of comparable pairs (i, j) in which i ranks above j; pairs of equal rank count half."""
    rows = np.flatnonzero(comparable.any(1))
    pairs, difference = comparable[rows].astype(np.float64), ranked[rows, None] - ranked
    right = pairs * ((difference > tied) + 0.5 * (np.abs(difference) <= tied))
    w = np.asarray(weights, np.float64)
    with np.errstate(invalid="ignore"):
        share: Floats = ((w[:, rows] @ right) * w).sum(1) / ((w[:, rows] @ pairs) * w).sum(1)
    return share


def _by_confusion(weights: Array, truth: Array, predicted: Array, classes: int) -> dict[str, Floats]:
    cells = np.eye(classes**2)[truth * classes + predicted]  # [N, K K]
    counts = (np.asarray(weights, np.float64) @ cells).reshape(-1, classes, classes)
    true, said, hit = counts.sum(2), counts.sum(1), np.diagonal(counts, axis1=1, axis2=2)
    distance = (np.arange(classes)[:, None] - np.arange(classes)) ** 2
    with np.errstate(invalid="ignore"):
        by_chance = true[:, :, None] * said[:, None] / true.sum(1)[:, None, None]
        f1 = np.nan_to_num(2 * hit / (true + said))
        return {
            BALANCED: _mean(hit / true),
            F1: (f1 * true).sum(1) / true.sum(1),
            KAPPA: 1 - (counts * distance).sum((1, 2)) / (by_chance * distance).sum((1, 2)),
        }


def _mean(values: Floats) -> Floats:
    """Over the last axis, of those that are numbers; NaN where none is."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        mean: Floats = np.where(known, values, 0).sum(-1) / known.sum(-1)
    return mean


def resampled(folds: Sequence[tuple[Array, Array, Array]], seed: int) -> tuple[Figures, Figures]:
    """The figures of each fold, and the mean over the folds for resampled patients.

    Patients are drawn with replacement from those of all folds, with all their samples in every fold: the
    same ones for the same seed, so that two encoders are compared on the same patients.

    Args:
        folds: truth, predictions, and the patient of each sample.
        seed: of the draws.

    Returns:
        By figure, float64 [folds] and float64 [BOOTSTRAPS].
    """
    patients, of = np.unique(np.concatenate([patient for *_, patient in folds]), return_inverse=True)
    drawn = np.random.default_rng(seed).integers(len(patients), size=(BOOTSTRAPS, len(patients)))
    times = np.stack([np.bincount(draw, minlength=len(patients)) for draw in drawn])
    weights = np.concatenate([np.ones((1, len(patients)), np.int64), times])
    ends = np.cumsum([len(truth) for truth, *_ in folds])[:-1]
    scored = [
        score(weights[:, rows], truth, predicted)
        for (truth, predicted, _), rows in zip(folds, np.split(of, ends), strict=True)
    ]
    found = {figure: np.stack([fold[figure] for fold in scored], 1) for figure in scored[0]}
    return (
        {figure: values[0] for figure, values in found.items()},
        {figure: _mean(values[1:]) for figure, values in found.items()},
    )
