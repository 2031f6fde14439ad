"""One training loop for every method: AdamW, cosine schedule, checkpoints, early stopping, loss curves.

Order, augmentation and dropout of an epoch depend only on the seed and the epoch's number, so that a resumed
run gives the same weights as one that was never stopped. Several GPUs run through accelerate, each with its
own batches and the negatives in them: ``accelerate launch -m seal_extract.cli train CONFIG.toml``.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from msgspec import to_builtins
from torch import Tensor, nn

from seal_extract.errors import SealExtractError, UsageError
from seal_extract.publish import publish
from seal_extract.train.config import LoopOptions, full_precision
from seal_extract.train.formats.source import needed
from seal_extract.train.pairs import Batches

MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # as accelerate calls them
STEPS_UNWATCHED = 64  # until the losses are looked at, for which the device has to be waited for
CHECKPOINT, METRICS, CURVES = "checkpoint.pt", "metrics.csv", "curves.png"
BATCHNORM = ("running_mean", "running_var", "num_batches_tracked")
Weights = dict[str, Tensor]
Row = dict[str, float]


class TrainingError(SealExtractError):
    """The loss is NaN or infinite; the last checkpoint is kept."""


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
    """Train the weights of ``model`` that require gradients, and leave it with those of the best epoch.

    Args:
        model: called with a batch and a seed, returns the terms of its loss.
        batches: to train on.
        validation: its loss, without augmentation, selects the best epoch and stops the run early; without
            it the last epoch is kept.
        folder: for ``checkpoint.pt``, ``metrics.csv`` and ``curves.png``, written after each epoch. A
            checkpoint in it is resumed.
        options: optimiser and schedule.
        identity: what else determines the result, as JSON; a checkpoint with another identity is refused.
        on_epoch: called with the row of each epoch.

    Returns:
        A row per epoch, including those before a resume.

    Raises:
        UsageError: a checkpoint with other options; accelerate is not installed.
        TrainingError: the loss is NaN or infinite.
        OutputError: the folder cannot be written.
    """
    run = _Run(model, batches, folder, options, {**to_builtins(options), **(identity or {})})
    run.resume()
    for epoch in range(len(run.rows), options.epochs):
        if options.patience and epoch - 1 - run.best_epoch >= options.patience:
            break
        row = run.train_epoch(epoch)
        if validation is not None:
            row["validation"] = run.validation_loss(validation)
        run.rows.append(row)
        if row.get("validation", -math.inf) < run.best_loss:
            run.best, run.best_epoch = trained_weights(model), epoch
            run.best_loss = row.get("validation", math.inf)
        if run.accelerator.is_main_process:
            run.save()
        if on_epoch is not None:
            on_epoch(row)
    load_trained(model, run.best)
    return run.rows


class _Run:
    """The state of a run: what a checkpoint holds."""

    def __init__(
        self, model: nn.Module, batches: Batches, folder: Path, options: LoopOptions, identity: dict[str, Any]
    ) -> None:
        self.accelerator = needed("accelerate").Accelerator(
            mixed_precision=MIXED[options.precision], gradient_accumulation_steps=options.accumulate
        )
        self.model, self.batches, self.folder, self.options = model, batches, folder, options
        self.identity = json.loads(json.dumps(identity))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=options.lr, weight_decay=options.weight_decay)
        steps = math.ceil(len(batches) // self.accelerator.num_processes / options.accumulate)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _cosine(options, steps))
        self.wrapped, self.optimiser = self.accelerator.prepare(model, optimiser)
        self.rows: list[Row] = []
        self.best: Weights = {}  # of the epoch with the lowest validation loss; without one, of the last
        self.best_loss, self.best_epoch = math.inf, -1

    def train_epoch(self, epoch: int) -> Row:
        """One pass over the pairs: the learning rate, the mean of each term of the loss, the seconds."""
        started, a, options = perf_counter(), self.accelerator, self.options
        torch.manual_seed(options.seed * 100_003 + epoch)  # of dropout and sampling
        self.wrapped.train()
        sums: dict[str, Tensor] = {}  # on the device
        losses: list[Tensor] = []
        for batch in self.batches.epoch(epoch, a.process_index, a.num_processes):
            with a.accumulate(self.wrapped):
                seed = combined_seed(options.seed, epoch, len(losses))
                terms = self.wrapped(batch.to(a.device), seed=seed)
                loss = torch.stack(list(terms.values())).sum()
                losses.append(loss.detach())
                a.backward(loss)
                if a.sync_gradients:
                    a.clip_grad_norm_(self.wrapped.parameters(), options.clip)
                self.optimiser.step()
                if a.sync_gradients:
                    self.schedule.step()
                self.optimiser.zero_grad()
            for name, value in {**terms, "loss": loss}.items():
                sums[name] = sums.get(name, 0) + value.detach().double()
            if len(losses) % STEPS_UNWATCHED == 0:
                self._check(losses, epoch)
        self._check(losses, epoch)
        row = {"epoch": epoch + 1, "lr": float(self.schedule.get_last_lr()[0])}
        row.update({name: value.item() / len(losses) for name, value in sums.items()})
        return row | {"seconds": round(perf_counter() - started, 2)}

    def _check(self, losses: list[Tensor], epoch: int) -> None:
        """Stop if a loss of the epoch is no number."""
        for count, loss in enumerate(torch.stack(losses).tolist(), 1):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss of epoch {epoch + 1}, batch {count} is {loss}; {CHECKPOINT} of "
                    f'epoch {epoch} is kept in {self.folder}; type a lower lr, or precision = "float32"'
                )

    def validation_loss(self, batches: Batches) -> float:
        """The mean loss of all pairs, without augmentation, dropout or sampling."""
        self.model.eval()
        total, pairs = 0.0, 0
        with torch.no_grad(), self.accelerator.autocast():
            for batch in batches.whole():
                on_device = batch.to(self.accelerator.device, patches=False)
                total += len(batch) * sum(value.item() for value in self.model(on_device).values())
                pairs += len(batch)
        return total / pairs

    def save(self) -> None:
        """Write the checkpoint, the table and its curves."""
        checkpoint = {
            "identity": json.dumps(self.identity),
            "rows": json.dumps(self.rows),
            "trained": trained_weights(self.model),
            "best": self.best,
            "best_loss": self.best_loss,
            "best_epoch": self.best_epoch,
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
        }
        with publish(self.folder / CHECKPOINT) as part:
            torch.save(checkpoint, part)
        with publish(self.folder / METRICS) as part, part.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(self.rows[0]))
            table.writeheader()
            table.writerows(self.rows)
        _draw_curves(self.rows, self.folder / CURVES)

    def resume(self) -> None:
        """Load the checkpoint in the folder, if there is one."""
        path = self.folder / CHECKPOINT
        if not path.is_file():
            return
        try:
            checkpoint = torch.load(path, map_location=self.accelerator.device, weights_only=True)
            before = json.loads(checkpoint["identity"])
        except Exception as exc:
            raise UsageError(f"{path} is no checkpoint of this package; choose another folder") from exc
        for options in (before, before.get("config", {}).get("loop", {})):
            if "precision" in options:  # an older version wrote the short name
                options["precision"] = full_precision(options["precision"])
        for name in self.identity.keys() | before.keys():
            if self.identity.get(name) != before.get(name):
                raise UsageError(
                    f"{path} was made with {name} = {before.get(name)}, not {self.identity.get(name)}; "
                    "choose another folder, or type the options of before"
                )
        load_trained(self.model, checkpoint["trained"])
        self.optimiser.load_state_dict(checkpoint["optimiser"])
        self.schedule.load_state_dict(checkpoint["schedule"])
        if self.accelerator.scaler is not None and checkpoint.get("scaler"):  # an older version kept none
            self.accelerator.scaler.load_state_dict(checkpoint["scaler"])
        self.rows, self.best = json.loads(checkpoint["rows"]), checkpoint["best"]
        self.best_loss, self.best_epoch = checkpoint["best_loss"], checkpoint["best_epoch"]


def _cosine(options: LoopOptions, steps_of_epoch: int) -> Callable[[int], float]:
    """Factor of the learning rate at each step: a linear warm-up, then half a cosine down to 0."""
    steps = options.epochs * steps_of_epoch
    warmup = max(1, round(options.warmup * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def combined_seed(*numbers: int) -> int:
    """One seed from several numbers."""
    value = 0
    for number in numbers:
        value = (value * 1_000_003 + number + 1) % 2**31
    return value


def trained_weights(model: nn.Module) -> Weights:
    """A copy of what training changes: weights that require gradients, and the statistics of BatchNorm."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    trained |= {name for name, _ in model.named_buffers() if name.rpartition(".")[2] in BATCHNORM}
    return {k: v.detach().clone() for k, v in model.state_dict().items() if k in trained}


def load_trained(model: nn.Module, weights: Weights) -> None:
    """Put the weights of `trained_weights` back; a `UsageError` if they are of another model."""
    odd = sorted(trained_weights(model).keys() ^ weights.keys())
    if odd:
        raise UsageError(f"the checkpoint is of another model: {odd[0]} and {len(odd) - 1} more do not fit")
    model.load_state_dict(weights, strict=False)  # frozen weights are not in it


def _draw_curves(rows: list[Row], path: Path) -> None:
    """A picture with a panel for each term of the loss, over the epochs."""
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
