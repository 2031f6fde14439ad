"""µm/px: which values can be true, and those that HEST-1k (Jaume et al. 2024) gives its slides.

HEST keeps them in ``metadata/NAME.json`` beside ``wsis/NAME.tif``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from seal_extract.errors import ResolutionError, UsageError

PLAUSIBLE_MPP = (0.05, 20.0)  # finer than any brightfield scanner, coarser than any thumbnail
STATED_MPP = (0.1, 10.0)  # believed of a file: HEST's TIFFs state a tenth of the true µm/px
MPP_TOLERANCE = 0.05  # by which two statements of a µm/px may differ
HEST_KEYS = ("pixel_size_um_estimated", "pixel_size_um_embedded")  # HEST takes the first itself
MOST_BYTES = 2**24  # a file of HEST has some 2,000


def check_mpp(mpp: float, source: str, path: Path, allowed: tuple[float, float] = PLAUSIBLE_MPP) -> None:
    """Refuse a µm/px that no brightfield scan can have."""
    low, high = allowed
    if not low <= mpp <= high:  # also refuses NaN
        tenth = f" (files of HEST state a tenth of the true one, which would be {mpp * 10:.4g})"
        raise ResolutionError(
            f"{path}: {source} gives {mpp:.4g} µm/px, which cannot be true (allowed: {low} to {high})"
            f"{tenth if low <= mpp * 10 < 10 * low else ''}; look it up and type --slide-mpp VALUE"
        )


def same_mpp(one: float, other: float) -> bool:
    """Whether two statements of a µm/px agree."""
    return abs(one / other - 1) <= MPP_TOLERANCE


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a section; nothing where the file is missing.

    Raises:
        UsageError: the file is not JSON.
    """
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise UsageError(f"{path} is no JSON: {exc}; download it again") from exc
    return meta if isinstance(meta, dict) else {}


def stated_mpp(meta: dict[str, Any]) -> tuple[str, float] | None:
    """The first µm/px that metadata give, with its key."""
    for key in HEST_KEYS:
        value = meta.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6:  # NaN is not
            return key, float(value)
    return None


def hest_mpp(slide: Path) -> tuple[str, float] | None:
    """The µm/px that HEST's metadata give a slide of a HEST folder, and where; None for any other slide.

    Raises:
        UsageError: the metadata are not JSON.
        ResolutionError: they give a µm/px that cannot be true.
    """
    if slide.parent.name != "wsis":
        return None
    path = slide.parent.parent / "metadata" / f"{slide.stem}.json"
    stated = stated_mpp(read_metadata(path))
    if stated is None:
        return None
    check_mpp(stated[1], stated[0], path, STATED_MPP)
    return f"{stated[0]} of metadata/{path.name}", stated[1]
