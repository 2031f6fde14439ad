"""Files of predicted expression, and the genes and signatures that each file holds.

More genes can be added to a file of the same features and weights; nothing else is replaced without asking.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import OutputError, UsageError
from seal_extract.features.feature_file import write_rows
from seal_extract.features.store import SlideFeatures, read_provenance
from seal_extract.genes.decoder import GeneDecoder, column_names
from seal_extract.genes.predict import FittedSignature, SignatureScores, predicted
from seal_extract.hdf5 import DAMAGED, checked, open_hdf5
from seal_extract.names import shareable

EXPRESSION = "expression"  # dataset of the genes' values, and the kind of the file
GENES = "genes"  # dataset of their names
SIGNATURES, SIGNATURE_NAMES = "signatures", "signature_names"
LOG1P = "predicted log1p expression"
SOURCE_KEYS = ("kind", "unit", "genes_named", "decoder", "grid", "features")


@dataclass(frozen=True)
class GeneSelection:
    """Genes and signatures of one slide, as a file holds them or shall hold them.

    Attributes:
        source: hash of the features and the decoder.
        genes: name of each column.
        columns: column of the decoder for each gene.
        signatures: signatures with the moments that their scores are computed with.
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
    ) -> GeneSelection:
        """Genes by their column, and signatures, of a slide.

        Raises:
            UsageError: a gene and a signature, or two signatures, have the same name.
        """
        names, source = column_names(decoder), _source_hash(_source_provenance(features, decoder))
        return cls(source, tuple(names[i] for i in columns), tuple(columns), tuple(signatures))

    @classmethod
    def read(cls, provenance: dict[str, Any] | None, decoder: GeneDecoder) -> GeneSelection | None:
        """The selection that a file's provenance states; None for other files and for other panels."""
        if provenance is None or "genes" not in provenance:
            return None
        genes, names = tuple(provenance["genes"]), column_names(decoder)
        columns = provenance.get("columns")  # files of older versions do not state them
        if columns is None:
            column_of = {name: i for i, name in enumerate(names)}
            columns = [column_of.get(gene, -1) for gene in genes]
        if any(not 0 <= i < len(names) for i in columns) or genes != tuple(names[i] for i in columns):
            return None
        signatures = tuple(FittedSignature.read(one) for one in provenance.get("signatures", ()))
        return cls(provenance.get("source") or _source_hash(provenance), genes, tuple(columns), signatures)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the genes, then of the signatures."""
        return (*self.genes, *(s.name for s in self.signatures))

    def each(self) -> list[GeneSelection]:
        """A selection for every single gene and signature."""
        columns = zip(self.genes, self.columns, strict=True)
        genes = [GeneSelection(self.source, (gene,), (column,)) for gene, column in columns]
        return genes + [GeneSelection(self.source, (), (), (s,)) for s in self.signatures]

    def as_json(self) -> dict[str, Any]:
        """The entries that `read` takes; they name no path of this machine."""
        return {
            "source": self.source,
            "genes": list(self.genes),
            "columns": list(self.columns),
            "signatures": [asdict(s) for s in self.signatures],
        }

    def added_to(self, held: GeneSelection) -> GeneSelection | None:
        """Both together; None if their sources differ or one name means different things."""
        signatures = {s.name: s for s in held.signatures}
        for one in self.signatures:
            if not signatures.setdefault(one.name, one).scores_like(one):
                return None
        if self.source != held.source:
            return None
        mine, theirs = (dict(zip(c.columns, c.genes, strict=True)) for c in (self, held))
        both = mine if mine.keys() >= theirs.keys() else theirs | mine
        return GeneSelection(self.source, tuple(both.values()), tuple(both), tuple(signatures.values()))

    def to_write(
        self, path: Path, provenance: dict[str, Any] | None, decoder: GeneDecoder, *, overwrite: bool
    ) -> GeneSelection | None:
        """The selection that a file must hold to have this one beside its own; None if it has it already.

        Args:
            path: the file.
            provenance: provenance in the file; None if it states none.
            decoder: decoder of the features.
            overwrite: drop the file's own selection.

        Raises:
            OutputError: the file holds something that this selection cannot be added to.
        """
        if overwrite or not path.exists():
            return self
        held = GeneSelection.read(provenance, decoder)
        both = None if held is None else self.added_to(held)
        if both is None:
            other = "genes or signatures of other features, weights or slides"
            what = "something else" if held is None else other
            raise OutputError(
                f"{path} exists and holds {what}; type --overwrite to replace it, or another -o"
            )
        return None if both == held else both


def table_provenance(
    features: SlideFeatures, decoder: GeneDecoder, selection: GeneSelection
) -> dict[str, Any]:
    """Provenance of a table of expression; it names no folder of this machine."""
    source = _source_provenance(features, decoder)
    return source | {"features": shareable(features.provenance)} | selection.as_json()


def _source_provenance(features: SlideFeatures, decoder: GeneDecoder) -> dict[str, Any]:
    return {
        "kind": EXPRESSION,
        "unit": LOG1P,
        "genes_named": decoder.genes is not None,
        "decoder": {"name": decoder.name, "weights": decoder.weights.sha256},
        "grid": features.provenance["grid"],
        "features": features.provenance,
    }


def _source_hash(provenance: dict[str, Any]) -> str:
    source = {key: provenance.get(key) for key in SOURCE_KEYS}
    return hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Expression:
    """Predicted expression of one slide, in the file that holds it.

    Attributes:
        path: the HDF5 file. It has ``expression`` float32 [N, G] in log1p of counts per 10,000, ``coords`` as
            in the features file and ``genes`` [G]. With signatures it also has ``signatures`` float32 [N, S]
            in standard deviations and ``signature_names`` [S].
        genes: the gene of each column; ``column 0``, ... if the decoder's columns have no names.
        signatures: names of the signatures.
        provenance: the decoder's encoder and weights, and the provenance of the features file.
    """

    path: Path
    genes: tuple[str, ...]
    signatures: tuple[str, ...]
    provenance: dict[str, Any]

    def column(self, name: str) -> NDArray[np.float32]:
        """float32 [N] of one gene or signature.

        Raises:
            UsageError: the file does not hold it.
        """
        for dataset, names in ((EXPRESSION, self.genes), (SIGNATURES, self.signatures)):
            if name in names:
                with open_hdf5(self.path) as file:
                    values: NDArray[np.float32] = file[dataset][:, names.index(name)]
                return values
        raise UsageError(
            f"{self.path} holds no {name}; it has {len(self.genes)} genes, {len(self.signatures)} signatures"
        )

    def __repr__(self) -> str:
        return f"Expression({self.path.name}: {len(self.genes)} genes)"


def expression_path(features: SlideFeatures, out: Path | None = None) -> Path:
    """Path of a slide's expression: ``expression_ENCODER/SLIDE.h5`` beside the folder of its features."""
    folder = out or features.path.parent.parent / f"expression_{features.provenance['encoder']['name']}"
    return folder / f"{features.path.stem}.h5"


def write_expression(
    features: SlideFeatures,
    decoder: GeneDecoder,
    path: Path,
    columns: Sequence[int] | None = None,
    *,
    signatures: Sequence[FittedSignature] = (),
    scores: SignatureScores | None = None,
    overwrite: bool = False,
) -> Expression:
    """Predict expression and write it, some thousand patches at a time.

    A file that holds other genes or signatures of the same features and weights keeps them.

    Args:
        features: features made by the decoder's encoder.
        decoder: from `decoder_of`.
        path: the HDF5 file; it appears when it is complete.
        columns: genes by their column; all by default.
        signatures: from `fit_signatures`.
        scores: of this slide and decoder, if other files are written from them too.
        overwrite: replace the file's genes and signatures.

    Raises:
        OutputError: the file was not written by this package, or was made from other features or weights, and
            ``overwrite`` is not set; or it cannot be written.
        UsageError: features of another width.
    """
    wanted = range(decoder.n_genes) if columns is None else columns
    asked, found = GeneSelection.of(features, decoder, wanted, signatures), find_expression(path)
    selection = asked.to_write(path, found.provenance if found else None, decoder, overwrite=overwrite)
    if selection is None:
        assert found is not None
        return found
    provenance = table_provenance(features, decoder, selection)
    names = tuple(s.name for s in selection.signatures)

    def describe(file: h5py.File) -> None:
        with open_hdf5(features.path) as source:
            source.copy("coords", file)
        file.create_dataset(GENES, data=np.array(selection.genes, object), dtype=h5py.string_dtype())
        if names:
            file.create_dataset(SIGNATURE_NAMES, data=np.array(names, object), dtype=h5py.string_dtype())
            columns = (scores or SignatureScores(features, decoder)).of(selection.signatures)
            table = np.stack(columns, axis=1)
            file.create_dataset(SIGNATURES, data=table, **checked(table))
        file.attrs["unit"] = provenance["unit"]

    shape = (len(features.grid), len(selection.genes))
    with write_rows(path, EXPRESSION, shape, np.float32, provenance, describe) as writer:
        for block in predicted(features, decoder, selection.columns):
            writer.append(block)
    return Expression(path, selection.genes, names, provenance)


def find_expression(path: Path) -> Expression | None:
    """The expression in a file of `write_expression`; None for a missing, damaged or other file."""
    try:
        provenance = read_provenance(path, EXPRESSION)
        if provenance is None or provenance.get("kind") != EXPRESSION:
            return None
        with open_hdf5(path) as file:
            genes = tuple(file[GENES].asstr()[()])
            signatures = tuple(file[SIGNATURE_NAMES].asstr()[()]) if SIGNATURE_NAMES in file else ()
    except (*DAMAGED, OutputError):
        return None
    provenance.setdefault("genes", list(genes))  # files of older versions have the genes in a dataset only
    return Expression(path, genes, signatures, provenance)
