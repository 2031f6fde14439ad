"""Multi-scale contrastive alignment of images and expression (Xing and Xing, 2026).

A region is a patch and its eight neighbours. Images and expression are contrasted patch by patch and region
by region, and each patch is drawn to its parent region.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from seal_extract.encoders.encoder import Encoder
from seal_extract.errors import UsageError
from seal_extract.train.config import MultiScaleOptions
from seal_extract.train.finetune import add_adapters, add_heads, embed_patches, project
from seal_extract.train.losses import info_nce, to_parent
from seal_extract.train.pairs import TrainBatch
from seal_extract.train.seal import Losses, OmicsModel


class MultiScaleModel(nn.Module):
    """Expression is embedded by SEAL's expression encoder, or comes as another model's embeddings."""

    def __init__(
        self,
        encoder: Encoder,
        omics: OmicsModel | None,
        options: MultiScaleOptions,
        embedding_dim: int = 0,
        projection: str = "none",
    ) -> None:
        """Add adapters to ``encoder``, whose own weights stay frozen.

        Args:
            encoder: the image encoder.
            omics: trained along; or None, where the batches have embeddings.
            options: weights.
            embedding_dim: dimensions of those embeddings.
            projection: kind of the heads, with an expression encoder.

        Raises:
            UsageError: neither an expression encoder nor embeddings; or heads without the former.
        """
        super().__init__()
        if omics is None and not embedding_dim:
            raise UsageError("nothing to align with: give an expression encoder, or embeddings of the spots")
        self.encoder, self.omics, self.options = encoder, omics, options
        add_heads(encoder, omics.omics if omics else None, projection)
        add_adapters(encoder.tower, options.lora)
        self.project = nn.Identity() if omics is not None else nn.Linear(embedding_dim, encoder.spec.dim)

    def forward(self, batch: TrainBatch, seed: int | None = None) -> Losses:
        """The weighted terms of the loss; ``batch`` holds whole regions."""
        assert batch.region is not None
        o = self.options
        images = embed_patches(self.encoder, batch.patches, o.stain, seed)  # [M, D]
        terms: Losses = {}
        if self.omics is not None:
            expression, terms = self.omics.losses(batch.expression)
            images, expression = project(self.encoder, self.omics.omics, images, expression)
        elif batch.embedding is not None:
            expression = self.project(batch.embedding)
        else:
            raise UsageError("the sections have no embeddings; name their key as obsm in [[data.sections]]")
        image_regions, expression_regions = mean_of(images, batch.region), mean_of(expression, batch.region)
        # a patch may lie in several regions of a batch: it is contrasted once
        once = first_of_each(batch.row)
        terms["patch"] = o.patch * info_nce(images[once], expression[once], o.temperature)
        terms["region"] = o.region * info_nce(image_regions, expression_regions, o.temperature)
        terms["hierarchy"] = o.hierarchy * to_parent(images, image_regions, batch.region)
        return terms


def mean_of(rows: Tensor, group: Tensor) -> Tensor:
    """Mean of the rows of each group: [M, D] and int64 [M] to [R, D]."""
    groups = int(group.max()) + 1
    total = rows.new_zeros(groups, rows.shape[1]).index_add(0, group, rows)
    return total / torch.bincount(group, minlength=groups)[:, None]


def first_of_each(row: Tensor) -> Tensor:
    """Positions at which each value of ``row`` occurs first: int64 [K], in order."""
    _, first = np.unique(row.cpu().numpy(), return_index=True)
    return torch.from_numpy(np.sort(first)).to(row.device)
