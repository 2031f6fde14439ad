"""The HEST-Benchmark as HEST's own code runs it: its folders, splits and genes, its regression and its table.

Source: Jaume et al., HEST-1k (arXiv 2406.16192), and ``hest.bench`` at commit afd42c3 of mahmoodlab/HEST. The
expression is log1p of raw counts of the 50 genes that come with a task; features are standardised and reduced
to 256 principal components; the ridge has no intercept and is solved by LSQR. The held-out ridge of
`expression` has other genes and another normalisation: its figures are not comparable.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from seal_extract.encoders import Encoder
from seal_extract.encoders.request import EncoderRequest
from seal_extract.errors import OutputError, UsageError
from seal_extract.evaluate.expression import FoldScore, mean_r, pearson
from seal_extract.evaluate.handcrafted import handcrafted_features
from seal_extract.evaluate.run import HANDCRAFTED, Log, name_of, sections_seen
from seal_extract.evaluate.table import Report, Row, Table
from seal_extract.run.patch_images import extract_patches
from seal_extract.slides.listing import read_rows
from seal_extract.slides.patch_files import PatchFile, open_patches
from seal_extract.train.formats.anndata import open_h5ad

REPORT = "hest"  # name of its files
GENES, SPLITS = "var_50genes.json", "splits"
COMPONENTS = 256
SEED = 1  # of HEST's principal components, which are found by a randomised method
MPP = 0.5  # of the benchmark's patches, where their files do not state it
PERMUTATIONS = 5
ROWS = 256  # patches at a time
Array = NDArray[Any]


@dataclass(frozen=True)
class Sample:
    """The files of one sample of a task."""

    name: str
    patches: Path
    counts: Path


@dataclass(frozen=True)
class Task:
    """One task of the benchmark, such as IDC.

    Attributes:
        name: of its folder.
        genes: to predict.
        samples: by name.
        splits: names of the training samples and of the test samples, for each split.
    """

    name: str
    genes: tuple[str, ...]
    samples: dict[str, Sample]
    splits: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]


def read_tasks(folder: Path, names: Sequence[str] | None = None) -> list[Task]:
    """The tasks of a folder as ``MahmoodLab/hest-bench`` has it, or the one task that the folder is.

    Args:
        folder: with a folder for each task, which has ``splits/train_0.csv``, ``test_0.csv`` and so on,
            ``var_50genes.json``, and the files that the splits name.
        names: of the tasks; all by default.

    Raises:
        UsageError: no or other tasks, a file is missing, or a sample is on both sides of a split.
    """
    found = {p.parent.name: p.parent for p in sorted(folder.glob(f"*/{GENES}"))}
    if (folder / GENES).is_file():
        found = {folder.resolve().name: folder}
    unknown = [name for name in names or () if name not in found]
    if not found or unknown:
        raise UsageError(
            f"{folder} has {f'no task {unknown[0]!r}' if unknown else 'no task of the HEST-Benchmark'}; "
            f"allowed: {', '.join(found) or f'a folder with TASK/{SPLITS}/train_0.csv and TASK/{GENES}'}"
        )
    return [_read_task(name, found[name]) for name in names or found]


def _read_task(name: str, folder: Path) -> Task:
    try:
        genes = tuple(map(str, json.loads((folder / GENES).read_text(encoding="utf-8"))["genes"]))
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise UsageError(f'{folder / GENES} cannot be read; it has to hold {{"genes": [...]}}') from exc
    samples: dict[str, Sample] = {}
    splits: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    while (file := folder / SPLITS / f"train_{len(splits)}.csv").is_file():
        train = _read_split(file, folder, samples)
        test = _read_split(file.with_name(file.name.replace("train", "test")), folder, samples)
        for both in set(train) & set(test):
            raise UsageError(
                f"{file}: {both} is also in the test samples; a sample is on one side of a split"
            )
        splits.append((train, test))
    if not splits or len(set(genes)) < max(1, len(genes)):
        raise UsageError(
            f"{folder} has {len(splits)} splits and {len(genes)} genes, each of which has to differ"
        )
    return Task(name, genes, samples, tuple(splits))


def _read_split(file: Path, folder: Path, samples: dict[str, Sample]) -> tuple[str, ...]:
    """The samples of one side of a split; they are added to ``samples``."""
    _, rows = read_rows(file)
    try:
        listed = [
            Sample(r["sample_id"], folder / r["patches_path"], folder / r["expr_path"]) for _, r in rows
        ]
    except KeyError as exc:
        raise UsageError(
            f"{file} cannot be read; it needs the columns sample_id, patches_path and expr_path"
        ) from exc
    missing = [path for sample in listed for path in (sample.patches, sample.counts) if not path.is_file()]
    if missing or not listed:
        raise UsageError(
            f"{file} names {missing[0] if missing else 'no sample'}, which is not there; download it"
        )
    samples.update({sample.name: sample for sample in listed})
    return tuple(sample.name for sample in listed)


# --- the files of a sample ----------------------------------------------------------------------------


def read_expression(sample: Sample, genes: Sequence[str]) -> tuple[NDArray[np.float64], bool]:
    """log1p of the raw counts at each patch, in the order of the patches: float64 [N, P].

    Returns:
        The expression, and whether all counts are whole numbers.

    Raises:
        UsageError: a gene, or the spot of a patch, is missing or occurs twice; counts below 0 or NaN.
    """
    barcodes = _open(sample).barcodes
    if barcodes is None:
        raise UsageError(f"{sample.patches} has no barcodes, by which its patches are matched with spots")
    data = open_h5ad(sample.counts, sample.name, on_tissue=False)
    rows, columns = data.obs_names.get_indexer_for(barcodes), data.var_names.get_indexer_for(list(genes))
    for what, found, wanted in (("spot", rows, barcodes), ("gene", columns, genes)):
        if len(found) != len(wanted) or (found < 0).any():
            raise UsageError(
                f"{sample.counts} lacks {(found < 0).sum()} of {len(wanted)} {what}s or has one twice; it "
                f"has to be of the same sample as {sample.patches.name}, and of the benchmark"
            )
    counts = data.X[rows][:, columns]
    counts = np.asarray(counts.toarray() if hasattr(counts, "toarray") else counts, np.float64)
    if not np.isfinite(counts).all() or counts.min(initial=0) < 0:
        raise UsageError(f"{sample.counts} holds NaN, infinity or numbers below 0; HEST takes raw counts")
    return np.log1p(counts), bool((counts == counts.round()).all())


def _open(sample: Sample) -> PatchFile:
    mpp = _unstated_mpp(sample.patches)
    return open_patches(sample.patches, mpp=mpp, slide_mpp=mpp)


def _unstated_mpp(path: Path) -> float | None:
    """The benchmark's µm/px where the file of patches does not state one."""
    try:
        open_patches(path)
    except UsageError:
        return MPP
    return None


def _embed(
    encoder: Encoder, out: Path, batch_size: int | None, overwrite: bool, task: Task, sample: Sample
) -> NDArray[np.float32]:
    """Embeddings of a sample, float32 [N, D]; a file of the same patches and weights is read again."""
    mpp = _unstated_mpp(sample.patches)
    options: dict[str, Any] = {"mpp": mpp, "slide_mpp": mpp, "batch_size": batch_size}
    try:
        found = extract_patches(sample.patches, encoder, out / task.name, **options)
    except OutputError:
        if not overwrite:
            raise
        found = extract_patches(sample.patches, encoder, out / task.name, overwrite=True, **options)
    return found.features


def _handcrafted(task: Task, sample: Sample) -> NDArray[np.float32]:
    batches = _open(sample).read(ROWS)  # uint8 [B, S, S, 3]
    return np.concatenate([handcrafted_features(np.moveaxis(batch, 3, 1)) for batch in batches])


# --- the protocol -------------------------------------------------------------------------------------


def predict(train: Array, expression: Array, test: Array, genes: int | None = None) -> Array:
    """HEST's regression: what it predicts for the test rows, [M, P].

    An encoder of fewer than 256 dimensions keeps them all, and so do fewer than 256 training rows; HEST's
    own code stops there.

    Args:
        train: float32 [N, D], embeddings.
        expression: float64 [N, P], log1p of raw counts.
        test: float32 [M, D].
        genes: their number in the benchmark's rule for alpha; P by default. Every column is solved alone.
    """
    components = min(COMPONENTS, *train.shape)
    reduction = make_pipeline(StandardScaler(), PCA(components, random_state=SEED))
    z, z_test = reduction.fit_transform(train), reduction.transform(test)
    # HEST hands over tensors of float32, which scikit-learn solves in float64: LSQR stops early, so it counts
    z, z_test = (np.asarray(x, np.float32).astype(np.float64) for x in (z, z_test))
    alpha = 100 / (components * (genes or expression.shape[1]))
    ridge = Ridge(alpha, solver="lsqr", fit_intercept=False, max_iter=1000, random_state=SEED)
    return np.asarray(ridge.fit(z, expression).predict(z_test)).reshape(len(test), -1)


def score_task(
    task: Task, embeddings: Mapping[str, Array], expression: Mapping[str, Array], permutations: int = 0
) -> tuple[list[FoldScore], NDArray[np.float64]]:
    """The score of each split, and the mean r with permuted rows.

    Args:
        task: its splits.
        embeddings: [N, D] of each sample.
        expression: float64 [N, P] of each sample.
        permutations: how often the expression of the training rows is shuffled within each sample.

    Returns:
        The scores, and float64 [splits, permutations].
    """
    scores, permuted = [], np.empty((len(task.splits), permutations))
    for i, (train, test) in enumerate(task.splits):
        rng, y = np.random.default_rng(i), [expression[s] for s in train]
        orders = [y, *([rng.permutation(rows) for rows in y] for _ in range(permutations))]
        predicted = predict(
            np.concatenate([embeddings[s] for s in train]),
            np.hstack([np.concatenate(order) for order in orders]),
            np.concatenate([embeddings[s] for s in test]),
            len(task.genes),
        )
        observed = np.concatenate([expression[s] for s in test])
        own, *by_chance = np.hsplit(predicted, permutations + 1)
        scores.append(FoldScore(f"split {i}", pearson(own, observed), task.genes, own))
        permuted[i] = [mean_r(pearson(shuffled, observed)) for shuffled in by_chance]
    return scores, permuted


def evaluate_hest(
    folder: Path,
    encoder: EncoderRequest,
    base: EncoderRequest | None,
    out: Path,
    *,
    tasks: Sequence[str] | None = None,
    batch_size: int | None = None,
    overwrite: bool = False,
    log: Log = lambda what: None,
) -> Report:
    """Run the HEST-Benchmark for an encoder and its base; handcrafted features and permuted rows beside them.

    Args:
        folder: see `read_tasks`.
        encoder: a name or folder.
        base: the encoder before alignment.
        out: folder in which the embeddings are kept, ``OUT/TASK/``: the same command continues a run that
            was stopped.
        tasks: names; all by default.
        batch_size: patches per forward pass.
        overwrite: replace embeddings that were made of something else.
        log: called with the name of each step.

    Raises:
        UsageError: as `read_tasks` and `read_expression`.
        EncoderError: encoders that cannot be loaded.
        OutputError: embeddings in ``out`` are of other patches or weights.
    """
    chosen = read_tasks(folder, tasks)
    requests = [request for request in (encoder, base) if request is not None]
    warnings: list[str] = []
    expression = {task.name: _expression(task, warnings, log) for task in chosen}
    contenders: dict[str, Callable[[Task, Sample], Array]] = {}
    for request in requests:
        name = name_of(request) + (", before alignment" if request is base else "")
        seen = sections_seen(request.name_or_path) & {s for task in chosen for s in task.samples}
        if seen:
            warnings.append(f"{name} saw {', '.join(sorted(seen))} in training; its numbers are too high")
        contenders[name] = partial(_embed, request.load(), out, batch_size, overwrite)
    contenders[HANDCRAFTED] = _handcrafted
    scores: dict[str, dict[str, list[FoldScore]]] = {name: {} for name in contenders}  # by task
    permuted: dict[str, NDArray[np.float64]] = {}  # by task, of the first contender
    for task in chosen:
        for name, embed in contenders.items():
            log(f"{task.name}: {name}")
            embeddings = {sample.name: embed(task, sample) for sample in task.samples.values()}
            times = 0 if task.name in permuted else PERMUTATIONS
            scores[name][task.name], r = score_task(task, embeddings, expression[task.name], times)
            permuted.setdefault(task.name, r)
    about = {
        "protocol": "HEST-Benchmark",
        "tasks": {
            t.name: {"samples": list(t.samples), "splits": len(t.splits), "genes": list(t.genes)}
            for t in chosen
        },
        "encoder": os.fspath(encoder.name_or_path),
        "base": None if base is None else os.fspath(base.name_or_path),
    }
    per_gene = {
        f"{name}, {task}": {score.fold: score.to_json() for score in splits}
        for name, by_task in scores.items()
        for task, splits in by_task.items()
    }
    return Report(
        REPORT, _tables(chosen, scores, permuted), about, warnings, {"pearson_r_per_gene": per_gene}
    )


def _expression(task: Task, warnings: list[str], log: Log) -> dict[str, Array]:
    """The expression of each sample; a warning is added if it was not measured as the benchmark takes it."""
    log(f"{task.name}: counts")
    read = {sample.name: read_expression(sample, task.genes) for sample in task.samples.values()}
    uneven = [name for name, (_, whole) in read.items() if not whole]
    if uneven:
        warnings.append(
            f"{task.name}: the counts of {', '.join(uneven)} are not whole numbers, and so not the raw "
            "counts of which the benchmark takes log1p"
        )
    return {name: values for name, (values, _) in read.items()}


def _tables(
    chosen: Sequence[Task],
    scores: Mapping[str, Mapping[str, list[FoldScore]]],
    permuted: Mapping[str, NDArray[np.float64]],
) -> list[Table]:
    """HEST's table, encoders by tasks; then a table of the splits of each task."""
    by_split = {
        name: {task: np.array([score.mean for score in splits]) for task, splits in by_task.items()}
        for name, by_task in scores.items()
    }
    first = next(iter(by_split))
    by_split[f"{first}, rows permuted"] = {task: r.mean(1) for task, r in permuted.items()}
    rows = []
    for name, found in by_split.items():
        means, spread = zip(*((float(r.mean()), float(r.std())) for r in found.values()), strict=True)
        rows.append(Row(name, means, spread))
    note = (
        "By the protocol of the HEST-Benchmark: mean ± standard deviation over its splits. Handcrafted "
        f"features and permuted rows ({PERMUTATIONS} orders) are not part of the benchmark."
    )
    columns, unit = tuple(task.name for task in chosen), "task" if len(chosen) > 1 else ""
    made = [Table("HEST-Benchmark, Pearson r", columns, tuple(rows), note, "average", unit)]
    for task in chosen:
        splits = scores[first][task.name]
        constant = [f"{split.fold} {split.constant}" for split in splits if split.constant]
        note = f"{len(task.genes)} genes."
        if constant:
            note += f" Constant genes are left out ({', '.join(constant)}); HEST's own code gives NaN there."
        lines = tuple(Row(name, tuple(found[task.name].tolist())) for name, found in by_split.items())
        title = f"HEST-Benchmark, {task.name}: Pearson r of each split"
        made.append(Table(title, tuple(split.fold for split in splits), lines, note, unit="split"))
    return made
