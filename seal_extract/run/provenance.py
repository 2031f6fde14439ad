"""What made a file: the request that decides its numbers, and all that one may want to know later."""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seal_extract.features.store import grid_fields
from seal_extract.patches.grid import PatchGrid
from seal_extract.run.options import ExtractOptions, SlidePlan, coords_file, roi_file
from seal_extract.slides.identity import content, sizes_and_times
from seal_extract.slides.slide import Slide

if TYPE_CHECKING:
    from seal_extract.tissue.mask import TissueMask

PIPELINE = 1  # raised whenever the same request gives other numbers than before
# options that leave the numbers as they are
WITHOUT_EFFECT = {
    *("max_read_errors", "batch_size", "workers", "overwrite"),
    *("layout", "overlay", "stage_dir", "stage_gb", "plan_timeout_s"),
    *("slide_mpp", "override_mpp"),  # the µm/px that they lead to stands with the slide
}
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


def describe_request(
    slide: Slide, encoder: dict[str, Any], options: ExtractOptions, name: str | None = None
) -> dict[str, Any]:
    """All that decides the numbers in a features file, as JSON; equal requests give equal files.

    Args:
        slide: the open slide; its name, content and geometry count, not its folder.
        encoder: `Encoder.identity`.
        options: all choices; files are counted by their content.
        name: of the slide's results; that of its file by default.
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
        "options": describe_options(slide.path, options, name),
        "encoder": encoder,
    }


def describe_options(slide: Path, options: ExtractOptions, name: str | None = None) -> dict[str, Any]:
    """The choices that decide the numbers, as JSON; files are counted by their content."""
    choices = {k: v for k, v in vars(options).items() if k not in WITHOUT_EFFECT}
    if options.coords is not None:
        choices["coords"] = sha256(coords_file(slide, options.coords, name))
    if options.roi is not None:
        choices["roi"] = sha256(roi_file(slide, options.roi, name))
    return choices


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first entry in which two requests differ, in words; None if they are equal.

    An option that one of them lacks, because its version did not know it, counts as its default.
    """
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            if key == "options":
                before, after = _all_options(before), _all_options(after)
            deeper = first_difference(before, after)
            if deeper:
                return f"{key} {deeper}"
        elif before != after:
            return f"{key} {_short(before)}, now {_short(after)}"
    return None


def _all_options(recorded: dict[str, Any]) -> dict[str, Any]:
    choices = vars(ExtractOptions()) | recorded
    return {name: value for name, value in choices.items() if name not in WITHOUT_EFFECT}


def describe(
    plan: SlidePlan, request: dict[str, Any], encoder: dict[str, Any], decoder: str
) -> dict[str, Any]:
    """The whole provenance of a features file, as JSON.

    Args:
        plan: slide, tissue and grid.
        request: from `describe_request`.
        encoder: what is worth knowing of the encoder beside its identity.
        decoder: how the patches were decoded.
    """
    slide = plan.slide
    return {
        "request": request,
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
        "tissue": plan.mask and _describe_tissue(plan.mask, plan.grid),
        "padding": float(plan.grid.padding.mean()) if len(plan.grid) else 0.0,  # share beyond the slide
        "grid": grid_fields(plan.grid),
        "encoder": encoder,
        "read_errors": 0,
        "unreadable": [],  # row, xy_l0 and reason of each patch whose features are zeros
        "versions": dict(library_versions()),
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _describe_tissue(mask: TissueMask, grid: PatchGrid) -> dict[str, float]:
    uncovered = mask.uncovered(grid.xy_l0, grid.patch_size_l0)
    return {"mpp": mask.mpp, "area_mm2": mask.area_mm2, "uncovered": uncovered}


@lru_cache(maxsize=1)
def library_versions() -> tuple[tuple[str, str], ...]:
    """The libraries that decide the numbers, with their versions."""
    return tuple((name, version(name)) for name in LIBRARIES)


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
