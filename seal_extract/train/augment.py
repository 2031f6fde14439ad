"""Patches varied as slides vary: turned, mirrored, stained and lit otherwise."""

from __future__ import annotations

import torch
from torch import Tensor


def turned(patches: Tensor, generator: torch.Generator) -> Tensor:
    """Each patch in one of its eight orientations.

    Args:
        patches: [B, 3, S, S].
        generator: on the CPU.
    """
    out = torch.empty_like(patches)
    orientation = torch.randint(8, (len(patches),), generator=generator)
    for o in range(8):
        rows = (orientation == o).nonzero()[:, 0].to(patches.device)
        some = patches[rows].flip(3) if o >= 4 else patches[rows]
        out[rows] = torch.rot90(some, o % 4, (2, 3))
    return out


def stained(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Each image with its channels scaled, mixed and shifted, around its own mean colour.

    Args:
        images: float [B, 3, S, S], 0 to 1.
        strength: sd of the factors; channels are mixed by 0.4 and shifted by 0.3 of it.
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
