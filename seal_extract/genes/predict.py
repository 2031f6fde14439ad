"""Predicted expression of a slide's patches, streamed from its features into a file beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import OutputError, UsageError
from seal_extract.genes.decoder import GeneDecoder, column_names
from seal_extract.genes.signature import Signature
from seal_extract.store import DAMAGED, SlideFeatures, read_pieces, read_provenance, write_rows

EXPRESSION, GENES = "expression", "genes"  # datasets of the file
LOG1P = "predicted log1p expression"
BLOCK_ROWS = 4096  # rows predicted at a time: 33 MB of 2,000 genes


@dataclass(frozen=True)
class Expression:
    """Predicted expression of one slide, in the file that holds it.

    Attributes:
        path: the HDF5 file: ``expression`` float32 [N, G] in log1p of counts per 10,000, ``coords`` as in the
            features file, ``genes`` [G].
        genes: the gene of each column; ``column 0``, ``column 1``, ... where nobody has named them.
        provenance: the decoder's encoder and weights, and the features file's own.
    """

    path: Path
    genes: tuple[str, ...]
    provenance: dict[str, Any]

    def column(self, gene: str) -> NDArray[np.float32]:
        """float32 [N] of one gene.

        Raises:
            UsageError: the file does not hold it.
        """
        if gene not in self.genes:
            raise UsageError(f"{self.path} holds no {gene}; it has {len(self.genes)} genes")
        with h5py.File(self.path, "r") as file:
            values: NDArray[np.float32] = file[EXPRESSION][:, self.genes.index(gene)]
        return values

    def __repr__(self) -> str:
        return f"Expression({self.path.name}: {len(self.genes)} genes)"


def expression_path(features: SlideFeatures, out: Path | None = None) -> Path:
    """Where a slide's expression lies: ``expression_ENCODER/SLIDE.h5`` beside the folder of its features."""
    folder = out or features.path.parent.parent / f"expression_{features.provenance['encoder']['name']}"
    return folder / f"{features.path.stem}.h5"


def write_expression(
    features: SlideFeatures,
    decoder: GeneDecoder,
    path: Path,
    columns: Sequence[int] | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Expression:
    """Predict expression and write it, some thousand patches at a time.

    Args:
        features: of the decoder's encoder.
        decoder: from `decoder_of`.
        path: the HDF5 file; it appears when it is complete.
        columns: genes by their column; all by default.
        overwrite: replace a file that holds something else.
        progress: told after each block how many patches are done.

    Raises:
        OutputError: a file is there that was not written by this package, or holds other genes or other
            weights and ``overwrite`` is not set; or it cannot be written.
        UsageError: features of another width.
    """
    wanted = range(decoder.n_genes) if columns is None else columns
    names = column_names(decoder)
    genes = tuple(names[i] for i in wanted)
    provenance = {
        "kind": EXPRESSION,
        "unit": LOG1P,
        "genes_named": decoder.genes is not None,
        "decoder": {"name": decoder.name, "weights": decoder.weights.sha256},
        "grid": features.provenance["grid"],
        "features": features.provenance,
    }
    found = find_expression(path)
    if path.exists() and not overwrite:
        if found is None or found.genes != genes or found.provenance != provenance:
            raise OutputError(
                f"{path} exists and holds {'other genes or other weights' if found else 'something else'}; "
                "type --overwrite to replace it, or another -o"
            )
        return found

    def describe(file: h5py.File) -> None:
        with h5py.File(features.path, "r") as source:
            source.copy("coords", file)
        file.create_dataset(GENES, data=np.array(genes, object), dtype=h5py.string_dtype())
        file.attrs["unit"] = provenance["unit"]

    shape = (len(features.grid), len(genes))
    with write_rows(path, EXPRESSION, shape, np.float32, provenance, describe) as writer:
        for block in predicted(features, decoder, columns):
            writer.append(block)
            if progress is not None:
                progress(writer.rows)
    return Expression(path, genes, provenance)


def find_expression(path: Path) -> Expression | None:
    """What `write_expression` wrote there; None if it did not."""
    try:
        provenance = read_provenance(path, EXPRESSION)
        if provenance is None or provenance.get("kind") != EXPRESSION:
            return None
        with h5py.File(path, "r") as file:
            return Expression(path, tuple(file[GENES].asstr()[()]), provenance)
    except DAMAGED:
        return None


def predicted(
    features: SlideFeatures, decoder: GeneDecoder, columns: Sequence[int] | None = None
) -> Iterator[NDArray[np.float32]]:
    """Predicted expression in the order of the patches, float32 [B, G] at a time."""
    for piece in read_pieces(features.path):
        for start in range(0, len(piece), BLOCK_ROWS):
            yield decoder.predict(piece[start : start + BLOCK_ROWS], columns)


def predict_genes(
    features: SlideFeatures, decoder: GeneDecoder, columns: Sequence[int]
) -> NDArray[np.float32]:
    """Predicted expression of a few genes, float32 [N, G]."""
    blocks = list(predicted(features, decoder, columns))
    return np.concatenate(blocks) if blocks else np.empty((0, len(columns)), np.float32)


def moments(
    slides: Sequence[SlideFeatures], decoder: GeneDecoder, columns: Sequence[int] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each gene over all patches of all slides, float64 [G] each.

    Source: Chan, Golub and LeVeque 1983, by which blocks are joined without loss.

    Raises:
        UsageError: there is no patch.
    """
    count, mean, squares = 0, np.zeros(1), np.zeros(1)
    for slide in slides:
        for block in predicted(slide, decoder, columns):
            rows = block.astype(np.float64)
            n, middle = len(rows), rows.mean(0)
            gap = middle - mean
            squares = squares + ((rows - middle) ** 2).sum(0) + gap**2 * (count * n / (count + n))
            mean = mean + gap * (n / (count + n))
            count += n
    if not count:
        raise UsageError("there is no patch in these slides; choose others")
    return mean, np.sqrt(squares / count)


def signature_scores(
    slides: Sequence[SlideFeatures], decoder: GeneDecoder, signature: Signature
) -> list[NDArray[np.float32]]:
    """Score of a signature in each patch, float32 [N] for each slide.

    Each gene is standardised over all patches of all ``slides`` together, so that none counts more for being
    expressed more; the score is the mean over the genes, weighted, in standard deviations. Genes that the
    decoder does not know are left out, and those that it predicts the same everywhere count as 0.

    Raises:
        UsageError: the decoder knows none of the genes, or there is no patch.
    """
    columns, weights = signature.known_to(decoder)
    mean, deviation = moments(slides, decoder, columns)
    per_gene = np.where(deviation > 0, np.array(weights) / np.where(deviation > 0, deviation, 1), 0)
    per_gene /= np.abs(weights).sum()
    return [
        ((predict_genes(slide, decoder, columns) - mean) @ per_gene).astype(np.float32) for slide in slides
    ]
