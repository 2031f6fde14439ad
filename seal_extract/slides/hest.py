"""Metadata of HEST-1k (Jaume et al. 2024): ``metadata/NAME.json`` beside ``wsis/NAME.tif``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from seal_extract.errors import UsageError
from seal_extract.slides.readers import STATED_MPP, check_mpp

MPP_KEYS = ("pixel_size_um_estimated", "pixel_size_um_embedded")  # HEST takes the first itself
MOST_BYTES = 2**24  # a file of HEST has some 2,000


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a section; nothing where the file is missing.

    Raises:
        UsageError: it is no JSON.
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
    for key in MPP_KEYS:
        value = meta.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6:  # NaN is not
            return key, float(value)
    return None


def hest_mpp(slide: Path) -> tuple[str, float] | None:
    """The µm/px that HEST's metadata give a slide of a HEST folder, and where; None for any other slide.

    Raises:
        UsageError: the metadata are no JSON.
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
