"""Genes: predict expression from embeddings, embed expression, and search slides by both."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from seal_extract.genes.gene_lists import read_panel

if TYPE_CHECKING:
    from seal_extract.genes.omics import OmicsEncoder, load_omics

__all__ = ["OmicsEncoder", "load_omics", "read_panel"]

_WITH_TORCH = {"OmicsEncoder": "omics", "load_omics": "omics"}


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
