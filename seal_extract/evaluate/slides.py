"""Slide-level evaluation: heads trained on the features of slides predict a label of patients, fold by fold.

The protocol is Patho-Bench's (arXiv 2502.06750), see `slide_heads`. Each head of each fold is one file with
its weights and predictions, so that a run that was stopped continues. Encoders are compared on the same folds
and on the same resampled patients.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from seal_extract.encoders.build import pick_device
from seal_extract.errors import OutputError, UsageError
from seal_extract.evaluate.labels import Labels, find_slides
from seal_extract.evaluate.run import Log
from seal_extract.evaluate.slide_heads import COX, OF_CLASSES, SETTINGS, Bag, train_head
from seal_extract.evaluate.slide_metrics import BOOTSTRAPS, Figures, figures_of, resampled
from seal_extract.evaluate.table import Report, Row, Table
from seal_extract.features.store import SlideFeatures
from seal_extract.pooling.patient_level import EARLY, FUSIONS, check_same
from seal_extract.publish import publish
from seal_extract.run.provenance import first_difference

REPORT, HEADS = "slides", "heads"  # names of the files and of the folder of trained heads, see `names_of`
VERSION = 1  # raised whenever the same request gives other numbers than before
METADATA = "seal_extract"  # of a head's file: request, predictions and versions, as JSON
PERMUTED = "labels permuted"
SEED = 7  # Patho-Bench's
Array = NDArray[Any]


@dataclass(frozen=True)
class Contender:
    """An encoder with a head."""

    encoder: str
    head: str
    permuted: bool = False

    @property
    def name(self) -> str:
        """In tables."""
        return f"{self.encoder}, {self.head}" + (f", {PERMUTED}" if self.permuted else "")

    def file(self, heads: Path, fold: str) -> Path:
        """The head that was trained on a fold."""
        permuted = "-permuted" if self.permuted else ""
        return heads / self.encoder / f"{self.head}{permuted}-{fold}.safetensors"


@dataclass(frozen=True)
class Scores:
    """The figures of a contender.

    Attributes:
        folds: by figure, float64 [folds].
        resamples: by figure, the mean over folds of each resample of patients, float64 [B].
    """

    folds: Figures
    resamples: Figures

    def minus(self, other: Scores) -> Scores:
        """The paired difference, on the same resamples."""
        pairs = ((self.folds, other.folds), (self.resamples, other.resamples))
        return Scores(*({figure: mine[figure] - its[figure] for figure in mine} for mine, its in pairs))

    def interval(self, figure: str) -> tuple[float, float] | None:
        """The middle 95 % of the resamples; None where a fold has no such figure."""
        if np.isnan(self.folds[figure]).any():
            return None
        low, high = np.nanpercentile(self.resamples[figure], (2.5, 97.5))
        return float(low), float(high)


@dataclass(frozen=True, eq=False)
class Cohort:
    """What is evaluated, and what decides the heads.

    Attributes:
        labels: with samples and folds.
        bags: of each sample, by encoder.
        fusion: of a patient's slides.
        seed: of all that is drawn.
    """

    labels: Labels
    bags: Mapping[str, Sequence[Bag]]
    fusion: str
    seed: int


def evaluate_slides(
    labels: Labels,
    folders: Sequence[Path],
    out: Path,
    *,
    heads: Sequence[str] = (),
    fusion: str = EARLY,
    seed: int = SEED,
    device: str | None = None,
    overwrite: bool = False,
    log: Log = lambda what: None,
) -> Report:
    """Evaluate every encoder with every head; the first one again with permuted labels.

    Args:
        labels: from `read_labels`.
        folders: of finished runs, or parts of them; their encoders are compared, the first with each other.
        out: folder in which the heads are kept, ``OUT/heads-LABEL/ENCODER/HEAD-FOLD.safetensors``: the same
            command continues a run that was stopped.
        heads: of `OF_CLASSES`, or of `COX` for a survival; all of them by default.
        fusion: ``"early"`` makes one bag of a patient's slides, ``"late"`` averages their embeddings.
        seed: of the heads, the permutation and the resamples.
        device: for ABMIL and mean MIL; by default a GPU where there is one.
        overwrite: replace heads that were trained on something else.
        log: called with the name of each step.

    Raises:
        UsageError: a head does not fit the label; as `find_slides`; or a sample has no patches.
        OutputError: features cannot be read, or heads in ``out`` are of another request.
    """
    allowed = OF_CLASSES if labels.classes else tuple(COX)
    unknown = [head for head in heads if head not in allowed]
    if unknown or fusion not in FUSIONS:
        what = f"--heads has {unknown[0]!r}" if unknown else f"--patient-level is {fusion!r}"
        kind = "classes" if labels.classes else "survival"
        choice = f"for {kind} {', '.join(allowed)}" if unknown else ", ".join(FUSIONS)
        raise UsageError(f"{what}; allowed: {choice}")
    log("features")
    names = [slide for sample in labels.samples for slide in sample.slides]
    found = find_slides(folders, names)
    bags = {encoder: _bags(labels, features, fusion) for encoder, features in found.items()}
    cohort, on = Cohort(labels, bags, fusion, seed), pick_device(device)
    report_name, kept_in = names_of(labels.label)
    chosen = tuple(dict.fromkeys(heads)) or allowed
    contenders = [Contender(encoder, head) for head in chosen for encoder in bags]
    contenders += [Contender(next(iter(bags)), head, permuted=True) for head in chosen]
    scores, unsettled = {}, []
    patients = np.array([sample.patient for sample in labels.samples])
    for contender in contenders:
        tested = []
        for number, fold in enumerate(labels.folds):
            log(f"{contender.name}: {fold.name}")
            path = contender.file(out / kept_in, fold.name)
            predicted, settled = _fold(cohort, contender, number, path, on, overwrite)
            tested.append((labels.truth[fold.test], predicted, patients[fold.test]))
            unsettled += [] if settled else [f"{contender.name}, {fold.name}"]
        if all(len(fold.test) == 1 for fold in labels.folds):
            tested = [tuple(map(np.concatenate, zip(*tested, strict=True)))]  # type: ignore[list-item]
        scores[contender] = Scores(*resampled(tested, seed))
    remarks = list(labels.remarks)
    if unsettled:
        remarks.append(f"{len(unsettled)} heads had not settled, the first of {unsettled[0]}")
    tables = [_table(figure, labels, scores) for figure in figures_of(len(labels.classes))]
    report = Report(report_name, tables, _about(cohort, chosen), remarks)
    with publish(out / kept_in / "README.md") as part:
        part.write_text(_card(report), encoding="utf-8")
    return report


def names_of(label: str) -> tuple[str, str]:
    """The name of a label's files and of its folder of heads, so that one folder may hold several labels."""
    suffix = "" if label == "label" else f"-{re.sub(r'[^a-zA-Z0-9_.]', '_', label)}"
    return REPORT + suffix, HEADS + suffix


def _bags(labels: Labels, features: Sequence[SlideFeatures], fusion: str) -> list[Bag]:
    """The bag of each sample.

    Raises:
        UsageError: a sample has no patches, or slides that cannot be one bag.
    """
    left, made = iter(features), []
    for sample in labels.samples:
        slides = [next(left) for _ in sample.slides]
        parts = [slides] if fusion == EARLY else [[slide] for slide in slides]
        bag = Bag(tuple(map(tuple, parts)))
        if fusion == EARLY:
            check_same(sample.patient, slides)
        elif not all(bag.counts):  # a slide without patches has no part in the mean
            bag = Bag(tuple(part for part, count in zip(bag.parts, bag.counts, strict=True) if count))
        if not any(bag.counts):
            raise UsageError(f"{slides[0].path} has no patches; leave {sample.name} out of the labels")
        made.append(bag)
    return made


# --- one head on one fold -----------------------------------------------------------------------------


def _fold(
    cohort: Cohort, contender: Contender, number: int, path: Path, device: torch.device, overwrite: bool
) -> tuple[Array, bool]:
    """`Trained.predicted` and `Trained.settled`, read where the same request made them before."""
    labels, bags = cohort.labels, cohort.bags[contender.encoder]
    fold, truth = labels.folds[number], labels.truth
    train, test = fold.train, fold.test
    if contender.permuted:
        shuffled = np.random.default_rng([cohort.seed, number]).permutation(train)
        truth = truth.copy()
        truth[train] = truth[shuffled]
    slides = [slide for i in (*train, *test) for part in bags[i].parts for slide in part]
    request = {
        "version": VERSION,
        "head": contender.head,
        "settings": SETTINGS[contender.head],
        "seed": cohort.seed,
        "patient level": cohort.fusion,
        "classes": labels.classes,
        "training labels": _digest([(labels.samples[i].name, truth[i].tolist()) for i in train]),
        "test": [labels.samples[i].name for i in test],
        "features": _digest([(slide.path.stem, slide.provenance["request"]) for slide in slides]),
    }
    found = _read(path, request, overwrite)
    if found is None:
        of_train, of_test = ([bags[i] for i in side] for side in (train, test))
        trained = train_head(contender.head, of_train, truth[train], of_test, cohort.seed, device)
        found = {
            "request": request,
            "predicted": trained.predicted.tolist(),
            "settled": trained.settled,
            "versions": {"torch": torch.__version__, "scikit-learn": sklearn.__version__},
            "device": device.type,
        }
        with publish(path) as part:
            save_file(trained.tensors, part, {METADATA: json.dumps(found)})
    return np.array(found["predicted"]), found["settled"]


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read(path: Path, request: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """What the file of a head says; None if there is no file, or one that is to be replaced.

    Raises:
        OutputError: another request or another tool made it.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            found: dict[str, Any] = json.loads(file.metadata()[METADATA])
        difference = first_difference(found["request"], json.loads(json.dumps(request)))
    except (SafetensorError, OSError, TypeError, KeyError, ValueError):
        difference = "it is no head of this command"
    if difference is None:
        return found
    if overwrite:
        return None
    raise OutputError(
        f"{path} was made by another request ({difference}); type --overwrite to replace it, or another -o"
    )


# --- tables -------------------------------------------------------------------------------------------


def _table(figure: str, labels: Labels, scores: Mapping[Contender, Scores]) -> Table:
    """Contenders by folds, and the first encoder minus each other one with the same head."""
    rows, paired, first = [], [], next(iter(scores)).encoder
    for contender, found in scores.items():
        folds = tuple(found.folds[figure].tolist())
        rows.append(Row(contender.name, folds, interval=found.interval(figure)))
        if contender.encoder != first:
            difference = scores[Contender(first, contender.head)].minus(found)
            name = f"{first} minus {contender.encoder}, {contender.head}"
            folds = tuple(difference.folds[figure].tolist())
            paired.append(Row(name, folds, interval=difference.interval(figure)))
    tested = {labels.samples[i].patient for fold in labels.folds for i in fold.test}
    note = (
        f"Intervals are of {BOOTSTRAPS} resamples of {len(tested)} test patients, the same for all lines; "
        "heads are not trained again. Permuted: the training labels, in one order for each fold."
    )
    together = len(rows[0].values) < len(labels.folds)  # folds of one sample are scored as one
    columns = ("all folds",) if together else tuple(fold.name for fold in labels.folds)
    title = f"Slides, {labels.label}: {figure}"
    return Table(title, columns, tuple(rows), note, paired=tuple(paired))


def _about(cohort: Cohort, heads: Sequence[str]) -> dict[str, Any]:
    labels = cohort.labels
    truth = labels.truth
    kinds = {name: int((truth == i).sum()) for i, name in enumerate(labels.classes)}
    return {
        "protocol": "Patho-Bench",
        "label": labels.label,
        "classes": kinds or {"event": int(truth[:, 1].sum()), "censored": int((truth[:, 1] == 0).sum())},
        "samples": len(labels.samples),
        "patients": len({sample.patient for sample in labels.samples}),
        "slides": sum(len(sample.slides) for sample in labels.samples),
        "folds": {fold.name: {"train": len(fold.train), "test": len(fold.test)} for fold in labels.folds},
        "encoders": {
            name: of[0].parts[0][0].provenance["request"].get("encoder") for name, of in cohort.bags.items()
        },
        "heads": {head: SETTINGS[head] for head in heads},
        "patient level": cohort.fusion,
        "seed": cohort.seed,
        "bootstraps": BOOTSTRAPS,
    }


def _card(report: Report) -> str:
    """The model card of the heads of a run."""
    about = report.about
    facts = {
        "label": about["label"],
        "classes, in the order of the probabilities": _listed(about["classes"]),
        "trained on": f"{about['patients']} patients, {about['slides']} slides; for each file, its fold",
        "features of": ", ".join(about["encoders"]),
        "a patient's slides": {"early": "one bag", "late": "mean of their embeddings"}[
            about["patient level"]
        ],
        "protocol": "Patho-Bench (arXiv 2502.06750)",
        "seed": about["seed"],
        **{head: _listed(settings) for head, settings in about["heads"].items()},
    }
    table = "".join(f"| {what} | {value} |\n" for what, value in facts.items())
    encoder, head, fold = (next(iter(about[what])) for what in ("encoders", "heads", "folds"))
    path = f"{names_of(about['label'])[1]}/{encoder}/{head}-{fold}.safetensors"
    return (
        f"# Heads that predict {about['label']} from slides\n\nThey were trained to compare encoders, each "
        "on a part of one cohort, and were not tested on another: they are not for diagnosis.\n\n"
        f"| | |\n|---|---|\n{table}\n## Use\n\nABMIL and mean MIL have the tensors of Patho-Bench's "
        "TrainableSlideEncoder, a linear probe has those of an attention model with equal attention for all "
        "patches. Cox has its coefficients only, for the mean of all patches.\n\n"
        f"```bash\nseal-extract slides/ -o out --encoder {encoder} --slide-level {path}\n```\n\n"
        f'```python\nfrom safetensors.torch import load_file\n\nstate_dict = load_file("{path}")\n```\n\n'
        f"## Figures\n\n{report.to_markdown()}"
    )


def _listed(facts: Mapping[str, Any]) -> str:
    return "; ".join(f"{what}: {value}" for what, value in facts.items())
