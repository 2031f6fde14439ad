"""SEAL: an expression encoder, then an image encoder aligned with it (arXiv 2602.14177, version 0.0.1).

Stage 1 trains the expression encoder alone. Stage 2 trains adapters in the last blocks of the image encoder,
the image decoder and the expression encoder together. With terms of the loss left out it is a baseline: CLIP,
regression or a linear probe.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seal_extract.encoders.encoder import Encoder
from seal_extract.encoders.heads import ExpressionDecoder
from seal_extract.encoders.spec import Decoder
from seal_extract.errors import UsageError
from seal_extract.genes.omics import OmicsEncoder
from seal_extract.train.config import SealOptions
from seal_extract.train.finetune import add_adapters, add_heads, embed_patches, project
from seal_extract.train.losses import expression_loss, flow_kl, info_nce
from seal_extract.train.pairs import TrainBatch

Losses = dict[str, Tensor]


class OmicsModel(nn.Module):
    """Stage 1: the expression encoder alone."""

    def __init__(self, omics: OmicsEncoder, sd: Tensor, kl: float = 0.0) -> None:
        """Make every weight of ``omics`` trainable.

        Args:
            omics: new, or trained before.
            sd: float32 [G], standard deviation of each gene over the training spots.
            kl: weight of the divergence from N(0, 1).
        """
        super().__init__()
        self.omics, self.kl = omics.requires_grad_(True), kl
        self.register_buffer("sd", sd)
        self.sd: Tensor

    def forward(self, batch: TrainBatch, seed: int | None = None) -> Losses:
        """The terms of the loss."""
        return self.losses(batch.expression)[1]

    def losses(self, expression: Tensor) -> tuple[Tensor, Losses]:
        """The embedding [B, D] of expression [B, G], a sample while training; and the terms of its loss."""
        mu, logvar = self.omics.latent(expression)
        z0 = mu + torch.randn_like(mu) * (logvar / 2).exp() if self.training else mu
        zk, log_det = self.omics.flow(z0)
        terms = {"reconstruction": expression_loss(self.omics.decoder(zk), expression, self.sd)}
        if self.kl:
            terms["kl"] = self.kl * flow_kl(z0, mu, logvar, zk, log_det)
        return zk, terms


class SealModel(nn.Module):
    """Stage 2, or a baseline."""

    def __init__(
        self,
        encoder: Encoder,
        omics: OmicsModel | None,
        sd: Tensor,
        options: SealOptions,
        projection: str = "none",
    ) -> None:
        """Add adapters, a decoder and projection heads to ``encoder``, whose own weights stay frozen.

        Raises:
            UsageError: alignment without an expression encoder, or with one of another dimension; or heads
                without alignment.
        """
        super().__init__()
        self.options = options
        if options.alignment and (omics is None or omics.omics.dim != encoder.spec.dim):
            raise UsageError(
                f"{encoder.spec.name} has {encoder.spec.dim} dimensions, the expression encoder "
                f"{omics.omics.dim if omics else 'is missing'}; both need the same number"
            )
        self.encoder, self.omics = encoder, omics if options.alignment or options.reconstruction else None
        add_heads(encoder, omics.omics if omics and options.alignment else None, projection)
        if options.lora:
            add_adapters(encoder.tower, options.lora)
        self.decoder = new_decoder(encoder.spec.dim, options.decoder_hidden, len(sd))
        self.register_buffer("sd", sd)
        self.sd: Tensor

    def forward(self, batch: TrainBatch, seed: int | None = None) -> Losses:
        """The weighted terms of the loss; patches are augmented if ``seed`` is given."""
        images = embed_patches(self.encoder, batch.patches, self.options.stain, seed)  # [B, D]
        return self.terms(images, images, batch)

    def terms(self, contrasted: Tensor, decoded: Tensor, batch: TrainBatch) -> Losses:
        """The weighted terms of the loss of two embeddings [B, D] of each image."""
        o = self.options
        terms: Losses = {}
        if self.omics is not None:
            expression, own = self.omics.losses(batch.expression)
            terms = {name: o.reconstruction * loss for name, loss in own.items()}
            if o.alignment:
                both = project(self.encoder, self.omics.omics, contrasted, expression)
                terms["alignment"] = o.alignment * info_nce(*both, o.temperature)
        if o.prediction:
            predicted = self.decoder(decoded.float())
            terms["prediction"] = o.prediction * expression_loss(predicted, batch.expression, self.sd)
        return terms


def new_omics(dim: int, genes: int, hidden: tuple[int, int]) -> OmicsEncoder:
    """An expression encoder with new weights; its flows begin close to the identity."""
    omics = OmicsEncoder("new", dim, genes, hidden=hidden)
    for name, parameter in omics.flows.named_parameters():
        nn.init.normal_(parameter, std=0.01) if not name.endswith("b") else nn.init.zeros_(parameter)
    return omics


def new_decoder(dim: int, hidden: int, genes: int) -> nn.Module:
    """SEAL's image decoder with new weights; with ``hidden`` 0 a single Linear layer, for probes."""
    if not hidden:
        return nn.Linear(dim, genes)
    decoder = ExpressionDecoder(dim, Decoder(hidden, genes)).to_empty(device="cpu")
    decoder.hidden.reset_parameters()
    decoder.genes.reset_parameters()
    # the last ReLU passes nothing below 0: begin where most genes are expressed
    nn.init.constant_(decoder.genes.bias, 0.1)
    return decoder


def as_expression_decoder(decoder: nn.Module) -> ExpressionDecoder:
    """The decoder as an encoder's folder holds it; a Linear layer as relu(W relu(x) - W relu(-x) + b)."""
    if isinstance(decoder, ExpressionDecoder):
        return decoder
    assert isinstance(decoder, nn.Linear)
    genes, dim = decoder.weight.shape
    both = ExpressionDecoder(dim, Decoder(2 * dim, genes))
    eye, weight = torch.eye(dim), decoder.weight.detach().cpu()
    tensors = {
        "hidden.weight": torch.cat([eye, -eye]),
        "hidden.bias": torch.zeros(2 * dim),
        "genes.weight": torch.cat([weight, -weight], dim=1),
        "genes.bias": decoder.bias.detach().cpu(),
    }
    both.load_state_dict(tensors, strict=True, assign=True)
    return both
