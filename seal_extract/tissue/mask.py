"""Where the tissue is: a mask at a stated µm/px, found in the slide or drawn in QuPath.

Stages: `read_overview` -> `gather_evidence` (what each place looks like) -> connected pieces of tissue.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import GeometryError, UsageError
from seal_extract.slides.overview import read_overview
from seal_extract.slides.readers import Array
from seal_extract.slides.slide import Slide
from seal_extract.tissue.appearance import (
    COLOURED,
    COLOURLESS,
    FADING_INK,
    INK,
    MIN_TEXTURE,
    TEXTURED,
    UNSCANNED,
    WINDOW_UM,
    disc,
    gather_evidence,
    has,
)
from seal_extract.tissue.geojson import (
    Mask,
    Polygon,
    fill_polygons,
    read_polygons,
    trace_polygons,
    write_polygons,
)

WORK_MPP = 4.0  # µm/px to look at: walls of fat cells still show, ink is still seen to be blurred
MAX_WORK_PX = 64_000_000  # larger slides are looked at more coarsely: 200 MB of pixels at most
MPP_RANGE = (1.0, 20.0)  # of masks, µm/px; coarser pixels would be wider than what is taken off the outline
HALO_UM = 12.0  # of the width that pooling adds to texture, this is left, in favour of pale borders
PEN_UM = 30.0  # half the width of the thinnest stroke
OUTLINE_UM = 12.0  # half the width of the threads that are trimmed off
SMOOTH_HOLES = 20  # smooth stained holes (colloid, mucin) are filled up to this many times the size of others


@dataclass(frozen=True, eq=False)
class TissueMask:
    """Which parts of a slide are tissue.

    Attributes:
        mask: bool [h, w], True in tissue; pixel (0, 0) begins at level-0 (0, 0).
        mpp: µm/px of `mask`, by the slide's own µm/px.
        downsample: level-0 px per px of `mask`.
        size_l0: (width, height) of level 0.
    """

    mask: Mask
    mpp: float
    downsample: float
    size_l0: tuple[int, int]

    def __post_init__(self) -> None:
        if self.mask.ndim != 2 or not self.mask.size or self.mask.dtype != np.bool_:
            raise GeometryError(f"mask is {self.mask.dtype} {list(self.mask.shape)}; allowed: bool [h, w]")
        if not (self.mpp > 0 and self.downsample > 0):
            raise GeometryError(f"mpp is {self.mpp}, downsample {self.downsample}; allowed: above 0")
        (h, w), (width, height) = self.mask.shape, self.size_l0
        if abs(w - width / self.downsample) > 1 or abs(h - height / self.downsample) > 1:
            raise GeometryError(
                f"mask is {w} x {h} px; {width} x {height} level-0 px at downsample {self.downsample:.4g} "
                f"make {width / self.downsample:.1f} x {height / self.downsample:.1f}, rounded"
            )

    def __repr__(self) -> str:
        (h, w), (width, height) = self.mask.shape, self.size_l0
        return (
            f"TissueMask({w} x {h} px at {self.mpp:.4g} µm/px of {width} x {height} level-0 px, "
            f"{self.area_mm2:.3g} mm² = {self.mask.mean():.1%} tissue)"
        )

    @property
    def area_mm2(self) -> float:
        """Area of the tissue in mm²."""
        return int(np.count_nonzero(self.mask)) * self.mpp**2 / 1e6

    @cached_property
    def polygons_l0(self) -> tuple[Polygon, ...]:
        """Exterior and holes of each connected part in level-0 pixels (or halves), along mask pixels."""
        return tuple(
            Polygon(self._to_l0(exterior), tuple(self._to_l0(hole) for hole in holes))
            for exterior, holes in trace_polygons(self.mask)
        )

    def share(self, xy_l0: NDArray[np.int64], size_l0: int) -> NDArray[np.float64]:
        """The share of square patches that is tissue; what lies outside the slide is none.

        Exact for any alignment: the integral image (Crow, SIGGRAPH 1984) of a mask that is constant within
        each pixel is bilinear between the pixels' corners.

        Args:
            xy_l0: int64 [N, 2], top-left corners (x, y) in level-0 pixels.
            size_l0: side of the patches in level-0 pixels.

        Returns:
            float64 [N], 0 to 1.
        """
        left, top = self._to_mask(xy_l0).T
        right, bottom = self._to_mask(xy_l0 + size_l0).T
        area = (
            self._area_before(right, bottom)
            - self._area_before(left, bottom)
            - self._area_before(right, top)
            + self._area_before(left, top)
        )
        share = area / (size_l0 / self.downsample) ** 2
        return np.asarray(np.clip(np.round(share, 9), 0, 1))  # so that a patch all in tissue has exactly 1

    def uncovered(self, xy_l0: NDArray[np.int64], size_l0: int) -> float:
        """The share of the tissue that lies under none of the patches; 0 where there is no tissue.

        Args:
            xy_l0: int64 [N, 2], top-left corners (x, y) in level-0 pixels, of few different x and y.
            size_l0: side of the patches in level-0 pixels.
        """
        edges = [np.unique(np.concatenate([side, side + size_l0])) for side in xy_l0.T]
        (x0, y0), (x1, y1) = (
            [np.searchsorted(edge, side) for edge, side in zip(edges, xy.T, strict=True)]
            for xy in (xy_l0, xy_l0 + size_l0)
        )
        patches = np.zeros((len(edges[1]), len(edges[0])), np.int32)  # over each cell between two edges
        for rows, columns, sign in ((y0, x0, 1), (y0, x1, -1), (y1, x0, -1), (y1, x1, 1)):
            np.add.at(patches, (rows, columns), sign)
        np.cumsum(patches, axis=0, out=patches)
        np.cumsum(patches, axis=1, out=patches)
        x, y = (np.clip(edge / self.downsample, 0, side) for edge, side in zip(edges, self._end, strict=True))
        (tissue,) = self._area_before(*self._end[:, None])
        covered = 0.0
        above = np.zeros(len(x))
        for row, bottom in enumerate(y):
            below = self._area_before(x, np.full(len(x), bottom))
            if row:
                covered += np.diff(below - above)[patches[row - 1, :-1] > 0].sum()
            above = below
        return float(np.clip(1 - covered / tissue, 0, 1).round(9)) if tissue else 0.0

    def contains(self, xy_l0: NDArray[np.number]) -> Mask:
        """Whether points lie in tissue, [N, 2] of (x, y) in level-0 pixels: bool [N]."""
        inside = np.logical_and(xy_l0 >= 0, xy_l0 < np.array(self.size_l0)).all(axis=1)
        last = np.array(self.mask.shape[::-1]) - 1
        column, row = np.clip(np.floor(xy_l0 / self.downsample), 0, last).astype(np.int64).T
        return np.asarray(inside & self.mask[row, column])

    def to_geojson(self, path: str | os.PathLike[str]) -> None:
        """Write `polygons_l0` as annotations of class Tissue, for QuPath to import.

        Raises:
            OutputError: the file cannot be written.
        """
        write_polygons(Path(path), self.polygons_l0)

    @classmethod
    def from_geojson(cls, path: str | os.PathLike[str], slide: Slide, mpp: float = 8.0) -> TissueMask:
        """Read tissue that was drawn or edited elsewhere, in QuPath above all, in level-0 pixels.

        Every polygon is tissue, whatever its class, but those of a class that ends in ``*`` (QuPath's
        ``Ignore*``), which are cut out.

        Args:
            path: GeoJSON.
            slide: the slide that it was drawn on.
            mpp: µm/px of the mask, 1 to 20; coarser where the slide itself is, or is very large.

        Raises:
            GeometryError: not GeoJSON, no polygons, other geometries, or all of it outside the slide.
            UsageError: a µm/px that no mask can have.
        """
        path = Path(path)
        kept, ignored = read_polygons(path)
        _check_on_slide(path, kept, slide)
        work_mpp, factor = _resolution(slide, mpp)
        downsample = work_mpp * factor / slide.mpp
        # rounded as by read_overview, so that the mask has the shape of find_tissue's
        read_px = (max(1, round(side * slide.mpp / work_mpp)) for side in slide.size_l0)
        width, height = (math.ceil(side / factor) for side in read_px)
        try:
            mask = fill_polygons(_scaled(kept, 1 / downsample), (height, width))
            mask &= ~fill_polygons(_scaled(ignored, 1 / downsample), (height, width))
        except GeometryError as exc:
            raise GeometryError(f"{path}: {exc}") from exc
        return cls(mask, slide.mpp * downsample, downsample, slide.size_l0)

    @cached_property
    def _integral(self) -> NDArray[np.int32]:
        return np.asarray(cv2.integral(self.mask.view(np.uint8)), np.int32)  # [h + 1, w + 1]

    def _to_mask(self, xy_l0: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(np.clip(xy_l0 / self.downsample, 0, self._end))

    @property
    def _end(self) -> NDArray[np.float64]:
        """(width, height) of the slide in mask pixels."""
        return np.asarray(np.minimum(np.array(self.size_l0) / self.downsample, self.mask.shape[::-1]))

    def _to_l0(self, ring: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.minimum(np.round(ring * self.downsample * 2) / 2, self.size_l0)

    def _area_before(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Tissue above and to the left of points, in mask pixels."""
        column = np.minimum(x.astype(np.int64), self.mask.shape[1] - 1)
        row = np.minimum(y.astype(np.int64), self.mask.shape[0] - 1)
        right, below = x - column, y - row
        table = self._integral
        upper = table[row, column] * (1 - right) + table[row, column + 1] * right
        lower = table[row + 1, column] * (1 - right) + table[row + 1, column + 1] * right
        return np.asarray(upper * (1 - below) + lower * below)


def find_tissue(
    slide: Slide,
    *,
    mpp: float = 8.0,
    min_texture: float = MIN_TEXTURE,
    min_area_mm2: float = 0.0125,
    max_hole_mm2: float = 0.05,
) -> TissueMask:
    """Find the tissue of a brightfield slide (H&E, or IHC with DAB), in bounded memory.

    Pale stroma and fat belong to it; bare glass, washes of stain, pen, dust, edges and what was never scanned
    do not. Pigment and blood are tissue too, unless in smooth pools wider than a pen stroke.

    Args:
        slide: an open slide.
        mpp: µm/px of the mask, 1 to 20; coarser where the slide itself is, or is very large.
        min_texture: optical density (rms, on the scale of cells) from which on something is tissue.
        min_area_mm2: smaller pieces are dropped; by default those below a patch of 224 px at 0.5 µm/px.
        max_hole_mm2: smaller holes are filled; by default lumina and clefts up to 250 µm across.

    Raises:
        UsageError: a µm/px that no mask can have.
        UnsupportedSlideError: fluorescence, or an empty scan.
        ReadError: a region of the slide cannot be read.
    """
    work_mpp, factor = _resolution(slide, mpp)
    overview = read_overview(slide, work_mpp)
    evidence = gather_evidence(overview, factor, min_texture)
    downsample = overview.downsample * factor
    px_per_mm2 = 1e6 / (slide.mpp * downsample) ** 2
    mask = _connect(evidence, slide.mpp * downsample, min_area_mm2 * px_per_mm2, max_hole_mm2 * px_per_mm2)
    return TissueMask(mask, slide.mpp * downsample, downsample, slide.size_l0)


def _resolution(slide: Slide, mpp: float) -> tuple[float, int]:
    """µm/px to look at, and how many of its pixels make one of the mask along a side."""
    low, high = MPP_RANGE
    if not low <= mpp <= high:
        raise UsageError(f"a tissue mask at {mpp:.4g} µm/px was asked; allowed: {low:g} to {high:g}")
    width, height = slide.size_l0
    finest = slide.mpp * max(1.0, math.sqrt(width * height / MAX_WORK_PX))
    factor = max(1, math.ceil(mpp / max(WORK_MPP, finest) - 1e-9))
    return max(mpp / factor, finest), factor


def _connect(evidence: Array, mpp: float, min_area_px: float, max_hole_px: float) -> Mask:
    """Evidence at ``mpp`` -> bool [h, w]: textured, but no ink; whole, without threads and specks."""
    excluded = np.logical_or(_strokes(evidence, mpp), has(evidence, UNSCANNED))
    tissue = _morph(cv2.MORPH_ERODE, has(evidence, TEXTURED), (WINDOW_UM - HALO_UM) / mpp)
    tissue = _morph(cv2.MORPH_OPEN, tissue & ~excluded, max(1, OUTLINE_UM / mpp))
    tissue |= _holes(tissue, excluded, has(evidence, COLOURED), max_hole_px)
    return _pieces(tissue, has(evidence, COLOURLESS), min(min_area_px, tissue.size / 4))


def _strokes(evidence: Array, mpp: float) -> Mask:
    """Pen strokes: sure ink as wide as a pen, the fading ink connected to it, and their rims."""
    sure = _morph(cv2.MORPH_OPEN, has(evidence, INK), PEN_UM / mpp)
    count, label = cv2.connectedComponents((sure | has(evidence, FADING_INK)).view(np.uint8))
    keep = np.zeros(count, np.bool_)
    keep[label[sure]] = True
    return _morph(cv2.MORPH_DILATE, np.asarray(keep[label]), max(1, HALO_UM / mpp))


def _holes(tissue: Mask, excluded: Mask, coloured: Mask, max_px: float) -> Mask:
    """Holes to fill: enclosed, neither ink nor unscanned; small, or smooth and stained."""
    count, label, stats, _ = cv2.connectedComponentsWithStats((~tissue).view(np.uint8), connectivity=4)
    x, y, w, h, area = stats.T
    enclosed = (x > 0) & (y > 0) & (x + w < tissue.shape[1]) & (y + h < tissue.shape[0])
    clear = np.bincount(label[excluded], minlength=count) < 0.2 * area
    stained = np.bincount(label[coloured], minlength=count) > 0.5 * area
    fill = enclosed & clear & (area < np.where(stained, SMOOTH_HOLES, 1) * max_px)
    fill[0] = False  # the tissue itself
    return np.asarray(fill[label])


def _pieces(tissue: Mask, colourless: Mask, min_px: float) -> Mask:
    """Connected pieces that are large enough and not grey all over, as edges of glass and bubbles are."""
    count, label, stats, _ = cv2.connectedComponentsWithStats(tissue.view(np.uint8), connectivity=4)
    area = stats[:, cv2.CC_STAT_AREA]
    keep = (area >= min_px) & (np.bincount(label[colourless], minlength=count) < 0.5 * area)
    keep[0] = False  # the background
    return np.asarray(keep[label])


def _morph(operation: int, mask: Mask, radius_px: float) -> Mask:
    """Erode, open and so on by a disc; what lies outside the image changes nothing."""
    return np.asarray(cv2.morphologyEx(mask.view(np.uint8), operation, disc(radius_px))).view(np.bool_)


def _scaled(polygons: list[Polygon], scale: float) -> list[Polygon]:
    return [Polygon(exterior * scale, tuple(hole * scale for hole in holes)) for exterior, holes in polygons]


def _check_on_slide(path: Path, polygons: list[Polygon], slide: Slide) -> None:
    if not polygons:
        raise GeometryError(f"{path} holds no polygons; draw the tissue in QuPath and export it as GeoJSON")
    points = np.concatenate([polygon.exterior for polygon in polygons])
    (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
    width, height = slide.size_l0
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        raise GeometryError(
            f"{path}: polygons span x {x0:.0f} to {x1:.0f}, y {y0:.0f} to {y1:.0f}, but "
            f"{slide.path.name} has x 0 to {width}, y 0 to {height}; give this slide's, in level-0 pixels"
        )
