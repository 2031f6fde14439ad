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
from seal_extract.encoders.registry import bundled
from seal_extract.encoders.request import EncoderRequest
from seal_extract.errors import UsageError, embedding
from seal_extract.evaluate.compare import SEEDS, Embeddings, compare, tables
from seal_extract.evaluate.expression import Fold, leave_one_out, random_splits
from seal_extract.evaluate.handcrafted import handcrafted_features
from seal_extract.evaluate.table import Report
from seal_extract.genes.omics import compared_behind_heads, load_omics
from seal_extract.train.pairs import Pairs, make_pairs
from seal_extract.train.sections import Section, choose_panel

FOLD = "{fold}"  # in an encoder's path: one encoder for each fold
HANDCRAFTED = "handcrafted features"  # as the tables call them
REPORT = "evaluation"  # name of its files
RANDOM = "random-spots"
BY = ("section", "patient", RANDOM)
REPEATS = 5  # SEAL's
IN_DOMAIN = (
    "Random splits over spots, as in SEAL's in-domain probe: neighbouring spots are on both sides of them. "
    "The numbers do not show how an encoder does on a new section."
)
Log = Callable[[str], None]


@dataclass(frozen=True)
class EvaluateOptions:
    """What is compared, and how.

    Attributes:
        by: ``"section"`` or ``"patient"``: what is held out in turn; or ``"random-spots"`` for random splits
            over all spots, as in SEAL's in-domain probe.
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


def evaluate(
    sections: Sequence[Section],
    encoder: EncoderRequest,
    base: EncoderRequest | None = None,
    *,
    options: EvaluateOptions = EvaluateOptions(),
    log: Log = lambda what: None,
) -> Report:
    """Compare an encoder with its base, handcrafted features and permuted rows, by the held-out ridge.

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
    groups = {s.name: s.patient if options.by == "patient" else s.name for s in sections}
    if len(set(groups.values())) < 2 and options.by != RANDOM:
        raise UsageError(
            f"all {len(sections)} sections are of one {options.by}, {next(iter(groups.values()), 'none')}; "
            f"allowed: two {options.by}s or more to leave one out"
        )
    log("cutting patches")
    pairs, folds = _folds(sections, groups, options)
    names = np.array(pairs.names)[pairs.section]  # [N]
    requests = [request for request in (encoder, base) if request is not None]
    warnings = [warning for request in requests for warning in _seen(request, folds)]
    if options.by == RANDOM:
        warnings.insert(0, IN_DOMAIN)
    contenders = {}
    for request in requests:
        name = name_of(request) + (", before alignment" if request is base else "")
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
    per_gene = {
        f"{name}, {probe}": {score.fold: score.to_json() for score in scores}
        for (name, probe), scores in found.scores.items()
    }
    made = tables(found, "" if options.by == RANDOM else options.by)
    return Report(REPORT, made, about, warnings, {"pearson_r_per_gene": per_gene})


def _folds(
    sections: Sequence[Section], groups: dict[str, str], options: EvaluateOptions
) -> tuple[Pairs, list[Fold]]:
    """The pairs of all sections, and folds of their rows, each with the panel of its training sections."""
    if options.by == RANDOM:
        panels = {f"random spots {i + 1}": choose_panel(sections, options.genes) for i in range(REPEATS)}
    else:
        panels = {
            held_out: choose_panel([s for s in sections if groups[s.name] != held_out], options.genes)
            for held_out in dict.fromkeys(groups.values())
        }
    pairs = make_pairs(sections, next(iter(panels.values())), patch_px=options.patch_px, mpp=options.mpp)
    held_out_by = np.array([groups[name] for name in pairs.names])[pairs.section]
    splits = leave_one_out(held_out_by) if options.by != RANDOM else random_splits(list(panels), len(pairs))
    names = np.array(pairs.names)[pairs.section]
    folds = [
        Fold(
            name,
            train,
            held_out,
            expression_of(sections, pairs, panels[name]),
            panels[name],
            held_out_by,
            names,
        )
        for name, train, held_out in splits
    ]
    return pairs, folds


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


def name_of(request: EncoderRequest) -> str:
    """As the tables call an encoder: the last folder that is the same for all folds."""
    name = os.fspath(request.name_or_path)
    parts = [part for part in Path(name).parts if FOLD not in part]
    return (parts[-1] if parts else name) + (", one per fold" if FOLD in name else "")


def _for_fold(request: EncoderRequest, fold: str) -> EncoderRequest:
    return replace(request, name_or_path=os.fspath(request.name_or_path).replace(FOLD, fold))


def embed(encoder: Encoder, patches: NDArray[np.uint8], batch_size: int) -> NDArray[np.float32]:
    """uint8 [N, 3, S, S] to float32 [N, D]."""
    batches = torch.split(torch.from_numpy(patches), batch_size)
    with embedding("a batch of the sections"):
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


def training_of(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the folder of an encoder states about its training; empty where there is none, or no statement."""
    file = Path(bundled().get(os.fspath(name_or_path), name_or_path)) / CONFIG
    if not file.is_file():
        return {}
    training: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")).get("training") or {}
    return training


def sections_seen(name_or_path: str | os.PathLike[str]) -> set[str]:
    """Names of the sections that an encoder was trained on, or by which its best epoch was chosen."""
    training = training_of(name_or_path)
    return {*training.get("sections", ()), *training.get("config", {}).get("data", {}).get("validation", ())}


def _seen(request: EncoderRequest, folds: Sequence[Fold]) -> list[str]:
    """A warning for each encoder that saw what is held out."""
    warnings = []
    for fold in folds:
        folder = _for_fold(request, fold.name).name_or_path
        seen = sections_seen(folder) & set(fold.sections[fold.held_out].tolist())
        if seen:
            warnings.append(
                f"{folder} saw {', '.join(sorted(seen))} in training, held out in fold {fold.name}: that "
                "number does not show how it generalises"
            )
    return warnings
