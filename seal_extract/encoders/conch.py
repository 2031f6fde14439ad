"""The image tower of CONCH (Lu et al., doi 10.1038/s41591-024-02856-4): the part that timm lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HEADS = 8  # of the pooler; the weights do not tell


class AttentionalPooler(nn.Module):
    """One learned query attends to all tokens (Yu et al., CoCa, arXiv 2205.01917, section 3.2)."""

    def __init__(self, dim: int, token_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, dim))
        self.attn = nn.MultiheadAttention(dim, HEADS, kdim=token_dim, vdim=token_dim, batch_first=True)
        self.ln_q = nn.LayerNorm(dim)
        self.ln_k = nn.LayerNorm(token_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, token_dim] to [B, dim]."""
        keys = self.ln_k(tokens)
        query = self.ln_q(self.query).expand(len(tokens), -1, -1)  # [B, 1, dim]
        pooled: Tensor = self.attn(query, keys, keys, need_weights=False)[0]  # [B, 1, dim]
        return pooled[:, 0]


class ConchTower(nn.Module):
    """A timm trunk, its tokens pooled by attention and normalised; the names are those of the weight file."""

    def __init__(self, trunk: Any, token_dim: int, dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.attn_pool_contrast = AttentionalPooler(dim, token_dim)
        self.ln_contrast = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W], sides multiples of the trunk's patch, to [B, dim]."""
        tokens = self.trunk.forward_features(images)  # [B, 1 + N, token_dim]
        pooled: Tensor = self.ln_contrast(self.attn_pool_contrast(tokens))
        return pooled
