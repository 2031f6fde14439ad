"""The µm/px of a slide, settled among its table, its file and the command."""

from __future__ import annotations

import warnings

from seal_extract.errors import ResolutionError
from seal_extract.slides.listing import SlideEntry, refuse_uncopied
from seal_extract.slides.readers import check_mpp
from seal_extract.slides.slide import Slide, open_slide

MPP_TOLERANCE = 0.05  # by which two statements of a µm/px may differ


def open_entry(entry: SlideEntry, slide_mpp: float | None = None, override_mpp: float | None = None) -> Slide:
    """Open a slide and settle its µm/px: by its table, else by its file, else by ``slide_mpp``.

    A table that agrees with the file within 5 % leaves the file's number as it is. A larger contradiction is
    told in a warning, and by the slide's ``mpp_conflict``.

    Args:
        entry: the slide.
        slide_mpp: µm/px at level 0 where neither table nor file has one.
        override_mpp: µm/px at level 0 that counts in place of everything else.

    Raises:
        SlideError: see `open_slide`.
        UsageError: it is a URL, and there is no copy.
    """
    refuse_uncopied(entry)
    claims = {"--override-mpp": override_mpp, "table": entry.mpp, "file": None, "--slide-mpp": slide_mpp}
    given = [(source, mpp) for source, mpp in claims.items() if mpp is not None]
    for source, mpp in given:
        check_mpp(mpp, source, entry.file)
    try:
        slide = open_slide(entry.file, origin=entry.path)
    except ResolutionError:  # the file does not know it
        if not given:
            raise
        slide = open_slide(entry.file, mpp=given[0][1])
        slide.mpp_source = given[0][0]
    else:
        claims["file"] = slide.mpp
        if override_mpp is not None or (entry.mpp is not None and not same_mpp(entry.mpp, slide.mpp)):
            source, mpp = given[0]
            slide.mpp_source = f"{source} (file: {slide.mpp:.4g}, {slide.mpp_source})"
            slide.mpp = mpp
    others = [f"{name} {mpp:.4g}" for name, mpp in claims.items() if mpp and not same_mpp(mpp, slide.mpp)]
    if others:
        slide.mpp_conflict = f"{slide.mpp:.4g} µm/px by {slide.mpp_source}, against {' and '.join(others)}"
        hint = f"; type --override-mpp {slide_mpp:.4g} if the file is wrong" if slide_mpp is not None else ""
        warnings.warn(f"{entry.source}: {slide.mpp_conflict}{hint}", stacklevel=1)
    return slide


def same_mpp(one: float, other: float) -> bool:
    """Whether two statements of a µm/px agree."""
    return abs(one / other - 1) <= MPP_TOLERANCE
