"""What pools a slide's patches: their mean here, attention in the modules that need torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
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
        scores: float32 [C, N], what the attention network said of each patch; None without attention.
        attention: float32 [C, N], their softmax over the patches: each row sums to 1.
        probabilities: float32 [K], of each class by the model's classifier; None without one.
        descriptions: dataset of the file -> a sentence about it, where its name does not say enough.
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
        """In the names of folders, before the encoder's."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides its numbers, as JSON: kind, and sha256 of the checkpoint."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """What else is worth knowing of it, as JSON."""
        ...

    @property
    def dim(self) -> int | None:
        """Width of the features it takes; None for any."""
        ...

    def pool(self, pieces: Iterable[Rows], count: int) -> Pooled:
        """Pool the ``count`` patches of a slide, one or more, which come piece by piece: [B, D]."""
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


def open_pooling(asked: str | Path) -> Pooling:
    """The mean, or the pooling that a checkpoint holds.

    Args:
        asked: ``"mean"``, or the file of a CLAM or ABMIL model; see `checkpoint` for the layouts known.

    Raises:
        UsageError: neither.
        CheckpointError: the file is no such model, or not exactly.
    """
    if str(asked) == MEAN:
        return MeanPooling()
    path = Path(asked)
    if not path.exists():
        raise UsageError(
            f"--slide-level {asked} is no file; allowed: {MEAN}, or the checkpoint (.pt, .pth, .safetensors) "
            f"of a CLAM (also its mil) or ABMIL model"
        )
    if path.stem == MEAN:
        raise UsageError(f"--slide-level {asked} would be filed as the {MEAN}; rename the file")
    from seal_extract.pooling.checkpoint import read_model

    return read_model(path)


def check_width(pooling: Pooling, dim: int, of: str) -> None:
    """Refuse features that a model was not made for.

    Args:
        pooling: from `open_pooling`.
        dim: columns of the features.
        of: the encoder that made them, for the message.

    Raises:
        UsageError: its input has another width.
    """
    if pooling.dim not in (None, dim):
        raise UsageError(
            f"the model {pooling.name} takes features of {pooling.dim} columns, those of {of} have {dim}; "
            f"give the checkpoint that was trained on {of}, or another --encoder"
        )
