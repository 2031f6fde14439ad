"""Position embeddings resampled as transformers' Dinov2Model does it, which timm lacks."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from seal_extract.errors import UsageError


class PlainPositions(VisionTransformer):
    """A vision transformer of timm whose positions are resampled bicubic without antialiasing.

    The two filters differ in enlarging too: the cubic's coefficient is -0.75 without antialiasing, -0.5 with.
    """

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patch tokens [B, H, W, D] to all tokens [B, prefix + H W, D]."""
        positions = resample_abs_pos_embed(
            self.pos_embed,
            new_size=list(x.shape[1:3]),
            old_size=list(self.patch_embed.grid_size),
            num_prefix_tokens=self.num_prefix_tokens,
            antialias=False,
        )
        prefix = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        dropped: Tensor = self.pos_drop(torch.cat([*prefix, x.flatten(1, 2)], 1) + positions)
        return dropped


def with_plain_positions(trunk: Any) -> Any:
    """Make a vision transformer resample its positions without antialiasing.

    Raises:
        UsageError: it is none, or of fixed size, or its prefix tokens have no positions.
    """
    if type(trunk) is not VisionTransformer or not trunk.dynamic_img_size or trunk.no_embed_class:
        raise UsageError(
            "antialias is False; allowed: with a VisionTransformer, dynamic_img_size and no no_embed_class"
        )
    trunk.__class__ = PlainPositions  # timm's factory takes no class
    return trunk
