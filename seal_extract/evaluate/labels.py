"""The labels of slides and patients, the folds that they are evaluated on, and the features of the slides.

The table is Patho-Bench's (``case_id``, ``slide_id``, label, ``fold_0`` and so on with train, val and test)
or CLAM's dataset file, whose folds are in a folder of ``splits_0.csv`` and so on. A patient is on one side of
a fold, always.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from seal_extract.errors import UsageError
from seal_extract.features.store import SlideFeatures, list_features
from seal_extract.slides.listing import read_rows, refuse_repeated

PATIENT, SLIDE = BY = ("patient", "slide")
SIDES = ("train", "val", "test")
Array = NDArray[Any]


@dataclass(frozen=True)
class Sample:
    """What has one label and one prediction: a patient, or a slide.

    Attributes:
        name: of the patient or slide.
        patient: that it is of.
        slides: their names.
        label: the class; empty where the label is a survival.
        time: until the event, or until nothing more is known; NaN where the label is a class.
        event: whether it has happened by then.
    """

    name: str
    patient: str
    slides: tuple[str, ...]
    label: str = ""
    time: float = float("nan")
    event: bool = False


@dataclass(frozen=True, eq=False)
class LabelFold:
    """A fold of samples.

    Attributes:
        name: in tables and of files.
        train: int64, samples.
        test: int64, samples.
    """

    name: str
    train: Array
    test: Array


@dataclass(frozen=True, eq=False)
class Labels:
    """What `read_labels` gives.

    Attributes:
        label: the column of the class, or of the time.
        samples: in the order of the table.
        folds: at least one.
        remarks: what was left out.
    """

    label: str
    samples: tuple[Sample, ...]
    folds: tuple[LabelFold, ...]
    remarks: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """In order: of numbers where all are numbers, else of the alphabet; none where it is a survival."""
        found = {sample.label for sample in self.samples} - {""}
        as_number: Callable[[str], Any] = float if all(map(_is_number, found)) else str
        return tuple(sorted(found, key=lambda label: (as_number(label), label)))

    @property
    def truth(self) -> Array:
        """int64 [N], the class of each sample; or float64 [N, 2], its time and event."""
        classes = self.classes
        if not classes:
            return np.array([(sample.time, sample.event) for sample in self.samples], np.float64)
        return np.array([classes.index(sample.label) for sample in self.samples])


def read_labels(
    path: Path,
    label: str,
    *,
    event: str | None = None,
    by: str = PATIENT,
    splits: Path | None = None,
    folds: int = 5,
    seed: int = 7,
) -> Labels:
    """Read the table of labels, and its folds; without any, patients are split into stratified folds.

    Args:
        path: CSV, or TSV by its suffix. Columns: ``slide_id`` or ``slide``, ``case_id`` (the patient; without
            it, each slide is one), the label, and folds: ``fold_0``, ``fold_1``, ..., or ``split``, each with
            train, val and test; or ``fold`` with the fold in which a patient is tested. Samples of val are
            left out of that fold, as in Patho-Bench, which takes the last checkpoint. A row without
            label is left out.
        label: the column of the class; with ``event``, of the time.
        event: the column of the event, 1 or 0 where the time is censored.
        by: whether a label is of a patient with all slides, or of a slide.
        splits: CLAM's folder of ``splits_0.csv`` and so on, with names of slides under train, val, test.
        folds: number of folds where none are given.
        seed: of those.

    Raises:
        UsageError: columns or values are missing or wrong, there is one class, a patient has two labels or
            is on both sides of a fold, or there are fewer patients of a class than folds.
    """
    if by not in BY:
        raise UsageError(f"--by is {by!r}; allowed: {', '.join(BY)}")
    rows = _rows(path)
    named = "slide_id" if "slide_id" in rows[0] else "slide" if "slide" in rows[0] else "case_id"
    patient = "case_id" if "case_id" in rows[0] else named
    for column in (named, label, *([event] if event else [])):
        if column not in rows[0]:
            option = {label: "; type --label COLUMN", event: "; type --event COLUMN"}.get(column, "")
            raise UsageError(f"{path} has no column {column!r}; it has {', '.join(rows[0])}{option}")
    known = [row for row in rows if row[label] not in ("", "nan", "NaN")]
    remarks = [f"{len(rows) - len(known)} rows without {label} are left out"] if known != rows else []
    if patient == named and named != "case_id":
        remarks.append("No column case_id states the patients, so that each slide counts as one patient")
    for slide, count in Counter(row[named] for row in known).items():
        if count > 1:
            raise UsageError(f"{path}: slide {slide!r} stands {count} times; name each slide once")
    grouped: dict[str, list[dict[str, str]]] = {}
    for row in known:
        if not (row[named] and row[patient]):
            raise UsageError(f"{path}: a row lacks its {named} or {patient}; fill it in")
        grouped.setdefault(row[patient if by == PATIENT else named], []).append(row)
    samples = []
    for name, of in grouped.items():
        sample = Sample(name, of[0][patient], tuple(row[named] for row in of), of[0][label])
        samples.append(sample if event is None else _survival(path, sample, of[0][event]))
        labels = {(row[label], row[event] if event else "") for row in of}
        if len(labels) > 1:
            raise UsageError(
                f"{path}: patient {name} has {len(labels)} different labels in {label}; give one to all of a "
                "patient's slides, or type --by slide"
            )
    read = Labels(label, tuple(samples), (), tuple(remarks))
    classes = read.classes if event is None else tuple(sorted({str(s.event) for s in samples}))
    if len(classes) < 2:
        what = "of one class" if event is None else "with" if "True" in classes else "without"
        what += f", {classes[0]}" if classes and event is None else " the event" if classes else ""
        raise UsageError(f"{path}: all {len(samples)} samples are {what}; allowed: two kinds or more")
    made = _split(path, read, _given(path, read, grouped, splits), classes, folds, seed)
    kinds = [sample.label or str(sample.event) for sample in samples]
    alone = [fold.name for fold in made if len({kinds[i] for i in fold.test}) == 1 < len(fold.test)]
    if alone:
        remarks.append(f"{', '.join(alone)} tests samples of one kind, so that there is no AUC or C-index")
    return replace(read, folds=made, remarks=tuple(remarks))


def _rows(path: Path) -> list[dict[str, str]]:
    columns, lines = read_rows(path, "\t" if path.suffix == ".tsv" else ",")
    refuse_repeated(path, columns, [name for name in columns if name])
    rows = [{name: cells.get(name, "") for name in columns if name} for _, cells in lines]
    if not rows:
        raise UsageError(f"{path} has no rows; give a table with the columns slide_id, case_id and a label")
    return rows


def _survival(path: Path, sample: Sample, event: str) -> Sample:
    """The sample with time and event in place of the class."""
    time = float(sample.label) if _is_number(sample.label) else -1.0
    if not 0 <= time < np.inf or event not in ("0", "1", "0.0", "1.0"):
        raise UsageError(
            f"{path}: {sample.name} has the time {sample.label!r} and the event {event!r}; allowed: a time "
            "of 0 or more, and 1 for an event or 0 for a censored time"
        )
    return replace(sample, label="", time=time, event=float(event) == 1)


def _is_number(text: str) -> bool:
    try:
        return not np.isnan(float(text))
    except ValueError:
        return False


# --- folds --------------------------------------------------------------------------------------------


def _given(
    path: Path, read: Labels, grouped: Mapping[str, Sequence[Mapping[str, str]]], splits: Path | None
) -> dict[str, list[set[str]]]:
    """The sides that each sample is on, for each fold of the table or of CLAM's folder; may be none."""
    if splits is not None:
        return {name: _clam(file, read.samples) for name, file in _clam_files(splits).items()}
    columns = list(next(iter(grouped.values()))[0])
    numbered = [column for column in columns if re.fullmatch(r"fold_\d+", column)]
    chosen = sorted(numbered, key=lambda column: int(column[5:])) or [c for c in ("split",) if c in columns]
    found = {column: [{row[column] for row in of} for of in grouped.values()] for column in chosen}
    if not chosen and "fold" in columns:
        number = [{row["fold"] for row in of} for of in grouped.values()]
        names = sorted(set[str]().union(*number), key=lambda name: (len(name), name))
        for name in names:
            sides = [{"test" if one == name else "train" for one in of} for of in number]
            found[name if name.startswith("fold") else f"fold_{name}"] = sides
    for fold, sides in found.items():
        for name, of in zip(grouped, sides, strict=True):
            for other in sorted(of - {*SIDES, ""}):
                raise UsageError(f"{path}: {name} is {other!r} in {fold}; allowed: {', '.join(SIDES)}")
    return found


def _clam_files(splits: Path) -> dict[str, Path]:
    files = {m[1]: file for file in splits.glob("*.csv") if (m := re.fullmatch(r"splits_(\d+)", file.stem))}
    if not files:
        raise UsageError(
            f"{splits} has no splits_0.csv; give the folder that CLAM's create_splits_seq.py wrote"
        )
    return {f"fold_{number}": files[number] for number in sorted(files, key=int)}


def _clam(file: Path, samples: Sequence[Sample]) -> list[set[str]]:
    rows = _rows(file)
    if not {"train", "test"} <= set(rows[0]):
        raise UsageError(f"{file} has the columns {', '.join(rows[0])}; needed: train, val and test")
    side_of = {row[side]: side for row in rows for side in SIDES if row.get(side)}
    return [{side_of[name] for name in sample.slides if name in side_of} for sample in samples]


def _split(
    path: Path,
    read: Labels,
    given: dict[str, list[set[str]]],
    classes: tuple[str, ...],
    folds: int,
    seed: int,
) -> tuple[LabelFold, ...]:
    kinds = np.array([sample.label or str(sample.event) for sample in read.samples])
    patients = np.array([sample.patient for sample in read.samples])
    if not given:
        kind, fewest = min(((k, len(set(patients[kinds == k]))) for k in classes), key=lambda found: found[1])
        if not 2 <= folds <= fewest:
            what = f"class {kind}" if read.classes else f"the event {kind}"
            raise UsageError(
                f"--folds is {folds}, but {fewest} patients are of {what}; allowed: 2 to that number"
            )
        names, of = np.unique(patients, return_inverse=True)
        groups = np.random.default_rng(seed).permutation(len(names))[of]  # older shuffling did not stratify
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes with few samples, which is checked below
            parts = list(StratifiedGroupKFold(folds).split(kinds, kinds, groups))
        made = tuple(LabelFold(f"fold_{i}", train, test) for i, (train, test) in enumerate(parts))
    else:
        made = tuple(
            LabelFold(fold, *(np.flatnonzero([side in of for of in sides]) for side in ("train", "test")))
            for fold, sides in given.items()
        )
    for fold in made:
        both = sorted(set(patients[fold.train]) & set(patients[fold.test]))
        if both:
            raise UsageError(
                f"{path}: patient {both[0]} is in train and in test of {fold.name}; put it in one"
            )
        if not len(fold.test):
            raise UsageError(f"{path}: {fold.name} tests no sample; write test for some of them")
        missing = sorted(set(classes) - set(kinds[fold.train]))
        if missing:
            what = f"of class {missing[0]}" if read.classes else f"with event {missing[0]}"
            raise UsageError(f"{path}: {fold.name} trains on no sample {what}; allowed: some of each")
    return made


# --- features -----------------------------------------------------------------------------------------


def find_slides(folders: Sequence[Path], slides: Sequence[str]) -> dict[str, list[SlideFeatures]]:
    """The features of each slide, in the order of their names, by the name of the encoder.

    Args:
        folders: of finished runs, or parts of them.
        slides: names as in a table, with or without suffix.

    Raises:
        OutputError: a folder holds no features, or those of a slide are damaged.
        UsageError: an encoder has not seen a slide, has seen it twice, or has two sets of weights.
    """
    found: dict[str, dict[str, SlideFeatures]] = {}
    for folder in folders:
        listed, damaged = list_features(folder)
        wanted = {*slides, *(Path(slide).stem for slide in slides)}
        for error in (error for path, error in damaged.items() if path.stem in wanted):
            raise error
        for features in listed:
            by_name = found.setdefault(features.provenance["encoder"]["name"], {})
            before = by_name.setdefault(features.path.stem, features)
            if before.path != features.path and features.path.stem in wanted:
                raise UsageError(
                    f"{before.path} and {features.path} are of one slide and encoder; give the folder of one"
                )
    chosen = {}
    for encoder, by_name in found.items():
        names = [slide if slide in by_name else Path(slide).stem for slide in slides]
        missing = [name for name in names if name not in by_name]
        if missing:
            raise UsageError(
                f"{folders[0]} has no features by {encoder} of {len(missing)} slides of the table, the first "
                f"{missing[0]}; embed them, or give the folder features_NAME of one encoder"
            )
        chosen[encoder] = [by_name[name] for name in names]
        made_by = [_made_by(features) for features in chosen[encoder]]
        for features, other in zip(chosen[encoder], made_by, strict=True):
            if other != made_by[0]:
                what = "weights" if other[0] != made_by[0][0] else "sizes of patches"
                raise UsageError(
                    f"{chosen[encoder][0].path} and {features.path} are by different {what} of {encoder}; "
                    "embed all slides in one way"
                )
    return chosen


def _made_by(features: SlideFeatures) -> tuple[Any, Any]:
    """Weights and patches, which have to be the same for all slides."""
    return features.provenance["request"].get("encoder"), (features.grid.patch_px, features.grid.mpp)
