"""What grows where on a synthetic slide: outline, glands, nests, fat, lymphocytes, single nuclei.

Smooth noise on a grid of about 1 µm decides, nuclei lie at hashed positions. All of it follows from the
place in µm and the seed, so windows agree wherever they overlap.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from seal_extract.errors import UsageError
from seal_extract.synthetic.texture import NUCLEUS_ANGLES, Axis, Flags, Float, Index, Noise, hashed, ramp

NODE_UM = 1.0  # the grid on which anatomy is decided
REACH_UM = 24.0  # farther than this, no nucleus touches a pixel
NUCLEUS_CELL_UM = 7.5  # one nucleus at most in a cell of this lattice
EPITHELIAL, SPINDLE, LYMPHOCYTE = range(3)
FAT_CELL_UM = 62.0
FAT_ABOVE = 1.25  # where the noise called "fat" exceeds this, fat grows


class Window(NamedTuple):
    """A rectangle of level-0 pixels."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Grid:
    """Nodes ``step_px`` apart over a window and ``reach`` nodes around it, aligned with the slide."""

    window: Window
    mpp: float
    step_px: int
    reach: int

    @classmethod
    def around(cls, window: Window, mpp: float) -> Grid:
        """The grid that covers everything whose cells may touch the window."""
        step_px = max(2, round(NODE_UM / mpp))
        return cls(window, mpp, step_px, math.ceil(REACH_UM / mpp / step_px) + 1)

    @property
    def pitch_um(self) -> float:
        """Distance between nodes."""
        return self.step_px * self.mpp

    @functools.cached_property
    def x_um(self) -> Axis:
        """Positions of the columns: [w]."""
        return self._nodes_um(self.window.x, self.window.width)

    @functools.cached_property
    def y_um(self) -> Axis:
        """Positions of the rows: [h]."""
        return self._nodes_um(self.window.y, self.window.height)

    def _nodes_um(self, start: int, length: int) -> Axis:
        first, last = start // self.step_px, (start + length - 1) // self.step_px
        return (np.arange(first - self.reach, last + self.reach + 1) + 0.5) * self.pitch_um

    def nearest(self, x_um: Axis, y_um: Axis) -> tuple[Index, Index]:
        """(row, column) of the nodes nearest to positions, to index a map with."""
        column = np.rint((x_um - self.x_um[0]) / self.pitch_um).astype(np.int64)
        row = np.rint((y_um - self.y_um[0]) / self.pitch_um).astype(np.int64)
        return np.clip(row, 0, len(self.y_um) - 1), np.clip(column, 0, len(self.x_um) - 1)

    def full(self, values: Float) -> Float:
        """A map [h, w] on the nodes drawn out to the window's pixels: [height, width]."""
        x, y, width, height = self.window
        rim = self.reach - 1
        part = values[rim:-rim, rim:-rim]
        size = (part.shape[1] * self.step_px, part.shape[0] * self.step_px)
        drawn = cv2.resize(part, size, interpolation=cv2.INTER_LINEAR)
        left, top = x % self.step_px + self.step_px, y % self.step_px + self.step_px
        return np.asarray(drawn[top : top + height, left : left + width])


@dataclass(frozen=True)
class Anatomy:
    """What grows where: maps [h, w] on the nodes of a grid; coverages run from 0 to 1."""

    outline_um: Float  # how far inside the section, negative on glass
    tissue: Float  # neither glass nor cleft
    gland_um: Float  # how far inside a gland or nest
    rise: tuple[Float, Float]  # unit vector (x, y) towards its middle
    solid: Float  # 0: a gland with a lumen, 1: a nest full of cells
    epithelium: Float
    lumen: Float
    fat: Float
    fat_wall: Float
    lymph: Float
    loose: Float  # how loose the stroma lies, about 0
    stain: Float  # how strongly it is stained, about 1
    bend_um: tuple[Float, Float]  # by how much (x, y) the fibres are displaced


@dataclass(frozen=True)
class Nuclei:
    """Single nuclei, one row each: centres in µm, and which stamp."""

    x_um: Axis
    y_um: Axis
    kind: Index
    shape: Axis  # in [0, 1)
    angle: Index


class Piece(NamedTuple):
    """The ellipse that a piece of tissue roughly fills."""

    x_um: float
    y_um: float
    a_um: float
    b_um: float
    angle: float

    @property
    def radius_um(self) -> float:
        """Radius of the circle of that area."""
        return math.sqrt(self.a_um * self.b_um)

    def inside_um(self, x_um: Axis, y_um: Axis) -> Axis:
        """Distance to the ellipse over a grid, about, positive inside: [h, w]."""
        right, down = x_um - self.x_um, (y_um - self.y_um)[:, None]
        u = right * math.cos(self.angle) + down * math.sin(self.angle)
        v = down * math.cos(self.angle) - right * math.sin(self.angle)
        return np.asarray((1 - np.hypot(u / self.a_um, v / self.b_um)) * self.radius_um)


class Specimen:
    """The tissue on a slide of ``size_um`` (width, height)."""

    def __init__(self, size_um: tuple[float, float], seed: int) -> None:
        if seed < 0:
            raise UsageError(f"seed={seed}: give 0 or more")
        rng = np.random.default_rng(seed)
        self.size_um = size_um
        self.salt = int(rng.integers(2**31))
        self.noise = Noise(self.salt)
        self.pieces = _scatter(size_um, rng)
        self._region_um = float(np.clip(min(size_um) / 3.5, 250, 2500))

    def outline_um(self, x_um: Axis, y_um: Axis) -> Float:
        """Distance to the tissue's outline over a grid, about, positive inside: [h, w]."""
        radius_um, (width, height) = self.pieces[0].radius_um, self.size_um
        inside = functools.reduce(np.maximum, (piece.inside_um(x_um, y_um) for piece in self.pieces))
        inside += 0.13 * radius_um * self.noise("shape", x_um, y_um, 1.1 * radius_um)
        to_border = np.minimum(np.minimum(x_um, width - x_um), np.minimum(y_um, height - y_um)[:, None])
        inside = np.minimum(inside, to_border - 0.09 * min(width, height))
        for name, share, wavelength_um, most_um in (
            ("bays", 0.07, 0.4 * radius_um, math.inf),
            ("edge", 0.04, 70.0, 9.0),
            ("fray", 0.02, 13.0, 2.5),
        ):
            inside += min(share * radius_um, most_um) * self.noise(name, x_um, y_um, wavelength_um)
        return np.asarray(inside, np.float32)

    def anatomy(self, grid: Grid) -> Anatomy:
        """What grows on the nodes of a grid."""
        region_um = self._region_um

        def field(name: str, wavelength_um: float) -> Float:
            return self.noise(name, grid.x_um, grid.y_um, wavelength_um)

        outline_um = self.outline_um(grid.x_um, grid.y_um)
        gland_um, rise, solid = self._glands(grid)
        epithelium = ramp(gland_um, 1.0)
        fat, fat_wall = (cover * (1 - epithelium) for cover in self._fat(grid))
        cleft = ramp(7 * field("rare", 420.0) - 7.7 - np.abs(field("cleft", 260.0)) / 0.024, 1.0)
        lymph = ramp(field("lymph", min(600.0, region_um)) - 1.5, 0.35)
        patch = field("patch", 200.0)
        return Anatomy(
            outline_um=outline_um,
            tissue=ramp(outline_um, 1.2) * (1 - cleft * (1 - epithelium)),
            gland_um=gland_um,
            rise=rise,
            solid=solid,
            epithelium=epithelium,
            lumen=ramp(gland_um - 17 - 4 * patch - 200 * solid, 1.2),
            fat=fat,
            fat_wall=fat_wall,
            lymph=lymph * (1 - epithelium) * (1 - fat) * (1 - fat_wall),
            loose=field("loose", 330.0),
            stain=1 + 0.06 * field("stain", region_um) + 0.05 * field("tint", 900.0) + 0.04 * patch,
            bend_um=(90 * field("bend x", 640.0), 90 * field("bend y", 640.0) + 4 * field("crimp", 70.0)),
        )

    def _glands(self, grid: Grid) -> tuple[Float, tuple[Float, Float], Float]:
        """Depth in a gland or nest in µm, direction to its middle, and which of the two it is."""
        x_um, y_um, region_um = grid.x_um, grid.y_um, self._region_um
        solid = ramp(self.noise("solid", x_um, y_um, 0.8 * region_um) + 0.2, 0.35)
        wealth = np.minimum(0.95 * self.noise("tumour", x_um, y_um, region_um) - 0.45, 0.25 + 0.8 * solid)
        wealth -= 6 * np.clip(self.noise("fat", x_um, y_um, 1.1 * region_um) - (FAT_ABOVE - 0.35), 0, 1)
        buds = 0.35 * self.noise("buds", x_um, y_um, 42.0)
        gland = self.noise("glands", x_um, y_um, 135.0) + buds + wealth - 0.3
        slope_y, slope_x = _slopes(gland, grid.pitch_um)
        slope = np.hypot(slope_x, slope_y) + np.float32(1e-6)
        return gland / np.hypot(slope, np.float32(0.012)), (slope_x / slope, slope_y / slope), solid

    def _fat(self, grid: Grid) -> tuple[Float, Float]:
        """Coverages of fat cells and of their walls: a Voronoi picture of shaken, weighted lattice points."""
        cell = FAT_CELL_UM
        column = cells(grid.x_um[0] - 2 * cell, grid.x_um[-1] + 2 * cell, cell)
        row = cells(grid.y_um[0] - 2 * cell, grid.y_um[-1] + 2 * cell, cell)
        fatness = self.noise("fat", (column + 0.5) * cell, (row + 0.5) * cell, 1.1 * self._region_um)
        is_fat = fatness > FAT_ABOVE
        if not is_fat.any():
            return (np.zeros((len(grid.y_um), len(grid.x_um)), np.float32),) * 2
        columns, rows = np.meshgrid(column, row)
        seed_x, seed_y = (
            ((lattice + 0.15 + 0.7 * hashed(columns, rows, self.salt + salt)) * cell).astype(np.float32)
            for salt, lattice in enumerate((columns, rows))
        )
        size = (0.75 + 0.5 * hashed(columns, rows, self.salt + 2)).astype(np.float32)
        fold = 7 * self.noise("folds", grid.x_um, grid.y_um, 75.0)
        x, y = grid.x_um.astype(np.float32) + fold, grid.y_um.astype(np.float32)[:, None] - fold
        left, top = (x // cell).astype(np.int64) - column[0], (y // cell).astype(np.int64) - row[0]
        around = ((top + j, left + i) for j in (-1, 0, 1) for i in (-1, 0, 1))
        gap, mine, other = _nearest_two(
            (np.hypot(x - seed_x[at], y - seed_y[at]) / size[at], is_fat[at]) for at in around
        )
        return ramp(gap - 2, 1.0) * mine, np.exp(-((gap / 2.6) ** 2)) * (mine | other)

    def nuclei(self, grid: Grid, here: Anatomy) -> Nuclei:
        """The nuclei that may touch the grid's window: a candidate per lattice cell, kept by chance."""
        cell, rim_um = NUCLEUS_CELL_UM, NUCLEUS_CELL_UM
        column = cells(grid.x_um[0] + rim_um, grid.x_um[-1] - rim_um, cell)
        row = cells(grid.y_um[0] + rim_um, grid.y_um[-1] - rim_um, cell)
        columns, rows = (axis.ravel() for axis in np.meshgrid(column, row))
        right, down, chance, shape, turn = (hashed(columns, rows, self.salt + salt) for salt in range(3, 8))
        x_um, y_um = (columns + 0.075 + 0.85 * right) * cell, (rows + 0.075 + 0.85 * down) * cell
        at = grid.nearest(x_um, y_um)
        kept = chance < _crowding(here, at)
        x_um, y_um, shape, turn = x_um[kept], y_um[kept], shape[kept], turn[kept]
        at = (at[0][kept], at[1][kept])

        depth_um, solid, across, up = (m[at] for m in (here.gland_um, here.solid, *here.rise))
        epithelial = depth_um > 1.5
        # around a lumen nuclei stand in line, 6 µm above the base
        pull_um = np.where(epithelial & (depth_um < 13), np.clip(6 - depth_um, -4, 4) * (1 - solid), 0)
        bend_y, bend_x = (slope[at] for slope in _slopes(here.bend_um[1], grid.pitch_um))
        along_fibre = np.arctan2(-bend_x, 1 + bend_y) + 0.8 * (turn - 0.6)
        upright = np.where(solid > 0.5, turn * math.pi, np.arctan2(up, across))
        angle = np.where(epithelial, upright, along_fibre) * (NUCLEUS_ANGLES / math.pi)
        kind = np.where(epithelial, EPITHELIAL, np.where(turn < 0.2 + here.lymph[at], LYMPHOCYTE, SPINDLE))
        return Nuclei(
            x_um + pull_um * across,
            y_um + pull_um * up,
            kind,
            shape,
            np.rint(angle).astype(np.int64) % NUCLEUS_ANGLES,
        )


def tissue_truth(size_px: tuple[int, int], *, mpp: float = 0.25, seed: int = 0, at_mpp: float = 8.0) -> Flags:
    """Where the tissue of such a slide lies, without rendering it.

    Inside counts whatever the outline encloses: fat, lumina and clefts too.

    Args:
        size_px: (width, height) of level 0 in pixels, as the slide was written.
        mpp: µm/px of level 0, as the slide was written.
        seed: As the slide was written.
        at_mpp: µm per pixel of the mask.

    Returns:
        bool [h, w] with ``w = ceil(width * mpp / at_mpp)``, sampled at the centres of its pixels.

    Raises:
        UsageError: ``at_mpp`` is not positive.
    """
    if not at_mpp > 0:
        raise UsageError(f"at_mpp={at_mpp}: give µm/px above 0, as 8.0")
    width_um, height_um = size_px[0] * mpp, size_px[1] * mpp
    x_um = (np.arange(math.ceil(width_um / at_mpp)) + 0.5) * at_mpp
    y_um = (np.arange(math.ceil(height_um / at_mpp)) + 0.5) * at_mpp
    specimen = Specimen((width_um, height_um), seed)
    bands = (specimen.outline_um(x_um, y_um[top : top + 256]) > 0 for top in range(0, len(y_um), 256))
    return np.concatenate(list(bands))


def cells(low_um: float, high_um: float, cell_um: float) -> Index:
    """The lattice cells that hold positions from ``low_um`` to ``high_um``."""
    return np.arange(math.floor(low_um / cell_um), math.floor(high_um / cell_um) + 1)


def _slopes(values: Float, pitch_um: float) -> tuple[Float, Float]:
    """Change per µm down and across: [h, w] each."""
    down, across = np.gradient(values, pitch_um)
    return np.asarray(down), np.asarray(across)


def _crowding(here: Anatomy, at: tuple[Index, Index]) -> Axis:
    """The chance that a lattice cell holds a nucleus, from what grows there."""
    depth_um, solid = here.gland_um[at], here.solid[at]
    in_line = (depth_um < 13) & (solid < 0.6)
    epithelial = np.where(in_line, 0.98, 0.12 + 0.5 * solid)
    crowd = np.where(depth_um > 1.5, epithelial, 0.10 + 0.05 * here.loose[at] + 0.75 * here.lymph[at])
    room = (here.tissue[at] > 0.8) & (here.outline_um[at] > 4) & (here.lumen[at] < 0.2) & (here.fat[at] < 0.3)
    return np.where(room, crowd, 0.0)


def _nearest_two(candidates: Iterable[tuple[Float, Flags]]) -> tuple[Float, Flags, Flags]:
    """From (distance, flag) of each candidate: second distance minus first, flag of first and second."""
    everything = iter(candidates)
    first, mine = next(everything)
    second, other = np.full_like(first, np.inf), np.zeros_like(mine)
    for away, flag in everything:
        closer = away < first
        other = np.where(closer, mine, np.where(away < second, flag, other))
        second = np.where(closer, first, np.minimum(second, away))
        first, mine = np.where(closer, away, first), np.where(closer, flag, mine)
    return second - first, mine, other


def _scatter(size_um: tuple[float, float], rng: np.random.Generator) -> list[Piece]:
    """One large piece about the middle; on slides above 1.5 mm up to two small ones in the corners."""
    width, height = size_um
    x, y, a, b = rng.uniform((0.46, 0.46, 0.31, 0.31), (0.54, 0.54, 0.36, 0.36))
    pieces = [Piece(width * x, height * y, width * a, height * b, rng.uniform(-0.3, 0.3))]
    corners = rng.permutation([(0.15, 0.15), (0.85, 0.15), (0.15, 0.85), (0.85, 0.85)])
    for x, y in corners[: rng.integers(3) if min(size_um) > 1500 else 0]:
        radius = rng.uniform(0.06, 0.10) * min(size_um)
        pieces.append(Piece(width * x, height * y, 1.3 * radius, radius, rng.uniform(0, math.pi)))
    return pieces
