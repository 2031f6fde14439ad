"""Adapters in PEFT's own folders, ``adapter_config.json`` and ``adapter_model.safetensors``, without PEFT.

What is understood is plain LoRA on Linear layers; every field that would make it something else is refused
by its name. How an adapter's layers are found in a tower is told in `layers`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seal_extract.encoders.checkpoint import is_finite
from seal_extract.encoders.found import check_regular
from seal_extract.encoders.layers import Place, find_places
from seal_extract.encoders.locate import ADAPTER_CONFIG
from seal_extract.encoders.lora import Update
from seal_extract.encoders.patterns import matches
from seal_extract.encoders.registry import EncoderSpec, list_encoders
from seal_extract.encoders.tower import Shapes, empty_tower, tower_shapes
from seal_extract.errors import CheckpointError, SealExtractError

if TYPE_CHECKING:
    from torch import Tensor

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")
_FLOATS = ("torch.float32", "torch.float16", "torch.bfloat16")

# what leaves the merged weights as they are: names, training, and the layers that the file's keys tell anyway
_WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config", "task_type", "ensure_weight_tying"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "eva_config"),
}
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # any other field must be empty, or one of these
    "bias": ("none",),
    # further values change the base weights, so that the adapter fits only those
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True)
class LoraConfig:
    """What ``adapter_config.json`` says of the numbers.

    Attributes:
        path: the file.
        r: rank.
        alpha: numerator of the scale.
        rslora: the scale is alpha / sqrt(r), not alpha / r (arXiv 2312.03732).
        targets: names that adapted layers end in, or a regular expression for their whole names.
        ranks: r of the layers that a pattern matches.
        alphas: alpha likewise.
        base: the model it was trained on, if it says so.
    """

    path: Path
    r: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...] | str
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    base: str | None = None

    def numbers(self, layers: Sequence[str]) -> dict[str, LayerNumbers]:
        """Rank and scale of each of these layers, and whether PEFT would have adapted it.

        Raises:
            ValueError: a pattern is no regular expression, or does not come to an end.
        """
        ranks, alphas = list(self.ranks), list(self.alphas)
        targets = [self.targets] if isinstance(self.targets, str) and self.targets != "all-linear" else []
        # as PEFT looks them up: the end of the name, after a dot
        found = matches([*(rf"(.*\.)?({p})" for p in (*ranks, *alphas)), *targets], layers)
        numbers = {}
        for i, layer in enumerate(layers):
            hits = [one[i] for one in found]
            of_rank = next((self.ranks[p] for p, hit in zip(ranks, hits, strict=False) if hit), self.r)
            of_alpha = zip(alphas, hits[len(ranks) :], strict=False)
            alpha = next((self.alphas[p] for p, hit in of_alpha if hit), self.alpha)
            scale = alpha / (math.sqrt(of_rank) if self.rslora else of_rank)
            if isinstance(self.targets, str):
                targeted = hits[-1] if targets else True
            else:
                targeted = any(_ends_in(layer, name) for name in self.targets)
            numbers[layer] = LayerNumbers(of_rank, float(scale), targeted)
        return numbers


def _ends_in(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


@dataclass(frozen=True)
class LayerNumbers:
    """What an adapter's config says of one layer.

    Attributes:
        rank: of its adapter.
        scale: what the product B A is multiplied by.
        targeted: whether it is among the target modules.
    """

    rank: int
    scale: float
    targeted: bool


def read_adapter_config(path: Path) -> LoraConfig:
    """Read ``adapter_config.json``.

    Raises:
        CheckpointError: missing, not JSON, or not plain LoRA on Linear layers; the field is named.
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
        if not _is_understood(name, value):
            raise CheckpointError(
                f"{path} has {name} {json.dumps(value)[:80]}, which is not merged; {_ALLOWED}"
            )
    try:
        return _parse(path, config)
    except (TypeError, ValueError, ArithmeticError) as exc:
        raise CheckpointError(f"{path} does not describe an adapter: {exc!s:.300}; {_ALLOWED}") from exc


_NUMBER = (int, float)
_ALLOWED = "allowed: a folder of PEFT with plain LoRA on Linear layers, bias none, nothing else trained"


def _is_understood(name: str, value: Any) -> bool:
    if name == "peft_type":
        return bool(value == "LORA")
    if name in _READ or name in _WITHOUT_EFFECT or not value:
        return True
    return value in _NEUTRAL.get(name, ())


def _parse(path: Path, config: Mapping[str, Any]) -> LoraConfig:
    if "peft_type" not in config:
        raise ValueError("peft_type is missing")
    targets: Any = config.get("target_modules")
    if not (isinstance(targets, str) and targets) and not _is_texts(targets):
        raise ValueError(f"target_modules is {targets!r}, neither names nor a regular expression")
    base = config.get("base_model_name_or_path")
    return LoraConfig(
        path,
        r=_positive("r", config.get("r", 8), int),
        alpha=_positive("lora_alpha", config.get("lora_alpha", 8), _NUMBER),
        rslora=bool(config.get("use_rslora")),
        targets=targets if isinstance(targets, str) else tuple(targets),
        ranks=_patterns(config, "rank_pattern", int),
        alphas=_patterns(config, "alpha_pattern", _NUMBER),
        base=base if isinstance(base, str) and base else None,
    )


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _patterns(config: Mapping[str, Any], name: str, kind: Any) -> dict[str, Any]:
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise TypeError(f"{name} is {patterns!r}, not numbers by pattern")
    for pattern, value in patterns.items():
        _positive(f"{name} {pattern}", value, kind)
    return patterns


def _positive(name: str, value: Any, kind: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}, not a number above 0")
    return value


@dataclass(frozen=True)
class Adapter:
    """An adapter, read and checked in itself.

    Attributes:
        config: its numbers.
        path: its weight file.
        halves: A [r, in] and B [out, r], float32, of every adapted layer by the name that it has there.
        scales: what each product is multiplied by.
    """

    config: LoraConfig
    path: Path
    halves: Mapping[str, tuple[Tensor, Tensor]]
    scales: Mapping[str, float]

    @property
    def shapes(self) -> Shapes:
        """[out, in] of the adapted layers."""
        return {layer: (b.shape[0], a.shape[1]) for layer, (a, b) in self.halves.items()}

    def updates(self, spec: EncoderSpec, tower: Shapes) -> list[Update]:
        """What to add to which weights of a tower.

        Raises:
            CheckpointError: it was trained on another base; the encoders that it fits are named.
        """
        try:
            places = find_places(self.shapes, tower)
        except ValueError as exc:
            trained = f", trained on {self.config.base}," if self.config.base else ""
            raise CheckpointError(
                f"the adapter {self.path.parent}{trained} does not fit {spec.name}: {exc}; {self._fits(spec)}"
            ) from exc
        return [self._update(layer, place) for layer, found in places.items() for place in found]

    def _update(self, layer: str, place: Place) -> Update:
        a, b = self.halves[layer]
        return Update(place.key, a, b[place.of_update], self.scales[layer], place.rows.start)

    def _fits(self, asked: EncoderSpec) -> str:
        names, seen = [], []
        for row in list_encoders():
            kind = (row.architecture, row.pooling, row.dim)
            if row.name == asked.name or kind in seen or (row.published and row.published.lora):
                continue
            seen.append(kind)
            try:
                find_places(self.shapes, tower_shapes(empty_tower(row)))
            except (ValueError, SealExtractError):
                continue
            names.append(row.name)
        return f"it fits {', '.join(names)}" if names else "it fits none of the named encoders"


def read_adapter(config: LoraConfig, tensors: Mapping[str, Tensor], weights_path: Path) -> Adapter:
    """Check an adapter's config and weights against each other.

    Args:
        config: from `read_adapter_config`.
        tensors: from `read_tensors`.
        weights_path: where they are from, for the message.

    Raises:
        CheckpointError: not exactly the weights that belong to the config.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        complaint = "is no LoRA weight of a Linear layer" if match is None else _complaint(tensor)
        if complaint or match is None:
            raise CheckpointError(f"{weights_path}: {key} {complaint}; {_ALLOWED}")
        pairs.setdefault(match["layer"], {})[match["half"]] = tensor.float()
    try:
        numbers = config.numbers(list(pairs))
    except (ValueError, ArithmeticError) as exc:
        raise CheckpointError(
            f"{config.path} does not describe an adapter: {exc!s:.300}; {_ALLOWED}"
        ) from exc
    for layer, halves in pairs.items():
        complaint = _mismatch(numbers[layer], layer, halves)
        if complaint:
            raise CheckpointError(f"{weights_path} does not belong to its {ADAPTER_CONFIG}: {complaint}")
    for name in config.targets if isinstance(config.targets, tuple) else ():
        if not any(_ends_in(layer, name) for layer in pairs):
            raise CheckpointError(
                f"{weights_path} has no weights for {name} of target_modules; fetch it again"
            )
    scales = {layer: one.scale for layer, one in numbers.items()}
    return Adapter(config, weights_path, {layer: (h["A"], h["B"]) for layer, h in pairs.items()}, scales)


def _complaint(tensor: Tensor) -> str:
    if tensor.ndim != 2:
        return f"has {tensor.ndim} dimensions, as of a convolution"
    if str(tensor.dtype) not in _FLOATS:
        return f"is {str(tensor.dtype).removeprefix('torch.')}, not float32, float16 or bfloat16"
    return "" if is_finite(tensor) else "holds NaN or infinite numbers; make the file again"


def _mismatch(numbers: LayerNumbers, layer: str, halves: Mapping[str, Tensor]) -> str:
    if halves.keys() != {"A", "B"}:
        return f"{layer} has no lora_{'B' if 'A' in halves else 'A'}"
    ranks, expected = (halves["A"].shape[0], halves["B"].shape[1]), numbers.rank
    if ranks != (expected, expected):
        return f"{layer} has rank {' and '.join(map(str, dict.fromkeys(ranks)))}, not {expected}"
    return "" if numbers.targeted else f"{layer} is not among its target_modules"
