"""Adapters as PEFT writes them into a state dict, merged into the weights they were trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from seal_extract.encoders.registry import Lora

if TYPE_CHECKING:
    from torch import Tensor

    from seal_extract.encoders.tower import Shapes


def wrapped_key(key: str, lora: Lora) -> str:
    """The name that a tower's tensor has once PEFT has wrapped its layer."""
    module, _, leaf = key.rpartition(".")
    return f"{module}.base_layer.{leaf}" if module in lora.targets else key


def adapter_keys(target: str) -> tuple[str, str]:
    """The names of A [r, in] and B [out, r] of an adapted layer."""
    return f"{target}.lora_A.default.weight", f"{target}.lora_B.default.weight"


def adapter_shapes(tower: Shapes, lora: Lora) -> Shapes:
    """Names and shapes of all adapters on a tower with these shapes."""
    shapes: Shapes = {}
    for target in lora.targets:
        outputs, inputs = tower[f"{target}.weight"]
        key_a, key_b = adapter_keys(target)
        shapes |= {key_a: (lora.r, inputs), key_b: (outputs, lora.r)}
    return shapes


def merge(tower: Mapping[str, Tensor], adapters: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """Add every adapter to its weight: W + (alpha / r) B A, in the float32 of the files.

    Args:
        tower: the base, under the tower's own names; left as it is.
        adapters: A and B of every target, under the names of `adapter_keys`.
        lora: targets and scale.

    Returns:
        The tower's tensors; those without an adapter are the same objects, not copies.
    """
    merged = dict(tower)
    for target in lora.targets:
        key_a, key_b = adapter_keys(target)
        update = adapters[key_b] @ adapters[key_a]  # [out, in]
        merged[f"{target}.weight"] = tower[f"{target}.weight"] + lora.scale * update
    return merged
