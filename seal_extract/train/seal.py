"""SEAL: an expression encoder, then an image encoder aligned with it (arXiv 2602.14177, version 0.0.1).

Stage 1 trains the expression encoder alone. Stage 2 trains adapters in the last blocks of the image encoder,
the image decoder and the expression encoder together. With terms left out it is the baselines of the field.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seal_extract.encoders.encoder import Encoder
from seal_extract.encoders.heads import ExpressionDecoder, new_head
from seal_extract.encoders.spec import Decoder
from seal_extract.encoders.transform import fit
from seal_extract.errors import UsageError
from seal_extract.genes.omics import OmicsEncoder
from seal_extract.train.augment import stained, turned
from seal_extract.train.batches import TrainBatch
from seal_extract.train.config import SealOptions
from seal_extract.train.lora import add_adapters
from seal_extract.train.losses import expression_loss, flow_kl, info_nce

Losses = dict[str, Tensor]


class OmicsModel(nn.Module):
    """Stage 1: the expression encoder by itself."""

    def __init__(self, omics: OmicsEncoder, sd: Tensor, kl: float = 0.0) -> None:
        """Make every weight of ``omics`` trainable.

        Args:
            omics: new, or trained before.
            sd: float32 [G], of each gene over the training spots.
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
        """The embedding [B, D] of expression [B, G], a sample while training; and what it costs."""
        mu, logvar = self.omics.latent(expression)
        z0 = mu + torch.randn_like(mu) * (logvar / 2).exp() if self.training else mu
        zk, log_det = self.omics.flow(z0)
        terms = {"reconstruction": expression_loss(self.omics.decoder(zk), expression, self.sd)}
        if self.kl:
            terms["kl"] = self.kl * flow_kl(z0, mu, logvar, zk, log_det)
        return zk, terms


class SealModel(nn.Module):
    """Stage 2, or a baseline of it."""

    def __init__(
        self,
        encoder: Encoder,
        omics: OmicsModel | None,
        sd: Tensor,
        options: SealOptions,
        projection: str = "none",
    ) -> None:
        """Add adapters, a decoder and projection heads to ``encoder``, which stays frozen elsewhere.

        Raises:
            UsageError: an alignment without an expression encoder, or with one of another length; or heads
                without an alignment.
        """
        super().__init__()
        self.options = options
        if options.alignment and (omics is None or omics.omics.dim != encoder.spec.dim):
            raise UsageError(
                f"{encoder.spec.name} gives {encoder.spec.dim} numbers, the expression encoder "
                f"{omics.omics.dim if omics else 'is missing'}; they have to be of one length"
            )
        self.encoder, self.omics = encoder, omics if options.alignment or options.reconstruction else None
        add_heads(encoder, omics if options.alignment else None, projection)
        self.adapted = add_adapters(encoder.tower, options.lora) if options.lora else ()
        self.decoder = new_decoder(encoder.spec.dim, options.decoder_hidden, len(sd))
        self.register_buffer("sd", sd)
        self.sd: Tensor

    def forward(self, batch: TrainBatch, seed: int | None = None) -> Losses:
        """The terms of the loss, weighted; patches are varied if ``seed`` is given."""
        o = self.options
        images = embed_patches(self.encoder, batch.patches, o.stain, seed)  # [B, D]
        terms: Losses = {}
        if self.omics is not None:
            expression, own = self.omics.losses(batch.expression)
            terms = {name: o.reconstruction * loss for name, loss in own.items()}
            if o.alignment:
                both = behind_heads(self.encoder, self.omics, images, expression)
                terms["alignment"] = o.alignment * info_nce(*both, o.temperature)
        if o.prediction:
            predicted = self.decoder(images.float())
            terms["prediction"] = o.prediction * expression_loss(predicted, batch.expression, self.sd)
        return terms


def add_heads(encoder: Encoder, omics: OmicsModel | None, kind: str) -> None:
    """Give both halves new projection heads, or none, in place of what they came with.

    Raises:
        UsageError: heads without an expression half to contrast with.
    """
    if kind != "none" and omics is None:
        raise UsageError(
            f"projection is {kind!r}, but no expression encoder is aligned with the images; leave it out"
        )
    encoder.projection = new_head(kind, encoder.spec.dim)
    if omics is not None:
        omics.omics.projection_head = new_head(kind, omics.omics.dim)


def behind_heads(
    encoder: Encoder, omics: OmicsModel | None, images: Tensor, expression: Tensor
) -> tuple[Tensor, Tensor]:
    """What is contrasted: both embeddings [B, D], behind the heads where there are some."""
    head = None if omics is None else omics.omics.projection_head
    if encoder.projection is None or head is None:
        return images, expression
    return encoder.projection(images), head(expression)


def embed_patches(encoder: Encoder, patches: Tensor, stain: float = 0.0, seed: int | None = None) -> Tensor:
    """Patches to embeddings with gradients; as `Encoder.encode` without a seed.

    Args:
        encoder: in whichever mode.
        patches: uint8 [B, 3, S, S].
        stain: sd of the colour variation; see `stained`.
        seed: of orientation and colour; None leaves the patches as they are.

    Returns:
        [B, D].
    """
    patches = patches.to(encoder.device, non_blocking=True)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if generator is not None:
        patches = turned(patches, generator)
    images = fit(patches, encoder.spec.input).float() / 255
    if generator is not None:
        images = stained(images, stain, generator)
    embeddings: Tensor = encoder((images - encoder.mean) / encoder.std)
    return embeddings


def new_decoder(dim: int, hidden: int, genes: int) -> nn.Module:
    """The image decoder of SEAL with new weights; with ``hidden`` 0 one Linear layer, for probes."""
    if not hidden:
        return nn.Linear(dim, genes)
    decoder = ExpressionDecoder(dim, Decoder(hidden, genes)).to_empty(device="cpu")
    decoder.hidden.reset_parameters()
    decoder.genes.reset_parameters()
    # the last ReLU passes nothing below 0: begin where most genes are expressed
    nn.init.constant_(decoder.genes.bias, 0.1)
    return decoder
