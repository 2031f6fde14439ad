"""Encoders and handcrafted features compared on the same folds, and with their rows permuted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError
from seal_extract.evaluate.expression import FIXED, TUNED, Fold, FoldScore, Probe, score_fold
from seal_extract.evaluate.table import Row, Table

KS = (1, 5, 10)  # numbers of first results for the recall
SEEDS = 10  # one permutation reaches ±0.07: genes vary together, and r with them
Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Embeddings:
    """All rows, embedded by one encoder.

    Attributes:
        images: [N, D], of the patches.
        expression: [N, E], of the spots' expression, in a space shared with ``aligned``; None without one.
        aligned: [N, E], the images in that space; None where it is that of ``images``.
    """

    images: Array
    expression: Array | None = None
    aligned: Array | None = None


@dataclass(frozen=True, eq=False)
class Comparison:
    """The scores of all contenders.

    Attributes:
        folds: names, in order.
        permuted_name: the contender whose rows were permuted.
        scores: by contender and probe, in the order of the folds.
        permuted: r with permuted rows by probe, float64 [seeds, folds].
        predicted_retrieval: by contender; for each fold, a `Retrieval` for each held-out section, through
            the expression that the last probe predicts.
        joint_retrieval: the same through embeddings of one space, for contenders that have them.
    """

    folds: tuple[str, ...]
    permuted_name: str
    scores: dict[tuple[str, str], list[FoldScore]] = field(default_factory=dict)
    permuted: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    predicted_retrieval: dict[str, list[list[Retrieval]]] = field(default_factory=dict)
    joint_retrieval: dict[str, list[list[Retrieval]]] = field(default_factory=dict)

    def mean(self, name: str, probe: Probe = FIXED) -> float:
        """Mean over the folds of the mean over genes."""
        return float(np.mean([score.mean for score in self.scores[name, probe.name]]))


def compare(
    contenders: Mapping[str, Mapping[str, Embeddings]],
    folds: Sequence[Fold],
    *,
    probes: Sequence[Probe] = (FIXED, TUNED),
    seeds: int = SEEDS,
) -> Comparison:
    """Score every contender on every fold by every probe; permute the rows of the first one.

    Args:
        contenders: by its name in tables, an encoder or handcrafted features, with the embeddings for each
            fold by the fold's name; the encoder first, then what it is compared with.
        folds: each with its own panel.
        probes: ways to predict expression.
        seeds: permutations of each fold.

    Raises:
        UsageError: as `score_fold`.
    """
    first = next(iter(contenders))
    found = Comparison(tuple(fold.name for fold in folds), first)
    for name, embeddings in contenders.items():
        for probe in probes:
            scores = [score_fold(embeddings[fold.name].images, fold, probe) for fold in folds]
            found.scores[name, probe.name] = scores
        found.predicted_retrieval[name] = [
            _retrieve_predicted(score, fold) for score, fold in zip(scores, folds, strict=True)
        ]
        if embeddings[folds[0].name].expression is not None:
            found.joint_retrieval[name] = [_retrieve_joint(embeddings[fold.name], fold) for fold in folds]
    for probe in probes:
        r = np.empty((seeds, len(folds)))
        for seed in range(seeds):
            for column, fold in enumerate(folds):
                images = permuted_rows(contenders[first][fold.name].images, fold, seed)
                r[seed, column] = score_fold(images, fold, probe).mean
        found.permuted[probe.name] = r
    return found


def permuted_rows(images: Array, fold: Fold, seed: int) -> Array:
    """[N, D] with the training rows shuffled within their sections; held-out rows stay.

    A section keeps its own mean, so that the remaining r is explained neither by chance nor by the section.
    """
    rng = np.random.default_rng(seed)
    order = np.arange(len(images))
    for section in np.unique(fold.sections[fold.train]):
        rows = fold.train[fold.sections[fold.train] == section]
        order[rows] = rng.permutation(rows)
    return images[order]


def _retrieve_predicted(score: FoldScore, fold: Fold) -> list[Retrieval]:
    """Predicted against measured expression, both standardised by the training rows."""
    train = np.asarray(fold.expression[fold.train], np.float64)
    mean, sd = train.mean(0), train.std(0)
    sd = np.where(sd > 0, sd, 1.0)
    predicted, observed = (score.predicted - mean) / sd, (fold.expression[fold.held_out] - mean) / sd
    return [retrieve(predicted[rows], observed[rows]) for rows in fold.held_out_sections()]


def _retrieve_joint(embeddings: Embeddings, fold: Fold) -> list[Retrieval]:
    images = embeddings.images if embeddings.aligned is None else embeddings.aligned
    assert embeddings.expression is not None
    images, expression = images[fold.held_out], embeddings.expression[fold.held_out]
    return [retrieve(images[rows], expression[rows]) for rows in fold.held_out_sections()]


# --- retrieval ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """Ranks of the queries' own partners, in one direction.

    Attributes:
        recall: by k, the share of queries whose partner is among the first k.
        median_rank: 1 is the best.
    """

    recall: dict[int, float]
    median_rank: float


@dataclass(frozen=True)
class Retrieval:
    """Both directions within one section, and a random order.

    Attributes:
        to_expression: an image is the query, expression is ranked.
        to_image: expression is the query, images are ranked.
        chance: of a random order: recall k / N, median rank (N + 1) / 2.
    """

    to_expression: Ranks
    to_image: Ranks
    chance: Ranks


def retrieve(images: NDArray[Any], expression: NDArray[Any], ks: Sequence[int] = KS) -> Retrieval:
    """Rank the spots of one section by cosine similarity, from image to expression and back.

    As SEAL (arXiv 2602.14177) and CLIP (arXiv 2103.00020): is a spot's own expression among the most similar?
    Spots of equal similarity share the mean of their ranks, so that constant embeddings rank in the middle,
    not first.

    Args:
        images: [N, D], a row per spot.
        expression: [N, D], in the same space.
        ks: numbers of first results for the recall.

    Raises:
        UsageError: shapes that do not fit, NaN or infinity, or a k below 1.
    """
    a, b = np.asarray(images, np.float64), np.asarray(expression, np.float64)
    if a.shape != b.shape or a.ndim != 2 or not a.size or not ks or min(ks) < 1:
        raise UsageError(
            f"images are {list(a.shape)}, expression is {list(b.shape)}, ks are {tuple(ks)}; "
            "allowed: the same [N, D] of both, k of 1 or more"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UsageError("images or expression hold NaN or infinity; allowed: finite embeddings")
    similarity = _unit(a) @ _unit(b).T  # [N, N]
    n = len(a)
    chance = Ranks({k: min(k, n) / n for k in ks}, (n + 1) / 2)
    return Retrieval(_ranks(similarity, ks), _ranks(similarity.T, ks), chance)


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float64] = rows / np.where(length > 0, length, 1.0)
    return unit


def _ranks(similarity: NDArray[np.float64], ks: Sequence[int]) -> Ranks:
    own = np.diagonal(similarity)[:, None]
    above = (similarity > own + 1e-12).sum(1)
    equal = (np.abs(similarity - own) <= 1e-12).sum(1) - 1
    ranks = 1 + above + equal / 2  # [N]
    return Ranks({k: float((ranks <= k).mean()) for k in ks}, float(np.median(ranks)))


# --- tables -------------------------------------------------------------------------------------------


def tables(found: Comparison, unit: str = "") -> list[Table]:
    """Expression by each probe, then retrieval: through the predicted expression, and in the joint space.

    Args:
        found: the scores.
        unit: what is held out in turn; empty for random splits, which are not independent of each other.
    """
    made = [_expression(found, probe, unit) for probe in found.permuted]
    for where, retrieval in (
        ("through predicted expression", found.predicted_retrieval),
        ("in the space of the alignment", found.joint_retrieval),
    ):
        if not retrieval:
            continue
        for k in KS:
            made.append(_retrieval(found, retrieval, f"Recall at {k}, {where}", lambda r, k=k: r.recall[k]))  # type: ignore[misc]
        made.append(_retrieval(found, retrieval, f"Median rank, {where}", lambda r: r.median_rank))
    return made


def _expression(found: Comparison, probe: str, unit: str) -> Table:
    scores = {name: folds for (name, by), folds in found.scores.items() if by == probe}
    rows = [Row(name, tuple(score.mean for score in folds)) for name, folds in scores.items()]
    permuted = found.permuted[probe]
    spread = tuple(permuted.std(0, ddof=1)) if len(permuted) > 1 else None
    rows.insert(1, Row(f"{found.permuted_name}, rows permuted", tuple(permuted.mean(0)), spread))
    folds = next(iter(scores.values()))
    constant = [f"{score.fold} {score.constant}" for score in folds if score.constant]
    note = (
        f"Mean over {len(folds[0].panel)} genes, without those that are constant in the held-out rows and "
        f"have no r ({', '.join(constant) or 'none'}). Rows permuted: mean ± sd of {len(permuted)} orders."
    )
    return Table(f"Pearson r of predicted expression, {probe}", found.folds, tuple(rows), note, unit=unit)


def _retrieval(
    found: Comparison,
    retrievals: dict[str, list[list[Retrieval]]],
    title: str,
    number: Callable[[Ranks], float],
) -> Table:
    """Both directions of each contender, and chance; a fold of several sections has their mean."""
    rows = []
    for name, folds in retrievals.items():
        rows += [
            Row(f"{name}, image to expression", _means(folds, number, "to_expression")),
            Row(f"{name}, expression to image", _means(folds, number, "to_image")),
        ]
    rows.append(Row("chance", _means(folds, number, "chance")))
    return Table(title, found.folds, tuple(rows), "Within a section.")


def _means(
    folds: list[list[Retrieval]], number: Callable[[Ranks], float], direction: str
) -> tuple[float, ...]:
    """Of each fold, over its sections."""
    return tuple(float(np.mean([number(getattr(r, direction)) for r in sections])) for sections in folds)
