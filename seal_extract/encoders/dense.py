"""Dense output: the grid of patch tokens of an image, and where the class token or the pooler looks.

Tokens are those that the embedding is made from: behind the trunk's last norm where it has one, in reading
order, without class, register and other prefix tokens. A convolutional network or a Swin transformer gives
its last feature map.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers.helpers import to_2tuple
from timm.models import FeatureListNet
from torch import Tensor, nn

from seal_extract.encoders.parts import ConchTower
from seal_extract.encoders.spec import EncoderSpec
from seal_extract.encoders.tower import pooled
from seal_extract.errors import UsageError

Grid = tuple[int, int, int]  # rows and columns of tokens, and numbers of each


def token_grid(tower: nn.Module, spec: EncoderSpec, height: int, width: int) -> Grid:
    """The grid of tokens of an image of ``height`` x ``width`` pixels, without computing it.

    Raises:
        UsageError: the tower has no such grid.
    """
    trunk = _trunk(tower)
    patch, info = getattr(getattr(trunk, "patch_embed", None), "patch_size", None), _last_map(trunk)
    if patch is not None and hasattr(trunk, "num_prefix_tokens"):
        down, across = to_2tuple(patch)
        return height // down, width // across, int(trunk.num_features)
    if info is None:
        raise UsageError(f"{spec.name} has no grid of tokens; allowed: vision transformers, Swin, CNNs")
    return -(-height // info["reduction"]), -(-width // info["reduction"]), int(info["num_chs"])


def _trunk(tower: Any) -> Any:
    return tower.trunk if isinstance(tower, ConchTower) else tower


def _last_map(trunk: Any) -> dict[str, Any] | None:
    info: Any = getattr(trunk, "feature_info", None)
    if isinstance(trunk, FeatureListNet):
        return dict(info.get_dicts()[-1])
    last = info[-1] if isinstance(info, list) and info else {}
    return last if {"reduction", "num_chs"} <= last.keys() else None


def embed_densely(tower: nn.Module, spec: EncoderSpec, images: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings and tokens by one forward pass.

    Args:
        tower: of the row.
        spec: the row.
        images: normalised [B, 3, H, W].

    Returns:
        The same [B, D] as `embed` gives, and tokens [B, h, w, C].

    Raises:
        UsageError: the tower has no grid of tokens.
    """
    expected = token_grid(tower, spec, *images.shape[2:])
    trunk = _trunk(tower)
    if spec.pooling == "map":
        (features,) = trunk(images)
    else:
        features = trunk.forward_features(images)
    tokens = features
    if features.ndim == 3:
        tokens = features[:, getattr(trunk, "num_prefix_tokens", 0) :]
        if tokens.shape[1] == expected[0] * expected[1]:
            tokens = tokens.unflatten(1, expected[:2])
    elif getattr(trunk, "output_fmt", "NCHW") != "NHWC":
        tokens = features.permute(0, 2, 3, 1)
    if tuple(tokens.shape[1:]) != expected:
        raise UsageError(
            f"{spec.name} gives {list(tokens.shape[1:])} and no grid of tokens {list(expected)}; allowed: "
            "vision transformers, Swin, CNNs"
        )
    return pooled(tower, spec.pooling, features), tokens


def attention_of(tower: nn.Module, spec: EncoderSpec, images: Tensor) -> Tensor:
    """How much the class token in the last block, or the pooler, attends to each patch.

    The attention is computed on a copy of the modules that shares their weights: `embed` and other threads
    go on with the fused one.

    Args:
        tower: of the row.
        spec: the row.
        images: normalised [B, 3, H, W].

    Returns:
        [B, heads, h, w], 0 or above; with the prefix tokens, which are left out, a head sums to 1.

    Raises:
        UsageError: the tower has no attention by a class token or a pooler.
    """
    rows, columns, _ = token_grid(tower, spec, *images.shape[2:])
    trunk = _trunk(tower)
    weights: Tensor | None
    if isinstance(tower, ConchTower):
        weights = tower.attn_pool_contrast.attention(trunk.forward_features(images))  # [B, heads, prefix + N]
    else:
        weights = _class_attention(trunk, images)
    if weights is None or weights.shape[2] != trunk.num_prefix_tokens + rows * columns:
        raise UsageError(
            f"{spec.name} has no attention maps; allowed: vision transformers with a class token, and "
            "towers with an attentional pooler"
        )
    of_patches = weights[:, :, trunk.num_prefix_tokens :]
    return of_patches.reshape(*of_patches.shape[:2], rows, columns)


def _class_attention(trunk: Any, images: Tensor) -> Tensor | None:
    """The first row of the attention of the last block, [B, heads, prefix + N]; None if there is none."""
    held: dict[int, Any] = {id(tensor): tensor for tensor in (*trunk.parameters(), *trunk.buffers())}
    probe = deepcopy(trunk, held)
    attention: Any = getattr(probe.blocks[-1] if hasattr(probe, "blocks") else None, "attn", None)
    if getattr(trunk, "cls_token", None) is None or not hasattr(attention, "attn_drop"):
        return None
    seen: list[Tensor] = []
    attention.fused_attn = False  # the weights pass through the dropout only where it is not fused
    attention.attn_drop.register_forward_hook(lambda module, args, weights: seen.append(weights[:, :, 0]))
    for image in torch.split(images, 1):  # all rows of the attention are computed: of one image at a time
        probe.forward_features(image)
    return torch.cat(seen)


# --- embeddings and tokens in one row -----------------------------------------------------------------------


def pack(embeddings: Tensor, tokens: Tensor) -> Tensor:
    """Embeddings and float16 tokens as float32 [B, D + h w C / 2]: the bits of two tokens' numbers in one.

    So they are queued, copied and split like embeddings alone, in half the memory of float32 tokens.
    """
    return torch.cat([embeddings, tokens.half().flatten(1).view(torch.float32)], 1)


def packed_columns(dim: int, grid: Grid) -> int:
    """The width of what `pack` gives."""
    return dim + grid[0] * grid[1] * grid[2] // 2


def unpack(
    rows: NDArray[np.float32], dim: int, grid: Grid
) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
    """What `pack` has joined: float32 [B, D] and float16 [B, h, w, C]."""
    tokens = np.ascontiguousarray(rows[:, dim:]).view(np.float16)
    return np.ascontiguousarray(rows[:, :dim]), tokens.reshape(len(rows), *grid)
