"""``--slide-level`` and ``--patient-level``: embeddings of the slides and patients of a run."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.options import comma_separated
from seal_extract.cli.terminal import echo, exit_status
from seal_extract.errors import OutputError, SealExtractError, UsageError
from seal_extract.publish import writing

if TYPE_CHECKING:
    from seal_extract.encoders.request import EncoderRequest
    from seal_extract.features.layouts import Layout
    from seal_extract.features.store import SlideFeatures
    from seal_extract.pooling import Pooling
    from seal_extract.run.options import ExtractOptions
    from seal_extract.run.status_table import SlideResult
    from seal_extract.slides.listing import SlideList


@dataclass(frozen=True)
class _Slide:
    """A slide of a patient: its file, and the features by encoder; none if it failed."""

    file: str
    features: tuple[Path, ...]


class SlideLevels:
    """The slide-level and patient-level files of a run; models are checked before any slide is read."""

    def __init__(
        self,
        args: argparse.Namespace,
        encoders: Sequence[EncoderRequest],
        options: ExtractOptions,
        slides: SlideList,
    ) -> None:
        """Open every model and hold it to the encoders' names and widths.

        Raises:
            UsageError: a file that is not there, a model of other features, two of one name, or a patient
                level that this run cannot give.
            CheckpointError: a file that is not such a model.
            HubError: the Hub does not deliver the weights of a named one.
        """
        self._asked = self._failed = self._patients_asked = self._patients_failed = 0
        self._out, self._options = args.out, options
        self._fusions = _fusions(args, slides)
        self._poolings: list[Pooling] = []
        self._patients: dict[str, list[_Slide]] = defaultdict(list)
        self._pooled: dict[tuple[Path, str], Path] = {}  # slide-level files by features and pooling
        if args.slide_level:
            from seal_extract.pooling import open_pooling

            names = dict.fromkeys(_split(args.slide_level))
            self._poolings = [open_pooling(name, args.offline) for name in names]
        names_of = [pooling.name for pooling in self._poolings]
        if len(set(names_of)) < len(names_of):
            raise UsageError(
                f"--slide-level has files of one name ({', '.join(names_of)}); rename one of them"
            )
        if self._poolings:
            from seal_extract.pooling.slide_level import check_features

            for pooling in self._poolings:
                for encoder in encoders:
                    check_features(pooling, encoder.spec.dim, encoder.spec.name)

    def pool(self, result: SlideResult) -> Iterator[str | SealExtractError]:
        """Pool the features of each encoder in each way asked for; yields one line or error for each."""
        if self._fusions and result.entry.case_id:
            slide = _Slide(result.path.name, tuple(features.path for features in result.features))
            self._patients[result.entry.case_id].append(slide)
        for features in result.features:
            for pooling in self._poolings:
                what = f"{result.path.name}: slide level by {pooling.name}"
                try:
                    self._asked += 1
                    yield f"{what}, {self._write(features, result.name, pooling)}"
                except SealExtractError as exc:
                    self._failed += 1
                    yield type(exc)(f"{what}: {exc}")

    def pool_patients(self) -> Iterator[tuple[str, str | SealExtractError]]:
        """Pool each patient once all slides are done; yields (patient, line or error) for each file."""
        for patient, slides in sorted(self._patients.items()):
            encoders = range(max(len(slide.features) for slide in slides) or 1)
            for encoder, pooling, fusion in product(encoders, self._poolings, self._fusions):
                count = f"{len(slides)} slide{'s' * (len(slides) > 1)}"
                what = f"{patient}: patient level by {pooling.name}, {fusion} fusion of {count}"
                try:
                    self._patients_asked += 1
                    yield patient, f"{what}, {self._write_patient(patient, slides, encoder, pooling, fusion)}"
                except SealExtractError as exc:
                    self._patients_failed += 1
                    yield patient, type(exc)(f"{what}: {exc}")

    def exit_status(self) -> int:
        """0, or 1 if a file failed, with a line that says how many."""
        slides = exit_status(self._failed, self._asked, "slide-level files")
        return max(slides, exit_status(self._patients_failed, self._patients_asked, "patient-level files"))

    def _write(self, features: SlideFeatures, name: str, pooling: Pooling) -> str:
        from seal_extract.pooling import pool_slide

        path = self._layout(features).slide_level(name, _name(pooling, features))
        if not len(features.grid):
            return f"no patches to pool{_without(path, self._options.overwrite)}"
        made = pool_slide(features, pooling, path, overwrite=self._options.overwrite)
        if self._fusions:
            self._pooled[features.path, pooling.name] = path
        line = " x ".join(map(str, made.features.shape))
        if made.provenance.get("mismatch"):  # older versions did not record it
            line += f" (mind that {made.provenance['mismatch']})"
        if made.probabilities is not None:
            line += f", class probabilities {' '.join(f'{p:.3g}' for p in made.probabilities)}"
        if made.finished_before:
            line += ", finished before"
            if made.is_older:
                line += (
                    " by an older version (without class probabilities, and unreadable for Patho-Bench): "
                    "delete the file and run the same command again to write it anew without encoding"
                )
        return f"{line} -> {path}"

    def _write_patient(
        self, patient: str, slides: Sequence[_Slide], encoder: int, pooling: Pooling, fusion: str
    ) -> str:
        from seal_extract.features.store import read_features
        from seal_extract.pooling import read_slide_level
        from seal_extract.pooling.patient_level import EARLY, fuse_early, fuse_late

        if failed := sorted(slide.file for slide in slides if not slide.features):
            raise OutputError(
                f"{', '.join(failed)} failed, and the embedding would lack {'them' if failed[1:] else 'it'}; "
                "run the same command again, or take what failed out of the table"
            )
        features = [read_features(path) for path in sorted(slide.features[encoder] for slide in slides)]
        path = self._layout(features[0]).patient_level(patient, f"{fusion}_{_name(pooling, features[0])}")
        with_patches = [one for one in features if len(one.grid)]
        overwrite = self._options.overwrite
        if not with_patches:
            return f"no patches to pool{_without(path, overwrite)}"
        if fusion == EARLY:
            made = fuse_early(patient, with_patches, pooling, path, overwrite=overwrite)
        else:
            pooled = [self._pooled.get((one.path, pooling.name)) for one in with_patches]
            done = [read_slide_level(file) for file in pooled if file is not None]
            if len(done) < len(pooled):
                raise OutputError("the slide-level file of a slide failed, see above")
            made = fuse_late(patient, done, path, overwrite=overwrite)
        line = " x ".join(map(str, made.features.shape))
        return f"{line}{', finished before' if made.finished_before else ''} -> {path}"

    def _layout(self, features: SlideFeatures) -> Layout:
        from seal_extract.features.layouts import layout_of_grid

        return layout_of_grid(self._options.layout, self._out, features.grid)


def _name(pooling: Pooling, features: SlideFeatures) -> str:
    return f"{pooling.name}-{features.provenance['encoder']['name']}"


def _split(asked: Sequence[str]) -> Iterator[str]:
    for text in asked:
        file = text.partition("=")[2]  # of NAME=FILE
        is_file = Path(text).exists() or (file and Path(file).exists())
        yield from [text] if is_file else (name.strip() for name in text.split(","))


def _without(path: Path, overwrite: bool) -> str:
    """Delete a file made from patches that the slide no longer has, if --overwrite permits it."""
    if not path.exists():
        return ""
    if not overwrite:
        raise OutputError(
            f"{path} was made from patches that the slide no longer has; type --overwrite to delete it"
        )
    with writing(path):
        path.unlink()
    return f", deleted {path}"


# --- patients -----------------------------------------------------------------------------------------


def _fusions(args: argparse.Namespace, slides: SlideList) -> list[str]:
    """The fusions asked for, each once.

    Raises:
        UsageError: there is no such fusion, or this run does not see all slides of each patient by name.
    """
    fusions = list(dict.fromkeys(name for text in args.patient_level for name in comma_separated(text)))
    if not fusions:
        return []
    from seal_extract.pooling.patient_level import FUSIONS

    for fusion in fusions:
        if fusion not in FUSIONS:
            raise UsageError(f"--patient-level is {fusion!r}; allowed: {', '.join(FUSIONS)}")
    if not args.slide_level:
        raise UsageError("--patient-level pools by --slide-level; type --slide-level mean too, or a model")
    for option, given in (("--shard", args.shard is not None), ("--retry-failed", args.retry_failed)):
        if given:
            raise UsageError(
                f"--patient-level needs all slides of a patient, and {option} takes a part of them; type "
                f"--patient-level in a run without {option}, which does not encode finished slides again"
            )
    patients = {entry.case_id for entry in slides.entries}
    if patients <= {None}:
        raise UsageError(
            "--patient-level needs the patient of each slide; give a table with a column case_id"
        )
    for patient in sorted(patients - {None}, key=str):
        _check_patient(str(patient))
    if without := sum(entry.case_id is None for entry in slides.entries):
        echo(f"{without} of {len(slides)} slides have no case_id and no part in a patient's embedding")
    return fusions


def _check_patient(patient: str) -> None:
    from seal_extract.names import shown

    if set(patient) & set('/\\:*?"<>|') or patient.startswith(".") or not patient.isprintable():
        raise UsageError(
            f"the case_id {shown(patient)!r} cannot be the name of a file; write it with letters, digits, "
            "spaces, . _ + -"
        )
