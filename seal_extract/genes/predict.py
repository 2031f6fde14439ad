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
from seal_extract.features.feature_file import write_rows
from seal_extract.features.store import SlideFeatures, read_pieces, read_provenance
from seal_extract.genes.contents import EXPRESSION, Contents, file_provenance, to_write
from seal_extract.genes.decoder import GeneDecoder
from seal_extract.genes.signature import FittedSignature, Signature
from seal_extract.hdf5 import DAMAGED, checked, open_hdf5

GENES = "genes"  # the dataset of their names
SIGNATURES, SIGNATURE_NAMES = "signatures", "signature_names"
BLOCK_ROWS = 4096  # rows predicted at a time: 33 MB of 2,000 genes


@dataclass(frozen=True)
class Expression:
    """Predicted expression of one slide, in the file that holds it.

    Attributes:
        path: the HDF5 file: ``expression`` float32 [N, G] in log1p of counts per 10,000, ``coords`` as in the
            features file, ``genes`` [G]; where signatures were asked for, ``signatures`` float32 [N, S] in
            standard deviations and ``signature_names`` [S].
        genes: the gene of each column; ``column 0``, ``column 1``, ... where nobody has named them.
        signatures: names of the signatures.
        provenance: the decoder's encoder and weights, and the features file's own.
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
    """Where a slide's expression lies: ``expression_ENCODER/SLIDE.h5`` beside the folder of its features."""
    folder = out or features.path.parent.parent / f"expression_{features.provenance['encoder']['name']}"
    return folder / f"{features.path.stem}.h5"


def write_expression(
    features: SlideFeatures,
    decoder: GeneDecoder,
    path: Path,
    columns: Sequence[int] | None = None,
    *,
    signatures: Sequence[FittedSignature] = (),
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Expression:
    """Predict expression and write it, some thousand patches at a time.

    A file that holds other genes or signatures of the same features and weights keeps them.

    Args:
        features: of the decoder's encoder.
        decoder: from `decoder_of`.
        path: the HDF5 file; it appears when it is complete.
        columns: genes by their column; all by default.
        signatures: from `fit_signatures`.
        overwrite: replace what the file holds.
        progress: told after each block how many patches are done.

    Raises:
        OutputError: a file is there that was not written by this package, or was made from other features or
            weights and ``overwrite`` is not set; or it cannot be written.
        UsageError: features of another width.
    """
    wanted = range(decoder.n_genes) if columns is None else columns
    asked = Contents.of(features, decoder, wanted, signatures)
    found = find_expression(path)
    held = None if found is None else Contents.read(found.provenance, decoder)
    contents = to_write(path, held, asked, overwrite=overwrite)
    if contents is None:
        assert found is not None
        return found
    provenance = file_provenance(features, decoder, contents)

    def describe(file: h5py.File) -> None:
        with open_hdf5(features.path) as source:
            source.copy("coords", file)
        file.create_dataset(GENES, data=np.array(contents.genes, object), dtype=h5py.string_dtype())
        if contents.signatures:
            names = np.array([s.name for s in contents.signatures], object)
            file.create_dataset(SIGNATURE_NAMES, data=names, dtype=h5py.string_dtype())
            scores = [score(features, decoder, s) for s in contents.signatures]
            columns = np.stack(scores, axis=1)
            file.create_dataset(SIGNATURES, data=columns, **checked(columns))
        file.attrs["unit"] = provenance["unit"]

    shape = (len(features.grid), len(contents.genes))
    with write_rows(path, EXPRESSION, shape, np.float32, provenance, describe) as writer:
        for block in predicted(features, decoder, contents.columns):
            writer.append(block)
            if progress is not None:
                progress(writer.rows)
    return Expression(path, contents.genes, tuple(s.name for s in contents.signatures), provenance)


def find_expression(path: Path) -> Expression | None:
    """What `write_expression` wrote there; None if it did not."""
    try:
        provenance = read_provenance(path, EXPRESSION)
        if provenance is None or provenance.get("kind") != EXPRESSION:
            return None
        with open_hdf5(path) as file:
            genes = tuple(file[GENES].asstr()[()])
            signatures = tuple(file[SIGNATURE_NAMES].asstr()[()]) if SIGNATURE_NAMES in file else ()
    except (*DAMAGED, OutputError):
        return None
    provenance.setdefault("genes", list(genes))  # older files have them in their dataset alone
    return Expression(path, genes, signatures, provenance)


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


def fit_signatures(
    slides: Sequence[SlideFeatures], decoder: GeneDecoder, signatures: Sequence[Signature]
) -> list[FittedSignature]:
    """Standardise the genes of signatures over all patches of all ``slides`` together.

    Genes that the decoder does not know are left out.

    Raises:
        UsageError: the decoder knows none of the genes of one, or there is no patch.
    """
    known = [signature.known_to(decoder) for signature in signatures]
    columns = sorted({column for some, _ in known for column in some})
    mean, deviation = moments(slides, decoder, columns)
    place = {column: i for i, column in enumerate(columns)}
    names = decoder.named()
    return [
        FittedSignature(
            signature.name,
            {names[column]: weight for column, weight in zip(some, weights, strict=True)},
            tuple(mean[[place[column] for column in some]].tolist()),
            tuple(deviation[[place[column] for column in some]].tolist()),
        )
        for signature, (some, weights) in zip(signatures, known, strict=True)
    ]


def score(features: SlideFeatures, decoder: GeneDecoder, fitted: FittedSignature) -> NDArray[np.float32]:
    """Score of a signature in each patch of a slide, float32 [N]."""
    columns = decoder.columns(list(fitted.weights))
    blocks = [fitted.score(block) for block in predicted(features, decoder, columns)]
    return np.concatenate(blocks) if blocks else np.empty(0, np.float32)


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
    (fitted,) = fit_signatures(slides, decoder, [signature])
    return [score(slide, decoder, fitted) for slide in slides]
