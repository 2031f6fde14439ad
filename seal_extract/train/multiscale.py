"""Multi-scale contrastive alignment of images and expression (Xing and Xing, 2026).

A region is a patch and its eight neighbours. Images and expression are contrasted patch by patch and region
by region, and each patch is drawn to its parent region.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seal_extract.encoders.encoder import Encoder
from seal_extract.errors import UsageError
from seal_extract.train.batches import TrainBatch
from seal_extract.train.config import MultiScaleOptions
from seal_extract.train.lora import add_adapters
from seal_extract.train.losses import info_nce, to_parent
from seal_extract.train.seal import Losses, OmicsModel, add_heads, behind_heads, embed_patches


class MultiScaleModel(nn.Module):
    """The expression side is SEAL's expression encoder, or a table of another model's embeddings."""

    def __init__(
        self,
        encoder: Encoder,
        omics: OmicsModel | None,
        options: MultiScaleOptions,
        table_dim: int = 0,
        projection: str = "none",
    ) -> None:
        """Add adapters to ``encoder``.

        Args:
            encoder: stays frozen but for its adapters.
            omics: trained along; or None, where the batches bring embeddings.
            options: weights.
            table_dim: length of those embeddings.
            projection: kind of the heads, with an expression encoder.

        Raises:
            UsageError: neither an expression encoder nor embeddings; or heads without the former.
        """
        super().__init__()
        if omics is None and not table_dim:
            raise UsageError("nothing to align with: give an expression encoder, or a table of embeddings")
        self.encoder, self.omics, self.options = encoder, omics, options
        add_heads(encoder, omics, projection)
        self.adapted = add_adapters(encoder.tower, options.lora)
        self.project = nn.Identity() if omics is not None else nn.Linear(table_dim, encoder.spec.dim)

    def forward(self, batch: TrainBatch, seed: int | None = None) -> Losses:
        """The terms of the loss, weighted; ``batch`` is of whole regions."""
        if batch.region is None:
            raise UsageError("multi-scale alignment needs batches of regions")
        o = self.options
        images = embed_patches(self.encoder, batch.patches, o.stain, seed)  # [M, D]
        expression, terms = self._expression(batch)
        images, expression = behind_heads(self.encoder, self.omics, images, expression)
        image_regions, expression_regions = mean_of(images, batch.region), mean_of(expression, batch.region)
        # a patch may lie in several regions of a batch: it is contrasted once
        once = first_of_each(batch.row)
        terms["patch"] = o.patch * info_nce(images[once], expression[once], o.temperature)
        terms["region"] = o.region * info_nce(image_regions, expression_regions, o.temperature)
        terms["hierarchy"] = o.hierarchy * to_parent(images, image_regions, batch.region)
        return terms

    def _expression(self, batch: TrainBatch) -> tuple[Tensor, Losses]:
        if self.omics is not None:
            return self.omics.losses(batch.expression)
        if batch.embedding is None:
            raise UsageError("the sections bring no table of embeddings; name it as obsm in [data]")
        return self.project(batch.embedding), {}


def mean_of(rows: Tensor, group: Tensor) -> Tensor:
    """Mean of the rows of each group: [M, D] and int64 [M] to [R, D]."""
    groups = int(group.max()) + 1
    total = rows.new_zeros(groups, rows.shape[1]).index_add(0, group, rows)
    return total / torch.bincount(group, minlength=groups)[:, None]


def first_of_each(row: Tensor) -> Tensor:
    """Positions at which each value of ``row`` stands first: int64 [K], in order."""
    values = row.tolist()
    return torch.tensor(
        sorted({v: i for i, v in reversed(list(enumerate(values)))}.values()), device=row.device
    )
