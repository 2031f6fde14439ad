"""Trained models that pool a stream of patches in one pass, with memory that does not grow with their number.

Ilse, Tomczak, Welling, "Attention-based Deep Multiple Instance Learning", 2018, arXiv 1802.04712: equations 7
to 9, in which a slide is the sum of its patches' hidden features, weighted by a softmax over all of them;
with a network per class, Lu et al., "Data-efficient and weakly supervised computational pathology on
whole-slide images", 2021, arXiv 2004.09666. The softmax is updated as patches arrive: Milakov,
Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv 1805.02867.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from seal_extract.encoders.files import WeightFile
from seal_extract.encoders.slide_encoders import SlideEncoder
from seal_extract.errors import CheckpointError
from seal_extract.pooling.slide_level import Pooled, Rows

PIECE = 4096  # patches in one matrix product; their hidden features take some megabytes
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": functional.relu, "gelu": functional.gelu}

DESCRIPTIONS = {
    "probabilities": "by the model's classifier: softmax over the classes, or sigmoid where it has one "
    "output; of a model that was trained on survival they are no probabilities of classes"
}

RowsAre = Literal["class", "branch", "head", "instance"]


class Linear(NamedTuple):
    """A layer: weight [out, in] and bias [out]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the precision of ``x``."""
        return functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Gate(NamedTuple):
    """An attention network: hidden [n, E] -> scores [n, C]; without ``sigmoid`` it is not gated."""

    tanh: Linear
    sigmoid: Linear | None
    score: Linear

    def __call__(self, hidden: Tensor) -> Tensor:
        """Equation 9 of Ilse et al., or 8 where it is not gated, before the softmax."""
        found = torch.tanh(self.tanh(hidden))
        if self.sigmoid is not None:
            found = found * torch.sigmoid(self.sigmoid(hidden))
        return self.score(found)


@dataclass(frozen=True)
class TrainedModel:
    """The facts of a checkpoint, whatever model it holds.

    Attributes:
        path: the checkpoint.
        kind: ``"CLAM_SB"``, ``"CLAM_MB"``, ``"ABMIL"``, ``"MIL_fc"`` or ``"MIL_fc_mc"``.
        layout: the tool whose names the layers have.
        sha256: of the file.
        rows_are: the meaning of a row of the attention: a class or branch, which has an embedding of its own;
            a head, several of which make one embedding; or the instance (patch) that was selected.
        made_for: the row of a slide encoder that was asked for by its name.
        weights: where the file of that row came from.
    """

    path: Path
    kind: str
    layout: str
    sha256: str
    rows_are: RowsAre
    made_for: SlideEncoder | None = field(default=None, kw_only=True)
    weights: WeightFile | None = field(default=None, kw_only=True)

    @property
    def name(self) -> str:
        """The name of the slide encoder, else that of the file, without suffix."""
        return self.made_for.name if self.made_for else self.path.stem

    @property
    def identity(self) -> dict[str, Any]:
        """See `Pooling.identity`."""
        return {"kind": self.kind, "sha256": self.sha256}

    @property
    def facts(self) -> dict[str, Any]:
        """See `Pooling.facts`."""
        facts = {"checkpoint": self.path.name, "layout": self.layout, "rows_are": self.rows_are}
        if self.made_for is None or self.weights is None:
            return facts
        row, file = self.made_for, self.weights
        source = row.source if file.revision else None  # no folder of this machine
        return {
            **facts,
            "made_for": {"encoder": row.encoder, "columns": row.encoder_dim, "patches": row.trained_at},
            **{"source": source, "revision": file.revision, "pinned": file.pinned},
        }

    def check_finite(self, found: Tensor) -> None:
        """Refuse scores that are not numbers.

        Raises:
            CheckpointError: a score is NaN or infinite.
        """
        if not bool(torch.isfinite(found).all()):
            raise CheckpointError(
                f"{self.path} gives scores that are not finite; was it trained on features of this encoder?"
            )


@dataclass(frozen=True)
class AttentionPooling(TrainedModel):
    """The attention of a trained model, and its slide classifier if that has a known form.

    Computed on the CPU in float32, summed in float64.

    Attributes:
        embed: layers from features [D] to hidden features [E], an activation after each; may be none.
        activation: of those layers, and of ``after``.
        gates: attention networks; their rows of scores follow each other.
        norms: a LayerNorm between each of the layers and its activation; may be none.
        split: each attention network has a share of the hidden features [n, H E] of its own, in order.
        sums_input: the features [D] are summed, and the hidden ones make the attention only.
        condense: from all heads' sums to one embedding, where there are several.
        after: one more layer on the embedding.
        classifier: one layer on the embedding, or one for each class on the class's own embedding. The class
            probabilities are the softmax of what they give; a single output is the logit of class 1.
    """

    embed: tuple[Linear, ...]
    activation: str
    gates: tuple[Gate, ...]
    condense: Linear | None = None
    after: Linear | None = None
    classifier: tuple[Linear, ...] = ()
    norms: tuple[Linear, ...] = ()
    split: bool = False
    sums_input: bool = False

    @property
    def dim(self) -> int:
        """Width of the features it takes."""
        first = self.embed[0] if self.embed else self.gates[0].tanh
        return int(first.weight.shape[1])

    @property
    def hidden_dim(self) -> int:
        """Width of the features that are summed."""
        return self.dim if self.sums_input else int(self.gates[0].tanh.weight.shape[1])

    def __repr__(self) -> str:
        rows = sum(len(gate.score.bias) for gate in self.gates)
        return (
            f"AttentionPooling({self.path.name}: {self.kind} as {self.layout} saves it, "
            f"{self.dim} -> {self.hidden_dim}, attention of {rows})"
        )

    def pool(self, pieces: Iterable[Rows], count: int) -> Pooled:
        """See `Pooling.pool`.

        Raises:
            CheckpointError: the network's scores are not finite.
        """
        rows = sum(len(gate.score.bias) for gate in self.gates)
        highest = torch.full((rows, 1), -torch.inf, dtype=torch.float64)
        weight = torch.zeros((rows, 1), dtype=torch.float64)  # sum of exp(score - highest)
        total = torch.zeros((rows, self.hidden_dim), dtype=torch.float64)
        scores = torch.empty((rows, count))  # one allocation does not fragment the heap
        start = 0
        with torch.inference_mode():
            for patches in in_small_pieces(pieces):
                hidden = self._hidden(patches)  # float32 [n, E], or [n, H E] where each gate has its share
                seen = hidden.chunk(len(self.gates), 1) if self.split else [hidden] * len(self.gates)
                gated = [gate(own) for gate, own in zip(self.gates, seen, strict=True)]
                found = torch.cat(gated, 1).T  # [C, n]
                self.check_finite(found)
                scores[:, start : start + len(patches)] = found
                start += len(patches)
                now = torch.maximum(highest, found.double().amax(1, keepdim=True))
                before, shares = (highest - now).exp(), (found.double() - now).exp()
                weight = weight * before + shares.sum(1, keepdim=True)
                summed = seen if self.split else [patches if self.sums_input else hidden]
                parts = zip(shares.chunk(len(summed)), summed, strict=True)
                total = total * before + torch.cat([share @ own.double() for share, own in parts])
                highest = now
            attention = torch.empty_like(scores)
            for row in range(rows):  # one at a time, in float64
                attention[row] = (scores[row].double() - highest[row]).exp() / weight[row]
            features = self._embedding(total / weight)
            probabilities = self._probabilities(features)
        return Pooled(
            features.float().numpy(), scores.numpy(), attention.numpy(), probabilities, DESCRIPTIONS
        )

    def _hidden(self, patches: Tensor) -> Tensor:
        """float32 [n, D] -> [n, E]."""
        for layer, norm in zip_longest(self.embed, self.norms):
            patches = layer(patches)
            if norm is not None:
                patches = functional.layer_norm(patches, norm.bias.shape, norm.weight, norm.bias)
            patches = ACTIVATIONS[self.activation](patches)
        return patches

    def _embedding(self, sums: Tensor) -> Tensor:
        """The weighted sums [C, E] -> the features of the slide."""
        if self.rows_are == "head" or len(sums) == 1:
            sums = sums.flatten()
        if self.condense is not None:
            sums = self.condense(sums)
        if self.after is not None:
            sums = ACTIVATIONS[self.activation](self.after(sums))
        return sums

    def _probabilities(self, features: Tensor) -> NDArray[np.float32] | None:
        if not self.classifier:
            return None
        rows = features.reshape(len(self.classifier), -1)
        logits = torch.cat([layer(row) for layer, row in zip(self.classifier, rows, strict=True)])
        if len(logits) == 1:
            logits = torch.cat([torch.zeros_like(logits), logits])
        return logits.softmax(0).float().numpy()


@dataclass(frozen=True)
class TopInstance(TrainedModel):
    """The two models that CLAM trains as ``--model_type mil``, which select one patch of the slide.

    Each patch has class probabilities of its own. With two classes (`MIL_fc`) the patch with the highest
    probability of class 1 is selected, also where the slide is of class 0; with more classes (`MIL_fc_mc`)
    the patch with the highest probability of any class. There is no attention. The datasets keep the rule
    that the embedding is the sum of the hidden features weighted by the attention: the attention is 1 at the
    selected patch and 0 elsewhere, its scores are the compared probabilities, and the features and
    probabilities are those of the selected patch. Computed on the CPU in float32.

    Attributes:
        embed: from features [D] to hidden features, a ReLU after it.
        classifier: from hidden features to the classes.
    """

    embed: Linear
    classifier: Linear

    @property
    def dim(self) -> int:
        """Width of the features it takes."""
        return int(self.embed.weight.shape[1])

    def __repr__(self) -> str:
        hidden, classes = self.embed.weight.shape[0], self.classifier.weight.shape[0]
        return f"TopInstance({self.path.name}: {self.kind}, {self.dim} -> {hidden}, {classes} classes)"

    def pool(self, pieces: Iterable[Rows], count: int) -> Pooled:
        """See `Pooling.pool`; of patches with equal probabilities the first is selected.

        Raises:
            CheckpointError: the network's scores are not finite.
        """
        scores, start, top = torch.empty((1, count)), 0, -1
        features = probabilities = torch.empty(0)
        with torch.inference_mode():
            for patches in in_small_pieces(pieces):
                hidden = functional.relu(self.embed(patches))
                of_patch = self.classifier(hidden).softmax(1)  # [n, K]
                self.check_finite(of_patch)
                found = of_patch[:, 1] if of_patch.shape[1] == 2 else of_patch.amax(1)
                scores[0, start : start + len(patches)] = found
                best = int(found.argmax())
                if top < 0 or found[best] > scores[0, top]:
                    top, features, probabilities = start + best, hidden[best].clone(), of_patch[best].clone()
                start += len(patches)
        attention = torch.zeros_like(scores)
        attention[0, top] = 1
        compared = "of class 1" if len(probabilities) == 2 else "of its most probable class"
        return Pooled(
            features.numpy(),
            scores.numpy(),
            attention.numpy(),
            probabilities.numpy(),
            {
                "features": "hidden features of the one patch that CLAM's mil selected",
                "attention": "1 at the one patch that CLAM's mil selected, 0 elsewhere; it has no attention",
                "attention_scores": f"the probability {compared}, by which CLAM's mil compares patches",
                "probabilities": "class probabilities of the one patch that CLAM's mil selected",
            },
        )


def in_small_pieces(pieces: Iterable[Rows]) -> Iterator[Tensor]:
    """Cut pieces so that each is float32 [n, D] with ``n`` at most ``PIECE``."""
    for piece in pieces:
        for start in range(0, len(piece), PIECE):
            yield torch.from_numpy(np.ascontiguousarray(piece[start : start + PIECE], np.float32))
