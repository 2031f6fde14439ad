"""Baselines that papers compare with, each by its published loss: ST-Net, BLEEP and PathOmCLIP.

ST-Net: He et al., Nature Biomedical Engineering 2020, and its code, bryanhe/ST-Net. BLEEP: Xie et al.,
arXiv 2306.01859, and its code, bowang-lab/BLEEP. PathOmCLIP: bioRxiv 2024.12.10.627865, which has
no public code; SEAL's variant is ``PathomClipWrapper`` in mahmoodlab/SEAL. Data, optimiser and augmentation
are those of this package's loop.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seal_extract.encoders.encoder import Encoder
from seal_extract.errors import UsageError
from seal_extract.train.config import BaselineOptions
from seal_extract.train.finetune import add_adapters, add_heads, embed_patches
from seal_extract.train.losses import bleep_loss, info_nce
from seal_extract.train.pairs import Batches, TrainBatch
from seal_extract.train.seal import Losses, OmicsModel

HEADS, FEED_FORWARD = 8, 2048  # of SEAL's local transformer


class _Baseline(nn.Module):
    """What all of them have: an encoder, of which all weights, adapters or nothing is trained."""

    def __init__(self, encoder: Encoder, options: BaselineOptions) -> None:
        super().__init__()
        self.encoder, self.options = encoder, options
        self.omics: OmicsModel | None = None
        self.decoder: nn.Module | None = None
        add_heads(encoder, None, "none")
        if options.train == "all":
            encoder.tower.requires_grad_(True)
        elif options.train == "lora":
            add_adapters(encoder.tower, options.lora)

    def embed(self, batch: TrainBatch, seed: int | None) -> Tensor:
        """[B, D], with gradients."""
        return embed_patches(self.encoder, batch.patches, self.options.stain, seed).float()


class StNetModel(_Baseline):
    """Expression by one Linear layer on the encoder, which is DenseNet-121 in the paper."""

    def __init__(self, encoder: Encoder, options: BaselineOptions, mean: Tensor) -> None:
        """Begin at the mean expression [G] of the training spots, with weights of zero, as ST-Net does."""
        super().__init__(encoder, options)
        decoder = nn.Linear(encoder.spec.dim, len(mean))
        nn.init.zeros_(decoder.weight)
        decoder.bias.data.copy_(mean)
        self.decoder: nn.Linear = decoder

    def forward(self, batch: TrainBatch, seed: int | None = None) -> Losses:
        """The mean squared error, which ST-Net's code sums over the batch: that only scales its lr."""
        return {"prediction": F.mse_loss(self.decoder(self.embed(batch, seed)), batch.expression)}


class BleepHead(nn.Module):
    """BLEEP's projection: Linear, GELU, Linear, dropout, added to the first, LayerNorm."""

    def __init__(self, inputs: int, options: BaselineOptions) -> None:
        super().__init__()
        self.projection = nn.Linear(inputs, options.projection_dim)
        self.fc = nn.Linear(options.projection_dim, options.projection_dim)
        self.dropout = nn.Dropout(options.dropout)
        self.norm = nn.LayerNorm(options.projection_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs] to [B, projection_dim]."""
        projected = self.projection(x)
        made: Tensor = self.norm(self.dropout(self.fc(F.gelu(projected))) + projected)
        return made


class BleepModel(_Baseline):
    """Image and expression contrasted with soft targets; expression is predicted by the nearest spots."""

    def __init__(self, encoder: Encoder, options: BaselineOptions, genes: int) -> None:
        super().__init__(encoder, options)
        self.image_head = BleepHead(encoder.spec.dim, options)
        self.spot_head = BleepHead(genes, options)

    def forward(self, batch: TrainBatch, seed: int | None = None) -> Losses:
        """BLEEP's loss."""
        images = self.image_head(self.embed(batch, seed))
        spots = self.spot_head(batch.expression)
        return {"alignment": bleep_loss(images, spots, self.options.temperature)}

    @torch.no_grad()
    def predict(self, query: Batches, reference: Batches) -> Tensor:
        """The mean expression of the reference spots that are nearest to each query patch: float32 [N, G]."""
        self.eval()
        device = self.encoder.device
        images = torch.cat([self.image_head(self.embed(batch, None)) for batch in query.whole()])
        expression = torch.from_numpy(reference.pairs.expression).to(device)
        return nearest_expression(images, self.spot_head(expression), expression, self.options.nearest)


def nearest_expression(images: Tensor, spots: Tensor, expression: Tensor, k: int) -> Tensor:
    """The mean expression of the ``k`` spots of highest cosine similarity, as BLEEP predicts it.

    Args:
        images: [N, D].
        spots: [M, D].
        expression: [M, G], of the spots.
        k: fewer where there are fewer spots.

    Returns:
        [N, G].
    """
    similarity = F.normalize(images, dim=1) @ F.normalize(spots, dim=1).T
    nearest = similarity.topk(min(k, len(spots))).indices  # int64 [N, k]
    return torch.stack([expression[rows].mean(0) for rows in nearest])


class PathOmClipModel(_Baseline):
    """Contrast of patch and expression; a transformer over neighbouring patches predicts expression.

    The contrast is published, and that a transformer gathers local features after it. The mean squared error
    of the predicted expression, the weights of both terms and the transformer's size, which is that of SEAL's
    variant, are this package's choice. With ``context = "batch"`` it is SEAL's variant: a patch attends to
    all patches of its batch, whether or not they are neighbours, and what comes out is contrasted.
    """

    def __init__(
        self, encoder: Encoder, omics: OmicsModel | None, options: BaselineOptions, genes: int, dim: int = 0
    ) -> None:
        """Add the transformer and a Linear layer to expression.

        Args:
            encoder: the image encoder.
            omics: the expression encoder, trained along; or None, where the batches have embeddings.
            options: choices.
            genes: of the panel.
            dim: dimensions of those embeddings.

        Raises:
            UsageError: the encoder's dimension is no multiple of 8, the number of heads.
        """
        super().__init__(encoder, options)
        own = encoder.spec.dim
        if own % HEADS:
            raise UsageError(
                f"{encoder.spec.name} has {own} dimensions; pathomclip allows multiples of {HEADS}, its heads"
            )
        self.omics = omics
        self.project = nn.Identity() if omics is not None else nn.Linear(dim, own)
        self.local = nn.TransformerEncoderLayer(own, HEADS, FEED_FORWARD, dropout=0.1, batch_first=True)
        self.predict = nn.Linear(own, genes)

    def forward(self, batch: TrainBatch, seed: int | None = None) -> Losses:
        """The terms of the loss; ``batch`` holds whole regions, unless the context is the batch."""
        images = self.embed(batch, seed)
        if batch.region is None:
            local = images = self.local(images[None])[0]
            target = torch.arange(len(images), device=images.device)
        else:
            target, sets, missing = neighbour_sets(images, batch.region)
            local, images = self.local(sets, src_key_padding_mask=missing)[:, 0], images[target]
        true = batch.expression[target]
        terms: Losses = {}
        if self.omics is not None:
            expression, terms = self.omics.losses(true)
        else:
            assert batch.embedding is not None
            expression = self.project(batch.embedding[target])
        terms["alignment"] = info_nce(images, expression, self.options.clip_temperature)
        terms["prediction"] = F.mse_loss(self.predict(local), true)
        return terms


def neighbour_sets(rows: Tensor, region: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Regions as sets of one size.

    Args:
        rows: [M, D], the patches of all regions, the middle one of each first.
        region: int64 [M], ascending.

    Returns:
        int64 [R], the row of each middle patch; [R, K, D], with zeros where a region has fewer than K
        patches; bool [R, K], true where it has none.
    """
    counts = torch.bincount(region)
    first = torch.cumsum(counts, 0) - counts
    place = torch.arange(len(region), device=region.device) - first[region]
    sets = rows.new_zeros(len(counts), int(counts.max()), rows.shape[1])
    missing = torch.ones(sets.shape[:2], dtype=torch.bool, device=rows.device)
    sets[region, place], missing[region, place] = rows, False
    return first, sets, missing
