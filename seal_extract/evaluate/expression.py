"""The held-out ridge: gene expression predicted from embeddings, on sections or patients left out in turn.

Expression is log1p of counts per 10,000, the genes are the most variable ones of the training sections, and
the ridge is on principal components with the alpha of the HEST-Benchmark (Jaume et al., arXiv 2406.16192), or
with one that is chosen. Its figures cannot be compared with those of the HEST-Benchmark: see `hest`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError, how_to_install

try:
    from sklearn.decomposition import PCA
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import Pipeline, make_pipeline
    from sklearn.preprocessing import StandardScaler
except ImportError as exc:
    raise UsageError(f"scikit-learn is not installed; {how_to_install('train')}") from exc

Floats = NDArray[np.float64]
HELD_OUT = 0.2  # of the rows, in random splits
BLOCKS = 5  # of consecutive rows: the inner folds where all rows are of one group


@dataclass(frozen=True)
class Probe:
    """The regression from embeddings to expression.

    Attributes:
        name: in tables.
        components: principal components at most.
        alphas: of the ridge, to choose from within the training rows; empty for 100 / (components x genes).
    """

    name: str
    components: int = 256
    alphas: tuple[float, ...] = ()


FIXED = Probe("held-out ridge, fixed alpha")
# the fixed alpha hardly regularises: with a few hundred spots, 256 components are fitted to their noise
TUNED = Probe(
    "held-out ridge, alpha chosen within the training rows", alphas=(1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
)


def fit_probe(
    embeddings: NDArray[Any],
    expression: NDArray[Any],
    probe: Probe = FIXED,
    groups: NDArray[Any] | None = None,
) -> Pipeline:
    """Standardise the features, keep the first principal components, fit a ridge.

    The components have mean 0 over the training rows, so that the intercept changes neither the weights nor
    Pearson's r: predictions include the training mean.

    Args:
        embeddings: [N, D].
        expression: [N, P], log1p.
        probe: settings.
        groups: [N], the section or patient of each row. A chosen alpha has the best mean Pearson r over
            groups left out in turn; with one group only, or None, over blocks of consecutive rows.

    Returns:
        A pipeline of scikit-learn; its ``predict`` takes [M, D] to [M, P].

    Raises:
        UsageError: shapes that do not fit, fewer than two rows, NaN or infinity.
    """
    x, y = _checked(embeddings, expression)
    alpha = 100 / (min(probe.components, *x.shape) * y.shape[1])
    if probe.alphas:
        alpha = _choose_alpha(x, y, probe, groups)
    reduction = _reduction(x, probe)
    return make_pipeline(*reduction, Ridge(alpha).fit(reduction.transform(x), y))


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


def _reduction(x: Floats, probe: Probe) -> Pipeline:
    """Features to principal components, fewer than asked for where there are fewer features or rows."""
    components = min(probe.components, *x.shape)
    return make_pipeline(StandardScaler(), PCA(components, svd_solver="full")).fit(x)


def _choose_alpha(x: Floats, y: Floats, probe: Probe, groups: NDArray[Any] | None) -> float:
    """The alpha with the best mean r over inner folds; the largest of equals."""
    if groups is None or len(np.unique(groups)) < 2:
        groups = np.arange(len(x)) * min(BLOCKS, len(x)) // len(x)
    total = np.zeros(len(probe.alphas))
    for _, train, held_out in leave_one_out(groups):
        if min(len(train), len(held_out)) < 2:
            continue
        reduction = _reduction(x[train], probe)
        z, z_held_out = reduction.transform(x[train]), reduction.transform(x[held_out])
        for i, alpha in enumerate(probe.alphas):
            predicted = Ridge(alpha).fit(z, y[train]).predict(z_held_out)
            total[i] += np.nan_to_num(mean_r(pearson(predicted.reshape(len(held_out), -1), y[held_out])))
    return max(zip(total.tolist(), probe.alphas, strict=True))[1]


def pearson(predicted: NDArray[Any], observed: NDArray[Any]) -> Floats:
    """Pearson's r of each column: two arrays [N, P] to float64 [P].

    NaN where the observed column is constant, as no prediction of it is right or wrong; 0 where only the
    predicted column is constant.

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
    """Columns that are not constant but for rounding."""
    span = values.max(0, initial=-np.inf) - values.min(0, initial=np.inf)
    varies: NDArray[np.bool_] = span > 1e-9 * np.abs(values).max(0, initial=0)
    return varies


def mean_r(per_gene: Floats) -> float:
    """Mean over the genes that have an r; NaN where none has."""
    defined = per_gene[~np.isnan(per_gene)]
    return float(defined.mean()) if defined.size else float("nan")


# --- folds --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Fold:
    """Rows to train on, rows held out, and the expression to predict.

    The panel is the fold's own: its genes are chosen from the training rows only.

    Attributes:
        name: of the section or patient that is held out.
        train: int64 [T], rows.
        held_out: int64 [H], rows.
        expression: float32 [N, P], log1p, of all rows.
        panel: gene of each column.
        groups: [N], the section or patient of each row, whichever is held out in turn.
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

    def held_out_sections(self) -> Iterator[NDArray[np.bool_]]:
        """For each held-out section: which of the held-out rows are of it."""
        sections = self.sections[self.held_out]
        for section in dict.fromkeys(sections.tolist()):
            yield sections == section


def leave_one_out(groups: Sequence[Any] | NDArray[Any]) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    """Each group of rows held out in turn: its name, the rows of all others, its own rows (int64).

    Raises:
        UsageError: fewer than two groups.
    """
    of = np.asarray(groups)
    names = list(dict.fromkeys(of.tolist()))
    if len(names) < 2:
        raise UsageError(f"all {len(of)} rows are of one group, {names}; allowed: two groups or more")
    for name in names:
        yield str(name), np.flatnonzero(of != name), np.flatnonzero(of == name)


def random_splits(names: Sequence[str], rows: int) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    """A random fifth of all rows held out, for each name anew, as `leave_one_out` gives it.

    The split of SEAL's in-domain probe (arXiv 2602.14177, its published code), whose seed is the number of
    the repeat.
    """
    for seed, name in enumerate(names):
        train, held_out = train_test_split(np.arange(rows), test_size=HELD_OUT, random_state=seed)
        yield name, np.sort(train), np.sort(held_out)


@dataclass(frozen=True, eq=False)
class FoldScore:
    """How well one fold's held-out rows were predicted.

    Attributes:
        fold: its name.
        per_gene: float64 [P], Pearson's r, NaN for genes that are constant in the held-out rows.
        panel: gene of each.
        predicted: float64 [H, P], of the held-out rows.
    """

    fold: str
    per_gene: Floats
    panel: tuple[str, ...]
    predicted: Floats

    @property
    def mean(self) -> float:
        """Over the genes that vary."""
        return mean_r(self.per_gene)

    @property
    def constant(self) -> int:
        """Number of genes without an r."""
        return int(np.isnan(self.per_gene).sum())

    def to_json(self) -> dict[str, float | None]:
        """Pearson's r by gene; None where it has none."""
        r = (None if np.isnan(value) else round(float(value), 6) for value in self.per_gene)
        return dict(zip(self.panel, r, strict=True))


def score_fold(embeddings: NDArray[Any], fold: Fold, probe: Probe = FIXED) -> FoldScore:
    """Fit to the embeddings [N, D] of the fold's training rows, predict the held-out ones.

    Raises:
        UsageError: as `fit_probe`.
    """
    if len(embeddings) != len(fold.expression):
        raise UsageError(
            f"embeddings are {len(embeddings)}, fold {fold.name} has {len(fold.expression)} rows; "
            "give one for each row"
        )
    train = fold.train
    fitted = fit_probe(embeddings[train], fold.expression[train], probe, fold.groups[train])
    x, y = _checked(embeddings[fold.held_out], fold.expression[fold.held_out])
    predicted = fitted.predict(x).reshape(y.shape)
    return FoldScore(fold.name, pearson(predicted, y), fold.panel, predicted)
