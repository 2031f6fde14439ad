"""Whose weights a file holds, by the rows themselves: for the messages about files that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor

from seal_extract.encoders.registry import list_encoders
from seal_extract.encoders.spec import Architecture, EncoderSpec, Shapes
from seal_extract.encoders.state_dict import adapter_keys, as_row_spells, misfit
from seal_extract.encoders.tower import empty_tower, tower_shapes
from seal_extract.errors import UsageError

OMICS = "SEAL omics"
ENOUGH = 0.9  # of a tower's tensors: a file may be cut short, or of a finetune that changed some
FUSED = (".attn.qkv.", ".mlp.fc1.")  # they are compared without what some files hold in parts
_TOWERS: dict[tuple[Architecture, str, int], Shapes] = {}  # those built so far


def looks_like(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The encoders whose tower, or whose adapters, a file holds; several if they have the same tensors.

    Args:
        tensors: from `read_tensors`.

    Returns:
        Names of `list_encoders`; or `OMICS` for the expression half of a SEAL checkpoint; none if unknown.
    """
    if "fc_mu.weight" in tensors and "flows.0.u" in tensors:
        return (OMICS,)
    shapes = {key: torch.empty(value.shape, device="meta") for key, value in tensors.items()}
    spelled: dict[tuple[object, ...], Shapes] = {}
    found: dict[str, tuple[float, int]] = {}
    for row in list_encoders():
        layout = row.layout
        names = (layout.prefix, layout.other_prefixes, layout.layer_names, *layout.renamed.items())
        if names not in spelled:
            spelled[names] = _shapes(as_row_spells(shapes, layout))
        share, count = _share(row, spelled[names])
        if share >= ENOUGH:
            found[row.name] = share, count
    return tuple(name for name, held in found.items() if held == max(found.values()))


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in tensors.items()}


def _share(row: EncoderSpec, held: Shapes) -> tuple[float, int]:
    """Share and number of a row's tensors that a file holds; of its adapters, where the file has no tower."""
    prefix = row.layout.prefix
    if row.layout.lora is not None and not any(k.startswith(prefix) and ".lora_" not in k for k in held):
        return float(_adapters_fit(row, held)), 0
    needed = {prefix + key: shape for key, shape in _tower(row).items()}
    needed = {key: shape for key, shape in needed.items() if not any(part in key for part in FUSED)}
    count = sum(held.get(key) == shape for key, shape in needed.items())
    return count / max(1, len(needed)), count


def _adapters_fit(row: EncoderSpec, held: Shapes) -> bool:
    if held.get("decoder.decoder.0.weight", ())[1:] != (row.dim,):
        return False
    pairs = adapter_keys(held, row.layout.prefix)
    adapters = {layer: {half: held[key] for half, key in keys.items()} for layer, keys in pairs.items()}
    return bool(adapters) and not any(
        misfit(layer, halves, row.layout, _tower(row)) for layer, halves in adapters.items()
    )


def _tower(row: EncoderSpec) -> Shapes:
    kind = (row.architecture, row.pooling, row.dim)  # several rows have the same tower
    if kind not in _TOWERS:
        _TOWERS[kind] = {}
        with suppress(UsageError):  # a plugin's row, or one for a newer timm
            _TOWERS[kind] = tower_shapes(empty_tower(row))
    return _TOWERS[kind]
