"""The grid of patches over the tissue: asked for in µm/px, stored in level-0 pixels.

`read_grid` makes the same record of the coordinates that TRIDENT, CLAM or AtlasPatch wrote.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import GeometryError, ResolutionError, UsageError
from seal_extract.hdf5 import DAMAGED, open_hdf5
from seal_extract.slides.readers import PLAUSIBLE_MPP, Array
from seal_extract.slides.slide import Slide, coarsest_level

if TYPE_CHECKING:
    from seal_extract.tissue.mask import TissueMask

NOMINAL_MPP = (0.125, 0.25, 0.5, 1.0, 2.0)  # of 80x, 40x, 20x, 10x and 5x, as scanner vendors use these terms
MPP_TOLERANCE = 0.05  # a slide this close to a nominal µm/px is cut as if it had that value
MAX_PATCH_PX = 8192  # of another tool's coordinates: twice the largest in use

Edges = Literal["drop", "keep"]  # of the patches that would reach past the scanned area


@dataclass(frozen=True)
class PatchGrid:
    """Square patches of one slide, row by row from the top.

    Attributes:
        xy_l0: int64 [N, 2], top-left corners (x, y) in level-0 pixels.
        patch_px: side of the patch that the encoder sees.
        mpp: µm/px of that patch.
        patch_size_l0: its side in level-0 pixels.
        overlap_px: overlap of neighbours, in pixels of the patch.
        level: level to read.
        read_px: side to read there; the patch is resampled from it to ``patch_px``.
        origin: ``"grid"``, or the tool whose coordinates these are.
        inside_l0: (x, y, width, height) of the area beyond which patches are white; None if none is padded.
            Coordinates of other tools may reach past the slide; they are black there, as in those tools.
    """

    xy_l0: NDArray[np.int64]
    patch_px: int
    mpp: float
    patch_size_l0: int
    overlap_px: int
    level: int
    read_px: int
    origin: str = "grid"
    inside_l0: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.inside_l0 is not None:  # JSON knows no tuples
            x, y, width, height = map(int, self.inside_l0)
            object.__setattr__(self, "inside_l0", (x, y, width, height))
        if self.xy_l0.ndim != 2 or self.xy_l0.shape[1] != 2 or self.xy_l0.dtype != np.int64:
            raise GeometryError(
                f"xy_l0 is {self.xy_l0.dtype} {list(self.xy_l0.shape)}; allowed: int64 [N, 2]"
            )
        for name in ("patch_px", "patch_size_l0", "read_px"):
            if getattr(self, name) < 1:
                raise GeometryError(f"{name} is {getattr(self, name)}; allowed: 1 or more")

    def __len__(self) -> int:
        return len(self.xy_l0)

    def __repr__(self) -> str:
        return (
            f"PatchGrid({len(self)} patches of {self.patch_px} px at {self.mpp:.4g} µm/px = "
            f"{self.patch_size_l0} level-0 px, read {self.read_px} px of level {self.level})"
        )

    @property
    def name(self) -> str:
        """The name of folders with its files, see `grid_name`."""
        return grid_name(self.patch_px, self.mpp, self.overlap_px)

    @property
    def padding(self) -> NDArray[np.float64]:
        """The share of each patch that lies beyond `inside_l0`: float64 [N]."""
        if self.inside_l0 is None:
            return np.zeros(len(self))
        first, size = np.array(self.inside_l0[:2]), np.array(self.inside_l0[2:])
        begin = np.clip(self.xy_l0, first, first + size)
        end = np.clip(self.xy_l0 + self.patch_size_l0, first, first + size)
        return np.asarray(1 - (end - begin).prod(axis=1) / self.patch_size_l0**2)

    def whiten(self, region: Array, row: int, slide: Slide) -> None:
        """Paint white what lies beyond `inside_l0` in the region of a patch, uint8 [read_px, read_px, 3]."""
        if self.inside_l0 is None:
            return
        level, first, size = slide.levels[self.level], self.inside_l0[:2], self.inside_l0[2:]
        for axis, pixels in enumerate((region.swapaxes(0, 1), region)):  # columns by x, rows by y
            corner = self.xy_l0[row, axis] / level.downsample
            last = min(level.size_px[axis], (first[axis] + size[axis]) / level.downsample)
            # a pixel is inside if its centre is inside
            pixels[: max(0, math.ceil(first[axis] / level.downsample - corner - 0.5))] = 255
            pixels[max(0, math.ceil(last - corner - 0.5)) :] = 255

    @property
    def nominal_mpp_l0(self) -> float:
        """The µm/px of level 0 that was assumed when the patches were cut."""
        return self.mpp * self.patch_px / self.patch_size_l0


def grid_name(patch_px: int, mpp: float, overlap_px: int) -> str:
    """``20x_224px_0px_overlap``, TRIDENT's name for a folder of patches of one kind."""
    return f"{10 / mpp:g}x_{patch_px}px_{overlap_px}px_overlap"


def mpp_of_name(name: str) -> float:
    """The µm/px in a `grid_name`."""
    return 10 / float(name.partition("x")[0])


def make_grid(
    slide: Slide,
    mask: TissueMask,
    patch_px: int = 224,
    mpp: float = 0.5,
    *,
    overlap_px: int = 0,
    min_tissue: float = 0.5,
    mpp_tolerance: float = MPP_TOLERANCE,
    allow_upsampling: bool = False,
    edges: Edges = "drop",
) -> PatchGrid:
    """Place patches over the tissue, row by row from the corner of the scanned area.

    Args:
        slide: gives the size, the µm/px and the levels.
        mask: a patch stays if at least ``min_tissue`` of its area is tissue in it.
        patch_px: side of a patch as the encoder sees it.
        mpp: µm/px of a patch as the encoder sees it.
        overlap_px: overlap of neighbours, in pixels of the patch.
        min_tissue: 0 (every patch that touches tissue) to 1.
        mpp_tolerance: a slide within this share of a nominal µm/px (0.125, 0.25, 0.5, 1, 2) is cut as if it
            had that value, so that slides of one patient have patches of one level-0 size; 0 cuts exactly.
        allow_upsampling: permit a target finer than the slide.
        edges: ``"drop"`` leaves out the patches that reach past the scanned area; ``"keep"`` keeps them,
            white beyond it.

    Raises:
        UsageError: a size, share or µm/px is out of range.
        ResolutionError: the target is finer than the slide.
        GeometryError: no patch fits into the slide, and edges are dropped.
    """
    check_request(patch_px, mpp, overlap_px, min_tissue, mpp_tolerance)
    mpp_l0 = nominal_mpp(slide.mpp, mpp_tolerance)
    if mpp < mpp_l0 * (1 - 1e-9) and not allow_upsampling:
        raise ResolutionError(
            f"{slide.path}: {mpp:.4g} µm/px asked, but the slide has only {slide.mpp:.4g}; "
            f"type --mpp {mpp_l0:.4g} or coarser, or --allow-upsampling to invent the missing detail"
        )
    patch_size_l0 = max(1, round(patch_px * mpp / mpp_l0))
    step = max(1, round(patch_size_l0 * (patch_px - overlap_px) / patch_px))
    xy_l0 = _cells(slide, patch_size_l0, step, edges)
    share = mask.share(xy_l0, patch_size_l0)
    kept = xy_l0[(share >= min_tissue) & (share > 0)]
    level, read_px = level_to_read(slide, patch_px, patch_size_l0)
    inside_l0 = slide.bounds_l0 if edges == "keep" else None
    return PatchGrid(kept, patch_px, mpp, patch_size_l0, overlap_px, level, read_px, inside_l0=inside_l0)


def nominal_mpp(mpp: float, tolerance: float = MPP_TOLERANCE) -> float:
    """The nominal µm/px that ``mpp`` lies within ``tolerance`` of, or ``mpp`` itself."""
    nearest = min(NOMINAL_MPP, key=lambda nominal: abs(mpp / nominal - 1))
    return nearest if abs(mpp / nearest - 1) <= tolerance else mpp


def level_to_read(slide: Slide, patch_px: int, patch_size_l0: int) -> tuple[int, int]:
    """The coarsest level at least as fine as the patch, and the side of the patch in its pixels."""
    level = coarsest_level(slide, patch_size_l0 / patch_px)
    return level, max(1, round(patch_size_l0 / slide.levels[level].downsample))


def read_grid(path: str | os.PathLike[str], slide: Slide) -> PatchGrid:
    """Read the coordinates in another tool's HDF5 file; the tool is recognised by the attributes.

    TRIDENT has ``patch_size_level0`` on ``coords``. CLAM has ``patch_level`` and ``patch_size`` in pixels of
    that level; our clam layout adds ``target_patch_size``, the side to which they are resized. AtlasPatch
    has rows of (x, y, read_w, read_h, level), and the sizes at the root.

    Raises:
        GeometryError: the file is of none of these tools, or its coordinates are not of this slide.
    """
    path = Path(path)
    coords, attrs, root = _read_coords(path)
    if coords.shape[1] == 5 or "patch_size_level0" in attrs:
        origin, stated = ("AtlasPatch", root) if coords.shape[1] == 5 else ("TRIDENT", attrs)
        overlap_px = _whole(path, {"overlap": 0} | attrs, "overlap", 0) if origin == "TRIDENT" else 0
        patch_px, patch_size_l0 = (_whole(path, stated, f"patch_size{end}") for end in ("", "_level0"))
    elif "patch_level" in attrs:
        origin = "CLAM"
        patch_px, patch_size_l0, overlap_px = _clam_sizes(path, attrs, slide)
    else:
        raise GeometryError(
            f"{path}: its coords carry neither patch_size_level0 (TRIDENT) nor patch_level (CLAM), so their "
            f"size is unknown; give the tool's coordinates file (patches/...h5), not its features"
        )
    if patch_px > MAX_PATCH_PX:
        raise GeometryError(f"{path}: patch_size is {patch_px} px; allowed: up to {MAX_PATCH_PX}")
    if patch_size_l0 > max(slide.size_l0):
        raise GeometryError(
            f"{path}: a patch is {patch_size_l0} level-0 px wide, and {slide.path.name} only "
            f"{slide.size_l0[0]} x {slide.size_l0[1]}; give the coordinates of this slide"
        )
    xy_l0 = coords[:, :2].astype(np.int64)
    _check_on_slide(path, slide, xy_l0, attrs)
    level, read_px = level_to_read(slide, patch_px, patch_size_l0)
    mpp = nominal_mpp(slide.mpp) * patch_size_l0 / patch_px
    inside_l0 = slide.bounds_l0 if _recorded(root).get("inside_l0") else None
    return PatchGrid(xy_l0, patch_px, mpp, patch_size_l0, overlap_px, level, read_px, origin, inside_l0)


def check_request(
    patch_px: int, mpp: float, overlap_px: int, min_tissue: float, mpp_tolerance: float
) -> None:
    """Raise a UsageError for sizes, shares and resolutions that no grid can have; see `make_grid`."""
    if patch_px < 1:
        raise UsageError(f"--patch-px is {patch_px}; allowed: 1 or more, for example 224")
    if not PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]:
        raise UsageError(f"--mpp is {mpp:.4g} µm/px; allowed: {PLAUSIBLE_MPP[0]} to {PLAUSIBLE_MPP[1]}")
    if not 0 <= overlap_px < patch_px:
        raise UsageError(f"--overlap-px is {overlap_px}; allowed: 0 to {patch_px - 1}, less than --patch-px")
    if not 0 <= min_tissue <= 1:
        raise UsageError(f"--min-tissue is {min_tissue:.4g}; allowed: 0 to 1, a share of the patch")
    if not 0 <= mpp_tolerance <= 0.2:
        raise UsageError(f"--mpp-tolerance is {mpp_tolerance:.4g}; allowed: 0 to 0.2, a share of the µm/px")


def _cells(slide: Slide, patch_size_l0: int, step: int, edges: Edges) -> NDArray[np.int64]:
    """All patches inside the scanned bounds, or as many as cover them, row by row: int64 [N, 2]."""
    left, top, width, height = slide.bounds_l0
    if edges == "keep":  # one more where a rest is left
        rests = (max(0, side - patch_size_l0) for side in (width, height))
        width, height = (patch_size_l0 + -(-rest // step) * step for rest in rests)
    if patch_size_l0 > min(width, height):
        raise GeometryError(
            f"{slide.path}: a patch is {patch_size_l0} level-0 px wide and the slide only {width} x {height}"
            "; type a smaller --patch-px, a finer --mpp, or --edges keep"
        )
    x = np.arange(left, left + width - patch_size_l0 + 1, step, dtype=np.int64)
    y = np.arange(top, top + height - patch_size_l0 + 1, step, dtype=np.int64)
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def _read_coords(path: Path) -> tuple[NDArray[Any], dict[str, Any], dict[str, Any]]:
    """``coords`` [N, 2 or 5], its attributes, the root's attributes."""
    if not path.is_file():
        raise GeometryError(f"{path} does not exist; give a coordinates file of TRIDENT, CLAM or AtlasPatch")
    try:
        with open_hdf5(path) as file:
            if not isinstance(file.get("coords"), h5py.Dataset):
                raise GeometryError(
                    f"{path} holds {sorted(file)}, no dataset 'coords'; give a coordinates file"
                )
            dataset = file["coords"]
            coords, attrs, root = dataset[()], dict(dataset.attrs), dict(file.attrs)
    except DAMAGED as exc:
        raise GeometryError(f"{path} is not an HDF5 file that can be read ({exc}); write it again") from exc
    if coords.ndim != 2 or coords.shape[1] not in (2, 5) or not np.issubdtype(coords.dtype, np.integer):
        raise GeometryError(
            f"{path}: coords are {coords.dtype} {list(coords.shape)}; allowed: integers [N, 2] in level-0 "
            "px, or AtlasPatch's [N, 5] (STAMP's coords are µm: give the file they were made from)"
        )
    return coords, attrs, root


def _recorded(root: dict[str, Any]) -> dict[str, Any]:
    """The grid as this package wrote it beside its coordinates; nothing where another tool wrote them."""
    try:
        return dict(json.loads(root["seal_extract"])["grid"])
    except (KeyError, TypeError, ValueError):
        return {}


def _whole(path: Path, attrs: dict[str, Any], name: str, smallest: int = 1) -> int:
    given = attrs.get(name)
    try:
        value = int(np.asarray(given).item())
        if value != given or value < smallest:
            raise ValueError(given)
    except (TypeError, ValueError, OverflowError) as exc:  # text, a list, nothing, NaN, infinity
        said = given.item() if isinstance(given, np.generic) else given
        raise GeometryError(
            f"{path}: {name} is {str(said)[:40]!r}; allowed: a whole number of pixels, {smallest} or more"
        ) from exc
    return value


def _clam_sizes(path: Path, attrs: dict[str, Any], slide: Slide) -> tuple[int, int, int]:
    patch_px, level = _whole(path, attrs, "patch_size"), _whole(path, attrs, "patch_level", smallest=0)
    if level >= len(slide.levels):
        raise GeometryError(
            f"{path}: patch_level is {level}, but {slide.path.name} has levels 0 to {len(slide.levels) - 1}; "
            f"give the coordinates of this slide"
        )
    target_px = _whole(path, attrs, "target_patch_size") if "target_patch_size" in attrs else patch_px
    return target_px, round(patch_px * slide.levels[level].downsample), int(attrs.get("overlap", 0))


def _check_on_slide(path: Path, slide: Slide, xy_l0: NDArray[np.int64], attrs: dict[str, Any]) -> None:
    width, height = slide.size_l0
    said = (attrs.get("level0_width", width), attrs.get("level0_height", height))
    if said != (width, height):
        raise GeometryError(
            f"{path}: made for a slide of {said[0]} x {said[1]} px, but {slide.path.name} is "
            f"{width} x {height}; give the coordinates of this slide"
        )
    outside = np.flatnonzero(((xy_l0 < 0) | (xy_l0 >= (width, height))).any(axis=1))
    if outside.size:
        x, y = xy_l0[outside[0]]
        raise GeometryError(
            f"{path}: {outside.size} of {len(xy_l0)} patches begin outside {slide.path.name} "
            f"({width} x {height} px), the first at ({x}, {y}); give the coordinates of this slide"
        )
    named = attrs.get("name", stem := slide.path.stem)
    named = named.decode(errors="replace") if isinstance(named, bytes) else str(named)
    if stem not in named and named not in slide.path.name:  # our own names may have folders in front
        warnings.warn(f"{path}: says that it is of {named}, not of {slide.path.name}", stacklevel=2)
