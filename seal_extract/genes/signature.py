"""Gene signatures: sets of genes from GMT files, or lists with a weight for each.

GMT is the Molecular Signatures Database's format: a line per set, its name, a description and its genes,
separated by tabs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError
from seal_extract.genes.decoder import GeneDecoder
from seal_extract.genes.panel import is_plain, read_text

MOST_MISSING = 20  # genes that a line names


@dataclass(frozen=True)
class Signature:
    """Genes that are looked at together.

    Attributes:
        name: of the set.
        weights: of each gene; 1 where nothing else was said.
    """

    name: str
    weights: dict[str, float]

    def __post_init__(self) -> None:
        bad = [gene for gene, weight in self.weights.items() if not math.isfinite(weight) or weight == 0]
        if not self.weights or bad:
            what = f"the weight {self.weights[bad[0]]:g} for {bad[0]}" if bad else "no gene"
            raise UsageError(f"the signature {self.name} has {what}; give genes with finite weights but 0")
        unprintable = next((name for name in (self.name, *self.weights) if not is_plain(name)), None)
        if unprintable is not None:
            raise UsageError(f"{unprintable!r} is no name of a gene or signature; give names in plain text")

    def __repr__(self) -> str:
        return f"Signature({self.name}: {len(self.weights)} genes)"

    def known_to(self, decoder: GeneDecoder) -> tuple[list[int], list[float]]:
        """Column and weight of each of its genes that the decoder predicts.

        Raises:
            UsageError: it predicts none of them, or its columns have no names.
        """
        where = {gene: i for i, gene in enumerate(decoder.named())}
        known = [gene for gene in self.weights if gene in where]
        if not known:
            first = ", ".join(list(self.weights)[:3])
            raise UsageError(
                f"none of the {len(self.weights)} genes of {self.name} ({first}, ...) is among the "
                f"{decoder.n_genes} of {decoder.name}, such as {decoder.named()[0]}; choose another signature"
            )
        return [where[gene] for gene in known], [self.weights[gene] for gene in known]

    def told(self, decoder: GeneDecoder) -> str:
        """How many of its genes the decoder predicts, and which it does not.

        Raises:
            UsageError: see `known_to`.
        """
        known, genes = len(self.known_to(decoder)[0]), decoder.named()
        missing = sorted(set(self.weights).difference(genes))
        others = f" and {len(missing) - MOST_MISSING} more" if len(missing) > MOST_MISSING else ""
        names = f"; missing: {', '.join(missing[:MOST_MISSING])}{others}" if missing else ""
        return f"{self.name}: {known} of {len(self.weights)} genes are in the panel{names}"


@dataclass(frozen=True)
class FittedSignature:
    """A signature with what its genes are standardised by, so that scores can be computed again.

    Attributes:
        name: of the signature.
        weights: of each of its genes that the decoder predicts.
        mean: of each gene over the patches that it was fitted to, in log1p of counts per 10,000.
        deviation: standard deviation of each gene over them.
    """

    name: str
    weights: dict[str, float]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def read(cls, entry: dict[str, Any]) -> FittedSignature:
        """From JSON, as `dataclasses.asdict` gives it."""
        return cls(entry["name"], entry["weights"], tuple(entry["mean"]), tuple(entry["deviation"]))

    def is_like(self, other: FittedSignature) -> bool:
        """Whether it gives the same scores, but for the rounding of another machine's sums."""
        mine, theirs = ((*one.mean, *one.deviation) for one in (self, other))
        named = (self.name, list(self.weights.items())) == (other.name, list(other.weights.items()))
        return named and np.allclose(mine, theirs, rtol=1e-5, atol=1e-7)

    def score(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """The mean of its genes, float [B, K], weighted and in standard deviations: float32 [B]."""
        deviation, weights = np.array(self.deviation), np.array(list(self.weights.values()))
        varies = deviation > 0
        per_gene = np.where(varies, weights / np.where(varies, deviation, 1), 0) / np.abs(weights).sum()
        return np.asarray((rows - np.array(self.mean)) @ per_gene, np.float32)


def read_signature(text: str) -> Signature:
    """A signature as it is typed: ``FILE.gmt:NAME``, ``FILE.gmt`` of one set, or ``GENE:WEIGHT,GENE:WEIGHT``.

    Raises:
        UsageError: no such file or set, or a weight that is no number.
    """
    head, colon, name = text.rpartition(":")
    for path, chosen in ((text, None), (head, name)):
        if path.lower().endswith(".gmt") and (chosen is None or colon):
            return _chosen(read_gmt(path), chosen, path)
    weights: dict[str, float] = {}
    for part in text.split(","):
        gene, _, weight = part.strip().partition(":")
        try:
            value = float(weight) if weight else 1.0
        except ValueError:
            value = math.nan
        if not gene or gene in weights or math.isnan(value):
            raise UsageError(
                f"the signature {text!r} has {part!r}; allowed: FILE.gmt:NAME, or GENE:WEIGHT,GENE:WEIGHT "
                "with each gene once"
            )
        weights[gene] = value
    return Signature(text, weights)


def read_gmt(path: str | Path) -> dict[str, Signature]:
    """All sets of a GMT file, by name.

    Raises:
        UsageError: missing, not text, empty, or with a line that is no set.
    """
    lines = read_text(path, str(path), "a GMT file, such as MSigDB's").splitlines()
    sets: dict[str, Signature] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, *rest = (field.strip() for field in line.split("\t"))
        genes = [gene for gene in rest[1:] if gene]
        if not name or not genes or name in sets:
            raise UsageError(
                f"line {number} of {path} is no gene set or has a name that was there; allowed: name, "
                "description and genes, separated by tabs"
            )
        sets[name] = Signature(name, dict.fromkeys(genes, 1.0))
    if not sets:
        raise UsageError(f"{path} holds no gene set; give a GMT file, such as MSigDB's")
    return sets


def _chosen(sets: dict[str, Signature], name: str | None, path: str) -> Signature:
    if name is None and len(sets) == 1:
        return next(iter(sets.values()))
    if name in sets:
        return sets[name]
    near: Sequence[str] = get_close_matches(name or "", sets, n=3, cutoff=0.3) or list(sets)[:3]
    what = f"no set {name}" if name else f"{len(sets)} sets"
    raise UsageError(f"{path} holds {what}; type {path}:NAME, such as {' or '.join(near)}")
