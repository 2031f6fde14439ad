"""Encoders: a row of data each, the weights from a file or the Hub. They know nothing of slides.

Importing this package imports neither torch nor timm; the first touch of `load_encoder` or `Encoder` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from seal_extract.encoders.registry import find_spec, list_encoders
from seal_extract.encoders.spec import EncoderSpec

if TYPE_CHECKING:
    from seal_extract.encoders.build import load_encoder
    from seal_extract.encoders.encoder import Encoder
    from seal_extract.encoders.files import WeightFile

__all__ = ["Encoder", "EncoderSpec", "WeightFile", "find_spec", "list_encoders", "load_encoder"]

_WITH_TORCH = {"load_encoder": "build", "Encoder": "encoder", "WeightFile": "files"}


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
