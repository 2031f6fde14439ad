"""The Cox model with an elastic net, as Patho-Bench fits it by scikit-survival's coxnet.

Simon, Friedman, Hastie, Tibshirani, "Regularization Paths for Cox's Proportional Hazards Model via Coordinate
Descent", 2011, doi 10.18637/jss.v039.i05. Ties are Breslow's, features are centred and not scaled. The
problem is strictly convex: another algorithm finds the same coefficients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import ElasticNet

ALPHAS, L1_RATIO = (0.01, 0.02, 0.07), 0.5  # Patho-Bench's
STEPS, TOLERANCE = 500, 1e-10
Floats = NDArray[np.float64]


def fit_cox(
    x: NDArray[Any], time: NDArray[Any], event: NDArray[Any], alpha: float, l1_ratio: float = L1_RATIO
) -> tuple[Floats, bool]:
    """The coefficients that minimise -log partial likelihood / N + alpha (l1 |b| + (1 - l1) b² / 2).

    Each step solves the weighted least squares of Newton's method for the hazards of the step before, without
    the terms between samples, by scikit-learn's coordinate descent; a step that goes too far is halved.

    Args:
        x: [N, D].
        time: [N].
        event: [N], whether it has happened by then.
        alpha: strength of the elastic net.
        l1_ratio: its share of the absolute values.

    Returns:
        float64 [D], with which the product of rows is their risk; and whether the steps settled. They do not
        where some features tell the order of the events completely; scikit-survival stops there.
    """
    x = np.asarray(x, np.float64) - np.mean(x, 0, dtype=np.float64)
    order = np.argsort(-np.asarray(time), kind="stable")  # from the last
    x, time, event = x[order], np.asarray(time)[order], np.asarray(event, np.float64)[order]
    last = np.searchsorted(-time, -time, side="right") - 1  # of those at risk at the same time
    first = np.searchsorted(-time, -time, side="left")
    net = ElasticNet(
        alpha, l1_ratio=l1_ratio, fit_intercept=False, tol=1e-7, max_iter=100_000, warm_start=True
    )
    net.coef_ = coefficients = np.zeros(x.shape[1])
    loss, gradient, curvature = _likelihood(x @ coefficients, event, first, last)
    best = loss
    settled = False
    for _ in range(STEPS):
        counts = curvature > 1e-12  # of samples that were ever at risk
        target = (x @ coefficients)[counts] + gradient[counts] / curvature[counts]
        # the weights' mean becomes 1 in scikit-learn, so alpha takes its place
        net.alpha = alpha * len(x) / curvature[counts].sum()
        net.fit(x[counts], target, sample_weight=curvature[counts])
        step = net.coef_ - coefficients
        for halvings in range(30):
            tried = coefficients + step * 0.5**halvings
            loss, gradient, curvature = _likelihood(x @ tried, event, first, last)
            loss += alpha * (l1_ratio * np.abs(tried).sum() + (1 - l1_ratio) / 2 * (tried**2).sum())
            if loss <= best + 1e-15:
                break
        settled = bool(best - loss <= TOLERANCE * max(1.0, abs(best)))
        coefficients, best = tried, loss
        if settled:
            break
    return coefficients, settled


def _likelihood(
    risk: Floats, event: Floats, first: NDArray[Any], last: NDArray[Any]
) -> tuple[float, Floats, Floats]:
    """-log partial likelihood / N; and of N times it, by the risk of each sample, -gradient and curvature.

    The curvature is an upper bound. Samples are in the order of time, the last first; ``first`` and ``last``
    are the range of those of equal time.
    """
    shift = risk.max()
    hazard = np.exp(risk - shift)
    at_risk = np.cumsum(hazard)[last]
    share = event / at_risk
    met = np.cumsum(share[::-1])[::-1][first]  # over events until the sample's time
    likelihood = (event * (risk - shift - np.log(at_risk))).sum()
    return -likelihood / len(risk), event - hazard * met, hazard * met
