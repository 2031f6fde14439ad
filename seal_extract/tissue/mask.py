"""The tissue of a slide as a mask at a stated µm/px, with its outlines and the share of tissue in patches."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray

from seal_extract.errors import GeometryError, UsageError
from seal_extract.slides.slide import Slide
from seal_extract.tissue.geojson import Mask, fill_polygons, read_polygons, trace_polygons, write_polygons

WORK_MPP = 4.0  # µm/px to look at: walls of fat cells still show, ink is still seen to be blurred
MAX_WORK_PX = 64_000_000  # larger slides are looked at more coarsely: 200 MB of pixels at most
MPP_RANGE = (1.0, 20.0)  # of masks, µm/px; coarser pixels would be wider than what is taken off the outline


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
    def polygons_l0(self) -> tuple[shapely.Polygon, ...]:
        """One polygon per connected part, along mask pixels, in level-0 pixels or halves of them."""

        def to_l0(points: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.minimum(np.round(points * self.downsample * 2) / 2, self.size_l0)

        return tuple(shapely.transform(polygon, to_l0) for polygon in trace_polygons(self.mask))

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
        work_mpp, factor = work_resolution(slide, mpp)
        downsample = work_mpp * factor / slide.mpp
        polygons = read_polygons(path)
        _check_on_slide(path, polygons[0], slide)
        # rounded as by read_overview, so that the mask has the shape of find_tissue's
        read_px = (max(1, round(side * slide.mpp / work_mpp)) for side in slide.size_l0)
        width, height = (math.ceil(side / factor) for side in read_px)
        in_mask = (shapely.transform(part, lambda xy: xy * (1 / downsample)) for part in polygons)
        try:
            kept, ignored = (fill_polygons(part, (height, width)) for part in in_mask)
        except GeometryError as exc:
            raise GeometryError(f"{path}: {exc}") from exc
        return cls(kept & ~ignored, slide.mpp * downsample, downsample, slide.size_l0)

    @cached_property
    def _integral(self) -> NDArray[np.int32]:
        return np.asarray(cv2.integral(self.mask.view(np.uint8)), np.int32)  # [h + 1, w + 1]

    def _to_mask(self, xy_l0: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(np.clip(xy_l0 / self.downsample, 0, self._end))

    @property
    def _end(self) -> NDArray[np.float64]:
        """(width, height) of the slide in mask pixels."""
        return np.asarray(np.minimum(np.array(self.size_l0) / self.downsample, self.mask.shape[::-1]))

    def _area_before(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Tissue above and to the left of points, in mask pixels."""
        column = np.minimum(x.astype(np.int64), self.mask.shape[1] - 1)
        row = np.minimum(y.astype(np.int64), self.mask.shape[0] - 1)
        right, below = x - column, y - row
        table = self._integral
        upper = table[row, column] * (1 - right) + table[row, column + 1] * right
        lower = table[row + 1, column] * (1 - right) + table[row + 1, column + 1] * right
        return np.asarray(upper * (1 - below) + lower * below)


def work_resolution(slide: Slide, mpp: float) -> tuple[float, int]:
    """µm/px to look at, and how many of its pixels make one of the mask along a side."""
    low, high = MPP_RANGE
    if not low <= mpp <= high:
        raise UsageError(f"a tissue mask at {mpp:.4g} µm/px was asked; allowed: {low:g} to {high:g}")
    width, height = slide.size_l0
    finest = slide.mpp * max(1.0, math.sqrt(width * height / MAX_WORK_PX))
    factor = max(1, math.ceil(mpp / max(WORK_MPP, finest) - 1e-9))
    return max(mpp / factor, finest), factor


def _check_on_slide(path: Path, polygons: list[shapely.Polygon], slide: Slide) -> None:
    if not polygons:
        raise GeometryError(f"{path} holds no polygons; draw the tissue in QuPath and export it as GeoJSON")
    x0, y0, x1, y1 = shapely.total_bounds(polygons)
    width, height = slide.size_l0
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        raise GeometryError(
            f"{path}: polygons span x {x0:.0f} to {x1:.0f}, y {y0:.0f} to {y1:.0f}, but "
            f"{slide.path.name} has x 0 to {width}, y 0 to {height}; "
            "give polygons that were drawn on this slide, in level-0 pixels"
        )
