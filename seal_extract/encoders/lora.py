"""Low-rank adapters merged into the weights they were trained on: W + scale B A (arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from seal_extract.encoders.registry import Lora

if TYPE_CHECKING:
    from torch import Tensor

    from seal_extract.encoders.tower import Shapes


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


def wrapped_key(key: str, lora: Lora) -> str:
    """The name that a tower's tensor has once PEFT has wrapped its layer."""
    module, _, leaf = key.rpartition(".")
    return f"{module}.base_layer.{leaf}" if module in lora.targets else key


def adapter_keys(target: str) -> tuple[str, str]:
    """The names of A [r, in] and B [out, r] of an adapted layer in a wrapped model's state dict."""
    return f"{target}.lora_A.default.weight", f"{target}.lora_B.default.weight"


def adapter_shapes(tower: Shapes, lora: Lora) -> Shapes:
    """Names and shapes of all adapters on a tower with these shapes."""
    shapes: Shapes = {}
    for target in lora.targets:
        outputs, inputs = tower[f"{target}.weight"]
        key_a, key_b = adapter_keys(target)
        shapes |= {key_a: (lora.r, inputs), key_b: (outputs, lora.r)}
    return shapes


def lora_updates(tensors: Mapping[str, Tensor], lora: Lora, prefix: str) -> list[Update]:
    """The adapters of a row out of its file, whose keys and shapes have been checked.

    Args:
        tensors: of the file.
        lora: targets and scale.
        prefix: what stands in front of the targets in that file.
    """
    updates = []
    for target in lora.targets:
        a, b = (tensors[prefix + key] for key in adapter_keys(target))
        updates.append(Update(f"{target}.weight", a, b, lora.scale))
    return updates
