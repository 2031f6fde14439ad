"""Low-rank adapters: merged into the weights they were trained on, W + scale B A (arXiv 2106.09685).

`read_adapters` finds those in a SEAL file; `adapter` reads those in a folder of PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from seal_extract.encoders.checkpoint import complaint
from seal_extract.encoders.spec import Published, Shapes
from seal_extract.encoders.state_dict import adapter_keys, fits, place

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Update:
    """``scale * b @ a``, to be added to consecutive rows of one weight.

    Attributes:
        key: the weight, as the tower names it.
        a: [r, in].
        b: [rows, r].
        scale: alpha / r, or the scale of another variant of LoRA.
        first_row: of the weight; above 0 for k or v of a fused layer.
    """

    key: str
    a: Tensor
    b: Tensor
    scale: float
    first_row: int = 0


def merge(tower: Mapping[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
    """Add every update to its weight, in the float32 of the files.

    Args:
        tower: the base weights, by the tower's names; they are not changed.
        updates: checked to fit them.

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


def merged_layers(file: str, updates: Iterable[Update]) -> list[dict[str, Any]]:
    """What was merged, as JSON: one table of ``file``, ``rank``, ``scale`` and ``layers`` per rank and scale.

    Args:
        file: that the adapters are from.
        updates: that were merged.
    """
    layers: dict[tuple[int, float], dict[str, None]] = {}  # a set in order: q, k, v share a layer
    for update in updates:
        alike = layers.setdefault((len(update.a), update.scale), {})
        alike[update.key.removesuffix(".weight")] = None
    return [
        {"file": file, "rank": rank, "scale": scale, "layers": list(names)}
        for (rank, scale), names in layers.items()
    ]


@dataclass(frozen=True)
class FileAdapters:
    """The adapters in a SEAL file.

    Attributes:
        shapes: of their tensors, by the keys of the file.
        updates: of the adapters that are right.
        complaints: about the others, one text per kind of error.
    """

    shapes: Shapes
    updates: tuple[Update, ...]
    complaints: tuple[str, ...]


def read_adapters(tensors: Mapping[str, Tensor], layout: Published, tower: Shapes) -> FileAdapters:
    """Find every adapter of a SEAL file, and its place in the tower.

    Args:
        tensors: from `as_row_spells`.
        layout: of the row.
        tower: shape of each of its tensors.
    """
    assert layout.lora is not None
    wrong: dict[str, list[str]] = {}
    shapes: Shapes = {}
    updates: list[Update] = []
    taken: set[tuple[str, int]] = set()  # weight and first row: version 4 and 5 have two names for a layer
    pairs = adapter_keys(tensors, layout.prefix)
    for layer, keys in pairs.items():
        halves = {half: tensors[key] for half, key in sorted(keys.items())}
        shapes |= {key: tuple(tensors[key].shape) for key in keys.values()}
        spot = place(layer, tower)
        kind = _complaint(layer, halves, layout, tower)
        if not kind and spot is not None and (spot.key, spot.rows[0]) in taken:
            kind = "adapters on a layer that has others"
        if kind or spot is None:
            listed = ", ".join(f"lora_{half} {list(value.shape)}" for half, value in halves.items())
            wrong.setdefault(kind, []).append(f"{layer}: {listed}")
            continue
        taken.add((spot.key, spot.rows[0]))
        a, b = halves["A"], halves["B"]
        updates.append(Update(spot.key, a, b, layout.lora.alpha / len(a), spot.rows[0]))
    complaints = [complaint(kind, layers) for kind, layers in wrong.items()]
    if not pairs:
        complaints.append("no adapters; the file holds no pair of lora_A and lora_B")
    return FileAdapters(shapes, tuple(updates), tuple(complaints))


def _complaint(layer: str, halves: Mapping[str, Tensor], layout: Published, tower: Shapes) -> str:
    """What is wrong with an adapter, as a kind of error; empty if nothing is."""
    if len(halves) < 2:
        return "half pairs"
    a, b = halves["A"], halves["B"]
    if a.ndim != 2 or b.ndim != 2 or not len(a) or a.shape[0] != b.shape[1]:
        return "adapters of two ranks in a pair"
    stated = layout.lora.r if layout.lora else None
    if stated not in (None, len(a)):
        return f"adapters of another rank than the r {stated} of {layout.settings}"
    # UNI's adapters must not pass for Phikon-v2's, whose layers have the names of another library
    spot = place(layer, tower)
    if spot is None or (f"{layer}.weight" in tower) != (layout.layer_names == "timm"):
        return "adapters on layers that the tower does not have"
    if len(tower[spot.key]) != 2:
        return "adapters on what is no Linear layer"
    return "" if fits((len(b), a.shape[1]), spot, tower) else "adapters that do not fit their layer"
