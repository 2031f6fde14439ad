"""The comparison on sections: patches cut once, embedded by every encoder; every fold chooses its panel."""

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
from seal_extract.evaluate.compare import SEEDS, Comparison, Line, compare
from seal_extract.evaluate.expression import Fold, leave_one_out
from seal_extract.evaluate.handmade import handmade_features
from seal_extract.evaluate.table import Table, tables, to_csv
from seal_extract.genes import load_omics
from seal_extract.genes.omics import compared_behind_heads
from seal_extract.publish import publish
from seal_extract.train.pairs import Pairs, make_pairs
from seal_extract.train.sections import Section, choose_panel

FOLD = "{fold}"  # in an encoder's path: one encoder for each fold
HANDMADE = "hand-made features"
BY = ("section", "patient")


@dataclass(frozen=True)
class EvaluateOptions:
    """What is compared, and how.

    Attributes:
        by: ``"section"`` or ``"patient"``: what is held out in turn.
        genes: of each fold's panel, the most variable of its training sections.
        patch_px: side of the patches that are cut.
        mpp: µm/px of those patches.
        batch_size: patches per forward.
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
    """What `evaluate` found.

    Attributes:
        found: every score.
        tables: for reading.
        about: options, sections and encoders, as JSON.
        warnings: what weakens the numbers: an encoder that saw held-out sections.
    """

    found: Comparison
    tables: list[Table]
    about: dict[str, Any]
    warnings: list[str]

    def to_markdown(self) -> str:
        """Warnings, then all tables."""
        return "\n".join([*(f"**{w}**\n" for w in self.warnings), *(t.to_markdown() for t in self.tables)])

    def to_json(self) -> dict[str, Any]:
        """All numbers, those of single genes included."""
        per_gene = {
            f"{line}, {probe}": {
                score.fold: {
                    gene: None if np.isnan(r) else round(float(r), 6)
                    for gene, r in zip(score.panel, score.per_gene, strict=True)
                }
                for score in scores
            }
            for (line, probe), scores in self.found.scores.items()
        }
        made = [table.to_json() for table in self.tables]
        return {**self.about, "warnings": self.warnings, "tables": made, "pearson_r_per_gene": per_gene}

    def write(self, folder: Path, *, overwrite: bool = False) -> list[Path]:
        """Write ``evaluation.md``, ``.csv`` and ``.json``.

        Raises:
            OutputError: they are there already, or cannot be written.
        """
        files = check_free(folder, overwrite)
        texts = (self.to_markdown(), to_csv(self.tables), json.dumps(self.to_json(), indent=1) + "\n")
        for file, text in zip(files, texts, strict=True):
            with publish(file) as part:
                part.write_text(text, encoding="utf-8")
        return files


def check_free(folder: Path, overwrite: bool) -> list[Path]:
    """The files of an evaluation, none of which is there yet unless they may be replaced.

    Raises:
        OutputError: one is there.
    """
    files = [folder / f"evaluation{suffix}" for suffix in (".md", ".csv", ".json")]
    there = [file for file in files if file.exists()]
    if there and not overwrite:
        raise OutputError(f"{there[0]} is there already; give --overwrite or another -o")
    return files


def evaluate(
    sections: Sequence[Section],
    encoder: EncoderRequest,
    base: EncoderRequest | None = None,
    *,
    options: EvaluateOptions = EvaluateOptions(),
    say: Callable[[str], None] = lambda what: None,
) -> Evaluation:
    """Hold out each section or patient; compare an encoder with its base, hand-made features, permuted rows.

    Args:
        sections: with expression and slides.
        encoder: a name or folder; with ``{fold}`` in it, one for each fold, by the name of what is held out.
        base: the encoder before alignment.
        options: choices.
        say: told what is being done.

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
    say("cutting patches")
    panels = _panels(sections, groups, options.genes)
    first = next(iter(panels.values()))
    pairs = make_pairs(sections, first, patch_px=options.patch_px, mpp=options.mpp)
    folds = _folds(sections, pairs, groups, panels)
    requests = [request for request in (encoder, base) if request is not None]
    warnings = [w for request in requests for w in _seen(request, folds)]
    lines = [_line(request, sections, pairs, folds, options, say) for request in requests]
    if base is not None:
        lines[1] = replace(lines[1], name=f"{lines[1].name}, before alignment")
    say(HANDMADE)
    lines.append(Line(HANDMADE, _in_batches(pairs.patches, handmade_features, options.batch_size)))
    say("predicting expression")
    found = compare(lines, folds, seeds=options.seeds)
    about = {
        "by": options.by,
        "genes": options.genes,
        "patch_px": options.patch_px,
        "mpp": options.mpp,
        "sections": {
            s.name: {"patient": s.patient, "spots": int(_rows_of(pairs, s).sum())} for s in sections
        },
        "encoder": os.fspath(encoder.name_or_path),
        "base": None if base is None else os.fspath(base.name_or_path),
    }
    return Evaluation(found, tables(found), about, warnings)


# --- folds --------------------------------------------------------------------------------------------


def _panels(sections: Sequence[Section], groups: dict[str, str], genes: int) -> dict[str, tuple[str, ...]]:
    """Each fold's genes, from its training sections alone."""
    return {
        held_out: choose_panel([s for s in sections if groups[s.name] != held_out], genes)
        for held_out in dict.fromkeys(groups.values())
    }


def _folds(
    sections: Sequence[Section],
    pairs: Pairs,
    groups: dict[str, str],
    panels: dict[str, tuple[str, ...]],
) -> list[Fold]:
    of = np.array(pairs.names)[pairs.section]  # [N]
    by = np.array([groups[name] for name in pairs.names])[pairs.section]
    return [
        Fold(name, train, held_out, expression_of(sections, pairs, panels[name]), panels[name], by, of)
        for name, train, held_out in leave_one_out(by)
    ]


def expression_of(
    sections: Sequence[Section], pairs: Pairs, panel: Sequence[str], *, smooth: bool = False
) -> NDArray[np.float32]:
    """log1p of a panel for the rows of the pairs, float32 [N, P]: spots without a patch are left out.

    Args:
        sections: those of the pairs.
        pairs: for their rows.
        panel: genes.
        smooth: half of each spot's expression is the mean of its neighbours'.
    """
    expression = np.empty((len(pairs), len(panel)), np.float32)
    barcodes = np.asarray(pairs.barcodes)
    for section in sections:
        rows = _rows_of(pairs, section)
        at = {barcode: row for row, barcode in enumerate(section.barcodes)}
        values = section.log1p(panel)
        values = section.smoothed(values) if smooth else values
        expression[rows] = values[[at[barcode] for barcode in barcodes[rows].tolist()]]
    return expression


def _rows_of(pairs: Pairs, section: Section) -> NDArray[np.bool_]:
    rows: NDArray[np.bool_] = pairs.section == pairs.names.index(section.name)
    return rows


# --- lines --------------------------------------------------------------------------------------------


def _line(
    request: EncoderRequest,
    sections: Sequence[Section],
    pairs: Pairs,
    folds: Sequence[Fold],
    options: EvaluateOptions,
    say: Callable[[str], None],
) -> Line:
    """Embeddings by one encoder for all folds, or by one for each."""
    name = os.fspath(request.name_or_path)
    images: dict[str, NDArray[Any]] = {}
    expression: dict[str, NDArray[Any]] = {}
    aligned: dict[str, NDArray[Any]] = {}
    for fold in folds if FOLD in name else folds[:1]:
        own = _for_fold(request, fold.name)
        say(f"embedding by {own.name_or_path}")
        encoder = own.load()
        images[fold.name] = embed(encoder, pairs.patches, options.batch_size)
        joint = _embed_expression(own, encoder, sections, pairs)
        if joint is not None:
            expression[fold.name] = joint
            made = images[fold.name]
            aligned[fold.name] = made if encoder.projection is None else encoder.project(made).cpu().numpy()
    if FOLD not in name:
        one = folds[0].name
        return Line(_label(name), images[one], expression.get(one), aligned.get(one))
    if len(expression) < len(folds):
        return Line(_label(name), images)
    return Line(_label(name), images, expression, aligned)


def _for_fold(request: EncoderRequest, fold: str) -> EncoderRequest:
    return replace(request, name_or_path=os.fspath(request.name_or_path).replace(FOLD, fold))


def _label(name: str) -> str:
    """A folder is known by its own name; one for each fold by what comes before."""
    parts = [part for part in Path(name).parts if FOLD not in part]
    return f"{parts[-1] if parts else name}{', one per fold' if FOLD in name else ''}"


def embed(encoder: Encoder, patches: NDArray[np.uint8], batch_size: int) -> NDArray[np.float32]:
    """uint8 [N, 3, S, S] to float32 [N, D]."""

    def one(batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        made: NDArray[np.float32] = encoder.encode(torch.from_numpy(np.array(batch))).cpu().numpy()
        return made

    return _in_batches(patches, one, batch_size)


def _in_batches(
    patches: NDArray[np.uint8], describe: Callable[[NDArray[np.uint8]], NDArray[np.float32]], size: int
) -> NDArray[np.float32]:
    return np.concatenate([describe(patches[i : i + size]) for i in range(0, len(patches), size)])


def _embed_expression(
    request: EncoderRequest, encoder: Encoder, sections: Sequence[Section], pairs: Pairs
) -> NDArray[np.float32] | None:
    """By the expression half beside the encoder, smoothed as in its training; None where there is none."""
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
    """What an encoder's folder says of its training; nothing where it says nothing, or is no folder."""
    file = folder / CONFIG
    if not file.is_file():
        return {}
    training: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")).get("training") or {}
    return training


def _seen(request: EncoderRequest, folds: Sequence[Fold]) -> list[str]:
    """Encoders whose folder says that they were trained, or stopped, on what is held out."""
    warnings = []
    for fold in folds:
        folder = Path(_for_fold(request, fold.name).name_or_path)
        training = training_of(folder)
        validation = training.get("config", {}).get("data", {}).get("validation", ())
        seen = {*training.get("sections", ()), *validation}
        both = seen & set(fold.sections[fold.held_out].tolist())
        if both:
            warnings.append(
                f"{folder} saw {', '.join(sorted(both))} in training, held out in fold {fold.name}: that "
                "number says what it remembers"
            )
    return warnings
