"""What will be read of a slide, settled before any encoder is asked: options -> tissue -> grid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from seal_extract.errors import GeometryError, UsageError
from seal_extract.grid import MPP_TOLERANCE, PatchGrid, make_grid, read_grid
from seal_extract.slide import Slide
from seal_extract.tissue import TissueMask, find_tissue

Resampling = Literal["bicubic", "area"]
COORDS_NAMES = ("{}_patches.h5", "{}.h5")
ROI_NAMES = ("{}.geojson", "{}.json")


@dataclass(frozen=True)
class ExtractOptions:
    """Every choice of a run; the command line only fills it.

    Attributes:
        patch_px: side of a patch as the encoder sees it.
        mpp: its µm/px.
        overlap_px: overlap of neighbouring patches, in pixels of the patch.
        min_tissue: smallest share of tissue in a patch, 0 to 1.
        mpp_tolerance: slides this close to a nominal µm/px are cut as if they had it.
        allow_upsampling: permit a target finer than the slide.
        slide_mpp: µm/px at level 0, for slides that do not say it.
        roi: GeoJSON of the tissue, or a folder of ``{slide}.geojson``, in place of finding it.
        coords: coordinates of TRIDENT, CLAM or AtlasPatch, a file or a folder, in place of a grid.
        resample: ``"bicubic"``, as the field's other tools, or ``"area"``, which is faster.
        fast_decode: decode JPEG at reduced scale where patches shrink by a multiple of 2: other pixels.
        max_read_errors: patches of a slide that may be unreadable before it fails; their features are zeros.
        batch_size: patches per forward pass; found by trying on a GPU by default.
        workers: reading threads; all cores by default.
        overwrite: replace a file that other options made.
    """

    patch_px: int = 224
    mpp: float = 0.5
    overlap_px: int = 0
    min_tissue: float = 0.5
    mpp_tolerance: float = MPP_TOLERANCE
    allow_upsampling: bool = False
    slide_mpp: float | None = None
    roi: Path | None = None
    coords: Path | None = None
    resample: Resampling = "bicubic"
    fast_decode: bool = False
    max_read_errors: int = 0
    batch_size: int | None = None
    workers: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.roi is not None and self.coords is not None:
            raise UsageError("--roi and --coords both say where the patches lie; give one of them")
        if self.resample not in get_args(Resampling):
            raise UsageError(f"--resample is {self.resample!r}; allowed: {', '.join(get_args(Resampling))}")
        if self.max_read_errors < 0:
            raise UsageError(f"--max-read-errors is {self.max_read_errors}; allowed: 0 or more")
        for name in ("batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; allowed: 1 or more")


@dataclass(frozen=True)
class SlidePlan:
    """A slide, its tissue, its patches; ``mask`` is None where the coordinates came from a file."""

    slide: Slide
    mask: TissueMask | None
    grid: PatchGrid


def plan_slide(slide: Slide, options: ExtractOptions = ExtractOptions()) -> SlidePlan:
    """Find the tissue and lay the grid, or take either from the file that ``options`` names.

    Raises:
        SlideError: the slide cannot be read, is not brightfield, or is coarser than the target.
        GeometryError: the file that ``options`` names does not fit the slide.
    """
    if options.coords is not None:
        return SlidePlan(slide, None, read_grid(coords_file(slide, options.coords), slide))
    if options.roi is not None:
        mask = TissueMask.from_geojson(roi_file(slide, options.roi), slide)
    else:
        mask = find_tissue(slide)
    grid = make_grid(
        slide,
        mask,
        options.patch_px,
        options.mpp,
        overlap_px=options.overlap_px,
        min_tissue=options.min_tissue,
        mpp_tolerance=options.mpp_tolerance,
        allow_upsampling=options.allow_upsampling,
    )
    return SlidePlan(slide, mask, grid)


def coords_file(slide: Slide, given: Path) -> Path:
    """The coordinates file of ``slide``: ``given`` itself, or the one in that folder."""
    return _file_for(slide, given, COORDS_NAMES, "--coords")


def roi_file(slide: Slide, given: Path) -> Path:
    """The GeoJSON file of ``slide``: ``given`` itself, or the one in that folder."""
    return _file_for(slide, given, ROI_NAMES, "--roi")


def _file_for(slide: Slide, given: Path, names: tuple[str, ...], option: str) -> Path:
    if given.is_file():
        return given
    candidates = [given / name.format(slide.path.stem) for name in names]
    found = [c for c in candidates if c.is_file()]
    if not found:
        allowed = " or ".join(c.name for c in candidates)
        raise GeometryError(f"{option} {given} is neither a file nor a folder with {allowed}; check the path")
    return found[0]
