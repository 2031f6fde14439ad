"""Patches that look like one, in its slide and in the others of a cohort."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seal_extract.errors import OutputError, UsageError
from seal_extract.features.store import SlideFeatures

if TYPE_CHECKING:
    from seal_extract.genes.index import Index
    from seal_extract.genes.search import Found

LOOKED_AT = 512  # nearest patches of an index, of which those of the slide itself are left out


def alike_in_slide(slide: SlideFeatures, row: int, most: int) -> list[Found]:
    """The patches of a slide most like its patch ``row``, without itself, the nearest first.

    Raises:
        UsageError: the embedding is 0, as of a patch that could not be read.
    """
    from seal_extract.genes.index import ExactIndex
    from seal_extract.genes.search import Found

    return ExactIndex([slide]).search(slide.features[row], most, skip=Found(slide, row, 1.0))


def alike_in_others(
    slide: SlideFeatures, row: int, cohort: Sequence[SlideFeatures], most: int
) -> list[Found]:
    """The patches of other slides most like one, the nearest first.

    The run's FAISS index is asked where there is one that is up to date, else every row is looked at.

    Args:
        slide: whose patch it is.
        row: the patch.
        cohort: all slides, by one encoder.
        most: how many to return.

    Raises:
        UsageError: the embedding is 0, or slides were made with other weights.
    """
    from seal_extract.genes.index import ExactIndex

    query, index = slide.features[row], _made_before(cohort)
    if index is not None:
        found = index.search(query, LOOKED_AT)
        return [one for one in found if one.slide.path != slide.path][:most]
    others = [other for other in cohort if other.path != slide.path]
    return ExactIndex(others).search(query, most) if others else []


def _made_before(cohort: Sequence[SlideFeatures]) -> Index | None:
    from seal_extract.genes.faiss_index import index_folder, open_index

    folder = index_folder(cohort)
    if not folder.exists():
        return None
    try:
        return open_index(cohort, folder)
    except (UsageError, OutputError):  # older than the features, another encoder's, or FAISS is not installed
        return None
