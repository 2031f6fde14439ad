"""Classes of spots, such as cortical layers, predicted from embeddings: donors are left out in turn.

The linear probe is a multinomial logistic regression on standardised embeddings, with the settings of
Patho-Bench's (C 0.5, balanced classes). The clusters are those of k-means within each section.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, balanced_accuracy_score, confusion_matrix, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from seal_extract.encoders.request import EncoderRequest
from seal_extract.errors import UsageError
from seal_extract.evaluate.expression import leave_one_out, random_splits
from seal_extract.evaluate.handcrafted import handcrafted_features
from seal_extract.evaluate.run import HANDCRAFTED, REPEATS, Log, embed, name_of, sections_seen
from seal_extract.evaluate.table import Report, Row, Table
from seal_extract.train.pairs import make_pairs
from seal_extract.train.sections import Section

REPORT = "spot_classes"  # name of its files
BY = ("donor", "section")
C, STEPS = 0.5, 2000
RESTARTS, SEED = 10, 0  # of k-means; the seed is also that of permuted labels
Array = NDArray[Any]
Split = tuple[str, Array, Array]  # name, rows to train on, rows held out


@dataclass(frozen=True, eq=False)
class Spots:
    """All spots that have a class.

    Attributes:
        labels: [N], class of each.
        sections: [N], name of the section.
        donors: [N].
        embeddings: by contender, float32 [N, D].
    """

    labels: Array
    sections: Array
    donors: Array
    embeddings: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """How well the classes of a split's held-out spots were predicted.

    Attributes:
        balanced_accuracy: mean over the classes there of the share that was found.
        weighted_f1: F1 of each class, weighted by its spots.
        confusion: int64 [K, K], true by predicted class.
    """

    balanced_accuracy: float
    weighted_f1: float
    confusion: Array


def score_split(embeddings: Array, labels: Array, split: Split) -> Score:
    """Fit the linear probe to the rows to train on, and predict the classes of the held-out rows.

    Args:
        embeddings: [N, D].
        labels: [N].
        split: its rows.
    """
    _, train, held_out = split
    regression = LogisticRegression(C=C, class_weight="balanced", max_iter=STEPS)
    probe = make_pipeline(StandardScaler(), regression).fit(embeddings[train], labels[train])
    true, predicted = labels[held_out], probe.predict(embeddings[held_out])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of predicted classes that the held-out rows do not have
        balanced = balanced_accuracy_score(true, predicted)
    return Score(
        float(balanced),
        float(f1_score(true, predicted, average="weighted", zero_division=0)),
        confusion_matrix(true, predicted, labels=np.unique(labels)),
    )


def cluster_ari(embeddings: Array, labels: Array) -> float:
    """Adjusted Rand index between the classes of one section and k-means with as many clusters.

    Args:
        embeddings: [N, D]; standardised before they are clustered.
        labels: [N].

    Returns:
        0 by chance, 1 for the same groups; NaN for a section of one class.
    """
    k = len(np.unique(labels))
    if k < 2:
        return float("nan")
    means = KMeans(k, n_init=RESTARTS, random_state=SEED)
    return float(adjusted_rand_score(labels, means.fit_predict(StandardScaler().fit_transform(embeddings))))


def evaluate_spots(
    sections: Sequence[Section],
    encoder: EncoderRequest,
    base: EncoderRequest | None = None,
    *,
    by: str = "donor",
    patch_px: int = 224,
    mpp: float = 0.5,
    batch_size: int = 64,
    log: Log = lambda what: None,
) -> Report:
    """Compare an encoder with its base, handcrafted features and permuted labels on classes of spots.

    Args:
        sections: with ``labels``; the patient of a section is the donor.
        encoder: a name or folder.
        base: the encoder before alignment.
        by: ``"donor"`` or ``"section"``: what is left out in turn.
        patch_px: side of the patches.
        mpp: µm/px of the patches.
        batch_size: patches per forward pass.
        log: called with the name of each step.

    Raises:
        UsageError: sections without labels, one class only, or one donor only.
        EncoderError: encoders that cannot be loaded.
        SlideError: slides that cannot be read.
    """
    if by not in BY:
        raise UsageError(f"--by is {by!r}; allowed: {', '.join(BY)}")
    _check(sections, by)
    requests = {name_of(encoder): encoder}
    if base is not None:
        requests[f"{name_of(base)}, before alignment"] = base
    spots = _embedded(sections, requests, patch_px, mpp, batch_size, log)
    groups = spots.donors if by == "donor" else spots.sections
    left_out = list(leave_one_out(groups))
    at_random = list(random_splits([f"random {i + 1}" for i in range(REPEATS)], len(groups)))
    remarks = _remarks(sections, requests, by, spots, left_out)
    made, details = [], {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        for title, splits, unit in (
            (f"leave one {by} out", left_out, by),
            ("random split over spots", at_random, ""),
        ):
            log(title)
            scores = {name: _scores(rows, spots, splits) for name, rows in spots.embeddings.items()}
            first = next(iter(scores))
            scores[f"{first}, labels permuted"] = _scores(spots.embeddings[first], spots, splits, SEED)
            made += _tables(title, splits, scores, unit)
            details[title] = {name: [s.confusion.tolist() for s in found] for name, found in scores.items()}
    if caught:
        remarks.append(f"{len(caught)} of the probes had not converged after {STEPS} steps")
    log("clusters")
    made.append(_cluster_table(spots))
    about = {
        "by": by,
        "classes": {str(label): count for label, count in sorted(Counter(spots.labels.tolist()).items())},
        "sections": {
            s.name: {"donor": s.patient, "spots": int((spots.sections == s.name).sum())} for s in sections
        },
        "probe": f"standardised embeddings, logistic regression, C {C}, balanced classes",
        "clusters": f"standardised embeddings, k-means, {RESTARTS} restarts, seed {SEED}",
        "patch_px": patch_px,
        "mpp": mpp,
        "encoder": os.fspath(encoder.name_or_path),
        "base": None if base is None else os.fspath(base.name_or_path),
    }
    return Report(REPORT, made, about, remarks, {"confusion_true_by_predicted": details})


def _check(sections: Sequence[Section], by: str) -> None:
    """Refuse what can be known to be too little before a slide is opened."""
    without = [s.name for s in sections if s.labels is None or not any(s.labels)]
    if without:
        raise UsageError(
            f"{without[0]} has no classes of spots; type --label COLUMN of the AnnData's obs, or "
            "label_column in the configuration"
        )
    classes = {label for s in sections for label in s.labels or () if label}
    if len(classes) < 2:
        raise UsageError(f"all spots are of one class, {classes.pop()}; allowed: two classes or more")
    groups = {s.patient if by == "donor" else s.name for s in sections}
    if len(groups) < 2:
        more = "; type --by section to leave out sections" if by == "donor" and len(sections) > 1 else ""
        raise UsageError(f"all sections are of one {by}, {groups.pop()}; allowed: two or more{more}")


def _remarks(
    sections: Sequence[Section],
    requests: Mapping[str, EncoderRequest],
    by: str,
    spots: Spots,
    left_out: Sequence[Split],
) -> list[str]:
    """What weakens the numbers.

    Raises:
        UsageError: the rows to train on are of one class.
    """
    remarks = [
        f"{name} saw {', '.join(sorted(seen))} in training; its numbers are too high"
        for name, request in requests.items()
        if (seen := sections_seen(request.name_or_path) & {s.name for s in sections})
    ]
    if by == "donor" and all(s.patient == s.name for s in sections):
        remarks.append(
            "No file states donors, so that each section counts as one. Sections of one donor look alike: "
            "name the column of donors by --donor"
        )
    for name, train, held_out in left_out:
        known = set(spots.labels[train])
        if len(known) < 2:
            raise UsageError(f"without {by} {name} all spots are of one class, {known.pop()}; allowed: two")
        unseen = sorted(set(spots.labels[held_out]) - known)
        if unseen:
            remarks.append(
                f"Only {by} {name} has the class {', '.join(unseen)}: it cannot be predicted there"
            )
    return remarks


def _embedded(
    sections: Sequence[Section],
    requests: Mapping[str, EncoderRequest],
    patch_px: int,
    mpp: float,
    batch_size: int,
    log: Log,
) -> Spots:
    """The spots that have a class and a patch; the patches of one section at a time are in memory."""
    encoders = {name: request.load() for name, request in requests.items()}
    labels, names, donors = [], [], []
    embeddings: dict[str, list[Array]] = {name: [] for name in (*encoders, HANDCRAFTED)}
    for section in sections:
        log(f"embedding {section.name}")
        assert section.labels is not None
        labelled = np.flatnonzero([bool(label) for label in section.labels])
        pairs = make_pairs([section.take(labelled)], (), patch_px, mpp)
        labels += [section.labels[row] for row in labelled[pairs.row]]
        names += [section.name] * len(pairs)
        donors += [section.patient] * len(pairs)
        for name, encoder in encoders.items():
            embeddings[name].append(embed(encoder, pairs.patches, batch_size))
        embeddings[HANDCRAFTED].append(handcrafted_features(pairs.patches))
    joined = {name: np.concatenate(parts) for name, parts in embeddings.items()}
    return Spots(np.array(labels), np.array(names), np.array(donors), joined)


def _scores(
    embeddings: Array, spots: Spots, splits: Sequence[Split], permute: int | None = None
) -> list[Score]:
    """The score of each split; with a seed, the training rows' labels are shuffled within their sections."""
    scores = []
    for split in splits:
        labels, train = spots.labels.copy(), split[1]
        if permute is not None:
            rng = np.random.default_rng(permute)
            for section in np.unique(spots.sections[train]):
                rows = train[spots.sections[train] == section]
                labels[rows] = rng.permutation(labels[rows])
        scores.append(score_split(embeddings, labels, split))
    return scores


def _tables(
    title: str, splits: Sequence[Split], scores: Mapping[str, Sequence[Score]], unit: str
) -> list[Table]:
    """A table of each figure: contenders by splits; random splits are not independent: no unit."""
    note = "" if unit else "Neighbouring spots are on both sides of a split."
    columns = tuple(name for name, _, _ in splits)
    made = []
    for figure in ("balanced accuracy", "weighted F1"):
        values = figure.replace(" ", "_").lower()
        rows = [Row(name, tuple(getattr(s, values) for s in found)) for name, found in scores.items()]
        made.append(Table(f"Classes of spots, {title}: {figure}", columns, tuple(rows), note, unit=unit))
    return made


def _cluster_table(spots: Spots) -> Table:
    """The agreement of clusters with the classes within each section."""
    names = tuple(dict.fromkeys(spots.sections.tolist()))
    rows = [
        Row(
            name, tuple(cluster_ari(x[spots.sections == s], spots.labels[spots.sections == s]) for s in names)
        )
        for name, x in spots.embeddings.items()
    ]
    note = "k-means within a section, as many clusters as classes; 0 is chance, 1 the classes themselves."
    return Table("Classes of spots: ARI of clusters", names, tuple(rows), note, unit="section")
