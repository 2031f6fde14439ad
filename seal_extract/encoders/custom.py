"""Any model of timm as an encoder, ``timm:NAME``, with the input that its own pretrained config states."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import timm
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from seal_extract.encoders.registry import FILTERS, Architecture, EncoderSpec, InputRule, Published
from seal_extract.encoders.tower import own_dim
from seal_extract.errors import UsageError

PREFIX = "timm:"
_FILES = ("model.safetensors", "pytorch_model.bin")


def timm_spec(asked: str) -> EncoderSpec:
    """The row of ``timm:NAME``, NAME being an architecture of timm, with a tag of weights or without.

    Patches are resized and cropped as timm evaluates the model. timm states no µm/px. The embedding is what
    the model gives without its classes.

    Raises:
        UsageError: timm has no such model, or it takes another input than RGB squares.
    """
    config = _config(asked)
    side = config.input_size[-1]
    layers = [config.classifier] if isinstance(config.classifier, str) else config.classifier or ()
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
        # a config may ask for another size than the architecture has by default
        architecture=Architecture(config.architecture, {"img_size": side} if config.fixed_input_size else {}),
        pooling="own",
        input=_input(asked, config, side),
        paper=", ".join(_texts(config.paper_ids)),
        published=Published(
            files=(config.hf_hub_filename,) if config.hf_hub_filename else _FILES,
            ignored=tuple(f"{layer}." for layer in layers),
        ),
    )
    return replace(draft, dim=own_dim(draft))


def _config(asked: str) -> Any:
    name = asked.removeprefix(PREFIX)
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


def _input(asked: str, config: Any, side: int) -> InputRule:
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


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(v) for v in value or ()]


def as_timm_reads(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Bring a file whose names are those of a model's first authors to timm's, by timm's own conversion."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        return dict(convert(dict(tensors), model)) if convert is not None else dict(tensors)
    except Exception:  # of timm's code, on names that it does not know: the check that follows tells them
        return dict(tensors)
