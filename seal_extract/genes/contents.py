"""What a file of predicted expression holds, so that more can be added to it and nothing else is replaced."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seal_extract.errors import OutputError, UsageError
from seal_extract.features.store import SlideFeatures
from seal_extract.genes.decoder import GeneDecoder, column_names
from seal_extract.genes.signature import FittedSignature
from seal_extract.names import shareable

EXPRESSION = "expression"  # the kind of such a file, and its dataset
LOG1P = "predicted log1p expression"
SOURCE = ("kind", "unit", "genes_named", "decoder", "grid", "features")  # of the provenance, not what is held


@dataclass(frozen=True)
class Contents:
    """Genes and signatures of one slide, and what they were predicted from.

    Attributes:
        source: features and decoder, hashed.
        genes: name of each column.
        columns: of the decoder.
        signatures: with the means and deviations that their scores are computed with.
    """

    source: str
    genes: tuple[str, ...]
    columns: tuple[int, ...]
    signatures: tuple[FittedSignature, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise UsageError(
                f"{twice} would name two columns of one table; give the signature another name in a GMT file"
            )

    @classmethod
    def of(
        cls,
        features: SlideFeatures,
        decoder: GeneDecoder,
        columns: Sequence[int],
        signatures: Sequence[FittedSignature] = (),
    ) -> Contents:
        """What is to be written.

        Raises:
            UsageError: a gene and a signature, or two signatures, have one name.
        """
        names = column_names(decoder)
        source = source_of(source_provenance(features, decoder))
        return cls(source, tuple(names[i] for i in columns), tuple(columns), tuple(signatures))

    @classmethod
    def read(cls, provenance: dict[str, Any] | None, decoder: GeneDecoder) -> Contents | None:
        """What a file of this provenance holds; None where it is no such file or of another panel."""
        if provenance is None or "genes" not in provenance:
            return None
        genes, names = tuple(provenance["genes"]), column_names(decoder)
        columns = provenance.get("columns")  # older files do not say them
        if columns is None:
            where = {name: i for i, name in enumerate(names)}
            columns = [where.get(gene, -1) for gene in genes]
        if any(not 0 <= i < len(names) for i in columns) or genes != tuple(names[i] for i in columns):
            return None
        signatures = tuple(FittedSignature.read(one) for one in provenance.get("signatures", ()))
        return cls(provenance.get("source") or source_of(provenance), genes, tuple(columns), signatures)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the genes, then of the signatures."""
        return (*self.genes, *(s.name for s in self.signatures))

    def each(self) -> list[Contents]:
        """Every gene and every signature by itself."""
        genes = [Contents(self.source, (g,), (i,)) for g, i in zip(self.genes, self.columns, strict=True)]
        return genes + [Contents(self.source, (), (), (s,)) for s in self.signatures]

    def entries(self) -> dict[str, Any]:
        """As JSON, as `read` takes it; the source is there as a hash, which names no path of this machine."""
        return {
            "source": self.source,
            "genes": list(self.genes),
            "columns": list(self.columns),
            "signatures": [asdict(s) for s in self.signatures],
        }

    def added_to(self, held: Contents) -> Contents | None:
        """Both together; None where they are of different sources or mean different things by one name."""
        signatures = {s.name: s for s in held.signatures}
        for one in self.signatures:
            if not signatures.setdefault(one.name, one).is_like(one):
                return None
        if self.source != held.source:
            return None
        mine, theirs = (dict(zip(c.columns, c.genes, strict=True)) for c in (self, held))
        both = mine if mine.keys() >= theirs.keys() else theirs | mine
        return Contents(self.source, tuple(both.values()), tuple(both), tuple(signatures.values()))


def to_write(path: Path, held: Contents | None, asked: Contents, *, overwrite: bool) -> Contents | None:
    """What a file has to hold for it to have what is asked beside what it has; None if it has it already.

    Args:
        path: the file.
        held: what it holds, as `Contents.read` tells; None where nothing of ours is there.
        asked: what it is to hold.
        overwrite: drop what it holds.

    Raises:
        OutputError: something is there that this cannot be added to.
    """
    if overwrite or not path.exists():
        return asked
    both = None if held is None else asked.added_to(held)
    if both is None:
        what = (
            "something else" if held is None else "genes or signatures of other features, weights or slides"
        )
        raise OutputError(f"{path} exists and holds {what}; type --overwrite to replace it, or another -o")
    return None if both == held else both


def source_provenance(features: SlideFeatures, decoder: GeneDecoder) -> dict[str, Any]:
    """What expression is predicted from."""
    return {
        "kind": EXPRESSION,
        "unit": LOG1P,
        "genes_named": decoder.genes is not None,
        "decoder": {"name": decoder.name, "weights": decoder.weights.sha256},
        "grid": features.provenance["grid"],
        "features": features.provenance,
    }


def file_provenance(features: SlideFeatures, decoder: GeneDecoder, contents: Contents) -> dict[str, Any]:
    """What a table of expression says of itself; it may be given away."""
    source = source_provenance(features, decoder)
    return source | {"features": shareable(features.provenance)} | contents.entries()


def source_of(provenance: dict[str, Any]) -> str:
    """That part of a provenance, hashed."""
    return _hash({key: provenance.get(key) for key in SOURCE})


def _hash(entries: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
