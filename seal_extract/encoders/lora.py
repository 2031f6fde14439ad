"""Low-rank adapters merged into the weights they were trained on: W + scale B A (arXiv 2106.09685)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class Update:
    """``scale * b @ a``, to be added to consecutive rows of one weight.

    Attributes:
        key: the weight, as the tower names it.
        a: [r, in].
        b: [rows, r].
        scale: alpha / r, or what a variant of LoRA puts in its place.
        first_row: of the weight; above 0 where the layer is a part of a fused one.
    """

    key: str
    a: Tensor
    b: Tensor
    scale: float
    first_row: int = 0


def merge(tower: Mapping[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
    """Add every update to its weight, in the float32 of the files.

    Args:
        tower: the base, under the tower's own names; left as it is.
        updates: checked to fit it.

    Returns:
        The tower's tensors; those without an update are the same objects, not copies.
    """
    merged = dict(tower)
    for update in updates:
        if merged[update.key] is tower[update.key]:  # two updates may share a fused weight
            merged[update.key] = tower[update.key].clone()
        rows = slice(update.first_row, update.first_row + len(update.b))
        merged[update.key][rows].addmm_(update.b, update.a, alpha=update.scale)  # no copy beside it
    return merged


def adapter_keys(keys: Iterable[str], prefix: str = "") -> dict[str, dict[str, str]]:
    """The keys of the halves ``"A"`` [r, in] and ``"B"`` [out, r] of each adapted layer, as PEFT names them.

    Args:
        keys: of a file; those of adapters are picked out.
        prefix: what stands in front of them, and is taken off the names of the layers.
    """
    pairs: dict[str, dict[str, str]] = {}
    for key in keys:
        match = _KEY.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if match is not None:
            pairs.setdefault(match["layer"], {})[match["half"]] = key
    return pairs


def merged_layers(file: str, updates: Iterable[Update]) -> list[dict[str, Any]]:
    """What was merged, as JSON: of each rank and scale, the layers as the tower names them.

    Args:
        file: that the adapters are from.
        updates: that were merged.
    """
    layers: dict[tuple[int, float], list[str]] = {}
    for update in updates:
        name, alike = update.key.removesuffix(".weight"), layers.setdefault((len(update.a), update.scale), [])
        if name not in alike:  # q, k and v of one fused layer
            alike.append(name)
    return [
        {"file": file, "rank": rank, "scale": scale, "layers": names}
        for (rank, scale), names in layers.items()
    ]
