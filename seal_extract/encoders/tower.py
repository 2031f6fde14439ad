"""The tower of a row, without weights: names and shapes to check a file against, then to fill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import timm
import timm.layers
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from seal_extract.encoders.conch import ConchTower
from seal_extract.encoders.positions import with_plain_positions
from seal_extract.encoders.registry import EncoderSpec
from seal_extract.errors import UsageError

Shapes = dict[str, tuple[int, ...]]

# what a config.json may pass to timm: nothing that fetches or reads a file
KWARGS = (
    *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "qk_norm"),
    *("init_values", "class_token", "no_embed_class", "reg_tokens", "pre_norm", "dynamic_img_size"),
    *("mlp_layer", "act_layer", "norm_layer"),
)
# more than any vision transformer has: building it would take all memory or hours
MOST = {
    **{"img_size": 4096, "patch_size": 512, "embed_dim": 2**14, "depth": 128, "num_heads": 256},
    **{"mlp_ratio": 64, "reg_tokens": 256},
}
MLP_LAYERS = ("Mlp", "SwiGLU", "SwiGLUPacked")
_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.randn)
_IN_PLACE = {
    *(Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.clamp_),
    *(Tensor.mul_, Tensor.add_, Tensor.fill_, Tensor.zero_),
}


class _NoMemory(TorchFunctionMode):
    """Parameters are made on the meta device: no memory, no time to initialise.

    ``torch.device("meta")`` would do it too, but for older timm, which reads numbers back from a linspace.
    Arithmetic on numbers that are not there is left out: it would take two thirds of the time.
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
    """Build the tower of ``spec`` on the meta device, in evaluation mode.

    Raises:
        UsageError: timm cannot build it, or its embedding is not ``spec.dim`` long.
    """
    trunk, own = _timm_model(spec), spec.pooling == "own"
    with _building(spec), _NoMemory():
        width, prefix = int(trunk.num_features), 1 if own else int(trunk.num_prefix_tokens)
        tower: nn.Module = ConchTower(trunk, width, spec.dim) if spec.pooling == "conch" else trunk
    dims = {"cls": width, "cls+mean": 2 * width, "own": _own_dim(trunk)}
    dim = dims.get(spec.pooling, spec.dim)
    if dim != spec.dim or not prefix:
        raise UsageError(
            f"encoder {spec.name}: its {spec.pooling} pooling gives {dim} numbers of {prefix} prefix tokens; "
            f"allowed: dim {spec.dim}, at least one prefix token"
        )
    return tower.eval().requires_grad_(False)


def own_dim(spec: EncoderSpec) -> int:
    """Length of what the model of ``spec`` gives, pooling by itself; ``spec.dim`` is not looked at.

    Raises:
        UsageError: timm cannot build it.
    """
    return _own_dim(_timm_model(spec))


def _own_dim(model: Any) -> int:
    return int(getattr(model, "head_hidden_size", None) or model.num_features)


def _timm_model(spec: EncoderSpec) -> Any:
    build = partial(timm.create_model, _model(spec), pretrained=False, num_classes=0, **_kwargs(spec))
    with _building(spec):
        with _NoMemory():
            model = build()
        if any(value.is_meta for value in _constants(model)):
            model = build()  # window tables, rotary frequencies and the like are in no file: made for real
        return model if spec.architecture.antialias else with_plain_positions(model)


def _constants(model: nn.Module) -> list[Tensor]:
    """Buffers that a weight file does not hold."""
    held = model.state_dict()
    return [value for key, value in model.named_buffers() if key not in held]


@contextmanager
def _building(spec: EncoderSpec) -> Iterator[None]:
    """Whatever timm makes of arguments that do not go together, as our one line."""
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
        kind = "models of timm" if spec.pooling == "own" else "vision transformers of timm"
        raise UsageError(
            f"encoder {spec.name} cannot be built as {spec.architecture!s:.300}: {exc!s:.300}; "
            f"allowed: {kind}"
        ) from exc


def _model(spec: EncoderSpec) -> str:
    name = spec.architecture.timm
    if not name.isidentifier() or not timm.is_model(name):  # no URL, no path, no tag of weights
        raise UsageError(f"encoder {spec.name} is built on {name!r}, unknown to timm {timm.__version__}")
    return name


def _kwargs(spec: EncoderSpec) -> dict[str, Any]:
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
    if "mlp_layer" in kwargs:  # timm takes activations by name, but this one only as an object
        kwargs["mlp_layer"] = _mlp(kwargs["mlp_layer"])
    return kwargs


def _mlp(name: object) -> Any:
    if name not in MLP_LAYERS:
        raise UsageError(f"mlp_layer is {name!r}; allowed: {', '.join(MLP_LAYERS)}")
    return getattr(timm.layers, str(name))


def tower_shapes(tower: nn.Module) -> Shapes:
    """Every tensor that a full weight file of ``tower`` holds."""
    return {key: tuple(value.shape) for key, value in tower.state_dict().items()}


def fill(tower: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Make ``tensors``, already checked against `tower_shapes`, the tower's own memory, without a copy."""
    tower.load_state_dict(tensors, strict=True, assign=True)
    tower.requires_grad_(False)


def embed(tower: nn.Module, pooling: str, images: Tensor) -> Tensor:
    """Normalised images [B, 3, H, W] to embeddings [B, D]."""
    trunk: Any = tower
    if pooling in ("conch", "own"):
        embedding: Tensor = trunk(images)
        return embedding
    tokens: Tensor = trunk.forward_features(images)  # [B, prefix + N, D]
    cls = tokens[:, 0]
    if pooling == "cls":
        return cls
    return torch.cat([cls, tokens[:, trunk.num_prefix_tokens :].mean(1)], dim=1)
