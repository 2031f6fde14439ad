"""The image tower of a row: built by timm without weights, then filled with checked tensors."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import timm
import timm.layers
import torch
from timm.models import FeatureListNet, get_pretrained_cfg
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from seal_extract.encoders.parts import ConchTower, ConvStem, new_head, with_plain_positions
from seal_extract.encoders.spec import (
    COUNTER,
    FILTERS,
    Architecture,
    EncoderSpec,
    InputRule,
    Published,
    Shapes,
)
from seal_extract.errors import UsageError, first_line

# arguments of timm that a config.json may set: none that fetches or reads a file
KWARGS = (
    *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "qk_norm"),
    *("init_values", "class_token", "no_embed_class", "reg_tokens", "pre_norm", "dynamic_img_size"),
    *("mlp_layer", "act_layer", "norm_layer", "embed_layer", "features_only", "out_indices"),
)
# above those of every vision transformer: building such a model would take all memory, or hours
MOST = {
    **{"img_size": 4096, "patch_size": 512, "embed_dim": 2**14, "depth": 128, "num_heads": 256},
    **{"mlp_ratio": 64, "reg_tokens": 256},
}
MLP_LAYERS = ("Mlp", "SwiGLU", "SwiGLUPacked")
TIMM_PREFIX = "timm:"
_TIMM_FILES = ("model.safetensors", "pytorch_model.bin")
_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.randn)
_IN_PLACE = {
    *(Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.clamp_),
    *(Tensor.mul_, Tensor.add_, Tensor.fill_, Tensor.zero_),
}


# --- building -----------------------------------------------------------------------------------------------


class _NoMemory(TorchFunctionMode):
    """Makes parameters on the meta device, which takes no memory and no time to initialise.

    ``torch.device("meta")`` would break older timm, which reads numbers back from a linspace. In-place
    arithmetic on meta tensors is skipped; it would take two thirds of the time.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _IN_PLACE and args[0].is_meta:
            return args[0]
        kwargs = dict(kwargs or {})
        if func in _FACTORIES and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def empty_tower(spec: EncoderSpec) -> nn.Module:
    """Build the tower of a row on the meta device, in evaluation mode.

    Raises:
        UsageError: timm cannot build it, or its embedding is not ``spec.dim`` long.
    """
    trunk, whole, head = _timm_model(spec), spec.pooling in ("map", "own"), spec.architecture.head
    if head is not None and whole:
        raise UsageError(
            f"encoder {spec.name} has a head behind {spec.pooling} pooling; allowed: cls, cls+mean, conch"
        )
    with _building(spec), _NoMemory():
        width = _own_dim(trunk) if whole else int(trunk.num_features)
        prefix = 1 if whole else int(trunk.num_prefix_tokens)
        dim = {"cls+mean": 2 * width, "conch": spec.dim}.get(spec.pooling, width)
        tower: Any = trunk
        if spec.pooling == "conch":
            tower = ConchTower(trunk, width, spec.dim, spec.architecture.pooler)
        if head is not None:
            tower.head, dim = new_head(head, dim), head.widths[-1]
    if dim != spec.dim or not prefix:
        raise UsageError(
            f"encoder {spec.name}: its {spec.pooling} pooling gives {dim} numbers of {prefix} "
            f"prefix tokens; allowed: dim {spec.dim}, at least one prefix token"
        )
    built: nn.Module = tower.eval().requires_grad_(False)
    return built


def _own_dim(model: Any) -> int:
    if isinstance(model, FeatureListNet):
        (width,) = model.feature_info.channels()  # of one map
        return int(width)
    return int(getattr(model, "head_hidden_size", None) or model.num_features)


def _timm_model(spec: EncoderSpec) -> Any:
    name = spec.architecture.timm
    if not name.isidentifier() or not timm.is_model(name):  # neither a URL, nor a path, nor a tag of weights
        raise UsageError(f"encoder {spec.name} is built on {name!r}, unknown to timm {timm.__version__}")
    build = partial(timm.create_model, name, pretrained=False, num_classes=0, **_checked_kwargs(spec))
    with _building(spec):
        with _NoMemory():
            model = build()
        held = model.state_dict()
        if any(value.is_meta for key, value in model.named_buffers() if key not in held):
            for key, value in build().named_buffers():  # window tables, rotary frequencies: in no file
                module, _, name = key.rpartition(".")
                if key not in held:
                    model.get_submodule(module).register_buffer(name, value, persistent=False)
        if spec.architecture.antialias:
            return model
        return with_plain_positions(model, spec.architecture.position_offset)


@contextmanager
def _building(spec: EncoderSpec) -> Iterator[None]:
    """Turn any error of timm about its arguments into one line."""
    try:
        yield
    except UsageError:
        raise
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        AssertionError,
        RuntimeError,
        ArithmeticError,
    ) as exc:
        kind = "models of timm" if spec.pooling in ("map", "own") else "vision transformers of timm"
        raise UsageError(
            f"encoder {spec.name} cannot be built as {spec.architecture!s:.300}: {first_line(exc)}; "
            f"allowed: {kind}"
        ) from exc


def _checked_kwargs(spec: EncoderSpec) -> dict[str, Any]:
    kwargs = dict(spec.architecture.kwargs)
    refused = sorted(kwargs.keys() - set(KWARGS))
    if refused:
        raise UsageError(
            f"encoder {spec.name} passes {', '.join(refused)} to timm; allowed: {', '.join(KWARGS)}"
        )
    for name, most in MOST.items():
        values = kwargs.get(name, 1)
        for value in values if isinstance(values, list) and 0 < len(values) < 3 else [values]:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not (0 <= value <= most):
                raise UsageError(f"encoder {spec.name} has {name} {values!r:.80}; allowed: at most {most}")
    if "mlp_layer" in kwargs:  # timm takes activations by name, but this layer only as a class
        if kwargs["mlp_layer"] not in MLP_LAYERS:
            raise UsageError(f"mlp_layer is {kwargs['mlp_layer']!r}; allowed: {', '.join(MLP_LAYERS)}")
        kwargs["mlp_layer"] = getattr(timm.layers, kwargs["mlp_layer"])
    if "embed_layer" in kwargs:
        if kwargs["embed_layer"] != ConvStem.__name__:
            raise UsageError(f"embed_layer is {kwargs['embed_layer']!r}; allowed: {ConvStem.__name__}")
        kwargs["embed_layer"] = ConvStem
    return kwargs


def tower_shapes(tower: nn.Module) -> Shapes:
    """Every tensor of a weight file of ``tower``, but for BatchNorms' counts of training steps."""
    held = tower.state_dict()
    return {key: tuple(value.shape) for key, value in held.items() if not key.endswith(COUNTER)}


def fill(tower: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Use ``tensors``, which were checked against `tower_shapes`, as the tower's memory, without a copy."""
    counters = {
        key: torch.zeros((), dtype=torch.int64) for key in tower.state_dict() if key.endswith(COUNTER)
    }
    tower.load_state_dict(tensors | counters, strict=True, assign=True)
    tower.requires_grad_(False)


def embed(tower: nn.Module, pooling: str, images: Tensor) -> Tensor:
    """Normalised images [B, 3, H, W] to embeddings [B, D]."""
    trunk: Any = tower
    if pooling in ("conch", "own"):
        embedding: Tensor = trunk(images)
        return embedding
    return pooled(tower, pooling, trunk(images)[0] if pooling == "map" else trunk.forward_features(images))


def pooled(tower: nn.Module, pooling: str, features: Tensor) -> Tensor:
    """What the trunk of a tower gives, tokens [B, prefix + N, C] or a map, to embeddings [B, D]."""
    trunk: Any = tower
    if pooling == "map":
        return features.mean((2, 3))
    if pooling in ("conch", "own"):
        embedding: Tensor = (trunk.pool if pooling == "conch" else trunk.forward_head)(features)
        return embedding
    tokens = features[:, 0]
    if pooling == "cls+mean":
        tokens = torch.cat([tokens, features[:, trunk.num_prefix_tokens :].mean(1)], dim=1)
    embedding = trunk.head(tokens)  # of most rows it does nothing
    return embedding


# --- any model of timm --------------------------------------------------------------------------------------


def timm_spec(asked: str) -> EncoderSpec:
    """The row of ``timm:NAME``; NAME is an architecture of timm, with or without a tag of weights.

    Input and normalisation are those of timm's own evaluation; timm states no µm/px. The embedding is the
    output of the model without its classifier.

    Raises:
        UsageError: timm has no such model, or its input is not a square RGB image.
    """
    config = _timm_config(asked)
    side = config.input_size[-1]
    layers = [config.classifier] if isinstance(config.classifier, str) else config.classifier or ()
    papers = [config.paper_ids] if isinstance(config.paper_ids, str) else config.paper_ids or ()
    draft = EncoderSpec(
        name=f"timm-{config.architecture}" + (f".{config.tag}" if config.tag else ""),
        dim=1,
        patch_px=side,
        mpp=None,
        mean=tuple(config.mean),
        std=tuple(config.std),
        precision="float32",
        licence=config.license or "not stated",
        source=config.hf_hub_id or "",
        # a config may ask for another size than the default of the architecture
        architecture=Architecture(config.architecture, {"img_size": side} if config.fixed_input_size else {}),
        pooling="own",
        input=_timm_input(asked, config, side),
        paper=", ".join(map(str, papers)),
        published=Published(
            files=(config.hf_hub_filename,) if config.hf_hub_filename else _TIMM_FILES,
            ignored=tuple(f"{layer}." for layer in layers),
        ),
    )
    return replace(draft, dim=_own_dim(_timm_model(draft)))


def _timm_config(asked: str) -> Any:
    name = asked.removeprefix(TIMM_PREFIX)
    architecture = name.split(".")[0]
    if not architecture.isidentifier() or not timm.is_model(architecture):
        near = ", ".join(timm.list_models(f"*{architecture}*")[:3]) if architecture.isidentifier() else ""
        hint = f"; did you mean {near}" if near else ""
        raise UsageError(f"{asked}: timm {timm.__version__} has no model {architecture!r}{hint}")
    try:
        config = get_pretrained_cfg(name)
    except RuntimeError as exc:
        tags = timm.list_models(f"{architecture}.*", pretrained=True)
        raise UsageError(f"{asked}: timm has no such weights; allowed: {', '.join(tags) or 'none'}") from exc
    if config is None:
        raise UsageError(f"{asked}: timm states no input for it; choose a model with pretrained weights")
    return config


def _timm_input(asked: str, config: Any, side: int) -> InputRule:
    channels, height, width = config.input_size
    if (channels, height) != (3, width):
        raise UsageError(f"{asked} takes {list(config.input_size)}; allowed: three channels, squares")
    if config.interpolation not in FILTERS or config.crop_mode not in ("center", "squash"):
        raise UsageError(
            f"{asked} takes a {config.interpolation} resize and a {config.crop_mode} crop; "
            f"allowed: {' or '.join(FILTERS)}, center"
        )
    resize_px = math.floor(side / config.crop_pct)  # as timm rounds it
    return InputRule(side, resize_px, config.interpolation, None if resize_px == side else side)


def as_timm_reads(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of a file of the model's first authors to timm's, by timm's own conversion."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        return dict(convert(dict(tensors), model)) if convert is not None else dict(tensors)
    except Exception:  # timm's code met unknown names; the check that follows reports them
        return dict(tensors)
