"""Whole-slide images in, patch embeddings out.

The public names, in the order in which data flows through them; each is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seal_extract.encoders import Encoder, EncoderSpec, list_encoders, load_encoder
    from seal_extract.errors import SealExtractError
    from seal_extract.features.store import SlideFeatures, read_features
    from seal_extract.genes.omics import OmicsEncoder, load_omics
    from seal_extract.patches.grid import PatchGrid, make_grid, read_grid
    from seal_extract.run.cohort import CohortReport, extract_cohort
    from seal_extract.run.extract import extract
    from seal_extract.run.options import ExtractOptions
    from seal_extract.run.patch_images import extract_patches
    from seal_extract.slides.listing import SlideList, list_slides
    from seal_extract.slides.slide import Slide, open_slide
    from seal_extract.tissue.mask import TissueMask
    from seal_extract.tissue.segmentation import find_tissue

    __version__: str

_HOME = {
    "open_slide": "slides.slide",
    "Slide": "slides.slide",
    "find_tissue": "tissue.segmentation",
    "TissueMask": "tissue.mask",
    "make_grid": "patches.grid",
    "read_grid": "patches.grid",
    "PatchGrid": "patches.grid",
    "load_encoder": "encoders",
    "list_encoders": "encoders",
    "Encoder": "encoders",
    "EncoderSpec": "encoders",
    "load_omics": "genes.omics",
    "OmicsEncoder": "genes.omics",
    "extract": "run.extract",
    "extract_patches": "run.patch_images",
    "list_slides": "slides.listing",
    "SlideList": "slides.listing",
    "extract_cohort": "run.cohort",
    "CohortReport": "run.cohort",
    "ExtractOptions": "run.options",
    "read_features": "features.store",
    "SlideFeatures": "features.store",
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
