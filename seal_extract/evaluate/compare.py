"""Lines of a comparison over the same folds: encoders, hand-made features, and rows permuted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError
from seal_extract.evaluate.expression import HEST, TUNED, Fold, FoldScore, Probe, score_fold
from seal_extract.evaluate.retrieval import Retrieval, retrieve

SEEDS = 10  # one permutation reaches ±0.07: genes vary together, so r does too


@dataclass(frozen=True, eq=False)
class Line:
    """One row of the table.

    Attributes:
        name: as it is printed.
        embeddings: [N, D] of all rows; or one such array for each fold, by its name, where the encoder was
            trained for the fold.
        expression: embeddings of the expression in the same space, [N, D], given in the same way: the encoder
            was aligned with them, and retrieval is asked for.
        aligned: the images in that space, where a projection head brings them there; else the embeddings.
    """

    name: str
    embeddings: NDArray[Any] | Mapping[str, NDArray[Any]]
    expression: NDArray[Any] | Mapping[str, NDArray[Any]] | None = None
    aligned: NDArray[Any] | Mapping[str, NDArray[Any]] | None = None

    def of(self, fold: str) -> NDArray[Any]:
        """The embeddings for a fold."""
        return _of(self.embeddings, fold, self.name)

    def expression_of(self, fold: str) -> NDArray[Any] | None:
        """The expression's embeddings for a fold."""
        return None if self.expression is None else _of(self.expression, fold, self.name)

    def aligned_of(self, fold: str) -> NDArray[Any]:
        """The images in the space of the expression, for a fold."""
        return _of(self.embeddings if self.aligned is None else self.aligned, fold, self.name)


def _of(given: NDArray[Any] | Mapping[str, NDArray[Any]], fold: str, name: str) -> NDArray[Any]:
    if not isinstance(given, Mapping):
        return given
    if fold not in given:
        raise UsageError(f"{name} has no embeddings for fold {fold}; it has those for {', '.join(given)}")
    return given[fold]


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` found.

    Attributes:
        folds: names, in order.
        scores: of each line by each probe, in the order of the folds.
        permuted: r of the permuted line by each probe, float64 [seeds, folds].
        permuted_name: the line whose rows were permuted.
        predicted_retrieval: by the expression that the last probe predicts; for each line and fold, a
            `Retrieval` for each held-out section.
        joint_retrieval: by embeddings of one space, of the lines that have them.
    """

    folds: tuple[str, ...]
    permuted_name: str
    scores: dict[tuple[str, str], list[FoldScore]] = field(default_factory=dict)
    permuted: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    predicted_retrieval: dict[str, list[list[Retrieval]]] = field(default_factory=dict)
    joint_retrieval: dict[str, list[list[Retrieval]]] = field(default_factory=dict)

    def mean(self, line: str, probe: Probe = HEST) -> float:
        """Mean over the folds of the mean over genes."""
        return float(np.mean([score.mean for score in self.scores[line, probe.name]]))


def compare(
    lines: Sequence[Line],
    folds: Sequence[Fold],
    *,
    probes: Sequence[Probe] = (HEST, TUNED),
    seeds: int = SEEDS,
) -> Comparison:
    """Score every line on every fold by every probe; permute the rows of the first line.

    Args:
        lines: the encoder first, then what it is held against.
        folds: each with its own panel.
        probes: ways to predict expression.
        seeds: permutations of each fold.

    Raises:
        UsageError: no line, no fold, two of one name, or as `score_fold`.
    """
    for what, names in (("lines", [line.name for line in lines]), ("folds", [fold.name for fold in folds])):
        if not names or len(set(names)) != len(names):
            raise UsageError(f"{what} are {names}; allowed: one or more, each of another name")
    found = Comparison(tuple(fold.name for fold in folds), lines[0].name)
    for line in lines:
        for probe in probes:
            found.scores[line.name, probe.name] = [score_fold(line.of(f.name), f, probe) for f in folds]
        last = found.scores[line.name, probes[-1].name]
        found.predicted_retrieval[line.name] = [
            _retrieve_predicted(score, fold) for score, fold in zip(last, folds, strict=True)
        ]
        if line.expression is not None:
            found.joint_retrieval[line.name] = [_retrieve_joint(line, fold) for fold in folds]
    for probe in probes:
        found.permuted[probe.name] = _permuted(lines[0], folds, probe, seeds)
    return found


def _permuted(line: Line, folds: Sequence[Fold], probe: Probe, seeds: int) -> NDArray[np.float64]:
    """Mean r with the training rows shuffled within their sections, [seeds, folds].

    A section keeps its own mean, so that what is left is what neither chance nor the section explains.
    """
    scores = np.empty((seeds, len(folds)))
    for seed in range(seeds):
        for column, fold in enumerate(folds):
            embeddings = permuted_rows(line.of(fold.name), fold, seed)
            scores[seed, column] = score_fold(embeddings, fold, probe).mean
    return scores


def permuted_rows(embeddings: NDArray[Any], fold: Fold, seed: int) -> NDArray[Any]:
    """[N, D] with each section's training rows in another order; held-out rows stay."""
    rng = np.random.default_rng(seed)
    order = np.arange(len(embeddings))
    for section in np.unique(fold.sections[fold.train]):
        rows = fold.train[fold.sections[fold.train] == section]
        order[rows] = rng.permutation(rows)
    return embeddings[order]


def _retrieve_predicted(score: FoldScore, fold: Fold) -> list[Retrieval]:
    """Predicted against measured expression, both standardised by the training rows."""
    train = np.asarray(fold.expression[fold.train], np.float64)
    mean, sd = train.mean(0), train.std(0)
    sd = np.where(sd > 0, sd, 1.0)
    predicted, observed = (score.predicted - mean) / sd, (fold.expression[fold.held_out] - mean) / sd
    return [retrieve(predicted[rows], observed[rows]) for rows in _sections(fold)]


def _retrieve_joint(line: Line, fold: Fold) -> list[Retrieval]:
    images, expression = line.aligned_of(fold.name)[fold.held_out], line.expression_of(fold.name)
    assert expression is not None
    return [retrieve(images[rows], expression[fold.held_out][rows]) for rows in _sections(fold)]


def _sections(fold: Fold) -> Iterator[NDArray[np.bool_]]:
    """Rows of each held-out section, among the held-out rows."""
    of = fold.sections[fold.held_out]
    for section in dict.fromkeys(of.tolist()):
        yield of == section
