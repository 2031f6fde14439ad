"""Predict the expression of genes and the scores of signatures from the features of slides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError
from seal_extract.features.store import SlideFeatures, read_pieces
from seal_extract.genes.decoder import GeneDecoder
from seal_extract.genes.gene_lists import Signature

BLOCK_ROWS = 4096  # rows predicted at a time: 33 MB of 2,000 genes
KEEP_BYTES = 2**30  # expression that `signature_scores` keeps in memory instead of predicting it twice


# --- predictions ----------------------------------------------------------------------------------


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
    return np.concatenate([np.empty((0, len(columns)), np.float32), *predicted(features, decoder, columns)])


def moments(
    slides: Sequence[SlideFeatures], decoder: GeneDecoder, columns: Sequence[int] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each gene over all patches of all slides, float64 [G] each.

    Source: Chan, Golub and LeVeque 1983, for joining the moments of blocks without loss.

    Raises:
        UsageError: there is no patch.
    """
    return _moments(block for slide in slides for block in predicted(slide, decoder, columns))


def _moments(blocks: Iterable[NDArray[np.float32]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    count, mean, squares = 0, np.zeros(1), np.zeros(1)
    for block in blocks:
        n, rows = len(block), block.astype(np.float64)
        if not n:
            continue
        block_mean = rows.mean(0)
        gap = block_mean - mean
        squares = squares + ((rows - block_mean) ** 2).sum(0) + gap**2 * (count * n / (count + n))
        mean = mean + gap * (n / (count + n))
        count += n
    if not count:
        raise UsageError("there is no patch in these slides; choose others")
    return mean, np.sqrt(squares / count)


# --- signatures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FittedSignature:
    """A signature with the moments that standardise its genes, so that scores can be computed again.

    Attributes:
        name: name of the signature.
        weights: weight of each gene that the decoder predicts.
        mean: mean of each gene over the patches of the fit, in log1p of counts per 10,000.
        deviation: standard deviation of each gene over these patches.
    """

    name: str
    weights: dict[str, float]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def read(cls, entry: dict[str, Any]) -> FittedSignature:
        """From JSON, as `dataclasses.asdict` gives it."""
        return cls(entry["name"], entry["weights"], tuple(entry["mean"]), tuple(entry["deviation"]))

    def scores_like(self, other: FittedSignature) -> bool:
        """Whether both give the same scores, apart from rounding on another machine."""
        mine, theirs = ((*one.mean, *one.deviation) for one in (self, other))
        named = (self.name, list(self.weights.items())) == (other.name, list(other.weights.items()))
        return named and np.allclose(mine, theirs, rtol=1e-5, atol=1e-7)

    def score(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """The weighted mean of its standardised genes: float [B, K] to float32 [B]."""
        deviation, weights = np.array(self.deviation), np.array(list(self.weights.values()))
        varies = deviation > 0
        per_gene = np.where(varies, weights / np.where(varies, deviation, 1), 0) / np.abs(weights).sum()
        return np.asarray((rows - np.array(self.mean)) @ per_gene, np.float32)


def fit_signatures(
    slides: Sequence[SlideFeatures], decoder: GeneDecoder, signatures: Sequence[Signature]
) -> list[FittedSignature]:
    """Standardise the genes of signatures over all patches of all ``slides`` together.

    Genes that the decoder does not predict are left out.

    Raises:
        UsageError: the decoder predicts no gene of a signature, or there is no patch.
    """
    known = [signature.known_to(decoder)[0] for signature in signatures]
    columns = sorted({column for some in known for column in some})
    mean, deviation = moments(slides, decoder, columns)
    places = [[columns.index(column) for column in some] for some in known]
    return [
        _fitted(signature, decoder, mean[place], deviation[place])
        for signature, place in zip(signatures, places, strict=True)
    ]


def _fitted(
    signature: Signature, decoder: GeneDecoder, mean: NDArray[np.float64], deviation: NDArray[np.float64]
) -> FittedSignature:
    columns, weights = signature.known_to(decoder)
    names = [decoder.named()[column] for column in columns]
    by_gene = dict(zip(names, weights, strict=True))
    return FittedSignature(signature.name, by_gene, tuple(mean.tolist()), tuple(deviation.tolist()))


def score(
    features: SlideFeatures, decoder: GeneDecoder, signatures: Sequence[FittedSignature]
) -> NDArray[np.float32]:
    """Scores of signatures in each patch of a slide, float32 [N, S]; the features are read once for all."""
    columns = [decoder.columns(list(signature.weights)) for signature in signatures]
    scores = [np.empty((0, len(signatures)), np.float32)]
    for piece in read_pieces(features.path) if signatures else ():
        for start in range(0, len(piece), BLOCK_ROWS):
            blocks = decoder.predict_each(piece[start : start + BLOCK_ROWS], columns)
            scores.append(np.stack([s.score(b) for s, b in zip(signatures, blocks, strict=True)], axis=1))
    return np.concatenate(scores)


def signature_scores(
    slides: Sequence[SlideFeatures], decoder: GeneDecoder, signature: Signature
) -> list[NDArray[np.float32]]:
    """Score of a signature in each patch, float32 [N] for each slide.

    Each gene is standardised over all patches of all ``slides`` together, so that highly expressed genes do
    not count more. The score is the weighted mean over the genes, in standard deviations. Genes that the
    decoder does not predict are left out; genes that it predicts equal everywhere count as 0.

    Raises:
        UsageError: the decoder predicts none of the genes, or there is no patch.
    """
    columns, _ = signature.known_to(decoder)

    def predict(i: int) -> NDArray[np.float32]:
        return predict_genes(slides[i], decoder, columns)

    fits = sum(len(slide.grid) for slide in slides) * len(columns) * 4 <= KEEP_BYTES
    expression = cache(predict) if fits else predict
    fitted = _fitted(signature, decoder, *_moments(map(expression, range(len(slides)))))
    return [fitted.score(expression(i)) for i in range(len(slides))]
