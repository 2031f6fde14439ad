"""Genes for the viewer: their names, maps over a slide, and those that set a patch or a region apart."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import SealExtractError, UsageError
from seal_extract.features.store import SlideFeatures

if TYPE_CHECKING:
    from seal_extract.genes.decoder import GeneDecoder
    from seal_extract.genes.gene_lists import Signature

UNIT = "predicted log1p expression"
SAMPLE = 4096  # patches of a slide that a patch is compared with
MOST_SUGGESTED = 12
LARGE = 20_000_000  # patches times genes; more would take many seconds
MOST_GENES = 200  # of a signature that is typed

Rows = NDArray[np.float32]


class GeneMaps:
    """The decoder of one encoder, loaded when genes are first asked for."""

    def __init__(
        self, load: Callable[[], GeneDecoder], signatures: Mapping[str, Signature] | None = None
    ) -> None:
        """``load`` makes the decoder; ``signatures`` are sets of genes that may be asked for by name."""
        self.signatures = dict(signatures or {})
        self._load = load
        self._lock = threading.Lock()
        self._decoder: GeneDecoder | SealExtractError | None = None

    @property
    def decoder(self) -> GeneDecoder:
        """The decoder.

        Raises:
            SealExtractError: the encoder has none, or it cannot be had; always the same error.
        """
        with self._lock:
            if self._decoder is None:
                try:
                    self._decoder = self._load()
                except SealExtractError as exc:
                    self._decoder = exc.with_traceback(None)
        if isinstance(self._decoder, SealExtractError):
            raise type(self._decoder)(*self._decoder.args)
        return self._decoder

    def state(self) -> dict[str, Any]:
        """Whether the genes have names, and if not the reason, in a line."""
        try:
            names = self.decoder.named()
        except SealExtractError as exc:
            return {"named": False, "why": str(exc), "count": 0, "signatures": []}
        return {"named": True, "why": "", "count": len(names), "signatures": sorted(self.signatures)}

    def suggest(self, typed: str) -> list[str]:
        """Genes and sets that begin with the typed text, then those that contain it."""
        wanted = typed.strip().upper()
        known = [*self.decoder.named(), *self.signatures]
        begin = sorted(name for name in known if name.upper().startswith(wanted))
        inside = sorted(name for name in known if wanted in name.upper()[1:] and name not in begin)
        return (begin + inside)[:MOST_SUGGESTED]

    def check(self, asked: str) -> dict[str, Any]:
        """The reason why a typed text cannot be shown, empty if it can, and the nearest genes."""
        try:
            _ = self.signatures.get(asked) or self._typed(asked)
        except SealExtractError as exc:
            return {"why": str(exc), "nearest": self._near(asked)}
        return {"why": "", "nearest": []}

    def _near(self, asked: str) -> list[str]:
        """Genes with a name like that of the first unknown one."""
        spelled = {name.upper(): name for name in self.decoder.named()}
        typed = (part.partition(":")[0].strip().upper() for part in asked.split(","))
        unknown = next((name for name in typed if name and name not in spelled), "")
        return [spelled[name] for name in get_close_matches(unknown, spelled, n=3, cutoff=0.5)]

    def values(self, features: SlideFeatures, asked: str) -> tuple[str, str, Rows]:
        """A title, a unit and float32 [N] for a gene, for several with commas, or for a named set.

        Raises:
            UsageError: an unknown gene; the message names the nearest.
        """
        from seal_extract.genes.predict import predict_genes, signature_scores

        decoder = self.decoder
        signature = self.signatures.get(asked) or self._typed(asked)
        if len(signature.weights) == 1 and asked not in self.signatures:
            gene = next(iter(signature.weights))
            return gene, UNIT, predict_genes(features, decoder, decoder.columns([gene]))[:, 0]
        (scores,) = signature_scores([features], decoder, signature)
        known = len(signature.known_to(decoder)[0])
        unit = f"mean of {known} genes, in standard deviations over this slide"
        return signature.name, unit, scores

    def _typed(self, text: str) -> Signature:
        """``ESR1``, or ``ESR1, PGR:0.5``, spelled as the panel spells it."""
        from seal_extract.genes.gene_lists import Signature

        spelled = {name.upper(): name for name in self.decoder.named()}
        parts = [part.strip() for part in text.replace(";", ",").split(",") if part.strip()]
        if not 0 < len(parts) <= MOST_GENES:
            raise UsageError(
                f"{len(parts)} genes were given; allowed: 1 to {MOST_GENES}, with commas between"
            )
        weights: dict[str, float] = {}
        for part in parts:
            name, _, weight = part.partition(":")
            try:
                weights[spelled.get(name.strip().upper(), name.strip())] = float(weight) if weight else 1.0
            except ValueError as exc:
                raise UsageError(f"{part!r} is no gene with a weight; type for example ESR1:0.5") from exc
        self.decoder.columns(list(weights))
        return Signature(", ".join(parts), weights)

    def baseline(self, features: SlideFeatures) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of each gene over at most 4,096 patches of a slide: float64 [G]."""
        rows = features.features[:: max(1, len(features.grid) // SAMPLE)]
        expression = self.decoder.predict(rows)
        return expression.mean(0, dtype=np.float64), expression.std(0, dtype=np.float64)

    def of_patch(
        self, features: SlideFeatures, row: int, baseline: tuple[NDArray[Any], NDArray[Any]], most: int = 12
    ) -> list[dict[str, Any]]:
        """The genes by which a patch stands out most of its slide, with value and standard deviations."""
        mean, deviation = baseline
        predicted = self.decoder.predict(features.features[row : row + 1])[0]
        above = (predicted - mean) / np.maximum(deviation, 1e-6) * (deviation > 1e-6)
        names = self.decoder.named()
        return [
            {"gene": names[k], "value": float(predicted[k]), "above": float(above[k])}
            for k in np.argsort(-above, kind="stable")[:most]
        ]

    def of_region(self, features: SlideFeatures, inside: NDArray[np.bool_], most: int = 20) -> dict[str, Any]:
        """The genes by which a region, bool [N], stands out most of the rest of its slide.

        See `region_genes`; on large slides fewer draws are made, and the note says how many.
        """
        from seal_extract.genes.predict import region_genes

        large = len(features.grid) * self.decoder.n_genes > LARGE
        found = region_genes(features, self.decoder, inside, permutations=199 if large else 999)
        columns = {"inside": found.inside, "outside": found.outside, "effect": found.effect}
        columns |= {"p": found.p_pieces, "q": found.q_pieces}
        return {
            "genes": [
                {"gene": gene} | {name: float(values[i]) for name, values in columns.items()}
                for i, gene in enumerate(found.genes[:most])
            ],
            "note": f"{UNIT}; effect is Cohen's d; p is the share of {found.permutations} regions of equal "
            f"size, elsewhere on the slide, that differ as much; q corrects it for {len(found.genes):,} "
            "genes (Benjamini-Hochberg)",
        }
