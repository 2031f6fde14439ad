"""Pairs of patch and spot in batches: every epoch its own order, which depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seal_extract.errors import UsageError
from seal_extract.train.pairs import Pairs

REGION = 9  # a patch and its eight neighbours
REACH = 1.6  # times the pitch: the diagonal of a square lattice is 1.41, its next ring 2


@dataclass(frozen=True)
class TrainBatch:
    """Patches with what was measured on them.

    Attributes:
        patches: uint8 [B, 3, S, S].
        expression: float32 [B, G], log1p of the panel.
        row: int64 [B], of each pair.
        region: int64 [B], which region of the batch each belongs to; None without regions.
        embedding: float32 [B, E], of another model; None without a table.
    """

    patches: Tensor
    expression: Tensor
    row: Tensor
    region: Tensor | None = None
    embedding: Tensor | None = None

    def __len__(self) -> int:
        return len(self.row)

    def to(self, device: torch.device) -> TrainBatch:
        """All of it on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)


class Batches:
    """Batches of pairs, or of whole regions of neighbouring pairs."""

    def __init__(self, pairs: Pairs, batch_size: int, seed: int = 0, *, regions: bool = False) -> None:
        """Hold the batch to the number of pairs.

        Args:
            pairs: from `make_pairs`.
            batch_size: pairs of a batch; with ``regions``, regions of a batch.
            seed: of the order.
            regions: batches of regions, each a patch with its neighbours.

        Raises:
            UsageError: fewer pairs than a batch.
        """
        if not 1 < batch_size <= len(pairs):
            raise UsageError(
                f"batch_size is {batch_size}, but {', '.join(pairs.names)} have {len(pairs)} pairs; "
                f"type batch_size = {min(64, len(pairs))}"
            )
        self.pairs, self.batch_size, self.seed = pairs, batch_size, seed
        self._regions = neighbourhoods(pairs) if regions else None

    def __len__(self) -> int:
        """Batches of an epoch; what does not fill one is left for the next epoch's other order."""
        return len(self.pairs) // self.batch_size

    def epoch(self, number: int, rank: int = 0, ranks: int = 1) -> Iterator[TrainBatch]:
        """The batches of an epoch, or every ``ranks``-th of them."""
        order = np.random.default_rng([self.seed, number]).permutation(len(self.pairs))
        for i in range(rank, len(self) - len(self) % ranks, ranks):
            yield self.take(order[i * self.batch_size : (i + 1) * self.batch_size])

    def whole(self) -> Iterator[TrainBatch]:
        """All pairs in order, section by section, for validation."""
        for section in np.unique(self.pairs.section):
            yield self.take(np.flatnonzero(self.pairs.section == section))

    def take(self, rows: NDArray[np.int64]) -> TrainBatch:
        """These pairs, or the regions around them."""
        region = None
        if self._regions is not None:
            members = self._regions[rows]  # int64 [R, 9], -1 where there is none
            kept = members >= 0
            region = torch.from_numpy(np.nonzero(kept)[0])
            rows = members[kept]
        table = self.pairs.embeddings
        return TrainBatch(
            torch.from_numpy(np.ascontiguousarray(self.pairs.patches[rows])),
            torch.from_numpy(self.pairs.expression[rows]),
            torch.from_numpy(rows),
            region,
            None if table is None else torch.from_numpy(table[rows]),
        )


def neighbourhoods(pairs: Pairs) -> NDArray[np.int64]:
    """Each pair and its nearest eight of the same section that touch it.

    Returns:
        int64 [N, 9], the pair itself first; -1 where a neighbour is missing.
    """
    from scipy.spatial import cKDTree

    found = np.full((len(pairs), REGION), -1, np.int64)
    for section in np.unique(pairs.section):
        rows = np.flatnonzero(pairs.section == section)
        tree = cKDTree(pairs.xy_um[rows])
        distance, nearest = tree.query(pairs.xy_um[rows], k=min(REGION, len(rows)))
        distance, nearest = distance.reshape(len(rows), -1), nearest.reshape(len(rows), -1)
        # of the nearest four: spots lie unevenly, and the nearest one alone is nearer than the pitch
        pitch = np.median(distance[:, 1:5]) if distance.shape[1] > 1 else 0.0
        near = distance <= REACH * pitch
        found[rows[:, None], np.arange(distance.shape[1])] = np.where(near, rows[nearest], -1)
    return found
