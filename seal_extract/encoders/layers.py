"""Where the Linear layers that another build of the same network names differently lie in a tower.

An adapter trained on the model of transformers (q, k, v apart, ``encoder.layer.3.attention...``) or of timm
(``blocks.3.attn.qkv``), bare or wrapped in another module, finds its layers here; parts of a fused layer are
consecutive rows of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]

# how names end in transformers (4, then 5) and elsewhere; how timm's ends; which part of how many rows
_ENDINGS = (
    (r"(?:attention\.attention\.query|attention\.q_proj|attn\.q(?:_proj)?)", "attn.qkv", 0, 3),
    (r"(?:attention\.attention\.key|attention\.k_proj|attn\.k(?:_proj)?)", "attn.qkv", 1, 3),
    (r"(?:attention\.attention\.value|attention\.v_proj|attn\.v(?:_proj)?)", "attn.qkv", 2, 3),
    (r"(?:attention\.output\.dense|attention\.o_proj|attn\.(?:o|out)_proj)", "attn.proj", 0, 1),
    (r"mlp\.gate_proj", "mlp.fc1", 0, 2),
    (r"mlp\.up_proj", "mlp.fc1", 1, 2),
    (r"(?:mlp\.fc1|mlp\.weights_in|intermediate\.dense)", "mlp.fc1", 0, 1),
    (r"(?:mlp\.fc2|mlp\.weights_out|mlp\.down_proj|output\.dense)", "mlp.fc2", 0, 1),
)
_BLOCK = re.compile(r"(?:(?<=\.)|^)(?:encoder\.)?(?:blocks|layers?)\.(\d+)\.(.+)$")
_APART = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Place:
    """Rows of one weight of a tower that take rows of one layer's update.

    Attributes:
        key: the weight.
        rows: of the weight.
        of_update: rows of the update; as many, or the layer does not fit.
    """

    key: str
    rows: slice
    of_update: slice


def find_places(layers: Shapes, tower: Shapes) -> dict[str, tuple[Place, ...]]:
    """The places of all ``layers`` in a tower, under one and the same change of prefix.

    Args:
        layers: [out, in] of each, by the name that it has in the model it comes from.
        tower: shape of every tensor.

    Returns:
        By the names of ``layers``; more than one place where a fused layer is three in the tower.

    Raises:
        ValueError: some are not there, or of another shape; the message says which.
    """
    if not layers:
        raise ValueError("there are no layers in it")
    nearest: tuple[int, dict[str, tuple[Place, ...]]] | None = None
    for names in _renamings(list(layers), tower):
        places = {layer: place(names[layer], layers[layer], tower) for layer in layers}
        found = {layer: where for layer, where in places.items() if where}
        if nearest is None or len(found) > nearest[0]:
            nearest = len(found), found
        if len(found) == len(layers):
            break
    assert nearest is not None
    _check(layers, tower, nearest[1])
    return nearest[1]


def _renamings(layers: list[str], tower: Shapes) -> Iterator[dict[str, str]]:
    """The names with none, one, two... of their common first words off, a word of the tower before them."""
    words = [layer.split(".") for layer in layers]
    common = 0
    while all(len(w) > common + 1 and w[common] == words[0][common] for w in words):
        common += 1
    fronts = ["", *dict.fromkeys(key.split(".")[0] + "." for key in tower if key.count(".") > 1)]
    for front in fronts:
        for off in range(common + 1):
            yield {layer: front + ".".join(w[off:]) for layer, w in zip(layers, words, strict=True)}


def place(name: str, shape: tuple[int, ...], tower: Shapes) -> tuple[Place, ...]:
    """Where a layer of this name lies, by name alone; nothing if the tower has no such layer."""
    everything, key = slice(0, shape[0]), f"{name}.weight"
    if key in tower:
        return (Place(key, _part(tower[key], 0, 1), everything),)
    stem, _, last = name.rpartition(".")
    apart = [f"{stem}.{part}.weight" for part in _APART]
    if last == "qkv" and all(key in tower for key in apart):
        return tuple(Place(key, _part(tower[key], 0, 1), _part(shape, i, 3)) for i, key in enumerate(apart))
    block = _BLOCK.search(name)
    for pattern, ending, part, parts in _ENDINGS if block else ():
        key = _BLOCK.sub(rf"blocks.\1.{ending}.weight", name)
        if block and re.fullmatch(pattern, block[2]) and key in tower:
            return (Place(key, _part(tower[key], part, parts), everything),)
    return ()


def _part(shape: tuple[int, ...], part: int, parts: int) -> slice:
    return slice(part * shape[0] // parts, (part + 1) * shape[0] // parts)


def _check(layers: Shapes, tower: Shapes, places: Mapping[str, tuple[Place, ...]]) -> None:
    missing = [layer for layer in layers if layer not in places]
    if missing:
        raise ValueError(f"it has no layer {_some(missing)}")
    wrong = [layer for layer in layers if not fits(layers[layer], tower, places[layer])]
    if wrong:
        there = tower[places[wrong[0]][0].key]
        raise ValueError(
            f"{_some(wrong)} was adapted as {list(layers[wrong[0]])}, and its weight is {list(there)}"
        )


def fits(shape: tuple[int, ...], tower: Shapes, places: tuple[Place, ...]) -> bool:
    """Whether an update [out, in] has the shape of its places."""
    return all(
        len(tower[p.key]) == 2 and tower[p.key][1] == shape[1] and _length(p.rows) == _length(p.of_update)
        for p in places
    )


def _length(rows: slice) -> int:
    return int(rows.stop - rows.start)


def _some(layers: list[str]) -> str:
    more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    return layers[0] + more
