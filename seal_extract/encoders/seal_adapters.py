"""The adapters in a SEAL file, which tells by itself on which layers they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from seal_extract.encoders.checkpoint import complaint
from seal_extract.encoders.layers import fits, place
from seal_extract.encoders.lora import Update, adapter_keys
from seal_extract.encoders.spec import Published
from seal_extract.encoders.tower import Shapes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FileAdapters:
    """The adapters in a file.

    Attributes:
        shapes: of their tensors, by the keys of the file.
        updates: what to add to which weights of the tower; of the adapters that are right.
        complaints: what is wrong with the others, each kind with the layers.
    """

    shapes: Shapes
    updates: tuple[Update, ...]
    complaints: tuple[str, ...]


def read_adapters(tensors: Mapping[str, Tensor], layout: Published, tower: Shapes) -> FileAdapters:
    """Find every adapter of a file, and the place of each in the tower.

    Args:
        tensors: under the prefix of the row, from `as_row_spells`.
        layout: of the row.
        tower: shape of each of its tensors.
    """
    assert layout.lora is not None
    wrong: dict[str, list[str]] = {}
    shapes: Shapes = {}
    updates: list[Update] = []
    taken: set[tuple[str, int]] = set()  # weight and first row: a layer goes by two names in transformers
    pairs = adapter_keys(tensors, layout.prefix)
    if not pairs:
        wrong["adapters; the file holds no pair of lora_A and lora_B"] = []
    for layer, keys in pairs.items():
        shapes |= {key: tuple(tensors[key].shape) for key in keys.values()}
        found = [(half, tensors[key]) for half, key in sorted(keys.items())]
        kind = "half pairs" if len(found) < 2 else _complaint(layer, found[0][1], found[1][1], layout, tower)
        spots = () if kind else place(layer, (len(found[1][1]), found[0][1].shape[1]), tower)
        if any((spot.key, spot.rows.start) in taken for spot in spots):
            kind = "adapters on a layer that has others"
        if kind:
            told = ", ".join(f"lora_{half} {list(value.shape)}" for half, value in found)
            wrong.setdefault(kind, []).append(f"{layer}: {told}")
            continue
        (_, a), (_, b) = found
        taken |= {(spot.key, spot.rows.start) for spot in spots}
        for spot in spots:
            scale = layout.lora.alpha / len(a)
            updates.append(Update(spot.key, a, b[spot.of_update], scale, spot.rows.start))
    complaints = (complaint(kind, layers) or f"no {kind}" for kind, layers in wrong.items())
    return FileAdapters(shapes, tuple(updates), tuple(complaints))


def _complaint(layer: str, a: Tensor, b: Tensor, layout: Published, tower: Shapes) -> str:
    """What is wrong with an adapter, as a kind; empty if nothing is."""
    if a.ndim != 2 or b.ndim != 2 or not len(a) or a.shape[0] != b.shape[1]:
        return "adapters of two ranks in a pair"
    stated = layout.lora.r if layout.lora else None
    if stated not in (None, len(a)):
        return f"adapters of another rank than the r {stated} of {layout.settings}"
    # under another library's names, UNI's adapters would pass for Phikon-v2's
    spots = place(layer, (len(b), a.shape[1]), tower)
    if not spots or (f"{layer}.weight" in tower) != (layout.layer_names == "timm"):
        return "adapters on layers that the tower does not have"
    if len(tower[spots[0].key]) != 2:
        return "adapters on what is no Linear layer"
    return "" if fits((len(b), a.shape[1]), tower, spots) else "adapters that do not fit their layer"
