"""Encoders and handcrafted features compared on the same folds, and with their rows permuted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError
from seal_extract.evaluate.expression import HEST, TUNED, Fold, FoldScore, Probe, score_fold
from seal_extract.evaluate.retrieval import Retrieval, retrieve

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
class Contender:
    """What is compared: an encoder, or handcrafted features.

    Attributes:
        name: in tables.
        embeddings: of all folds; or of each fold by its name, where an encoder was trained for each.
    """

    name: str
    embeddings: Embeddings | Mapping[str, Embeddings]

    def of(self, fold: str) -> Embeddings:
        """The embeddings for a fold."""
        if isinstance(self.embeddings, Embeddings):
            return self.embeddings
        if fold not in self.embeddings:
            known = ", ".join(self.embeddings)
            raise UsageError(f"{self.name} has no embeddings for fold {fold}; it has those for {known}")
        return self.embeddings[fold]


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

    def mean(self, name: str, probe: Probe = HEST) -> float:
        """Mean over the folds of the mean over genes."""
        return float(np.mean([score.mean for score in self.scores[name, probe.name]]))


def compare(
    contenders: Sequence[Contender],
    folds: Sequence[Fold],
    *,
    probes: Sequence[Probe] = (HEST, TUNED),
    seeds: int = SEEDS,
) -> Comparison:
    """Score every contender on every fold by every probe; permute the rows of the first one.

    Args:
        contenders: the encoder first, then what it is compared with.
        folds: each with its own panel.
        probes: ways to predict expression.
        seeds: permutations of each fold.

    Raises:
        UsageError: no contender, no fold, two of one name, or as `score_fold`.
    """
    for what, names in (("contenders", [c.name for c in contenders]), ("folds", [f.name for f in folds])):
        if not names or len(set(names)) != len(names):
            raise UsageError(f"{what} are {names}; allowed: one or more, each of another name")
    found = Comparison(tuple(fold.name for fold in folds), contenders[0].name)
    for one in contenders:
        for probe in probes:
            scores = [score_fold(one.of(fold.name).images, fold, probe) for fold in folds]
            found.scores[one.name, probe.name] = scores
        found.predicted_retrieval[one.name] = [
            _retrieve_predicted(score, fold) for score, fold in zip(scores, folds, strict=True)
        ]
        if one.of(folds[0].name).expression is not None:
            found.joint_retrieval[one.name] = [_retrieve_joint(one.of(fold.name), fold) for fold in folds]
    for probe in probes:
        r = np.empty((seeds, len(folds)))
        for seed in range(seeds):
            for column, fold in enumerate(folds):
                images = permuted_rows(contenders[0].of(fold.name).images, fold, seed)
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
