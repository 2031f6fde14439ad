"""The parts of image towers that timm lacks; a row selects and sizes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from timm.layers.helpers import to_2tuple
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from seal_extract.encoders.spec import Head, Pooler
from seal_extract.errors import UsageError


class AttentionalPooler(nn.Module):
    """Learned queries attend to all tokens (Yu et al., CoCa, arXiv 2205.01917, section 3.2).

    Only the first query is computed: the others of CoCa are for its captions.
    """

    def __init__(self, dim: int, token_dim: int, shape: Pooler) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(shape.queries, dim))
        self.attn = nn.MultiheadAttention(
            dim, shape.heads, bias=shape.bias, kdim=token_dim, vdim=token_dim, batch_first=True
        )
        self.ln_q = nn.LayerNorm(dim)
        self.ln_k = nn.LayerNorm(token_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, token_dim] to [B, dim]."""
        pooled: Tensor = self.attn(*self._query_and_keys(tokens), need_weights=False)[0]  # [B, 1, dim]
        return pooled[:, 0]

    def attention(self, tokens: Tensor) -> Tensor:
        """The weights by which `forward` mixes the tokens, [B, heads, N]."""
        weights: Tensor = self.attn(*self._query_and_keys(tokens), average_attn_weights=False)[1]
        return weights[:, :, 0]

    def _query_and_keys(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys = self.ln_k(tokens)
        query = self.ln_q(self.query[:1]).expand(len(tokens), -1, -1)  # [B, 1, dim]
        return query, keys, keys


class ConchTower(nn.Module):
    """The tokens of a timm trunk, pooled by attention and normalised: CONCH and other CoCa image towers.

    CONCH is by Lu et al., doi 10.1038/s41591-024-02856-4; the names are those of its weight file.
    """

    def __init__(self, trunk: Any, token_dim: int, dim: int, shape: Pooler) -> None:
        super().__init__()
        self.trunk = trunk
        if not shape.after_norm:
            trunk.norm = nn.Identity()
        self.attn_pool_contrast = AttentionalPooler(dim, token_dim, shape)
        self.ln_contrast = nn.LayerNorm(dim)
        self.head: nn.Module = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W], sides multiples of the trunk's patch, to [B, dim]."""
        return self.pool(self.trunk.forward_features(images))

    def pool(self, tokens: Tensor) -> Tensor:
        """All tokens of the trunk [B, 1 + N, token_dim] to [B, dim]."""
        embedding: Tensor = self.head(self.ln_contrast(self.attn_pool_contrast(tokens)))
        return embedding


class UnitLength(nn.Module):
    """Divides each row by its Euclidean norm."""

    def forward(self, rows: Tensor) -> Tensor:
        """[B, D] to [B, D]."""
        return nn.functional.normalize(rows, dim=-1)


def new_head(shape: Head, inputs: int) -> nn.Sequential:
    """The layers of a head that takes ``inputs`` numbers."""
    layers: list[nn.Module] = []
    for width in shape.widths:
        layers += [nn.GELU()] if layers else []
        layers.append(nn.Linear(inputs, width, bias=shape.bias))
        inputs = width
    return nn.Sequential(*layers, *[UnitLength()] * shape.unit_length)


class ConvStem(nn.Module):
    """A patch embedding by convolutions, each of which halves the image.

    With patches of 4 px it is CTransPath's (Wang et al., doi 10.1016/j.media.2022.102559); with larger ones
    that of Xiao et al. (arXiv 2106.14881). timm calls it with the arguments of its own; it takes those that
    it needs.
    """

    def __init__(
        self,
        img_size: Any = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: Callable[[int], nn.Module] | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if patch_size not in (4, 8, 16) or embed_dim % 8:
            raise UsageError(
                f"ConvStem has patches of {patch_size} px and width {embed_dim}; allowed: 4, 8 or 16 px, and "
                "a width that is a multiple of 8"
            )
        self.patch_size = (patch_size, patch_size)
        self.grid_size = tuple(side // patch_size for side in to_2tuple(img_size))
        self.num_patches = math.prod(self.grid_size)
        widths = [in_chans, *(embed_dim // 8 * 2**i for i in range(patch_size.bit_length() - 1))]
        halvings = [
            part
            for before, after in pairwise(widths)
            for part in (
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            )
        ]
        self.proj = nn.Sequential(*halvings, nn.Conv2d(widths[-1], embed_dim, 1))
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to tokens [B, H / P, W / P, D], with patches of P px."""
        tokens: Tensor = self.norm(self.proj(images).permute(0, 2, 3, 1))
        return tokens


class PlainPositions(VisionTransformer):
    """A vision transformer of timm that resamples its positions as transformers' Dinov2Model or DINO does.

    That is bicubic without antialiasing. The two filters differ in enlarging too: the cubic's coefficient is
    -0.75 without antialiasing and -0.5 with it.
    """

    position_offset = 0.0

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patch tokens [B, H, W, D] to all tokens [B, prefix + H W, D]."""
        old, new = list(self.patch_embed.grid_size), list(x.shape[1:3])
        if self.position_offset and new != old:
            positions = self._with_offset(old, new)
        else:
            positions = resample_abs_pos_embed(
                self.pos_embed,
                new_size=new,
                old_size=old,
                num_prefix_tokens=self.num_prefix_tokens,
                antialias=False,
            )
        prefix = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        dropped: Tensor = self.pos_drop(torch.cat([*prefix, x.flatten(1, 2)], 1) + positions)
        return dropped

    def _with_offset(self, old: list[int], new: list[int]) -> Tensor:
        """Positions [1, prefix + H W, D], taken where ``new`` patches and the offset would fill the image."""
        positions: Any = self.pos_embed
        of_prefix, of_patches = positions.split([self.num_prefix_tokens, old[0] * old[1]], 1)
        resampled = nn.functional.interpolate(
            of_patches.unflatten(1, old).permute(0, 3, 1, 2),
            scale_factor=[(n + self.position_offset) / o for n, o in zip(new, old, strict=True)],
            mode="bicubic",
        )
        return torch.cat([of_prefix, resampled.flatten(2).mT], 1)


def with_plain_positions(trunk: Any, offset: float) -> Any:
    """The same trunk, made a `PlainPositions`.

    Raises:
        UsageError: it is none that this is defined for.
    """
    if type(trunk) is not VisionTransformer or not trunk.dynamic_img_size or trunk.no_embed_class:
        raise UsageError(
            "antialias is False; allowed: with a VisionTransformer, dynamic_img_size and no no_embed_class"
        )
    plain: Any = trunk
    plain.__class__ = PlainPositions  # timm's factory takes no class
    plain.position_offset = offset
    return plain
