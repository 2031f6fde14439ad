"""Finding the slide from which features were made."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from seal_extract.errors import SlideOpenError
from seal_extract.features.store import SlideFeatures
from seal_extract.slides.overview import Overview, read_overview
from seal_extract.slides.slide import Slide, open_slide

OVERVIEW_PX = 2000  # as in the pictures of 10x Genomics


def open_origin(features: SlideFeatures, slides: Path | None = None) -> Slide:
    """Open the slide of these features, at its recorded path or by its file name in another folder.

    Args:
        features: from `read_features`.
        slides: folder to search, with its subfolders, if the slide has moved.

    Raises:
        SlideOpenError: the slide is not found, has another size, or cannot be opened.
    """
    path = find_origin(features, slides)
    slide = open_slide(path, mpp=features.provenance["slide"]["mpp"])
    expected = tuple(features.provenance["slide"]["size_l0"])
    if slide.size_l0 != expected:
        slide.close()
        raise SlideOpenError(
            f"{path} has {slide.size_l0[0]} x {slide.size_l0[1]} px, but {features.path.name} was made from "
            f"{expected[0]} x {expected[1]}; give the folder of the right slide as --slides"
        )
    return slide


def origin_overview(features: SlideFeatures, slides: Path | None = None) -> Overview:
    """The slide of these features at low resolution, at most `OVERVIEW_PX` wide and high.

    Raises:
        SlideError: the slide cannot be found, opened or read.
    """
    with closing(open_origin(features, slides)) as slide:
        return read_overview(slide, slide.mpp * max(slide.size_l0) / OVERVIEW_PX, holes=True)


def find_origin(features: SlideFeatures, slides: Path | None = None) -> Path:
    """The path at which `open_origin` finds the slide.

    Raises:
        SlideOpenError: the slide is not found, or several files have its name.
    """
    known = Path(features.provenance["slide"]["path"])
    if slides is None:
        if known.is_absolute() and known.exists():
            return known
        why = (
            "is no longer there"
            if known.is_absolute()
            else "has no recorded folder, because this is an export"
        )
        raise SlideOpenError(f"the slide {known} {why}; give the folder that holds it as --slides")
    found = [slides] if slides.name == known.name else sorted(slides.rglob(known.name))
    if len(found) != 1 or not found[0].exists():
        what = f"{len(found)} files" if len(found) > 1 else "no file"
        raise SlideOpenError(
            f"{slides} holds {what} of the name {known.name}; give the folder of the right one"
        )
    return found[0]
