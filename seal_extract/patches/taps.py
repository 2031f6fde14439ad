"""Resampling as whole numbers: the pixels that each new pixel is made of, and their weights.

Pillow filters rows with weights rounded to 22 bits, rounds to 8 bits, then filters columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Filter = Literal["bicubic", "bilinear", "area"]
SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}  # px of the output at which the filter ends
WEIGHT_BITS = 22  # of Pillow's weights for 8-bit images


def by_taps(patches: Tensor, size_px: tuple[int, int], filter: Filter = "bicubic") -> Tensor:
    """Resize on any device: Pillow's pixels bit for bit; for area the exact mean, half rounded up.

    Args:
        patches: uint8 [B, 3, H, W].
        size_px: (height, width) wanted; for area no larger than before.
        filter: see `seal_extract.patches.resample.resample`.

    Returns:
        uint8 [B, 3, height, width].
    """
    device = patches.device
    rows, columns = (taps(b, a, filter, device) for b, a in zip(patches.shape[2:], size_px, strict=True))
    if filter == "area":
        whole = rows.total * columns.total
        kind = torch.int32 if 256 * whole < 2**31 else torch.int64
        sums = _weighted(_weighted(patches, 3, columns, kind), 2, rows, kind)
        return sums.add_(whole // 2).floor_divide_(whole).to(torch.uint8)
    for axis, along in ((3, columns), (2, rows)):
        sums = _weighted(patches, axis, along, torch.int32)
        # half up, as Pillow does, then clipped to 8 bits
        patches = sums.add_(1 << (WEIGHT_BITS - 1)).bitwise_right_shift_(WEIGHT_BITS).clamp_(0, 255)
        patches = patches.to(torch.uint8)
    return patches


@dataclass(frozen=True)
class Taps:
    """The pixels along one axis that each new pixel is made of.

    Attributes:
        pixels: int32 [K, after], neighbours, from the first to the last that counts or beyond.
        weights: int32 [K, after], of these pixels; 0 beyond the last that counts.
        total: of the weights of a new pixel, apart from their rounding.
    """

    pixels: Tensor
    weights: Tensor
    total: int


@lru_cache(maxsize=64)
def taps(before: int, after: int, filter: Filter, device: torch.device) -> Taps:
    """The filter that resizes ``before`` px to ``after``, kept on the device."""
    spans = _shares(before, after) if filter == "area" else _pillows_filter(before, after, filter)
    longest = max(len(weights) for _, weights in spans)
    pixels = [[min(first + k, before - 1) for first, _ in spans] for k in range(longest)]
    weights = [[w[k] if k < len(w) else 0 for _, w in spans] for k in range(longest)]
    total = before // math.gcd(before, after) if filter == "area" else 2**WEIGHT_BITS
    return Taps(
        torch.tensor(pixels, dtype=torch.int32, device=device),
        torch.tensor(weights, dtype=torch.int32, device=device),
        total,
    )


def _weighted(patches: Tensor, axis: int, along: Taps, kind: torch.dtype) -> Tensor:
    """Weighted sums of ``patches`` along an axis, a tap at a time."""
    shape = [-1 if i == axis else 1 for i in range(patches.ndim)]
    weights = [weights.view(shape) for weights in along.weights.to(kind)]
    sums: Tensor = patches.index_select(axis, along.pixels[0]) * weights[0]
    for pixels, weight in zip(along.pixels[1:], weights[1:], strict=True):
        sums.addcmul_(patches.index_select(axis, pixels), weight)
    return sums


def _shares(before: int, after: int) -> list[tuple[int, list[int]]]:
    """The first pixel under each new one, and how much of each lies there, in whole parts of a pixel."""
    common = math.gcd(before, after)
    span, parts = before // common, after // common
    shares = []
    for begin in range(0, after * span, span):
        pixels = range(begin // parts, -(-(begin + span) // parts))
        inside = [min(begin + span, (j + 1) * parts) - max(begin, j * parts) for j in pixels]
        shares.append((pixels.start, inside))
    return shares


def _pillows_filter(before: int, after: int, filter: Filter) -> list[tuple[int, list[int]]]:
    """The first pixel of each new one, and Pillow's weights from there, whole numbers.

    They are the filter, stretched when shrinking, sampled at pixel centres, normalised, times 2^22.
    """
    scale = before / after
    stretch = max(scale, 1.0)
    support = SUPPORT[filter] * stretch
    spans = []
    for i in range(after):
        centre = (i + 0.5) * scale
        first, last = max(0, int(centre - support + 0.5)), min(before, int(centre + support + 0.5))
        samples = [_kernel((j - centre + 0.5) / stretch, filter) for j in range(first, last)]
        whole = 2**WEIGHT_BITS / sum(samples)
        spans.append((first, [math.trunc(math.copysign(0.5, s) + s * whole) for s in samples]))
    return spans


def _kernel(x: float, filter: Filter) -> float:
    """Triangle, or the cubic of Keys with a = -0.5."""
    x = abs(x)
    if filter == "bilinear":
        return max(0.0, 1.0 - x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0
