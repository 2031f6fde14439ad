"""What a slide's report can lay over it, as parts of one file: small pictures and their numbers."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from seal_extract.errors import UsageError
from seal_extract.features.store import SlideFeatures, sample_rows
from seal_extract.genes.predict import moments, predict_genes
from seal_extract.view.colours import Components, cluster_colours
from seal_extract.view.gene_maps import UNIT, GeneMaps
from seal_extract.view.heatmap import PatchRaster, colour
from seal_extract.view.layers import Attention, Layer, cluster_layer, embedding_layer, scale_layer
from seal_extract.view.tiles import png

if TYPE_CHECKING:
    from seal_extract.genes.decoder import GeneDecoder
    from seal_extract.genes.signature import Signature

MOST_VALUES = 3_000_000  # patches times numbers of each; 4 bytes of the file each
DEFAULT_GENES = 24
CLUSTER_COUNTS = (3, 5, 8, 12)
SAMPLED_ROWS = 8192  # embeddings, for colours
LEVELS = 255  # colours of numbers; a palette holds them and the transparent one
HALF_BELOW = 2048  # where steps of float16 reach 1

Part = dict[str, Any]  # as the page's script takes it


@dataclass(frozen=True)
class ChosenGenes:
    """The genes of one page.

    Attributes:
        columns: of the decoder.
        by_variance: whether they are those whose prediction varies most over the slide.
    """

    columns: tuple[int, ...]
    by_variance: bool


def choose_genes(
    features: SlideFeatures, decoder: GeneDecoder, genes: Sequence[str] | None, others: int
) -> ChosenGenes:
    """The genes asked for, or the 24 whose prediction varies most over the slide.

    Args:
        features: of the slide.
        decoder: with named columns.
        genes: by name; None chooses.
        others: numbers of each patch, other than genes, that the page is to hold.

    Raises:
        UsageError: an unknown gene, or more than the page has room for.
    """
    patches = len(features.grid)
    room = most_numbers(patches) - others
    if genes is not None:
        columns = decoder.columns(list(dict.fromkeys(genes)))
        if len(columns) > room:
            raise UsageError(
                f"{len(columns)} genes of {patches:,} patches would make a page too large to mail; allowed: "
                f"{max(0, room)} for this slide; type fewer --genes"
            )
        return ChosenGenes(tuple(columns), False)
    if not patches:
        return ChosenGenes((), True)
    _, deviation = moments([features], decoder)
    order = np.argsort(-deviation, kind="stable")
    return ChosenGenes(tuple(order[: max(0, min(DEFAULT_GENES, room))].tolist()), True)


def most_numbers(patches: int) -> int:
    """How many genes, signatures and attentions a page of so many patches has room for."""
    return max(1, MOST_VALUES // max(1, patches))


class LayerParts:
    """Layers of one slide as parts of its page."""

    def __init__(self, features: SlideFeatures) -> None:
        """Lay out the raster.

        Raises:
            GeometryError: the slide has no patch.
        """
        self._features, self._raster = features, PatchRaster.of(features.grid)

    def embedding(self) -> list[Part]:
        """The embedding as one layer, its colours fitted to this slide alone."""
        layer = embedding_layer(self._components, self._features.features, slides=1)
        return [self._part(layer, png(self._raster.paint(layer.rgb)))]

    def clusters(self) -> list[Part]:
        """A layer for each count of clusters that the slide has patches for."""
        parts = []
        for k in CLUSTER_COUNTS:
            if k <= len(self._components.sample):
                layer = cluster_layer(self._components, self._features.features, k, slides=1)
                picture = self._palette(_values(layer).astype(np.uint8), cluster_colours(k))
                parts.append(self._part(layer, picture))
        return parts

    def genes(self, decoder: GeneDecoder, columns: Sequence[int]) -> list[Part]:
        """A layer for each gene, with its mean and standard deviation over the slide."""
        rows = predict_genes(self._features, decoder, columns)
        named = [decoder.named()[i] for i in columns]
        return [
            self._scale(gene, UNIT, values)
            | {"mean": float(values.mean(dtype=np.float64)), "sd": float(values.std(dtype=np.float64))}
            for gene, values in zip(named, rows.T, strict=True)
        ]

    def signatures(self, decoder: GeneDecoder, signatures: Sequence[Signature]) -> list[Part]:
        """A layer for each signature, in standard deviations over this slide."""
        maps = [(one.name, GeneMaps(lambda: decoder, {one.name: one})) for one in signatures]
        return [self._scale(*own.values(self._features, name)) for name, own in maps]

    def attention(self, attention: Attention) -> Part:
        """Attention of one class.

        Raises:
            UsageError: it is over other patches, or cannot be read.
        """
        layer = attention.layer(self._features.grid.xy_l0)
        return self._scale(layer.legend["title"], layer.legend["unit"], _values(layer))

    @property
    def bounds_l0(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) of every picture, in level-0 pixels."""
        return self._raster.bounds_l0

    @cached_property
    def _components(self) -> Components:
        return Components.of(sample_rows(self._features.path, SAMPLED_ROWS))

    def _scale(self, title: str, unit: str, values: NDArray[np.float32]) -> Part:
        layer = scale_layer(title, unit, values)
        low, high = layer.legend["low"], layer.legend["high"]
        share = (np.clip(values.astype(np.float64), low, high) - low) / (high - low)
        index = np.round((LEVELS - 1) * share).astype(np.uint8)
        return self._part(layer, self._palette(index, colour(np.linspace(0, 1, LEVELS), 0, 1)))

    def _palette(self, index: NDArray[np.uint8], colours: NDArray[np.uint8]) -> bytes:
        """A PNG of uint8 [N] that say which of the colours [K, 3] each patch has; K is at most 255."""
        cells = self._raster.paint(np.repeat(index[:, None] + 1, 3, axis=1))[..., 0]  # 0 is no patch
        picture = Image.fromarray(np.ascontiguousarray(cells))
        picture.putpalette(b"\0\0\0" + colours.tobytes())
        file = io.BytesIO()
        picture.save(file, "PNG", transparency=0, optimize=True)
        return file.getvalue()

    def _part(self, layer: Layer, picture: bytes) -> Part:
        values = None if layer.values is None else packed(layer.values)
        return {"legend": layer.legend, "picture": base64_of(picture), "values": values}


def packed(values: NDArray[np.float32]) -> Part:
    """Numbers for a page: float16, or float32 where there are large ones."""
    kind = "f2" if np.abs(values).max(initial=0) < HALF_BELOW else "f4"
    return {"type": kind, "base64": base64_of(values.astype(f"<{kind}").tobytes())}


def base64_of(data: bytes) -> str:
    """Bytes as text."""
    return base64.b64encode(data).decode("ascii")


def _values(layer: Layer) -> NDArray[np.float32]:
    assert layer.values is not None
    return layer.values
