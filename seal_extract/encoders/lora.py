"""Low-rank adapters: merged into the weights they were trained on, W + scale B A (arXiv 2106.09685).

PEFT's own folders, ``adapter_config.json`` and ``adapter_model.safetensors``, are read without PEFT: plain
LoRA on Linear layers. Every field of the config that would make it something else is refused by its name.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from seal_extract.encoders.checkpoint import is_finite
from seal_extract.encoders.folder import as_record, read_json
from seal_extract.encoders.locate import ADAPTER_CONFIG
from seal_extract.encoders.registry import list_encoders
from seal_extract.encoders.spec import EncoderSpec, Shapes
from seal_extract.encoders.state_dict import adapter_keys, find_places
from seal_extract.encoders.tower import empty_tower, tower_shapes
from seal_extract.errors import CheckpointError, SealExtractError

if TYPE_CHECKING:
    from torch import Tensor


# --- merging ------------------------------------------------------------------------------------------------


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


# --- the config of PEFT -------------------------------------------------------------------------------------

_FRONT = "base_model.model."
_FLOATS = ("torch.float32", "torch.float16", "torch.bfloat16")
# fields that do not change the merged weights: names, training, and layers that the file's keys tell anyway
_WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config", "task_type", "ensure_weight_tying"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "eva_config"),
}
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # any other field must be empty, or have one of these values
    "bias": ("none",),
    # other values change the base weights too, so the adapter fits only those
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
_ALLOWED = "allowed: a folder of PEFT with plain LoRA on Linear layers, bias none, nothing else trained"

Rank = Annotated[int, Meta(gt=0)]
Alpha = Annotated[float, Meta(gt=0, le=1e9)]
Names = Annotated[str, Meta(min_length=1)] | Annotated[tuple[str, ...], Meta(min_length=1)]


@dataclass(frozen=True)
class LoraConfig:
    """The fields of ``adapter_config.json`` that decide the numbers, by their names in PEFT.

    Attributes:
        target_modules: last words of the names of adapted layers, or a regular expression for whole names.
        r: rank.
        lora_alpha: numerator of the scale.
        use_rslora: whether the scale is alpha / sqrt(r) (arXiv 2312.03732) and not alpha / r.
        rank_pattern: another r for layers that match a pattern.
        alpha_pattern: another alpha for layers that match a pattern.
        base_model_name_or_path: the model it was trained on, if stated.
    """

    peft_type: str
    target_modules: Names
    r: Rank = 8
    lora_alpha: Alpha = 8
    use_rslora: bool | None = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    base_model_name_or_path: Any = None

    def numbers(self, layers: Sequence[str]) -> dict[str, tuple[int, float, bool]]:
        """Rank and scale of each layer's adapter, and whether the layer is one of the target modules.

        Raises:
            ValueError: a pattern is no regular expression, or takes too long to match.
        """
        ranks, alphas = self.rank_pattern or {}, self.alpha_pattern or {}
        by_pattern = {p: rf"(.*\.)?({p})" for p in (*ranks, *alphas)}  # as PEFT matches them
        names = self.target_modules
        targets = names if isinstance(names, str) and names != "all-linear" else ".*"
        patterns = list(dict.fromkeys([*by_pattern.values(), targets]))
        found = dict(zip(patterns, matches(patterns, layers), strict=True))
        numbers = {}
        for i, layer in enumerate(layers):
            rank = next((r for p, r in ranks.items() if found[by_pattern[p]][i]), self.r)
            alpha = next((a for p, a in alphas.items() if found[by_pattern[p]][i]), self.lora_alpha)
            scale = alpha / (math.sqrt(rank) if self.use_rslora else rank)
            named = isinstance(names, str) or any(_ends_in(layer, name) for name in names)
            numbers[layer] = (rank, float(scale), named and found[targets][i])
        return numbers


def _ends_in(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def read_adapter_config(path: Path) -> LoraConfig:
    """Read ``adapter_config.json``.

    Raises:
        CheckpointError: missing, not JSON, or not plain LoRA on Linear layers; the message names the field.
    """
    config = read_json(path, _ALLOWED)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is a {type(config).__name__}, not an adapter's config; {_ALLOWED}")
    for name, value in config.items():
        if name == "peft_type":
            understood = value == "LORA"
        else:
            neutral = not value or value in _NEUTRAL.get(name, ())
            understood = neutral or name in _READ or name in _WITHOUT_EFFECT
        if not understood:
            raise CheckpointError(
                f"{path} has {name} {json.dumps(value)[:80]}, which is not merged; {_ALLOWED}"
            )
    return as_record(config, LoraConfig, path, "an adapter", _ALLOWED)


# Python's regular expressions have no time limit, and a pattern from a file may run forever: those that are
# not plain names are matched by a process of their own, with limits
SECONDS, BYTES = 10, 2**30
_PLAIN = re.compile(r"(?:[\w-]|\\?\.)*")
_MATCHER = f"""
import json, re, sys, warnings
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({BYTES}, {BYTES}))
except (ImportError, ValueError, OSError):
    pass
warnings.simplefilter("ignore")
patterns, names = json.load(sys.stdin)
try:
    found = [[re.fullmatch(p, n) is not None for n in names] for p in patterns]
except (re.error, RecursionError, OverflowError, MemoryError) as exc:
    found = str(exc) or type(exc).__name__
json.dump(found, sys.stdout)
"""


def matches(patterns: Sequence[str], names: Sequence[str]) -> list[list[bool]]:
    """Whether each pattern matches each whole name, [patterns][names].

    Raises:
        ValueError: a pattern is no regular expression, or takes too long to match.
    """
    if all(_PLAIN.fullmatch(pattern) or pattern == ".*" for pattern in patterns):
        return [[re.fullmatch(pattern, name) is not None for name in names] for pattern in patterns]
    command = [sys.executable, "-I", "-S", "-c", _MATCHER]
    try:
        done = subprocess.run(
            command, input=json.dumps([patterns, names]), capture_output=True, text=True, timeout=SECONDS
        )
        found = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as exc:
        raise ValueError(f"its patterns take more than {SECONDS} s or {BYTES:,} bytes to match") from exc
    if isinstance(found, str):
        raise ValueError(f"one of its patterns is no regular expression: {found}")
    return found  # type: ignore[no-any-return]


# --- the weights of PEFT ------------------------------------------------------------------------------------


def adapter_updates(
    config: LoraConfig, tensors: Mapping[str, Tensor], weights_path: Path, spec: EncoderSpec, tower: Shapes
) -> list[Update]:
    """The updates of a tower's weights by an adapter.

    Args:
        config: from `read_adapter_config`.
        tensors: from `read_tensors`.
        weights_path: of the file they are from, for the message.
        spec: the row of the tower, for the message.
        tower: shape of every tensor.

    Raises:
        CheckpointError: the weights are not exactly those that the config describes, or were trained on
            another base; then the message names the encoders that they fit.
    """
    halves = _checked_halves(config, tensors, weights_path)
    shapes = {layer: (len(b), a.shape[1]) for layer, (a, b, _) in halves.items()}
    try:
        places = find_places(shapes, tower)
    except ValueError as exc:
        base = config.base_model_name_or_path
        trained = f", trained on {base}," if base and isinstance(base, str) else ""
        names = ", ".join(_fitting(shapes, spec)) or "none of the named encoders"
        raise CheckpointError(
            f"the adapter {weights_path.parent}{trained} does not fit {spec.name}: {exc}; it fits {names}"
        ) from exc
    return [Update(spot.key, *halves[layer], spot.rows[0]) for layer, spot in places.items()]


def _checked_halves(
    config: LoraConfig, tensors: Mapping[str, Tensor], weights_path: Path
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A [r, in] and B [out, r] in float32 and the scale of each layer, by the layer's name in the file."""
    named = {key.removeprefix(_FRONT): tensor for key, tensor in tensors.items()}
    pairs = adapter_keys(named)
    of_adapters = {key for pair in pairs.values() for key in pair.values()}
    for key, tensor in named.items():
        complaint = _complaint(tensor) if key in of_adapters else "is no LoRA weight of a Linear layer"
        if complaint:
            raise CheckpointError(f"{weights_path}: {key} {complaint}; {_ALLOWED}")
    try:
        numbers = config.numbers(list(pairs))
    except (ValueError, ArithmeticError) as exc:
        raise CheckpointError(
            f"{weights_path.with_name(ADAPTER_CONFIG)} does not describe an adapter: {exc!s:.300}; {_ALLOWED}"
        ) from exc
    halves = {}
    for layer, keys in pairs.items():
        rank, scale, targeted = numbers[layer]
        pair = {half: named[key].float() for half, key in keys.items()}
        complaint = _mismatch(layer, pair, rank)
        if not complaint and not targeted:
            complaint = f"{layer} is not among its target_modules"
        if complaint:
            raise CheckpointError(f"{weights_path} does not belong to its {ADAPTER_CONFIG}: {complaint}")
        halves[layer] = (pair["A"], pair["B"], scale)
    for name in config.target_modules if isinstance(config.target_modules, tuple) else ():
        if not any(_ends_in(layer, name) for layer in pairs):
            raise CheckpointError(
                f"{weights_path} has no weights for {name} of target_modules; fetch it again"
            )
    return halves


def _complaint(tensor: Tensor) -> str:
    if tensor.ndim != 2:
        return f"has {tensor.ndim} dimensions, as of a convolution"
    if str(tensor.dtype) not in _FLOATS:
        return f"is {str(tensor.dtype).removeprefix('torch.')}, not float32, float16 or bfloat16"
    return "" if is_finite(tensor) else "holds NaN or infinite numbers; make the file again"


def _mismatch(layer: str, pair: Mapping[str, Tensor], rank: int) -> str:
    if pair.keys() != {"A", "B"}:
        return f"{layer} has no lora_{'B' if 'A' in pair else 'A'}"
    ranks = (pair["A"].shape[0], pair["B"].shape[1])
    if ranks != (rank, rank):
        return f"{layer} has rank {' and '.join(map(str, dict.fromkeys(ranks)))}, not {rank}"
    return ""


def _fitting(shapes: Mapping[str, tuple[int, int]], asked: EncoderSpec) -> list[str]:
    """Names of the other encoders with places for these layers; of several on one architecture, the first."""
    names, seen = [], []
    for row in list_encoders():
        kind = (row.architecture, row.pooling, row.dim)
        if row.name == asked.name or kind in seen or (row.published and row.published.lora):
            continue
        seen.append(kind)
        with suppress(ValueError, SealExtractError):
            find_places(shapes, tower_shapes(empty_tower(row)))
            names.append(row.name)
    return names
