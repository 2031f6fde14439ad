"""CLAM's ``mil``: the slide is its most telling patch.

Each patch gets class probabilities of its own. Of two classes (`MIL_fc`) the patch is selected that is most
probably of class 1, also where the slide is of class 0; of more (`MIL_fc_mc`) the patch with the highest
probability of any class. There is no attention. What is written in its place keeps the rule of the others,
that the embedding is the sum of the hidden features weighted by it:

    features          the hidden features [512] of the selected patch, as ``return_features`` of CLAM has them
    attention         [1, N]: 1 at the selected patch, 0 elsewhere
    attention_scores  [1, N]: the probability by which patches are compared, no softmax over patches
    probabilities     the class probabilities of the selected patch, which are the slide's
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional

from seal_extract.pooling.attention import Linear, TrainedModel, small
from seal_extract.pooling.pooling import Pooled, Rows


@dataclass(frozen=True)
class TopInstance(TrainedModel):
    """The two models that CLAM trains as ``--model_type mil``; computed on the CPU in float32.

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
            for patches in small(pieces):
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
