"""Whole-slide images in, patch embeddings out.

The public names, in the order in which data flows through them; each is imported when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seal_extract.cohort import CohortReport, extract_cohort
    from seal_extract.embed_patches import extract_patches
    from seal_extract.encoders import Encoder, EncoderSpec, list_encoders, load_encoder
    from seal_extract.errors import SealExtractError
    from seal_extract.extract import extract
    from seal_extract.genes import OmicsEncoder, load_omics
    from seal_extract.grid import PatchGrid, make_grid, read_grid
    from seal_extract.plan import ExtractOptions
    from seal_extract.slide import Slide, open_slide
    from seal_extract.slide_list import SlideList, list_slides
    from seal_extract.store import SlideFeatures, read_features
    from seal_extract.tissue import TissueMask, find_tissue

    __version__: str

_HOME = {
    "open_slide": "slide",
    "Slide": "slide",
    "find_tissue": "tissue",
    "TissueMask": "tissue",
    "make_grid": "grid",
    "read_grid": "grid",
    "PatchGrid": "grid",
    "load_encoder": "encoders",
    "list_encoders": "encoders",
    "Encoder": "encoders",
    "EncoderSpec": "encoders",
    "load_omics": "genes",
    "OmicsEncoder": "genes",
    "extract": "extract",
    "extract_patches": "embed_patches",
    "list_slides": "slide_list",
    "SlideList": "slide_list",
    "extract_cohort": "cohort",
    "CohortReport": "cohort",
    "ExtractOptions": "plan",
    "read_features": "store",
    "SlideFeatures": "store",
    "SealExtractError": "errors",
}

__all__ = [
    "CohortReport",
    "Encoder",
    "EncoderSpec",
    "ExtractOptions",
    "OmicsEncoder",
    "PatchGrid",
    "SealExtractError",
    "Slide",
    "SlideFeatures",
    "SlideList",
    "TissueMask",
    "extract",
    "extract_cohort",
    "extract_patches",
    "find_tissue",
    "list_encoders",
    "list_slides",
    "load_encoder",
    "load_omics",
    "make_grid",
    "open_slide",
    "read_features",
    "read_grid",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("seal-extract")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


class _Package(ModuleType):
    """Keeps a public name for its function where a submodule has the same name: ``extract``."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
