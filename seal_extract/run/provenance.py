"""What made a file: the fingerprint, which decides its numbers, and all that one may want to know later."""

from __future__ import annotations

from dataclasses import fields
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from seal_extract.features.store import grid_fields
from seal_extract.patches.grid import PatchGrid
from seal_extract.run.options import FINGERPRINT_OPTIONS, ExtractOptions
from seal_extract.slides.entry import content, sizes_and_times
from seal_extract.slides.slide import Slide

if TYPE_CHECKING:
    from seal_extract.tissue.mask import TissueMask

PIPELINE = 1  # raised whenever the same request gives other numbers than before
FINGERPRINT_VERSION = 1  # raised when entries change their meaning; a file without "version" has version 1
OPTIONS = {field.name for field in fields(ExtractOptions)}
LIBRARIES = (
    "seal-extract",
    "torch",
    "timm",
    "numpy",
    "opencv-python-headless",
    "simplejpeg",
    "imagecodecs",
    "openslide-python",
    "tiffslide",
)


def fingerprint(slide: Slide, options: dict[str, Any], encoder: dict[str, Any]) -> dict[str, Any]:
    """All that decides the numbers in a features file, as JSON; equal fingerprints give equal files.

    Args:
        slide: the open slide; its name, content and geometry count, not its folder.
        options: from `PatchOptions.fingerprint`.
        encoder: `Encoder.identity`.
    """
    return {
        "pipeline": PIPELINE,
        "slide": {
            "file": slide.path.name,
            "bytes": slide.path.stat().st_size,
            "content": content(slide.path),
            "size_l0": list(slide.size_l0),
            "mpp": slide.mpp,
            "reader": slide.reader.split()[0],
        },
        "options": options,
        "encoder": encoder,
    }


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first entry in which two fingerprints differ, in words; None if they are equal.

    An option that one of them lacks, because its version did not know it, counts as its default.
    """
    if old.get("version", 1) > FINGERPRINT_VERSION:
        return f"version {old['version']} of the fingerprint, of a newer seal-extract"
    return _first_difference(old, new)


def _first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            if key == "options":
                before, after = _all_options(before), _all_options(after)
            if deeper := _first_difference(before, after):
                return f"{key} {deeper}"
        elif before != after:
            return f"{key} {_short(before)}, now {_short(after)}"
    return None


def _all_options(recorded: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of those not recorded, without those that leave the numbers as they are."""
    decisive = {k: v for k, v in recorded.items() if k in FINGERPRINT_OPTIONS or k not in OPTIONS}
    return FINGERPRINT_OPTIONS | decisive


def describe(
    slide: Slide,
    mask: TissueMask | None,
    grid: PatchGrid,
    fingerprint: dict[str, Any],
    encoder: dict[str, Any],
    decoder: str,
) -> dict[str, Any]:
    """The whole provenance of a features file, as JSON.

    Args:
        slide: the open slide.
        mask: its tissue, if it was found or drawn.
        grid: its patches.
        fingerprint: from `fingerprint`.
        encoder: what is worth knowing of the encoder beside its identity.
        decoder: how the patches were decoded.
    """
    tissue = mask and {
        "mpp": mask.mpp,
        "area_mm2": mask.area_mm2,
        "uncovered": mask.uncovered(grid.xy_l0, grid.patch_size_l0),
    }
    return {
        "request": fingerprint,
        "slide": {
            # Absolute, so that the slide is found wherever the results are moved to, and told from another of
            # its name. `names.shareable` takes the folders out of all that is made to be given away.
            "path": str(slide.path.resolve()),
            "mtime_ns": slide.path.stat().st_mtime_ns,
            "stamp": sizes_and_times(slide.path),
            "size_l0": list(slide.size_l0),
            "mpp": slide.mpp,
            "mpp_source": slide.mpp_source,
            "mpp_conflict": slide.mpp_conflict,
            "reader": slide.reader,
            "decoder": decoder,
        },
        "tissue": tissue,
        "padding": float(grid.padding.mean()) if len(grid) else 0.0,  # share beyond the slide
        **describe_rest(grid, encoder),
    }


def describe_rest(grid: PatchGrid, encoder: dict[str, Any]) -> dict[str, Any]:
    """The part of a provenance that is the same for patches of a slide and for ready-cut patches."""
    return {
        "grid": grid_fields(grid),
        "encoder": encoder,
        "read_errors": 0,
        "unreadable": [],  # row, xy_l0 and reason of each patch whose features are zeros
        "versions": dict(library_versions()),
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


@lru_cache(maxsize=1)
def library_versions() -> tuple[tuple[str, str], ...]:
    """The libraries that decide the numbers, with their versions."""
    return tuple((name, version(name)) for name in LIBRARIES)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
