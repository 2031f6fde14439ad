"""Tissue sections with expression measured on spots: the record, normalisation, neighbours, the panel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError

TARGET_SUM = 1e4  # counts per spot after scaling
LOG1P_MAX = 20.0  # log1p of 5e8: no spot has so many
LATTICES = {  # steps (row, column) from a spot to its true neighbours
    "hexagonal": ((0, 2), (0, -2), (1, 1), (1, -1), (-1, 1), (-1, -1)),
    "square": ((0, 1), (0, -1), (1, 0), (-1, 0)),
    "none": (),
}
Expression = NDArray[np.float32]


@dataclass(frozen=True, repr=False)
class Section:
    """One section with N spots and G genes.

    Attributes:
        name: of the section.
        patient: identifier of the patient.
        slide: the image that patches are cut from.
        mpp: µm/px at level 0 as the data state it; None where only the slide's file can state it.
        mpp_source: where the µm/px comes from.
        genes: the columns of ``counts``, each once.
        counts: [N, G], sparse (CSR) or dense; counts, or their log1p after scaling to 10,000 per spot.
        scale: ``"counts"`` or ``"log1p"``.
        xy_l0: float64 [N, 2], centres of the spots in level-0 pixels.
        barcodes: one per spot.
        array_rc: int64 [N, 2], row and column on the array; None where there are none.
        lattice: ``"hexagonal"`` (Visium), ``"square"`` or ``"none"``.
        embeddings: float32 [N, E] of another model, if the file has some.
        labels: class of each spot, empty where it has none; None without labels.

    Raises:
        UsageError: lengths that differ, a gene or barcode twice, values that contradict ``scale``.
    """

    name: str
    patient: str
    slide: Path
    mpp: float | None
    mpp_source: str
    genes: tuple[str, ...]
    counts: Any
    scale: str
    xy_l0: NDArray[np.float64]
    barcodes: tuple[str, ...]
    array_rc: NDArray[np.int64] | None = None
    lattice: str = "none"
    embeddings: Expression | None = None
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        n, g = self.counts.shape
        if (len(self.barcodes), len(self.xy_l0), len(self.genes)) != (n, n, g):
            raise UsageError(
                f"{self.name}: {len(self.barcodes)} barcodes, {len(self.xy_l0)} positions and "
                f"{len(self.genes)} genes for counts of {n} x {g}; they have to agree"
            )
        if not n:
            raise UsageError(
                f"{self.name} has no spot with both counts and a position; check the names of its spots"
            )
        for what, names in (("gene", self.genes), ("barcode", self.barcodes)):
            if len(set(names)) < len(names):
                twice = sorted(x for x, count in Counter(names).items() if count > 1)
                raise UsageError(
                    f"{self.name}: {len(twice)} {what}s occur twice, the first is {twice[0]}; make it unique"
                )
        _check_scale(self.name, self.counts, self.scale)

    def __repr__(self) -> str:
        mpp = "µm/px of the file" if self.mpp is None else f"{self.mpp:.4g} µm/px by {self.mpp_source}"
        return f"Section({self.name} of {self.patient}: {len(self)} spots, {len(self.genes)} genes, {mpp})"

    def __len__(self) -> int:
        return len(self.barcodes)

    def log1p(self, genes: Sequence[str] | None = None) -> Expression:
        """log1p of the counts, each spot scaled to 10,000 over all its genes.

        Args:
            genes: columns to return; all by default.

        Returns:
            float32 [N, len(genes)].

        Raises:
            UsageError: a gene that was not measured here.
        """
        values = self.counts if genes is None else self.counts[:, self._columns(genes)]
        values = np.asarray(values.toarray() if hasattr(values, "toarray") else values, np.float64)
        if self.scale == "log1p":
            return np.asarray(values, np.float32)
        total = np.asarray(self.counts.sum(axis=1), np.float64).reshape(-1, 1)
        return np.log1p(values / np.maximum(total, 1) * TARGET_SUM).astype(np.float32)

    def smoothed(self, expression: Expression) -> Expression:
        """Half of each spot plus half the mean of its neighbours; a spot without neighbours is unchanged.

        Args:
            expression: float32 [N, G] of this section.
        """
        neighbours = self.neighbours()
        there = neighbours >= 0  # bool [N, K]
        count = there.sum(1)
        mean = np.zeros_like(expression)
        for k in range(neighbours.shape[1]):
            rows = np.flatnonzero(there[:, k])
            mean[rows] += expression[neighbours[rows, k]]
        some = count > 0
        mean[some] /= count[some, None]
        out: Expression = expression.copy()
        out[some] = (expression[some] + mean[some]) / 2
        return out

    def neighbours(self) -> NDArray[np.int64]:
        """Rows of each spot's neighbours on the array: int64 [N, 6, 4 or 0], -1 where one is missing."""
        steps = LATTICES[self.lattice] if self.array_rc is not None else ()
        if not steps or self.array_rc is None:
            return np.empty((len(self), 0), np.int64)
        key = self.array_rc @ np.array([2**32, 1])  # readers hold rows and columns below 2**30
        order = np.argsort(key, kind="stable")
        wanted = key[:, None] + np.array(steps) @ np.array([2**32, 1])
        found = order[np.searchsorted(key[order], wanted, side="right") - 1]
        return np.where(key[found] == wanted, found, -1)

    def take(self, rows: NDArray[np.int64]) -> Section:
        """Some of the spots."""
        return replace(
            self,
            counts=self.counts[rows],
            xy_l0=self.xy_l0[rows],
            barcodes=tuple(self.barcodes[i] for i in rows),
            array_rc=None if self.array_rc is None else self.array_rc[rows],
            embeddings=None if self.embeddings is None else self.embeddings[rows],
            labels=None if self.labels is None else tuple(self.labels[i] for i in rows),
        )

    def _columns(self, genes: Sequence[str]) -> list[int]:
        place = {gene: i for i, gene in enumerate(self.genes)}
        missing = [gene for gene in genes if gene not in place]
        if missing:
            raise UsageError(
                f"{self.name} lacks {len(missing)} of {len(genes)} genes, the first {missing[0]}; it has "
                f"{self.genes[0]}, {self.genes[-1]} and so on{_ids(genes, self.genes)}"
            )
        return [place[gene] for gene in genes]


def choose_panel(sections: Sequence[Section], count: int) -> tuple[str, ...]:
    """The most variable genes: highest variance of log1p within a section, averaged over sections.

    Args:
        sections: the training sections only.
        count: how many genes; only genes that every section has are considered.

    Returns:
        The most variable first; ties in alphabetical order.

    Raises:
        UsageError: fewer genes in common, or Ensembl ids in one and symbols in another.
    """
    common = sorted(set.intersection(*(set(s.genes) for s in sections)))
    if len(common) < count:
        first = sections[0]
        other = max(sections, key=lambda s: len(set(first.genes) - set(s.genes)))
        raise UsageError(
            f"the sections have {len(common)} genes in common, {count} are asked for"
            f"{_ids(first.genes, other.genes)}; type genes = {len(common)} or fewer"
        )
    variance = np.mean([s.log1p(common).var(axis=0, dtype=np.float64) for s in sections], axis=0)
    order = np.argsort(-variance, kind="stable")[:count]
    return tuple(common[i] for i in order)


def _check_scale(name: str, counts: Any, scale: str) -> None:
    values = np.asarray(counts.data if hasattr(counts, "toarray") else counts).ravel()
    if not np.isfinite(values).all() or (len(values) and values.min() < 0):
        raise UsageError(f"{name}: counts hold NaN, infinity or numbers below 0; give raw counts")
    whole = not len(values) or bool((values == np.round(values)).all())
    if scale == "counts" and not whole:
        raise UsageError(
            f"{name}: counts are not whole numbers (the largest is {values.max():.4g}), so they are "
            'normalised already; give raw counts, or type counts_are = "log1p" for log1p of 10,000 a spot'
        )
    if scale == "log1p" and len(values) and (values.max() > LOG1P_MAX or whole):
        raise UsageError(
            f'{name}: counts_are is "log1p", but the numbers are {"whole" if whole else "too large"} (the '
            f'largest is {values.max():.4g}); type counts_are = "counts"'
        )
    if scale not in ("counts", "log1p"):
        raise UsageError(f"counts_are is {scale!r}; allowed: counts, log1p")


def _ids(one: Sequence[str], other: Sequence[str]) -> str:
    """What to add to a message where one side has Ensembl ids and the other symbols."""
    ensembl = [sum(g.startswith("ENS") for g in names) > len(names) / 2 for names in (one, other)]
    if ensembl[0] == ensembl[1]:
        return ""
    return ": one side has Ensembl ids, the other symbols; name genes alike on both"
