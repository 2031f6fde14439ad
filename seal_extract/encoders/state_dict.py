"""State-dict conversion: the keys of a published file, renamed to the prefix of its row and timm's names.

Nothing is dropped and nothing is guessed. A key that is not understood stays as it is, so that the check that
follows reports it. Adapters keep the names of their layers; `find_places` and `place` tell where those are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from seal_extract.encoders.spec import Published, Shapes

# Linear layers of a block: name in transformers (version 4 or 5) or open_clip, name in timm, and which part
# of its rows
_LINEAR = (
    (r"attention\.(?:attention\.query|q_proj)|self_attn\.q_proj", "attn.qkv", 0, 3),
    (r"attention\.(?:attention\.key|k_proj)|self_attn\.k_proj", "attn.qkv", 1, 3),
    (r"attention\.(?:attention\.value|v_proj)|self_attn\.v_proj", "attn.qkv", 2, 3),
    (r"attention\.(?:output\.dense|o_proj)|(?:self_)?attn\.out_proj", "attn.proj", 0, 1),
    (r"mlp\.gate_proj", "mlp.fc1", 0, 2),
    (r"mlp\.up_proj", "mlp.fc1", 1, 2),
    (r"mlp\.(?:fc1|weights_in|c_fc)|intermediate\.dense", "mlp.fc1", 0, 1),
    (r"mlp\.(?:fc2|weights_out|down_proj|c_proj)|output\.dense", "mlp.fc2", 0, 1),
)
# everything else that timm's vision transformer has under another name, by library: in transformers those of
# ViTModel, Dinov2Model, Dinov2WithRegistersModel and CLIPVisionModel; in Meta's DINOv2 with blocks in chunks
# or not; in open_clip those of its VisionTransformer, which may be the trunk of a tower with a pooler
_RENAMED = {
    "transformers": (
        (r"embeddings\.cls_token", "cls_token"),
        (r"embeddings\.register_tokens", "reg_token"),
        (r"embeddings\.position_embeddings", "pos_embed"),
        (r"embeddings\.patch_embeddings\.projection\.(.+)", r"patch_embed.proj.\1"),
        (r"layernorm\.(.+)", r"norm.\1"),
        (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
        (r"encoder\.layer\.(\d+)\.(norm[12]\..+)", r"blocks.\1.\2"),
        (r"(?:encoder\.)?layers?\.(\d+)\.layernorm_before\.(.+)", r"blocks.\1.norm1.\2"),
        (r"(?:encoder\.)?layers?\.(\d+)\.layernorm_after\.(.+)", r"blocks.\1.norm2.\2"),
        (r"embeddings\.class_embedding", "cls_token"),
        (r"embeddings\.position_embedding\.weight", "pos_embed"),
        (r"embeddings\.patch_embedding\.(.+)", r"patch_embed.proj.\1"),
        (r"pre_layrnorm\.(.+)", r"norm_pre.\1"),
        (r"post_layernorm\.(.+)", r"norm.\1"),
        (r"encoder\.layers\.(\d+)\.layer_norm([12])\.(.+)", r"blocks.\1.norm\2.\3"),
    ),
    "dinov2": (
        (r"register_tokens", "reg_token"),
        (r"blocks\.(?:\d+\.)?(\d+)\.mlp\.w12\.(.+)", r"blocks.\1.mlp.fc1.\2"),
        (r"blocks\.(?:\d+\.)?(\d+)\.mlp\.w3\.(.+)", r"blocks.\1.mlp.fc2.\2"),
        (r"blocks\.\d+\.(\d+)\.(.+)", r"blocks.\1.\2"),
    ),
    "open_clip": (
        (r"(trunk\.)?class_embedding", r"\1cls_token"),
        (r"(trunk\.)?positional_embedding", r"\1pos_embed"),
        (r"(trunk\.)?conv1\.(.+)", r"\1patch_embed.proj.\2"),
        (r"(trunk\.)?ln_pre\.(.+)", r"\1norm_pre.\2"),
        (r"ln_post\.(.+)", r"norm.\1"),
        (r"proj", "head.0.weight"),
        (r"(trunk\.)?transformer\.resblocks\.(\d+)\.ln_([12])\.(.+)", r"\1blocks.\2.norm\3.\4"),
        (r"(trunk\.)?transformer\.resblocks\.(\d+)\.attn\.in_proj_(.+)", r"\1blocks.\2.attn.qkv.\3"),
    ),
    "titan": (
        (r"attn_pool_contrast\.to_(q|k|v)\.weight", r"attn_pool_contrast.attn.\1_proj_weight"),
        (r"attn_pool_contrast\.to_out\.weight", r"attn_pool_contrast.attn.out_proj.weight"),
    ),
}
# names of timm that the library lacks: the file of an encoder of equal shapes must not pass for this one's
_TIMM_ONLY = {
    "transformers": re.compile(r"(cls_token|pos_embed|(patch_embed|blocks|norm)\..+)"),
    "dinov2": re.compile(r"reg_token"),
    "open_clip": re.compile(r"(trunk\.)?(cls_token|pos_embed|(patch_embed|blocks|norm|norm_pre)\..+)"),
    "titan": re.compile(r"attn_pool_contrast\.attn\..+"),
}
_BLOCK = re.compile(r"(?:(?<=\.)|^)(?:encoder\.|transformer\.)?(?:blocks|layers?|resblocks)\.(\d+)\.(.+)$")
_ADAPTER = re.compile(r"(?P<layer>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")


def as_row_spells(
    tensors: Mapping[str, Tensor],
    layout: Published,
    read_again: Callable[[], Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Rename the keys of a file to those of its row.

    Args:
        tensors: as `read_tensors` returned them.
        layout: of the row.
        read_again: returns the same tensors from a second mapping of the file. Fused tensors are copied from
            there, so that the pages they were read from do not stay in memory beside the copy.

    Returns:
        The tensors under the row's keys. Separate q, k and v are fused where all three are there and alike.
        Where a file has registers, its position of the class token is added to that token, as timm has it.
        A layer that PEFT has wrapped, ``X.base_layer.weight``, is ``X.weight`` if X has adapters.
    """
    spelled = _spelled(tensors, layout)
    if layout.layer_names == "timm":
        return spelled
    again = spelled if read_again is None else _spelled(read_again(), layout)
    return _with_timm_names(spelled, again, layout)


def adapter_keys(keys: Iterable[str], prefix: str = "") -> dict[str, dict[str, str]]:
    """The keys of the halves "A" [r, in] and "B" [out, r] of each adapted layer, as PEFT names them.

    Args:
        keys: of a file; other keys are skipped.
        prefix: in front of those keys; the names of the layers are returned without it.
    """
    pairs: dict[str, dict[str, str]] = {}
    for key in keys:
        match = _ADAPTER.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if match is not None:
            pairs.setdefault(match["layer"], {})[match["half"]] = key
    return pairs


def _spelled(tensors: Mapping[str, Tensor], layout: Published) -> dict[str, Tensor]:
    """Everything but the names of another library."""
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        found = (match.expand(new) for p, new in layout.renamed.items() if (match := re.fullmatch(p, key)))
        new_key = next(found, key)
        renamed[key if new_key in renamed or new_key in tensors else new_key] = value  # one is unexpected
    return _unwrapped(_with_row_prefix(renamed, layout), layout.prefix)


def _with_row_prefix(tensors: Mapping[str, Tensor], layout: Published) -> dict[str, Tensor]:
    for other in layout.other_prefixes:
        above = other[: other.rstrip(".").rfind(".") + 1]
        inside = [key for key in tensors if key.startswith(above)]
        if inside and all(key.startswith(other) for key in inside):
            renamed = {key: layout.prefix + key.removeprefix(other) for key in inside}
            return {renamed.get(key, key): value for key, value in tensors.items()}
    return dict(tensors)


def _unwrapped(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Layers with adapters lose ``.base_layer``; one that has adapters but no such wrapper is marked."""
    adapted = {prefix + layer for layer in adapter_keys(tensors, prefix)}
    named: dict[str, Tensor] = {}
    for key, value in tensors.items():
        module, _, leaf = key.rpartition(".")
        layer = module.removesuffix(".base_layer")
        if layer in adapted:
            key = f"{layer}.{leaf}" if layer != module else f"{key} (not wrapped)"
        named[key] = value
    return named


def _with_timm_names(
    tensors: Mapping[str, Tensor], again: Mapping[str, Tensor], layout: Published
) -> dict[str, Tensor]:
    """``tensors`` under timm's names; fused tensors are copied from ``again``, which holds the same ones."""
    named: dict[str, Tensor] = {}
    separate: dict[tuple[str, int], dict[int, str]] = {}  # fused key, number of parts -> part -> key in file
    prefix = layout.prefix
    for key, value in _halved(tensors):
        if not key.startswith(prefix) or ".lora_" in key:
            named[key] = value
            continue
        value = _shaped(value, key.removeprefix(prefix))
        inner, part, parts = _timm_key(key.removeprefix(prefix), layout.layer_names)
        if parts > 1 and separate.setdefault((prefix + inner, parts), {}).setdefault(part, key) == key:
            continue
        spelled = key if parts > 1 else prefix + inner
        named[key if spelled in named else spelled] = value  # the second of two spellings is unexpected
    for (fused, count), keys in separate.items():
        held = [again[keys[part]] for part in range(count) if part in keys]
        if len(held) == count and _alike(held) and fused not in named:
            named[fused] = torch.cat(held)
        else:
            named |= {key: tensors[key] for key in keys.values()}
    if prefix + "reg_token" in named:
        _fold_position(named, prefix)
    return named


def _halved(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, with the fused k and v of TITAN's pooler apart."""
    for key, value in tensors.items():
        if key.endswith("attn_pool_contrast.to_kv.weight") and value.ndim and len(value) % 2 == 0:
            front = key.removesuffix("kv.weight")
            yield from zip((f"{front}k.weight", f"{front}v.weight"), value.chunk(2), strict=True)
        else:
            yield key, value


def _shaped(value: Tensor, key: str) -> Tensor:
    """The tensor with the dimensions that timm gives it, if another library has fewer or swaps them."""
    if value.ndim == 1 and key.endswith("class_embedding"):
        return value[None, None]
    if value.ndim == 2 and key.endswith(("positional_embedding", "position_embedding.weight")):
        return value[None]
    return value.T.contiguous() if value.ndim == 2 and key == "proj" else value


def _fold_position(named: dict[str, Tensor], prefix: str) -> None:
    """Add the class token's position to it: registers have none, and timm keeps those of patches alone."""
    held = [named[prefix + key] for key in ("cls_token", "pos_embed") if prefix + key in named]
    if len(held) < 2 or not all(t.layout == torch.strided and t.is_contiguous() for t in held):
        return  # an expanded number only claims its size, and the sum would take it
    cls, positions = held
    alike = cls.dtype == positions.dtype and cls.ndim == positions.ndim == 3
    if alike and cls.shape[:2] == (1, 1) and cls.shape[2] == positions.shape[2]:
        named[prefix + "cls_token"] = cls + positions[:, :1]
        named[prefix + "pos_embed"] = positions[:, 1:]


def _timm_key(key: str, layer_names: str) -> tuple[str, int, int]:
    """The timm name of a tensor of another library, and that it is part ``[1]`` of ``[2]`` of that tensor."""
    if _TIMM_ONLY[layer_names].fullmatch(key):
        return f"{key} (as timm names it)", 0, 1
    for pattern, new in _RENAMED[layer_names]:
        if match := re.fullmatch(pattern, key):
            return match.expand(new), 0, 1
    module, _, leaf = key.rpartition(".")
    layer = _timm_layer(module) if layer_names in ("transformers", "open_clip") else None
    if layer is None or leaf not in ("weight", "bias"):
        return key, 0, 1
    name, part, parts = layer
    return f"{name}.{leaf}", part, parts


def _timm_layer(name: str) -> tuple[str, int, int] | None:
    """The timm name of a Linear layer of a library: part number ``[1]`` of ``[2]`` parts of its rows."""
    block = _BLOCK.search(name)
    for pattern, ending, part, parts in _LINEAR if block else ():
        if block and re.fullmatch(pattern, block[2]):
            return f"{name[: block.start()]}blocks.{block[1]}.{ending}", part, parts
    return None


def _alike(parts: list[Tensor]) -> bool:
    """Whether tensors can be fused; an expanded number only claims its size, and the copy would take it."""
    first = parts[0]
    return first.ndim > 0 and all(
        p.shape == first.shape
        and p.dtype == first.dtype
        and p.layout == torch.strided
        and p.is_contiguous()
        and not p.is_meta
        for p in parts
    )


# --- places of adapted layers -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Rows of one weight of a tower that a layer's update is added to.

    Attributes:
        key: the weight.
        rows: first and last + 1 row of it; part of the rows for q, k or v of a fused layer.
    """

    key: str
    rows: tuple[int, int]


def find_places(layers: Mapping[str, tuple[int, ...]], tower: Shapes) -> dict[str, Place]:
    """The place in a tower of each layer of an adapter that was trained on another build of the same network.

    Names may be those of timm or transformers, and the whole network may have been wrapped in further
    modules, or have been the trunk of the tower alone.

    Args:
        layers: [out, in] of each, by the name that it had there.
        tower: shape of every tensor.

    Raises:
        ValueError: layers are missing in the tower, or have another shape there; the message says which.
    """
    if not layers:
        raise ValueError("there are no layers in it")
    words = [layer.split(".") for layer in layers]
    wrapped = 0  # number of first words that all names share
    while all(len(w) > wrapped + 1 and w[wrapped] == words[0][wrapped] for w in words):
        wrapped += 1
    attempts = [
        {layer: place(front + ".".join(w[off:]), tower) for layer, w in zip(layers, words, strict=True)}
        for front in ("", "trunk.")
        for off in range(wrapped + 1)
    ]
    places = min(attempts, key=lambda attempt: sum(spot is None for spot in attempt.values()))
    found = {layer: spot for layer, spot in places.items() if spot is not None}
    if len(found) < len(layers):
        raise ValueError(f"it has no layer {_first([layer for layer in layers if layer not in found])}")
    wrong = [layer for layer, spot in found.items() if not fits(layers[layer], spot, tower)]
    if wrong:
        there = list(tower[found[wrong[0]].key])
        raise ValueError(
            f"{_first(wrong)} was adapted as {list(layers[wrong[0]])}, and its weight is {there}"
        )
    return found


def place(name: str, tower: Shapes) -> Place | None:
    """The place of a Linear layer, by its name in timm or transformers; None if the tower lacks it."""
    layer = (name, 0, 1) if f"{name}.weight" in tower else _timm_layer(name)
    if layer is None or f"{layer[0]}.weight" not in tower:
        return None
    key, part, parts = f"{layer[0]}.weight", layer[1], layer[2]
    rows = tower[key][0]
    return Place(key, (part * rows // parts, (part + 1) * rows // parts))


def fits(shape: tuple[int, ...], spot: Place, tower: Shapes) -> bool:
    """Whether an update [out, in] has the shape of its place, which must be of a Linear layer."""
    weight = tower[spot.key]
    return len(weight) == 2 and shape == (spot.rows[1] - spot.rows[0], weight[1])


def misfit(layer: str, halves: Mapping[str, tuple[int, ...]], layout: Published, tower: Shapes) -> str:
    """What is wrong with an adapter of a SEAL file, as a kind of error; empty if nothing is.

    Args:
        layer: its name in the file.
        halves: shapes of "A" and "B", of those that are there.
        layout: of the row.
        tower: shape of every tensor.
    """
    if len(halves) < 2:
        return "half pairs"
    a, b = halves["A"], halves["B"]
    if len(a) != 2 or len(b) != 2 or not a[0] or a[0] != b[1]:
        return "adapters of two ranks in a pair"
    stated = layout.lora.r if layout.lora else None
    if stated not in (None, a[0]):
        return f"adapters of another rank than the r {stated} of {layout.settings}"
    # UNI's adapters must not pass for Phikon-v2's, whose layers have the names of another library
    spot = place(layer, tower)
    if spot is None or (f"{layer}.weight" in tower) != (layout.layer_names == "timm"):
        return "adapters on layers that the tower does not have"
    if len(tower[spot.key]) != 2:
        return "adapters on what is no Linear layer"
    return "" if fits((b[0], a[1]), spot, tower) else "adapters that do not fit their layer"


def _first(layers: list[str]) -> str:
    return layers[0] + (f" and {len(layers) - 1} more" if len(layers) > 1 else "")
