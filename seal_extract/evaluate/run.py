"""The evaluation of an encoder on sections: patches are cut once, every fold has its own panel."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seal_extract.encoders import Encoder
from seal_extract.encoders.folder import CONFIG, OMICS
from seal_extract.encoders.request import EncoderRequest
from seal_extract.errors import OutputError, UsageError
from seal_extract.evaluate.compare import SEEDS, Comparison, Embeddings, compare
from seal_extract.evaluate.expression import Fold, leave_one_out
from seal_extract.evaluate.handcrafted import handcrafted_features
from seal_extract.evaluate.table import Table, tables, to_csv
from seal_extract.genes.omics import compared_behind_heads, load_omics
from seal_extract.publish import publish
from seal_extract.train.pairs import Pairs, make_pairs
from seal_extract.train.sections import Section, choose_panel

FOLD = "{fold}"  # in an encoder's path: one encoder for each fold
HANDCRAFTED = "handcrafted features"  # as the tables call them
BY = ("section", "patient")
Log = Callable[[str], None]


@dataclass(frozen=True)
class EvaluateOptions:
    """What is compared, and how.

    Attributes:
        by: ``"section"`` or ``"patient"``: what is held out in turn.
        genes: of each fold's panel, the most variable of its training sections.
        patch_px: side of the patches that are cut.
        mpp: µm/px of those patches.
        batch_size: patches per forward pass.
        seeds: permutations.
    """

    by: str = "section"
    genes: int = 250
    patch_px: int = 224
    mpp: float = 0.5
    batch_size: int = 64
    seeds: int = SEEDS

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise UsageError(f"--by is {self.by!r}; allowed: {', '.join(BY)}")
        for name, least in (("genes", 1), ("batch_size", 1), ("patch_px", 32), ("seeds", 2)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} is {getattr(self, name)}; allowed: {least} or more")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        found: every score.
        tables: for reading.
        about: options, sections and encoders, as JSON.
        warnings: what weakens the numbers: an encoder that saw held-out sections in training.
    """

    found: Comparison
    tables: list[Table]
    about: dict[str, Any]
    warnings: list[str]

    def to_markdown(self) -> str:
        """Warnings, then all tables."""
        return "\n".join([*(f"**{w}**\n" for w in self.warnings), *(t.to_markdown() for t in self.tables)])

    def to_json(self) -> dict[str, Any]:
        """All numbers, including those of single genes."""
        per_gene = {
            f"{name}, {probe}": {
                score.fold: {
                    gene: None if np.isnan(r) else round(float(r), 6)
                    for gene, r in zip(score.panel, score.per_gene, strict=True)
                }
                for score in scores
            }
            for (name, probe), scores in self.found.scores.items()
        }
        made = [table.to_json() for table in self.tables]
        return {**self.about, "warnings": self.warnings, "tables": made, "pearson_r_per_gene": per_gene}

    def write(self, folder: Path, *, overwrite: bool = False) -> list[Path]:
        """Write ``evaluation.md``, ``.csv`` and ``.json``.

        Raises:
            OutputError: as `output_files`; or they cannot be written.
        """
        files = output_files(folder, overwrite)
        texts = (self.to_markdown(), to_csv(self.tables), json.dumps(self.to_json(), indent=1) + "\n")
        for file, text in zip(files, texts, strict=True):
            with publish(file) as part:
                part.write_text(text, encoding="utf-8")
        return files


def output_files(folder: Path, overwrite: bool) -> list[Path]:
    """The files of an evaluation.

    Raises:
        OutputError: one of them exists and must not be replaced.
    """
    files = [folder / f"evaluation{suffix}" for suffix in (".md", ".csv", ".json")]
    existing = [file for file in files if file.exists()]
    if existing and not overwrite:
        raise OutputError(f"{existing[0]} exists already; give --overwrite or another -o")
    return files


def evaluate(
    sections: Sequence[Section],
    encoder: EncoderRequest,
    base: EncoderRequest | None = None,
    *,
    options: EvaluateOptions = EvaluateOptions(),
    log: Log = lambda what: None,
) -> Evaluation:
    """Compare an encoder with its base, handcrafted features and permuted rows, on held-out sections.

    Args:
        sections: with expression and slides; each, or each patient, is held out in turn.
        encoder: a name or folder; with ``{fold}`` in it, one for each fold, by the name of what is held out.
        base: the encoder before alignment.
        options: choices.
        log: called with the name of each step.

    Raises:
        UsageError: fewer than two sections or patients, a panel larger than what is measured.
        EncoderError: encoders that cannot be loaded.
        SlideError: slides that cannot be read.
    """
    groups = {s.name: s.name if options.by == "section" else s.patient for s in sections}
    if len(set(groups.values())) < 2:
        raise UsageError(
            f"all {len(sections)} sections are of one {options.by}, {next(iter(groups.values()), 'none')}; "
            f"allowed: two {options.by}s or more to leave one out"
        )
    log("cutting patches")
    panels = {
        held_out: choose_panel([s for s in sections if groups[s.name] != held_out], options.genes)
        for held_out in dict.fromkeys(groups.values())
    }
    pairs = make_pairs(sections, next(iter(panels.values())), patch_px=options.patch_px, mpp=options.mpp)
    names = np.array(pairs.names)[pairs.section]  # [N]
    held_out_by = np.array([groups[name] for name in pairs.names])[pairs.section]
    folds = [
        Fold(name, train, held_out, expression_of(sections, pairs, panel), panel, held_out_by, names)
        for name, train, held_out in leave_one_out(held_out_by)
        for panel in [panels[name]]
    ]
    requests = [request for request in (encoder, base) if request is not None]
    warnings = [warning for request in requests for warning in _seen(request, folds)]
    contenders = {}
    for request in requests:
        name = _name_of(request) + (", before alignment" if request is base else "")
        contenders[name] = _embedded(request, sections, pairs, folds, options.batch_size, log)
    log("handcrafted features")
    handcrafted = Embeddings(handcrafted_features(pairs.patches))
    contenders[HANDCRAFTED] = {fold.name: handcrafted for fold in folds}
    log("predicting expression")
    found = compare(contenders, folds, seeds=options.seeds)
    about = {
        "by": options.by,
        "genes": options.genes,
        "patch_px": options.patch_px,
        "mpp": options.mpp,
        "sections": {s.name: {"patient": s.patient, "spots": int((names == s.name).sum())} for s in sections},
        "encoder": os.fspath(encoder.name_or_path),
        "base": None if base is None else os.fspath(base.name_or_path),
    }
    return Evaluation(found, tables(found), about, warnings)


def expression_of(
    sections: Sequence[Section], pairs: Pairs, panel: Sequence[str], *, smooth: bool = False
) -> NDArray[np.float32]:
    """log1p of a panel for the rows of the pairs, float32 [N, P]: spots without a patch are left out."""
    expression = np.empty((len(pairs), len(panel)), np.float32)
    for i, section in enumerate(sections):
        of = pairs.section == i
        values = section.log1p(panel)
        expression[of] = (section.smoothed(values) if smooth else values)[pairs.row[of]]
    return expression


# --- encoders -----------------------------------------------------------------------------------------


def _embedded(
    request: EncoderRequest,
    sections: Sequence[Section],
    pairs: Pairs,
    folds: Sequence[Fold],
    batch_size: int,
    log: Log,
) -> dict[str, Embeddings]:
    """Embeddings for each fold, by one encoder for all folds, or by one for each."""
    name = os.fspath(request.name_or_path)
    by_fold: dict[str, Embeddings] = {}
    for fold in folds if FOLD in name else folds[:1]:
        own = _for_fold(request, fold.name)
        log(f"embedding by {own.name_or_path}")
        encoder = own.load()
        images = embed(encoder, pairs.patches, batch_size)
        expression = _embed_expression(own, encoder, sections, pairs)
        aligned = None
        if expression is not None and encoder.projection is not None:
            aligned = encoder.project(images).cpu().numpy()
        by_fold[fold.name] = Embeddings(images, expression, aligned)
    if FOLD not in name:
        return {fold.name: by_fold[folds[0].name] for fold in folds}
    if any(embeddings.expression is None for embeddings in by_fold.values()):
        by_fold = {fold: Embeddings(embeddings.images) for fold, embeddings in by_fold.items()}
    return by_fold


def _name_of(request: EncoderRequest) -> str:
    """As the tables call an encoder: the last folder that is the same for all folds."""
    name = os.fspath(request.name_or_path)
    parts = [part for part in Path(name).parts if FOLD not in part]
    return (parts[-1] if parts else name) + (", one per fold" if FOLD in name else "")


def _for_fold(request: EncoderRequest, fold: str) -> EncoderRequest:
    return replace(request, name_or_path=os.fspath(request.name_or_path).replace(FOLD, fold))


def embed(encoder: Encoder, patches: NDArray[np.uint8], batch_size: int) -> NDArray[np.float32]:
    """uint8 [N, 3, S, S] to float32 [N, D]."""
    batches = torch.split(torch.from_numpy(patches), batch_size)
    return np.concatenate([encoder.encode(batch).cpu().numpy() for batch in batches])


def _embed_expression(
    request: EncoderRequest, encoder: Encoder, sections: Sequence[Section], pairs: Pairs
) -> NDArray[np.float32] | None:
    """By the expression encoder in the same folder, smoothed as in its training; None where there is none."""
    folder = Path(request.name_or_path)
    if not (folder / OMICS).is_file():
        return None
    omics = load_omics(folder)
    if omics.genes is None:
        return None
    smooth = bool(training_of(folder).get("config", {}).get("data", {}).get("smooth", False))
    project = compared_behind_heads(omics, encoder.spec.name, encoder.projection is not None)
    values = expression_of(sections, pairs, omics.genes, smooth=smooth)
    made: NDArray[np.float32] = omics.encode(values, project=project).numpy()
    return made


def training_of(folder: Path) -> dict[str, Any]:
    """What an encoder's folder states about its training; empty where it states nothing, or is no folder."""
    file = folder / CONFIG
    if not file.is_file():
        return {}
    training: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")).get("training") or {}
    return training


def _seen(request: EncoderRequest, folds: Sequence[Fold]) -> list[str]:
    """A warning for each encoder that was trained, or whose best epoch was chosen, on what is held out."""
    warnings = []
    for fold in folds:
        folder = Path(_for_fold(request, fold.name).name_or_path)
        training = training_of(folder)
        validation = training.get("config", {}).get("data", {}).get("validation", ())
        seen = {*training.get("sections", ()), *validation} & set(fold.sections[fold.held_out].tolist())
        if seen:
            warnings.append(
                f"{folder} saw {', '.join(sorted(seen))} in training, held out in fold {fold.name}: that "
                "number does not show how it generalises"
            )
    return warnings
