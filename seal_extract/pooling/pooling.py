"""Pooling: the interface, its result, and the mean; models that need torch are in `models`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError

MEAN = "mean"
Rows = NDArray[np.float32]  # [B, D], some patches of a slide


@dataclass(frozen=True)
class Pooled:
    """The patches of a slide, pooled.

    Attributes:
        features: float32 [D'], or [C, D'] where each class has its own attention.
        scores: float32 [C, N], the output of the attention network for each patch; None without attention.
        attention: float32 [C, N], their softmax over the patches: each row sums to 1.
        probabilities: float32 [K], one per class, from the model's classifier; None without one.
        descriptions: sentences about datasets of the file, by dataset, where the name does not say enough.
    """

    features: NDArray[np.float32]
    scores: NDArray[np.float32] | None = None
    attention: NDArray[np.float32] | None = None
    probabilities: NDArray[np.float32] | None = None
    descriptions: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        rows = "" if self.attention is None else f", attention {list(self.attention.shape)}"
        return f"Pooled({list(self.features.shape)}{rows})"


class Pooling(Protocol):
    """A way to pool; `open_pooling` gives one."""

    @property
    def name(self) -> str:
        """The name that is written before the encoder's in folder names."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the numbers, as JSON: kind, and sha256 of the checkpoint."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """Further facts, as JSON."""
        ...

    @property
    def dim(self) -> int | None:
        """Width of the features that it accepts; None for any."""
        ...

    def pool(self, pieces: Iterable[Rows], count: int) -> Pooled:
        """Pool the ``count`` patches of a slide, at least one, which arrive as pieces [B, D]."""
        ...


@dataclass(frozen=True)
class MeanPooling:
    """The arithmetic mean of all patches."""

    name = MEAN
    dim = None

    @property
    def identity(self) -> dict[str, Any]:
        """See `Pooling.identity`."""
        return {"kind": MEAN}

    @property
    def facts(self) -> dict[str, Any]:
        """See `Pooling.facts`."""
        return {}

    def pool(self, pieces: Iterable[Rows], count: int) -> Pooled:
        """See `Pooling.pool`; summed in float64."""
        total = sum(rows.sum(0, dtype=np.float64) for rows in pieces)
        return Pooled((total / count).astype(np.float32))


def check_width(pooling: Pooling, dim: int, of: str) -> None:
    """Refuse features of another width than the model accepts.

    Args:
        pooling: from `open_pooling`.
        dim: columns of the features.
        of: the name of the encoder, for the message.

    Raises:
        UsageError: the widths differ.
    """
    if pooling.dim not in (None, dim):
        raise UsageError(
            f"the model {pooling.name} takes features of {pooling.dim} columns, those of {of} have {dim}; "
            f"give the checkpoint that was trained on {of}, or another --encoder"
        )
