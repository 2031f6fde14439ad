"""The heads of slide-level evaluation, with Patho-Bench's settings: ABMIL, mean MIL, linear probe and Cox.

Source: mahmoodlab/Patho-Bench at 660e770 (arXiv 2502.06750) and ABMILSlideEncoder of mahmoodlab/TRIDENT at
a91fa84. The parameters have their names, so that their classes and `--slide-level` load a trained head.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from seal_extract.evaluate.cox import ALPHAS, L1_RATIO, fit_cox
from seal_extract.features.store import SlideFeatures
from seal_extract.pooling.slide_level import readable_pieces, unreadable_rows

ABMIL, MEAN_MIL, PROBE = "abmil", "mean-mil", "linear-probe"
COX = {f"cox-{alpha:g}": alpha for alpha in ALPHAS}
OF_CLASSES = (ABMIL, MEAN_MIL, PROBE)
ATTENTION_DIM, DROPOUT, ATTENTION_DROPOUT = 512, 0.1, 0.25
BAG, EPOCHS = 2048, 20  # patches, passes over the samples
LEARNING_RATE, LAST_RATE, WEIGHT_DECAY = 3e-4, 1e-8, 1e-5
C, PROBE_STEPS = 0.5, 10_000
WORKERS = 4  # of Patho-Bench's loader
SETTINGS: dict[str, dict[str, Any]] = {
    ABMIL: {
        "model": f"Linear, GELU, dropout {DROPOUT}; attention of {ATTENTION_DIM}, tanh, dropout "
        f"{ATTENTION_DROPOUT}; Linear, GELU, dropout {DROPOUT}; Linear",
        "optimizer": f"AdamW, learning rate {LEARNING_RATE}, weight decay {WEIGHT_DECAY}, cosine per step to "
        f"{LAST_RATE}",
        "epochs": EPOCHS,
        "bag": BAG,
        "checkpoint": "last",
    },
    PROBE: {"model": f"logistic regression on mean-pooled features, C {C}, balanced classes"},
    **{name: {"model": f"Cox, elastic net, alpha {a}, l1 ratio {L1_RATIO}"} for name, a in COX.items()},
}
SETTINGS[MEAN_MIL] = SETTINGS[ABMIL] | {"attention": "equal for all patches"}
Array = NDArray[Any]


@dataclass(frozen=True)
class Bag:
    """The patches of a sample, which stay in their files.

    Attributes:
        parts: slides whose patches are pooled together; the embeddings of several parts are averaged.
    """

    parts: tuple[tuple[SlideFeatures, ...], ...]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Patches of each part that could be read."""
        return tuple(sum(len(s.grid) - len(unreadable_rows(s)) for s in part) for part in self.parts)

    @cached_property
    def mean(self) -> NDArray[np.float32]:
        """float32 [D], of all patches of a part, then over the parts."""
        means = []
        for part, count in zip(self.parts, self.counts, strict=True):
            pieces = (piece for slide in part for piece in readable_pieces(slide))
            means.append(sum(piece.sum(0, dtype=np.float64) for piece in pieces) / count)
        mean: NDArray[np.float32] = np.mean(means, 0).astype(np.float32)
        return mean

    def read(self, drawn: Sequence[Tensor | None]) -> list[Tensor]:
        """The rows drawn of each part, in that order, float32 [n, D]; None stands for all."""
        return [_read(part, rows) for part, rows in zip(self.parts, drawn, strict=True)]


def _read(part: Sequence[SlideFeatures], rows: Tensor | None) -> Tensor:
    pieces = (np.asarray(piece, np.float32) for slide in part for piece in readable_pieces(slide))
    if rows is None:
        return torch.from_numpy(np.concatenate(list(pieces)))
    found, start = torch.empty((len(rows), part[0].dim)), 0
    for piece in pieces:
        here = (rows >= start) & (rows < start + len(piece))
        found[here] = torch.from_numpy(piece)[rows[here] - start]
        start += len(piece)
    return found


class SlideModel(nn.Module):
    """Patho-Bench's ABMIL and its classifier; in mean MIL the attention stays equal for all patches.

    Args:
        dim: D, columns of the features.
        classes: K.
        head: `ABMIL` or `MEAN_MIL`.
        seed: of the weights.
    """

    def __init__(self, dim: int, classes: int, head: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        before = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Dropout(DROPOUT))
        tanh = nn.Sequential(nn.Linear(dim, ATTENTION_DIM), nn.Tanh(), nn.Dropout(ATTENTION_DROPOUT))
        score = nn.Linear(ATTENTION_DIM, 1)
        after = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Dropout(DROPOUT))
        if head == MEAN_MIL:
            for parameter in score.parameters():
                nn.init.zeros_(parameter).requires_grad_(False)
        self.slide_encoder = nn.Module()
        self.slide_encoder.model = nn.ModuleDict({"pre_attention_layers": before})
        pooler = nn.Module()
        pooler.attention_heads, pooler.branching_layers = nn.ModuleList([tanh]), nn.ModuleList([score])
        self.slide_encoder.model.update({"image_pooler": pooler, "post_attention_layers": after})
        torch.manual_seed(seed)  # as Patho-Bench, after the encoder and before the classifier
        self.classification_head = nn.Linear(dim, classes)
        self._layers = before, tanh, score, after

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """Features [n, D] of each part to the logits [K] of the sample."""
        before, tanh, score, after = self._layers
        embeddings = []
        for patches in parts:
            hidden = before(patches[None])  # [1, n, D]
            attention = score(tanh(hidden)).softmax(1)
            embeddings.append(after(torch.einsum("bnr,bnf->brf", attention, hidden)[:, 0]))
        logits: Tensor = self.classification_head(torch.stack(embeddings).mean(0))[0]
        return logits


def train_model(
    bags: Sequence[Bag], truth: Array, classes: int, head: str, seed: int, device: torch.device
) -> SlideModel:
    """Train on one sample at a time.

    Patho-Bench weights its loss by class, but torch divides it by the sum of the weights of the batch: for
    one sample the weight cancels, so that there is none here.

    Args:
        bags: of the training samples.
        truth: int64 [N], their classes.
        classes: K.
        head: `ABMIL` or `MEAN_MIL`.
        seed: of weights, order, patches and dropout.
        device: to train on.
    """
    model = SlideModel(bags[0].parts[0][0].dim, classes, head, seed).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * len(bags)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, LAST_RATE)
    for _ in range(EPOCHS):
        for i, drawn in _shuffled(bags):
            logits = model([rows.to(device) for rows in bags[i].read(drawn)])
            loss = nn.functional.cross_entropy(logits, torch.tensor(truth[i], device=device))
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model


def predict_model(model: SlideModel, bags: Sequence[Bag], device: torch.device) -> NDArray[np.float32]:
    """Probabilities, float32 [N, K]; as in Patho-Bench, of a bag that is drawn."""
    model.eval()
    classes = model.classification_head.out_features
    nn.Linear(bags[0].parts[0][0].dim, classes)  # draws as much as Patho-Bench does before it loads a head
    found = np.empty((len(bags), classes), np.float32)
    with torch.inference_mode():
        for i, drawn in _shuffled(bags):
            logits = model([rows.to(device) for rows in bags[i].read(drawn)])
            found[i] = logits.softmax(0).cpu().numpy()
    return found


def _shuffled(bags: Sequence[Bag]) -> Iterator[tuple[int, list[Tensor | None]]]:
    """Samples in random order, each with the rows of its bag, drawn as by Patho-Bench's loader.

    torch's loader seeds each of its workers from one number, they take samples in turn, and Patho-Bench's
    data set draws each bag twice. A part with fewer patches than a bag is taken as it is.
    """
    base, order_seed = (int(torch.empty((), dtype=torch.int64).random_().item()) for _ in range(2))
    order = torch.randperm(len(bags), generator=torch.Generator().manual_seed(order_seed))
    workers = [torch.Generator().manual_seed(base + worker) for worker in range(WORKERS)]
    for place, i in enumerate(order.tolist()):
        source = workers[place % WORKERS]
        drawn = [
            [torch.randperm(n, generator=source)[:BAG] if n >= BAG else None for n in bags[i].counts]
            for _ in range(2)
        ]
        yield i, drawn[0]


# --- heads on mean-pooled features --------------------------------------------------------------------


def fit_linear_probe(x: Array, truth: Array) -> tuple[LogisticRegression, bool]:
    """Patho-Bench's logistic regression on mean-pooled features [N, D], and whether it settled."""
    probe = LogisticRegression(C=C, max_iter=PROBE_STEPS, class_weight="balanced", random_state=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        probe.fit(x, truth)
    return probe, not any(issubclass(one.category, ConvergenceWarning) for one in caught)


@dataclass(frozen=True, eq=False)
class Trained:
    """A head that was trained on a fold.

    Attributes:
        tensors: its weights, by the names that `--slide-level` reads.
        predicted: of the test samples: probabilities [N, K], or risks [N].
        settled: whether its optimisation ended by itself.
    """

    tensors: dict[str, Tensor]
    predicted: Array
    settled: bool = True


def train_head(
    head: str, bags: Sequence[Bag], truth: Array, test: Sequence[Bag], seed: int, device: torch.device
) -> Trained:
    """Train one head on one fold, and predict its test samples.

    Args:
        head: of `OF_CLASSES`, or of `COX` with times and events.
        bags: of the training samples.
        truth: their classes, or times and events.
        test: bags.
        seed: of all that is drawn.
        device: for ABMIL and mean MIL.
    """
    if head in (ABMIL, MEAN_MIL):
        model = train_model(bags, truth, int(truth.max()) + 1, head, seed, device)
        predicted = predict_model(model, test, device)
        return Trained({k: v.detach().cpu() for k, v in model.state_dict().items()}, predicted)
    x, x_test = (np.stack([bag.mean for bag in of]) for of in (bags, test))
    if head == PROBE:
        probe, settled = fit_linear_probe(x, truth)
        return Trained(_as_pooling(probe), probe.predict_proba(x_test), settled)
    coefficients, settled = fit_cox(x, truth[:, 0], truth[:, 1], COX[head])
    return Trained({"coefficients": torch.from_numpy(coefficients)}, x_test @ coefficients, settled)


def _as_pooling(probe: LogisticRegression) -> dict[str, Tensor]:
    """A probe as an attention model of AMLab's names, whose attention is equal for all patches."""
    values = (probe.coef_, probe.intercept_)
    weight, bias = (torch.from_numpy(np.ascontiguousarray(v, np.float32)) for v in values)
    if len(weight) == 1:  # of two classes, the logit of the second
        weight, bias = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros(1), bias])
    zeros = {"attention.0.weight": weight[:1] * 0, "attention.0.bias": torch.zeros(1)}
    zeros |= {"attention.2.weight": torch.zeros(1, 1), "attention.2.bias": torch.zeros(1)}
    return {**zeros, "classifier.weight": weight, "classifier.bias": bias}
