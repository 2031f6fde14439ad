"""Gene expression from embeddings: the HEST-Benchmark's protocol, a ridge on principal components.

Source: Jaume et al., HEST-1k (arXiv 2406.16192), and the benchmark's published settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError

Floats = NDArray[np.float64]
BLOCKS = 5  # of consecutive rows: how one group's rows are parted to choose alpha


@dataclass(frozen=True)
class Probe:
    """What is fitted to predict expression.

    Attributes:
        name: in tables.
        components: principal components at most.
        alphas: of the ridge, to choose from within the training rows; empty: the benchmark's own, which is
            100 / (components x genes).
    """

    name: str
    components: int = 256
    alphas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.components < 1 or any(alpha <= 0 for alpha in self.alphas):
            raise UsageError(
                f"components is {self.components}, alphas are {self.alphas}; allowed: 1 or more, above 0"
            )


HEST = Probe("HEST-Benchmark")
# the benchmark's alpha is next to none: a few hundred spots on 256 components are then fitted to their noise
TUNED = Probe("alpha chosen within the training rows", alphas=(1.0, 10.0, 100.0, 1e3, 1e4, 1e5))


@dataclass(frozen=True, eq=False)
class FittedProbe:
    """Predicts expression from embeddings; made by `fit_probe`.

    Attributes:
        mean, scale: of each feature in the training rows, float64 [D].
        weights: from standardised features to expression, float64 [D, P].
        offset: mean expression of the training rows, float64 [P].
        alpha: of the ridge.
        components: principal components that were kept.
    """

    mean: Floats
    scale: Floats
    weights: Floats
    offset: Floats
    alpha: float
    components: int

    def __repr__(self) -> str:
        features, genes = self.weights.shape
        return (
            f"FittedProbe({features} features by {self.components} components to {genes} genes, "
            f"alpha {self.alpha:.4g})"
        )

    def predict(self, embeddings: NDArray[Any]) -> Floats:
        """[M, D] to [M, P]."""
        standardised = (embeddings - self.mean) / self.scale
        predicted: Floats = standardised @ self.weights + self.offset
        return predicted


def fit_probe(
    embeddings: NDArray[Any],
    expression: NDArray[Any],
    probe: Probe = HEST,
    groups: NDArray[Any] | None = None,
) -> FittedProbe:
    """Standardise the features, keep the first principal components, fit a ridge.

    The benchmark fits without an intercept to expression that is not centred. Its components have mean 0 over
    the training rows, so an intercept changes neither weights nor Pearson's r; here predictions carry the
    training mean. The components are orthogonal, so the ridge is exact: s / (s² + alpha) of each.

    Args:
        embeddings: [N, D].
        expression: [N, P], log1p.
        probe: settings.
        groups: [N], the section or patient of each row: where alpha is chosen, it is the one with the best
            mean Pearson r over groups left out in turn. One group only, or None: over blocks of consecutive
            rows.

    Raises:
        UsageError: shapes that do not fit, fewer than two rows, NaN or infinity.
    """
    x, y = _checked(embeddings, expression)
    alpha = 100 / (_count(x, probe) * y.shape[1])
    if probe.alphas:
        alpha = _choose_alpha(x, y, probe, _blocks(len(x)) if groups is None else np.asarray(groups))
    return _Components.of(x, y, probe).at(alpha)


def _checked(embeddings: NDArray[Any], expression: NDArray[Any]) -> tuple[Floats, Floats]:
    x, y = np.asarray(embeddings, np.float64), np.asarray(expression, np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2 or not x.shape[1] or not y.shape[1]:
        raise UsageError(
            f"embeddings are {list(x.shape)}, expression is {list(y.shape)}; "
            "allowed: [N, D] and [N, P], N 2 or more"
        )
    for name, values in (("embeddings", x), ("expression", y)):
        bad = np.logical_not(np.isfinite(values)).any(axis=1).reshape(-1)
        if bad.any():
            raise UsageError(
                f"{name} hold NaN or infinity in {bad.sum()} of {len(bad)} rows, first in row "
                f"{bad.argmax()}; allowed: finite numbers"
            )
    return x, y


def _count(x: Floats, probe: Probe) -> int:
    """Components to keep: fewer than asked for where there are fewer features or rows."""
    return int(min(probe.components, *x.shape))


@dataclass(frozen=True, eq=False)
class _Components:
    """Training rows by their principal components: every alpha's ridge is a product away."""

    mean: Floats
    scale: Floats
    axes: Floats  # [K, D]
    sizes: Floats  # [K], singular values
    shares: Floats  # [K, P], of each component in the expression
    offset: Floats

    @classmethod
    def of(cls, x: Floats, y: Floats, probe: Probe) -> _Components:
        mean, scale, offset = x.mean(0), x.std(0), y.mean(0)
        scale = np.where(scale > 1e-9 * np.maximum(1.0, np.abs(mean)), scale, 1.0)  # a constant stays 0
        left, sizes, axes = np.linalg.svd((x - mean) / scale, full_matrices=False)
        k = _count(x, probe)
        return cls(mean, scale, axes[:k], sizes[:k], left[:, :k].T @ (y - offset), offset)

    def at(self, alpha: float) -> FittedProbe:
        shrunk = (self.sizes / (self.sizes**2 + alpha))[:, None] * self.shares
        return FittedProbe(self.mean, self.scale, self.axes.T @ shrunk, self.offset, alpha, len(self.sizes))


def _blocks(rows: int) -> NDArray[np.int64]:
    return np.arange(rows) * min(BLOCKS, rows) // rows


def _choose_alpha(x: Floats, y: Floats, probe: Probe, groups: NDArray[Any]) -> float:
    """The alpha with the best mean r over inner folds; of equals the largest."""
    if len(np.unique(groups)) < 2:
        groups = _blocks(len(x))
    scores = []
    for _, train, held_out in leave_one_out(groups):
        if min(len(train), len(held_out)) < 2:
            continue
        parts = _Components.of(x[train], y[train], probe)
        scores.append([mean_r(pearson(parts.at(a).predict(x[held_out]), y[held_out])) for a in probe.alphas])
    means = np.nan_to_num(np.array(scores).reshape(-1, len(probe.alphas))).sum(0)  # a fold without any r: 0
    return max(zip(means.tolist(), probe.alphas, strict=True))[1]


def pearson(predicted: NDArray[Any], observed: NDArray[Any]) -> Floats:
    """Pearson's r of each column.

    Args:
        predicted: [N, P].
        observed: [N, P].

    Returns:
        float64 [P]. NaN where the observed column is constant: no prediction is right or wrong about it;
        0 where only the prediction is constant, so that nobody gains by predicting nothing.

    Raises:
        UsageError: different shapes.
    """
    p, o = np.asarray(predicted, np.float64), np.asarray(observed, np.float64)
    if p.shape != o.shape or p.ndim != 2:
        raise UsageError(
            f"predicted is {list(p.shape)}, observed {list(o.shape)}; allowed: the same [N, P] of both"
        )
    varies, predicts = _varies(o), _varies(p)
    p, o = p - p.mean(0), o - o.mean(0)
    spread = np.sqrt((p**2).sum(0) * (o**2).sum(0))
    r = (p * o).sum(0) / np.where(spread > 0, spread, 1.0)
    return np.where(varies, np.where(predicts, r.clip(-1, 1), 0.0), np.nan)


def _varies(values: Floats) -> NDArray[np.bool_]:
    """Columns that are more than rounding of one number."""
    size = np.abs(values).max(0, initial=0)
    span = values.max(0, initial=-np.inf) - values.min(0, initial=np.inf)
    varies: NDArray[np.bool_] = span > 1e-9 * size
    return varies


def mean_r(per_gene: Floats) -> float:
    """Mean over the genes that have an r; NaN where none has."""
    defined = per_gene[~np.isnan(per_gene)]
    return float(defined.mean()) if defined.size else float("nan")


# --- folds --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Fold:
    """Which rows are trained on and which are held out, and the expression to predict.

    The panel is the fold's own: genes are chosen from its training rows alone.

    Attributes:
        name: what is held out.
        train: int64 [T], rows.
        held_out: int64 [H], rows.
        expression: float32 [N, P], log1p, of all rows.
        panel: gene of each column.
        groups: [N], what is left out in turn: the section or patient of each row.
        sections: [N], the section of each row: retrieval stays within one.
    """

    name: str
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]
    expression: NDArray[Any]
    panel: tuple[str, ...]
    groups: NDArray[Any]
    sections: NDArray[Any]

    def __post_init__(self) -> None:
        rows, genes = self.expression.shape
        if genes != len(self.panel) or {len(self.groups), len(self.sections)} != {rows}:
            raise UsageError(
                f"fold {self.name}: expression is {rows} x {genes}, the panel has {len(self.panel)} genes, "
                f"groups and sections are {len(self.groups)} and {len(self.sections)}; "
                "allowed: a gene for each column, a group and a section for each row"
            )
        both = np.intersect1d(self.train, self.held_out)
        if len(self.train) < 2 or len(self.held_out) < 2 or len(both):
            raise UsageError(
                f"fold {self.name} trains on {len(self.train)} rows and holds out {len(self.held_out)}, "
                f"{len(both)} of them in both; allowed: 2 or more of each, none in both"
            )

    def __repr__(self) -> str:
        return (
            f"Fold({self.name}: {len(self.train)} rows to train on, {len(self.held_out)} held out, "
            f"{len(self.panel)} genes)"
        )


def leave_one_out(groups: Sequence[Any] | NDArray[Any]) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    """Each group held out in turn, in the order of first appearance.

    Args:
        groups: [N], section or patient of each row.

    Yields:
        Its name, int64 rows of all others, int64 rows of its own.

    Raises:
        UsageError: fewer than two groups.
    """
    of = np.asarray(groups)
    names = list(dict.fromkeys(of.tolist()))
    if len(names) < 2:
        raise UsageError(f"all {len(of)} rows are of one group, {names}; allowed: two groups or more")
    for name in names:
        yield str(name), np.flatnonzero(of != name), np.flatnonzero(of == name)


@dataclass(frozen=True, eq=False)
class FoldScore:
    """How well one fold's held-out rows were predicted.

    Attributes:
        fold: its name.
        per_gene: float64 [P], Pearson's r, NaN for genes that are constant in the held-out rows.
        panel: gene of each.
        alpha: of the ridge.
        components: principal components.
        rows: trained on and held out.
        predicted: float64 [H, P], of the held-out rows.
    """

    fold: str
    per_gene: Floats
    panel: tuple[str, ...]
    alpha: float
    components: int
    rows: tuple[int, int]
    predicted: Floats

    @property
    def mean(self) -> float:
        """Over the genes that vary."""
        return mean_r(self.per_gene)

    @property
    def constant(self) -> int:
        """Genes without an r."""
        return int(np.isnan(self.per_gene).sum())

    def __repr__(self) -> str:
        return (
            f"FoldScore({self.fold}: r {self.mean:.3f} over {len(self.panel) - self.constant} genes, "
            f"{self.constant} constant, {self.rows[0]} rows trained on, {self.rows[1]} held out)"
        )


def score_fold(embeddings: NDArray[Any], fold: Fold, probe: Probe = HEST) -> FoldScore:
    """Fit on the fold's training rows, predict the held-out ones.

    Args:
        embeddings: [N, D], of all rows: an encoder trained for this fold gives other ones for another.
        fold: rows and expression.
        probe: settings.

    Raises:
        UsageError: as `fit_probe`.
    """
    if len(embeddings) != len(fold.expression):
        raise UsageError(
            f"embeddings are {len(embeddings)}, fold {fold.name} has {len(fold.expression)} rows; "
            "give one for each row"
        )
    train, held_out = fold.train, fold.held_out
    fitted = fit_probe(embeddings[train], fold.expression[train], probe, fold.groups[train])
    _checked(embeddings[held_out], fold.expression[held_out])
    predicted = fitted.predict(embeddings[held_out])
    r = pearson(predicted, fold.expression[held_out])
    rows = (len(train), len(held_out))
    return FoldScore(fold.name, r, fold.panel, fitted.alpha, fitted.components, rows, predicted)
