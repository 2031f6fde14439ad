"""Adapters in PEFT's own folders, ``adapter_config.json`` and ``adapter_model.safetensors``, without PEFT.

Plain LoRA on Linear layers is read; every field of the config that would make it something else is refused by
its name. `find_places` finds an adapter's layers in a tower.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seal_extract.encoders.checkpoint import is_finite
from seal_extract.encoders.files import check_regular
from seal_extract.encoders.locate import ADAPTER_CONFIG
from seal_extract.encoders.lora import Update
from seal_extract.encoders.registry import list_encoders
from seal_extract.encoders.spec import EncoderSpec, Shapes
from seal_extract.encoders.state_dict import adapter_keys, find_places
from seal_extract.encoders.tower import empty_tower, tower_shapes
from seal_extract.errors import CheckpointError, SealExtractError

if TYPE_CHECKING:
    from torch import Tensor

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


# --- the config ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraConfig:
    """The numbers in an ``adapter_config.json``.

    Attributes:
        path: the file.
        r: rank.
        alpha: numerator of the scale.
        rslora: whether the scale is alpha / sqrt(r) (arXiv 2312.03732) and not alpha / r.
        targets: the last words of the names of adapted layers, or a regular expression for whole names.
        ranks: another r for layers that match a pattern.
        alphas: another alpha for layers that match a pattern.
        base: the model it was trained on, if stated.
    """

    path: Path
    r: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...] | str
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    base: str | None = None

    def numbers(self, layers: Sequence[str]) -> dict[str, tuple[int, float, bool]]:
        """Rank and scale of each layer's adapter, and whether the layer is one of the target modules.

        Raises:
            ValueError: a pattern is no regular expression, or takes too long to match.
        """
        by_pattern = {p: rf"(.*\.)?({p})" for p in (*self.ranks, *self.alphas)}  # as PEFT matches them
        targets = self.targets if isinstance(self.targets, str) and self.targets != "all-linear" else ".*"
        patterns = list(dict.fromkeys([*by_pattern.values(), targets]))
        found = dict(zip(patterns, matches(patterns, layers), strict=True))
        numbers = {}
        for i, layer in enumerate(layers):
            rank = next((r for p, r in self.ranks.items() if found[by_pattern[p]][i]), self.r)
            alpha = next((a for p, a in self.alphas.items() if found[by_pattern[p]][i]), self.alpha)
            scale = alpha / (math.sqrt(rank) if self.rslora else rank)
            named = isinstance(self.targets, str) or any(_ends_in(layer, name) for name in self.targets)
            numbers[layer] = (rank, float(scale), named and found[targets][i])
        return numbers


def _ends_in(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def read_adapter_config(path: Path) -> LoraConfig:
    """Read ``adapter_config.json``.

    Raises:
        CheckpointError: missing, not JSON, or not plain LoRA on Linear layers; the message names the field.
    """
    check_regular(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise CheckpointError(f"{path} cannot be read as JSON: {reason}; {_ALLOWED}") from exc
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is a {type(config).__name__}, not an adapter's config; {_ALLOWED}")
    for name, value in config.items():
        ignored = name in _READ or name in _WITHOUT_EFFECT or not value
        if value != "LORA" if name == "peft_type" else not ignored and value not in _NEUTRAL.get(name, ()):
            raise CheckpointError(
                f"{path} has {name} {json.dumps(value)[:80]}, which is not merged; {_ALLOWED}"
            )
    try:
        return _parse(path, config)
    except (TypeError, ValueError, ArithmeticError) as exc:
        raise CheckpointError(f"{path} does not describe an adapter: {exc!s:.300}; {_ALLOWED}") from exc


def _parse(path: Path, config: Mapping[str, Any]) -> LoraConfig:
    if "peft_type" not in config:
        raise ValueError("peft_type is missing")
    targets: Any = config.get("target_modules")
    is_list = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    if not targets or not (is_list or isinstance(targets, str)):
        raise ValueError(f"target_modules is {targets!r}, neither names nor a regular expression")
    base = config.get("base_model_name_or_path")
    return LoraConfig(
        path,
        r=_positive("r", config.get("r", 8), int),
        alpha=_positive("lora_alpha", config.get("lora_alpha", 8), (int, float)),
        rslora=bool(config.get("use_rslora")),
        targets=targets if isinstance(targets, str) else tuple(targets),
        ranks=_patterns(config, "rank_pattern", int),
        alphas=_patterns(config, "alpha_pattern", (int, float)),
        base=base if isinstance(base, str) and base else None,
    )


def _patterns(config: Mapping[str, Any], name: str, kind: Any) -> dict[str, Any]:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise TypeError(f"{name} is {patterns!r}, not numbers by pattern")
    return {pattern: _positive(f"{name} {pattern}", value, kind) for pattern, value in patterns.items()}


def _positive(name: str, value: Any, kind: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}, not a number above 0")
    return value


# Python's regular expressions have no time limit, and a pattern from a file may take for ever: those that are
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


# --- the weights --------------------------------------------------------------------------------------------


Halves = dict[str, tuple["Tensor", "Tensor", float]]  # A [r, in], B [out, r] and scale of each layer


def read_adapter(config: LoraConfig, tensors: Mapping[str, Tensor], weights_path: Path) -> Halves:
    """The adapter of each layer in float32, by the layer's name in the file, checked against the config.

    Args:
        config: from `read_adapter_config`.
        tensors: from `read_tensors`.
        weights_path: of the file they are from, for the message.

    Raises:
        CheckpointError: the weights are not exactly those that the config describes.
    """
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
            f"{config.path} does not describe an adapter: {exc!s:.300}; {_ALLOWED}"
        ) from exc
    halves: Halves = {}
    for layer, keys in pairs.items():
        rank, scale, targeted = numbers[layer]
        pair = {half: named[key].float() for half, key in keys.items()}
        complaint = _mismatch(layer, pair, rank)
        if not complaint and not targeted:
            complaint = f"{layer} is not among its target_modules"
        if complaint:
            raise CheckpointError(f"{weights_path} does not belong to its {ADAPTER_CONFIG}: {complaint}")
        halves[layer] = (pair["A"], pair["B"], scale)
    for name in config.targets if isinstance(config.targets, tuple) else ():
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


def adapter_updates(config: LoraConfig, halves: Halves, spec: EncoderSpec, tower: Shapes) -> list[Update]:
    """The updates of a tower's weights by an adapter.

    Args:
        config: of the adapter.
        halves: from `read_adapter`.
        spec: the row of the tower, for the message.
        tower: shape of every tensor.

    Raises:
        CheckpointError: it was trained on another base; the message names the encoders that it fits.
    """
    shapes = {layer: (len(b), a.shape[1]) for layer, (a, b, _) in halves.items()}
    try:
        places = find_places(shapes, tower)
    except ValueError as exc:
        trained = f", trained on {config.base}," if config.base else ""
        names = ", ".join(_fitting(shapes, spec)) or "none of the named encoders"
        raise CheckpointError(
            f"the adapter {config.path.parent}{trained} does not fit {spec.name}: {exc}; it fits {names}"
        ) from exc
    return [Update(spot.key, *halves[layer], spot.rows[0]) for layer, spot in places.items()]


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
