"""One loop for every method: AdamW, a cosine after a warm-up, checkpoints, early stop, a table, its curves.

Order, variation and dropout of an epoch depend on the seed and its number alone, so that a run that was
stopped goes on as if it had not been. Several GPUs are accelerate's, each with its own batches and the
negatives in them: ``accelerate launch -m seal_extract.cli train CONFIG.toml``.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from seal_extract.errors import SealExtractError, UsageError, how_to_install
from seal_extract.publish import publish
from seal_extract.train.batches import Batches
from seal_extract.train.config import LoopOptions, full_precision

MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # as accelerate calls them
CHECKPOINT, METRICS, CURVES = "checkpoint.pt", "metrics.csv", "curves.png"
State = dict[str, Tensor]
Row = dict[str, float]


class TrainingError(SealExtractError):
    """A loss that is no number any more; the last good checkpoint stays."""


def train(
    model: nn.Module,
    batches: Batches,
    validation: Batches | None,
    folder: Path,
    options: LoopOptions,
    *,
    identity: Mapping[str, Any] | None = None,
    on_epoch: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Train the weights of ``model`` that ask for gradients, and leave it with the best of them.

    Args:
        model: called with a batch and a seed, gives the terms of its loss.
        batches: to train on.
        validation: its loss, without variation, tells the best epoch and when to stop; the last epoch is
            kept without it.
        folder: gets ``checkpoint.pt``, ``metrics.csv`` and ``curves.png``, anew after each epoch; a
            checkpoint that is there is gone on with.
        options: all choices.
        identity: what else decides the result, as JSON; a checkpoint of another is refused.
        on_epoch: told the row of each epoch.

    Returns:
        A row per epoch, those before a resume included.

    Raises:
        UsageError: a checkpoint of other options; accelerate is missing.
        TrainingError: the loss is no finite number.
        OutputError: the folder cannot be written.
    """
    run = _Run(model, batches, options, folder, {**asdict(options), **(identity or {})})
    run.resume()
    while run.next_epoch < options.epochs and not run.is_over():
        row = run.epoch()
        if validation is not None:
            row["validation"] = run.validate(validation)
        run.keep(row, row.get("validation"))
        if on_epoch is not None:
            on_epoch(row)
    load_trained(run.bare, run.best)
    return run.rows


class _Run:
    def __init__(
        self, model: nn.Module, batches: Batches, options: LoopOptions, folder: Path, identity: dict[str, Any]
    ) -> None:
        Accelerator = _accelerator()
        self.accelerator = Accelerator(
            mixed_precision=MIXED[options.precision], gradient_accumulation_steps=options.accumulate
        )
        self.batches, self.options, self.folder = batches, options, folder
        self.identity = json.loads(json.dumps(identity))
        self.bare = model
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=options.lr, weight_decay=options.weight_decay)
        per_epoch = math.ceil(len(batches) // self.accelerator.num_processes / options.accumulate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _cosine(options, per_epoch))
        self.model, self.optimiser = self.accelerator.prepare(model, optimiser)
        self.rows: list[Row] = []
        self.next_epoch, self.best_loss, self.best_epoch = 0, math.inf, -1
        self.best: State = {}

    def epoch(self) -> Row:
        """One pass over the pairs."""
        number, started, a = self.next_epoch, perf_counter(), self.accelerator
        torch.manual_seed(self.options.seed * 100_003 + number)  # of dropout and samples
        self.model.train()
        sums: dict[str, float] = {}
        count = 0
        stream = self.batches.epoch(number, a.process_index, a.num_processes)
        for i, batch in enumerate(stream):
            with a.accumulate(self.model):
                terms = self.model(batch.to(a.device), seed=hash_of(self.options.seed, number, i))
                loss = torch.stack(list(terms.values())).sum()
                if not loss.isfinite():
                    raise TrainingError(
                        f"the loss of epoch {number + 1}, batch {i + 1} is {loss.item()}; {CHECKPOINT} "
                        f"of epoch {number} stays in {self.folder}; type a lower lr, or "
                        'precision = "float32"'
                    )
                a.backward(loss)
                if a.sync_gradients:
                    a.clip_grad_norm_(self.model.parameters(), self.options.clip)
                self.optimiser.step()
                if a.sync_gradients:
                    self.schedule.step()
                self.optimiser.zero_grad()
            for name, value in {**terms, "loss": loss}.items():
                sums[name] = sums.get(name, 0.0) + value.item()
            count += 1
        self.next_epoch += 1
        means = {name: value / count for name, value in sums.items()}
        seconds = round(perf_counter() - started, 2)
        return {"epoch": number + 1, "lr": float(self.schedule.get_last_lr()[0]), **means, "seconds": seconds}

    def validate(self, batches: Batches) -> float:
        """The loss of all pairs, in the means of the samples drawn while training."""
        self.model.eval()
        losses: list[float] = []
        weights: list[int] = []
        with torch.no_grad(), self.accelerator.autocast():
            for batch in batches.whole():
                losses.append(sum(v.item() for v in self.bare(batch.to(self.accelerator.device)).values()))
                weights.append(len(batch))
        return sum(x * w for x, w in zip(losses, weights, strict=True)) / sum(weights)

    def is_over(self) -> bool:
        """No better epoch for as long as patience lasts."""
        patience = self.options.patience
        return bool(patience) and self.next_epoch - 1 - self.best_epoch >= patience

    def keep(self, row: Row, validation: float | None) -> None:
        """Write down an epoch."""
        self.rows.append(row)
        if validation is None or validation < self.best_loss:
            self.best_loss = math.inf if validation is None else validation
            self.best_epoch, self.best = self.next_epoch - 1, trained_state(self.bare)
        if not self.accelerator.is_main_process:
            return
        state = {
            "identity": json.dumps(self.identity),
            "rows": json.dumps(self.rows),
            "trained": trained_state(self.bare),
            "best": self.best,
            "best_loss": self.best_loss,
            "best_epoch": self.best_epoch,
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        path = self.folder / CHECKPOINT
        with publish(path) as part:
            torch.save(state, part)
        _write_table(self.rows, self.folder / METRICS)
        draw_curves(self.rows, self.folder / CURVES)

    def resume(self) -> None:
        """Go on with the checkpoint in the folder, if there is one."""
        path = self.folder / CHECKPOINT
        if not path.is_file():
            return
        try:
            state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
            before = json.loads(state["identity"])
        except Exception as exc:
            raise UsageError(f"{path} is no checkpoint of this package; choose another folder") from exc
        for loop in (before, before.get("config", {}).get("loop", {})):
            if "precision" in loop:  # an older version wrote the short name
                loop["precision"] = full_precision(loop["precision"])
        for name in self.identity.keys() | before.keys():
            if self.identity.get(name) != before.get(name):
                raise UsageError(
                    f"{path} was made with {name} = {before.get(name)}, not {self.identity.get(name)}; "
                    "choose another folder, or the options of before"
                )
        self.rows = json.loads(state["rows"])
        self.next_epoch = len(self.rows)
        self.best, self.best_loss, self.best_epoch = state["best"], state["best_loss"], state["best_epoch"]
        load_trained(self.bare, state["trained"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])


def hash_of(*numbers: int) -> int:
    """A seed out of several."""
    value = 0
    for number in numbers:
        value = (value * 1_000_003 + number + 1) % 2**31
    return value


def trained_state(model: nn.Module) -> State:
    """A copy of what training changes: the weights that ask for gradients, and BatchNorm's statistics."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    kept = {name for name, _ in model.named_buffers() if name.rpartition(".")[2] in _STATISTICS}
    return {k: v.detach().clone() for k, v in model.state_dict().items() if k in trained | kept}


def load_trained(model: nn.Module, state: State) -> None:
    """The way back from `trained_state`.

    Raises:
        UsageError: a state of another model.
    """
    wanted = trained_state(model)
    if wanted.keys() != state.keys():
        odd = sorted(wanted.keys() ^ state.keys())
        raise UsageError(f"the checkpoint is of another model: {odd[0]} and {len(odd) - 1} more do not fit")
    model.load_state_dict(state, strict=False)  # what is frozen is not in it


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _cosine(options: LoopOptions, per_epoch: int) -> Callable[[int], float]:
    steps = options.epochs * per_epoch
    rising = max(1, round(options.warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return factor


def _accelerator() -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as exc:
        raise UsageError(f"accelerate is not installed; {how_to_install('train')}") from exc
    return Accelerator


def _write_table(rows: list[Row], path: Path) -> None:
    with publish(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def draw_curves(rows: list[Row], path: Path) -> None:
    """Every term of the loss over the epochs, as a picture."""
    from matplotlib.figure import Figure

    names = [name for name in rows[0] if name not in ("epoch", "lr", "seconds")]
    figure = Figure(figsize=(3.2 * len(names), 2.6), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axis.plot(epochs, [row[name] for row in rows], color="#5b3a8c", marker="o", markersize=2.5)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("epoch", fontsize=9)
        axis.grid(alpha=0.25)
    with publish(path) as part:
        figure.savefig(part, dpi=120, format="png")
