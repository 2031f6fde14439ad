"""The picture of a stained section that was never alive, rendered window by window.

Each pixel follows from its level-0 position, the slide's size, µm/px and the seed alone, so any window
can be rendered by itself, in any order, on any thread, and windows meet without a seam. ``anatomy.py``
says what grows where and ``texture.py`` what it looks like close by; the sum is two stain coverages a
pixel, which Beer-Lambert's law turns into RGB.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from seal_extract.synthetic.anatomy import Anatomy, Grid, Nuclei, Specimen, Window, cells
from seal_extract.synthetic.texture import (
    Axis,
    Bytes,
    Float,
    fibre_texture,
    grain_texture,
    hashed,
    nucleus_stamps,
    ramp,
    stain_table,
)

GLASS_STEPS = 5  # grey levels between the dimmest and the brightest glass
DUST_CELL_UM, DUST_REACH_UM = 900.0, 40.0
DUST_RGB = (74, 70, 62)
PEN_RGB = (40, 66, 140)


class Section:
    """The picture on a slide of ``size_px`` at ``mpp`` µm/px.

    The first one at a µm/px takes a second and some 60 MB to draw its textures; later ones share them.
    ``cell_px`` is the side of the squares on which the glass keeps one brightness: the file's tiles.
    """

    def __init__(
        self,
        size_px: tuple[int, int],
        mpp: float,
        *,
        cell_px: int = 256,
        seed: int = 0,
        pen: bool = False,
        dust: bool = False,
    ) -> None:
        self.specimen = Specimen((size_px[0] * mpp, size_px[1] * mpp), seed)
        self.mpp, self.cell_px, self.dust, self.pen = mpp, cell_px, dust, pen
        self.period_px = cell_px * max(1, 1024 // cell_px)  # of the sensor's noise
        self._fibre_texture = fibre_texture(mpp)
        self._grain_textures = grain_texture(self.period_px, mpp)
        self._nucleus_stamps = nucleus_stamps(mpp)

    def is_glass(self, window: Window) -> bool:
        """True only if the window shows nothing but glass."""
        x_um = np.arange(window.x * self.mpp - 8, (window.x + window.width) * self.mpp + 16, 8.0)
        y_um = np.arange(window.y * self.mpp - 8, (window.y + window.height) * self.mpp + 16, 8.0)
        if self.specimen.outline_um(x_um, y_um).max() > -14:
            return False
        return not (self._specks(x_um, y_um) or (self.pen and self._ink(x_um, y_um).any()))

    def render(self, window: Window) -> Bytes:
        """The pixels of a window, which may reach past the slide: uint8 [height, width, 3], RGB."""
        glass = self.is_glass(window)
        eosin, haematoxylin = self._sensor(window) if glass else self._stains(window)
        colours = stain_table().take(cv2.merge((haematoxylin, eosin)).view(np.uint16)[..., 0])
        rgba = colours.view(np.uint8).reshape(window.height, window.width, 4)
        rgb: Bytes = np.asarray(cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB), np.uint8)
        if not glass:
            self._soil(rgb, window)
        self._light(rgb, window)
        return rgb

    # --- stains: uint8 [height, width], eosin and haematoxylin

    def _stains(self, window: Window) -> tuple[Bytes, Bytes]:
        grid = Grid.around(window, self.mpp)
        here = self.specimen.anatomy(grid)
        stroma = here.tissue * (1 - here.epithelium) * (1 - here.fat) * (1 - here.fat_wall)
        cytoplasm = here.tissue * here.epithelium * (1 - here.lumen) * here.stain
        torn = 0.13 * here.loose + 0.3 * ramp(7 - here.outline_um, 9)
        fibre = self._fibres(grid, here)
        present = np.clip((fibre - grid.full(torn)) * np.float32(5), 0, 1)

        eosin = grid.full(stroma * here.stain * (1 - 0.25 * here.lymph)) * present * (76 + 100 * fibre)
        eosin += grid.full(112 * cytoplasm + 112 * here.tissue * here.fat_wall)
        haematoxylin = grid.full(26 * stroma) * present + grid.full((68 + 14 * here.solid) * cytoplasm)
        eosin *= 0.75 + self._grain(0, window) * np.float32(0.25 / 128)
        haematoxylin *= 0.6 + self._grain(1, window) * np.float32(0.4 / 128)
        pink, blue = (
            np.maximum(np.minimum(stain, 255).astype(np.uint8), least)
            for stain, least in zip((eosin, haematoxylin), self._sensor(window), strict=True)
        )
        self._stamp(self.specimen.nuclei(grid, here), window, pink, blue)
        return pink, blue

    def _fibres(self, grid: Grid, here: Anatomy) -> Float:
        """The fibre texture, bent, over a grid's window: [height, width], 0..1."""
        x, y, width, height = grid.window
        side = len(self._fibre_texture)
        x_map, y_map = (grid.full(bend / np.float32(self.mpp)) for bend in here.bend_um)
        # modulo the period: remap keeps whole pixels in 16 bits
        x_map = x_map + np.arange(x % side, x % side + width, dtype=np.float32)
        y_map = y_map + np.arange(y % side, y % side + height, dtype=np.float32)[:, None]
        bent = cv2.remap(self._fibre_texture, x_map, y_map, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        return np.asarray(bent * np.float32(1 / 255))

    def _sensor(self, window: Window) -> tuple[Bytes, Bytes]:
        """What noise alone makes of bare glass."""
        return self._grain(0, window) // 6, self._grain(1, window) // 10

    def _grain(self, stain: int, window: Window) -> Bytes:
        side = self.period_px
        left, top = window.x % side, window.y % side
        times = (math.ceil((top + window.height) / side), math.ceil((left + window.width) / side))
        texture = self._grain_textures[stain]
        tiled = texture if times == (1, 1) else np.tile(texture, times)
        return tiled[top : top + window.height, left : left + window.width]

    def _stamp(self, nuclei: Nuclei, window: Window, eosin: Bytes, haematoxylin: Bytes) -> None:
        """Draw nuclei into both stains, in place: more blue where they lie, less pink."""
        stamps = self._nucleus_stamps
        half = len(stamps[0][0][0]) // 2
        left = np.floor(nuclei.x_um / self.mpp).astype(np.int64) - window.x - half
        top = np.floor(nuclei.y_um / self.mpp).astype(np.int64) - window.y - half
        shape = (nuclei.shape * len(stamps[0])).astype(np.int64)
        rows = np.stack([left, top, nuclei.kind, shape, nuclei.angle], axis=1).tolist()
        for x, y, kind, form, angle in rows:
            stamp = stamps[kind][form][angle]
            stamp = stamp[max(-y, 0) : max(window.height - y, 0), max(-x, 0) : max(window.width - x, 0)]
            if stamp.size:
                spot = np.s_[max(y, 0) : max(y, 0) + len(stamp), max(x, 0) : max(x, 0) + stamp.shape[1]]
                np.maximum(haematoxylin[spot], stamp, out=haematoxylin[spot])
                np.minimum(eosin[spot], 255 - (stamp >> 1) - (stamp >> 3), out=eosin[spot])

    # --- what lies on top

    def _soil(self, rgb: Bytes, window: Window) -> None:
        """Darken pixels under dust and pen, in place."""
        grid = Grid.around(window, self.mpp)
        for wanted, cover_of, colour in ((self.dust, self._dirt, DUST_RGB), (self.pen, self._ink, PEN_RGB)):
            if wanted and (cover := cover_of(grid.x_um, grid.y_um)).any():
                rgb[:] = rgb * (1 - grid.full(cover)[..., None] * (1 - np.array(colour, np.float32) / 255))

    def _dirt(self, x_um: Axis, y_um: Axis) -> Float:
        """Coverage by dust over a grid: [h, w]."""
        cover = np.zeros((len(y_um), len(x_um)), np.float32)
        for x, y, radius in self._specks(x_um, y_um):
            ragged = radius * (1 + 0.3 * self.specimen.noise("dust", x_um, y_um, 16.0))
            away = np.hypot(x_um - x, (y_um - y)[:, None]).astype(np.float32)
            np.maximum(cover, 0.8 * ramp(ragged - away, 1.5), out=cover)
        return cover

    def _specks(self, x_um: Axis, y_um: Axis) -> list[tuple[float, float, float]]:
        """Dust that may touch a grid: (x, y, radius) in µm."""
        if not self.dust:
            return []
        (left, right), (top, bottom) = (
            (axis[0] - DUST_REACH_UM, axis[-1] + DUST_REACH_UM) for axis in (x_um, y_um)
        )
        columns, rows = np.meshgrid(cells(left, right, DUST_CELL_UM), cells(top, bottom, DUST_CELL_UM))
        along, down, size = (hashed(columns, rows, self.specimen.salt + salt) for salt in (8, 9, 10))
        x, y, radius = (columns + along) * DUST_CELL_UM, (rows + down) * DUST_CELL_UM, 3 + 25 * size**3
        near = (left < x) & (x < right) & (top < y) & (y < bottom)
        return list(zip(x[near], y[near], radius[near], strict=True))

    def _ink(self, x_um: Axis, y_um: Axis) -> Float:
        """Coverage by a felt pen, an arc around most of the first piece, over a grid: [h, w]."""
        piece, noise = self.specimen.pieces[0], self.specimen.noise
        radius_um = 0.9 * piece.radius_um
        half_um = min(350.0, 0.05 * radius_um)
        right, down = x_um - piece.x_um, (y_um - piece.y_um)[:, None]
        wander = 1 + 0.06 * noise("hand", x_um, y_um, radius_um)
        away = np.abs(np.hypot(right, down) - radius_um * wander).astype(np.float32)
        facing = np.cos(np.arctan2(down, right) - self.specimen.salt).astype(np.float32)
        line = ramp(half_um - away, 0.1 * half_um) * ramp(facing - 0.2, 0.03)
        return np.asarray(line * (0.62 + 0.04 * noise("ink", x_um, y_um, 260.0)))

    def _light(self, rgb: Bytes, window: Window) -> None:
        """Add the unevenness of the lamp, whole grey levels per cell, in place."""
        cell, cell_um = self.cell_px, self.cell_px * self.mpp
        columns = cells(window.x, window.x + window.width - 1, cell)
        rows = cells(window.y, window.y + window.height - 1, cell)
        wave_um = 0.8 * max(self.specimen.size_um)
        field = self.specimen.noise("lamp", (columns + 0.5) * cell_um, (rows + 0.5) * cell_um, wave_um)
        levels = np.clip(np.rint(field + GLASS_STEPS / 2), 0, GLASS_STEPS).astype(np.uint8)
        for (j, i), level in np.ndenumerate(levels):
            left, top = int(columns[i]) * cell - window.x, int(rows[j]) * cell - window.y
            rgb[max(top, 0) : top + cell, max(left, 0) : left + cell] += level
