"""What finetuning needs of an image encoder: LoRA adapters, projection heads, augmentation, gradients.

LoRA: Hu et al., arXiv 2106.09685. `encoders.lora` merges adapters into weights.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from seal_extract.encoders.encoder import Encoder
from seal_extract.encoders.heads import new_head
from seal_extract.encoders.lora import Update, merge
from seal_extract.encoders.transform import fit
from seal_extract.errors import UsageError
from seal_extract.genes.omics import OmicsEncoder
from seal_extract.train.config import LoraOptions

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
ROWS = 64  # patches of a forward pass without gradients
_BLOCK = re.compile(r"(.*\bblocks)\.(\d+)\.")


class LoraLinear(nn.Module):
    """base(x) + alpha / r * B A dropout(x); B begins at zero, so that training begins at the base."""

    def __init__(self, base: nn.Linear, options: LoraOptions) -> None:
        super().__init__()
        self.base_layer = base
        self.scale = options.alpha / options.r
        self.dropout = nn.Dropout(options.dropout)
        self.lora_A = nn.Parameter(torch.empty(options.r, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, options.r, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    @property
    def weight(self) -> Tensor:
        """Of the base: models read a layer's dtype and device from it."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        low: Tensor = self.dropout(x) @ self.lora_A.T @ self.lora_B.T
        out: Tensor = self.base_layer(x) + self.scale * low
        return out


def add_adapters(tower: nn.Module, options: LoraOptions) -> None:
    """Wrap the attention and MLP layers of the last blocks; all other weights stay frozen.

    Raises:
        UsageError: the tower has fewer such blocks.
    """
    found: dict[tuple[str, int], dict[str, nn.Linear]] = {}
    for name, module in tower.named_modules():
        block = _BLOCK.match(name)
        if block and isinstance(module, nn.Linear) and name.endswith(LAYERS):
            found.setdefault((block[1], int(block[2])), {})[name] = module
    last = sorted(found)[-options.blocks :]
    if len(last) < options.blocks:
        raise UsageError(
            f"lora.blocks is {options.blocks}, but the encoder has {len(found)} blocks of {LAYERS}"
        )
    for place in last:
        for name, module in found[place].items():
            tower.set_submodule(name, LoraLinear(module, options))


def merge_adapters(tower: nn.Module) -> None:
    """Replace every adapter by a plain Linear layer with the adapter merged into it."""
    for name, module in list(tower.named_modules()):
        if isinstance(module, LoraLinear):
            base = module.base_layer
            update = Update("weight", module.lora_A.detach(), module.lora_B.detach(), module.scale)
            merged = merge({"weight": base.weight.detach()}, [update])["weight"]
            base.weight = nn.Parameter(merged, requires_grad=False)
            tower.set_submodule(name, base)


def add_heads(encoder: Encoder, omics: OmicsEncoder | None, kind: str) -> None:
    """Give both halves new projection heads, or none, in place of those that they came with.

    Raises:
        UsageError: heads without an expression encoder to contrast with.
    """
    if kind != "none" and omics is None:
        raise UsageError(
            f"projection is {kind!r}, but no expression encoder is aligned with the images; leave it out"
        )
    encoder.projection = new_head(kind, encoder.spec.dim)
    if omics is not None:
        omics.projection_head = new_head(kind, omics.dim)


def project(
    encoder: Encoder, omics: OmicsEncoder, images: Tensor, expression: Tensor
) -> tuple[Tensor, Tensor]:
    """Both embeddings [B, D] as they are contrasted: after the projection heads, where there are some."""
    if encoder.projection is None or omics.projection_head is None:
        return images, expression
    return encoder.projection(images), omics.projection_head(expression)


def embed_patches(encoder: Encoder, patches: Tensor, stain: float = 0.0, seed: int | None = None) -> Tensor:
    """Embeddings of patches, with gradients; without a seed the same as `Encoder.encode`.

    Without gradients a whole section may come at once: `ROWS` patches are embedded at a time.

    Args:
        encoder: in training or evaluation mode.
        patches: uint8 [B, 3, S, S], on any device.
        stain: standard deviation of the colour augmentation; see `vary_stain`.
        seed: of orientation and colour; None switches augmentation off.

    Returns:
        [B, D].
    """
    if seed is None and len(patches) > ROWS and not torch.is_grad_enabled():
        return torch.cat([embed_patches(encoder, part) for part in torch.split(patches, ROWS)])
    patches = patches.to(encoder.device, non_blocking=True)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if generator is not None:
        patches = reorient(patches, generator)
    images = fit(patches, encoder.spec.input).float() / 255
    if generator is not None:
        images = vary_stain(images, stain, generator)
    embeddings: Tensor = encoder((images - encoder.mean) / encoder.std)
    return embeddings


def reorient(patches: Tensor, generator: torch.Generator) -> Tensor:
    """Each patch [B, 3, S, S] in one of its eight orientations; ``generator`` is on the CPU."""
    out = torch.empty_like(patches)
    orientation = torch.randint(8, (len(patches),), generator=generator)
    for o in range(8):
        rows = (orientation == o).nonzero()[:, 0].to(patches.device)
        some = patches[rows].flip(3) if o >= 4 else patches[rows]
        out[rows] = torch.rot90(some, o % 4, (2, 3))
    return out


def vary_stain(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Each image with its channels scaled, mixed and shifted around its own mean colour.

    Args:
        images: float [B, 3, S, S], 0 to 1.
        strength: standard deviation of the scales; that of mixing is 0.4 of it, that of shifts 0.3.
        generator: on the CPU.
    """
    b = len(images)
    mixing = torch.eye(3) + strength * (
        0.4 * torch.randn(b, 3, 3, generator=generator)
        + torch.diag_embed(torch.randn(b, 3, generator=generator))
    )
    shift = 0.3 * strength * torch.randn(b, 3, 1, 1, generator=generator)
    middle = images.mean((2, 3), keepdim=True) / 2
    mixed = torch.einsum("bij,bjhw->bihw", mixing.to(images), images - middle) + middle
    return (mixed + shift.to(images)).clamp(0, 1)
