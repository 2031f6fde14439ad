"""The spellings of a published weight file, brought to one: prefixes, and layers named by another library.

What comes out has the prefix of the row and, behind it, the names of timm. Nothing is dropped and nothing is
guessed: a key that is not understood stays as it is, for the check that follows to name it. Where the names
of transformers are expected those of timm are not understood, or else UNI's file would pass for Phikon-v2's.
Adapters keep the names that their layers have in the file; `lora` and `layers` read those.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from seal_extract.encoders.lora import adapter_keys
from seal_extract.encoders.registry import Published

# how transformers' Dinov2Model names what timm's vision transformer has under another name
_RENAMED = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(.+)", r"patch_embed.proj.\1"),
    (r"layernorm\.(.+)", r"norm.\1"),
    (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    # version 4, then version 5
    (r"encoder\.layer\.(\d+)\.attention\.(?:output\.dense|o_proj)\.(.+)", r"blocks.\1.attn.proj.\2"),
    (r"encoder\.layer\.(\d+)\.((?:norm[12]|mlp\.fc[12])\..+)", r"blocks.\1.\2"),
)
_RENAMED_PATTERNS = tuple((re.compile(pattern), new) for pattern, new in _RENAMED)
_TIMM_NAMES = re.compile(r"(cls_token|pos_embed|(patch_embed|blocks|norm)\..+)")
_APART = re.compile(
    r"encoder\.layer\.(?P<block>\d+)\.attention\."
    r"(?:attention\.(?P<old>query|key|value)|(?P<new>[qkv])_proj)\.(?P<leaf>weight|bias)"
)


def as_row_spells(
    tensors: Mapping[str, Tensor],
    layout: Published,
    read_again: Callable[[], Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Bring the keys of a file to the spelling of its row.

    Args:
        tensors: as `read_tensors` gave them.
        layout: of the row.
        read_again: gives the same tensors, mapped from the file once more; what is fused is copied from
            there, so that its pages go with that mapping and do not stay in memory beside the copy.

    Returns:
        The same tensors under other keys; those of q, k and v fused, where all three are there and alike.
        What PEFT has wrapped, ``X.base_layer.weight``, is ``X.weight`` where X has adapters.
    """
    spelled = _unwrapped(_with_the_rows_prefix(tensors, layout), layout.prefix)
    if layout.layer_names != "transformers":
        return spelled
    again = None if read_again is None else _with_the_rows_prefix(read_again(), layout)
    parts = spelled if again is None else _unwrapped(again, layout.prefix)
    return _with_timm_names(spelled, parts, layout.prefix)


def _unwrapped(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The names that layers had before adapters wrapped them; one that has adapters and no wrap stays odd."""
    adapted = {prefix + layer for layer in adapter_keys(tensors, prefix)}
    named: dict[str, Tensor] = {}
    for key, value in tensors.items():
        module, _, leaf = key.rpartition(".")
        layer = module.removesuffix(".base_layer")
        if layer in adapted:
            key = f"{layer}.{leaf}" if layer != module else f"{key} (not wrapped)"
        named[key] = value
    return named


def _with_the_rows_prefix(tensors: Mapping[str, Tensor], layout: Published) -> dict[str, Tensor]:
    for other in layout.other_prefixes:
        above = other[: other.rstrip(".").rfind(".") + 1]
        inside = [key for key in tensors if key.startswith(above)]
        if inside and all(key.startswith(other) for key in inside):
            return {
                layout.prefix + key.removeprefix(other) if key.startswith(other) else key: value
                for key, value in tensors.items()
            }
    return dict(tensors)


def _with_timm_names(
    tensors: Mapping[str, Tensor], parts: Mapping[str, Tensor], prefix: str
) -> dict[str, Tensor]:
    """``tensors`` under timm's names; what is fused comes of ``parts``, which are the same tensors."""
    named: dict[str, Tensor] = {}
    apart_keys: dict[str, dict[str, str]] = {}  # fused key -> q, k, v -> key in the file
    for key, value in tensors.items():
        if ".lora_" in key:
            named[key] = value
            continue
        inner = key.removeprefix(prefix)
        apart = _APART.fullmatch(inner) if key.startswith(prefix) else None
        if apart is not None:
            fused = f"{prefix}blocks.{apart['block']}.attn.qkv.{apart['leaf']}"
            part = (apart["old"] or apart["new"])[0]
            if apart_keys.setdefault(fused, {}).setdefault(part, key) == key:
                continue
        spelled = prefix + _timm_name(inner) if key.startswith(prefix) else key
        named[key if spelled in named else spelled] = value  # in two spellings, one of them is unexpected
    for fused, keys in apart_keys.items():
        found = [parts[keys[part]] for part in "qkv" if part in keys]
        if len(found) == 3 and _alike(found) and fused not in named:
            named[fused] = torch.cat(found)
        else:
            named |= {key: tensors[key] for key in keys.values()}
    return named


def _timm_name(name: str) -> str:
    if _TIMM_NAMES.fullmatch(name):
        return f"{name} (as timm names it)"
    for pattern, new in _RENAMED_PATTERNS:
        if match := pattern.fullmatch(name):
            return match.expand(new)
    return name


def _alike(parts: list[Tensor]) -> bool:
    """Fit to be fused; what only claims its size, as an expanded number does, would then take it."""
    first = parts[0]
    return first.ndim > 0 and all(
        p.shape == first.shape
        and p.dtype == first.dtype
        and p.layout == torch.strided
        and p.is_contiguous()
        and not p.is_meta
        for p in parts
    )
