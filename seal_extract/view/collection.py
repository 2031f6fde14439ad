"""The slides of a results folder, for the viewer: their files, features and outlines, and their tiles.

Tiles are squares of 256 px at powers of two of the slide's size. Zoom 0 is level 0, zoom 1 half of it, and so
on until the slide is smaller than a tile. A tile is read from the coarsest level that is at least as fine and
averaged over areas; where that would be much to read, because the slide has few levels, it is cut out of one
overview of the whole slide.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, log2
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import shapely

from seal_extract.errors import OutputError, SealExtractError, SlideOpenError, UsageError
from seal_extract.features.layouts import CONTOURS, OVERLAYS, of_grid
from seal_extract.features.store import (
    SlideFeatures,
    open_origin,
    read_features,
    read_provenance,
    scan_features,
    url_of_origin,
    without_copies,
)
from seal_extract.names import shown
from seal_extract.patches.grid import grid_name
from seal_extract.run.status_table import DONE, IGNORED, StatusRow, read_status_rows
from seal_extract.slides.drawing import FOR_TRYING
from seal_extract.slides.overview import Overview, read_overview
from seal_extract.slides.readers import Array
from seal_extract.slides.slide import Slide, coarsest_level
from seal_extract.tissue.geojson import read_polygons
from seal_extract.view.layers import PatchRaster, png

TILE_PX = 256
JPEG_QUALITY = 85
OVERVIEW_PX = 4096  # longest side it may have
MOST_READ_PX = 1_500_000  # pixels of a level; more are taken from the overview if it is fine enough

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in level-0 pixels
Rings = list[list[list[int]]]  # of points (x, y), level-0 pixels
Provenances = dict[Path, dict[str, Any]]  # of features files


@dataclass(frozen=True)
class ShownSlide:
    """One slide of a results folder.

    Attributes:
        name: of its results.
        features: its features file; None if it failed.
        provenance: of the features; empty if it failed.
        status: its row of status.csv; None if there is none.
        slide: the slide's file as it was, or of its name in the folder given; None if it failed.
        overlay: its picture, which may not exist.
        tissue: its outline, which may not exist.
        attention: files with attention over its patches.
    """

    name: str
    features: Path | None
    provenance: dict[str, Any]
    status: StatusRow | None
    slide: Path | None
    overlay: Path
    tissue: Path
    attention: tuple[Path, ...] = ()

    @property
    def problem(self) -> str | None:
        """The reason why the slide cannot be shown, in a line; None if it can."""
        if self.features is None or self.slide is None:
            return (self.status and self.status.reason) or "it has no features"
        is_there = self.slide.is_absolute() and self.slide.exists()
        if not is_there and url_of_origin(self.provenance) is None:
            return (
                f"{self.slide} is not there any more; start again with --slides FOLDER, the folder "
                f"that holds {self.slide.name} now"
            )
        return None

    def read(self) -> SlideFeatures:
        """Its features.

        Raises:
            OutputError: there are none, or they have gone.
        """
        if self.features is None:
            raise OutputError(f"{self.name} has no features: {self.problem}")
        return read_features(self.features)

    def open(self) -> Slide:
        """Open the slide's file, with the µm/px that its features were made with.

        Raises:
            SlideOpenError: it is not there, or is another slide.
            SlideError: it cannot be opened.
        """
        if self.problem is not None:
            raise SlideOpenError(f"{self.name}: {self.problem}")
        return open_origin(self.read(), self.slide if self.slide and self.slide.exists() else None)


@dataclass(frozen=True)
class Collection:
    """The slides of one run by one encoder, in order of name; those without features come last.

    Attributes:
        out: the folder.
        encoder: that made the features.
        slides: addressed by their place in this tuple.
    """

    out: Path
    encoder: str
    slides: tuple[ShownSlide, ...]

    @classmethod
    def find(
        cls,
        out: str | os.PathLike[str],
        encoder: str | None = None,
        slides: str | os.PathLike[str] | None = None,
    ) -> Collection:
        """Look through a results folder, whatever its layout.

        Args:
            out: the ``-o`` of a run, or a part of it.
            encoder: that made the features; needed if there are several.
            slides: folder in which the slides lie now, below it too; they are found by their file names.

        Raises:
            UsageError: nothing finished there, several encoders or grids, an encoder that is not there.
        """
        out = Path(out)
        if not out.is_dir():
            raise UsageError(f"{out} is no folder; give the -o of a finished run")
        everything = scan_features(out, read_provenance)[0]
        found = {path: everything[path] for path in without_copies(everything)}
        if not found:
            raise UsageError(
                f"{out} holds no finished features file of seal_extract (looked for *.h5 in it and below); "
                "give the -o of a finished run"
            )
        encoder = _choose(out, encoder, sorted({made["encoder"]["name"] for made in found.values()}))
        found = {path: made for path, made in found.items() if made["encoder"]["name"] == encoder}
        folders: dict[str, str] = {_grid_of(made): str(path.parent) for path, made in found.items()}
        if len(folders) > 1 and len({path.stem for path in found}) < len(found):
            raise UsageError(
                f"{out} holds patches of several sizes; give one of their folders: "
                f"{', '.join(sorted(set(folders.values())))}"
            )
        return cls(out, encoder, tuple(_slides(out, found, _files_by_name(slides))))


def _choose(out: Path, encoder: str | None, there: list[str]) -> str:
    if encoder is None and len(there) > 1:
        raise UsageError(f"{out} holds features of {', '.join(there)}; type --encoder {there[0]}, or another")
    if encoder is not None and encoder not in there:
        raise UsageError(f"{out} holds no features of {encoder!r}; allowed: --encoder {', '.join(there)}")
    return encoder or there[0]


def _grid_of(provenance: dict[str, Any]) -> str:
    grid = provenance["grid"]
    return grid_name(grid["patch_px"], grid["mpp"], grid["overlap_px"])


def _files_by_name(folder: str | os.PathLike[str] | None) -> dict[str, Path]:
    if folder is None:
        return {}
    if not Path(folder).is_dir():
        raise UsageError(f"--slides is {folder}, which is no folder; give the one that holds the slides now")
    return {path.name: path for path in sorted(Path(folder).resolve().rglob("*"), reverse=True)}


def _slides(out: Path, found: Provenances, moved: dict[str, Path]) -> Iterator[ShownSlide]:
    places = (out, *out.resolve().parents[:3])  # ``out`` may be a part of the run's folder
    root = next((p for p in places if (p / "status.csv").exists() or (p / OVERLAYS).is_dir()), out)
    rows = {(row.name, row.grid): row for row in read_status_rows(root / "status.csv")}
    attention: dict[str, tuple[Path, ...]] = defaultdict(tuple)
    for path in sorted(root.rglob("slide_features_*/*.h5")):
        attention[path.stem] += (path,)

    def slide(name: str, grid: str, features: Path | None, provenance: dict[str, Any]) -> ShownSlide:
        file = Path(provenance["slide"]["path"]) if provenance else None
        return ShownSlide(
            name,
            features,
            provenance,
            rows.get((name, grid)) or rows.get((name, "")),  # an older version's
            file and moved.get(file.name, file),
            of_grid(root / OVERLAYS, grid, f"{name}.jpg"),
            of_grid(root / CONTOURS, grid, f"{name}.geojson"),
            attention[name],
        )

    for path in sorted(found, key=lambda path: path.stem):
        yield slide(path.stem, _grid_of(found[path]), path, found[path])
    done = {path.stem for path in found}
    for (name, grid), row in sorted(rows.items()):
        if name not in done and row.status not in (DONE, IGNORED):
            yield slide(name, grid, None, {})


# --- a slide as its page shows it -----------------------------------------------------------------


def describe_slide(slide: Slide, features: SlideFeatures, tissue: Rings) -> dict[str, Any]:
    """What the page of a slide needs, in the viewer and in a report; places are in level-0 pixels."""
    grid, made = features.grid, features.provenance
    unread = [patch["row"] for patch in made.get("unreadable", [])]
    return {
        "name": shown(features.path.stem),
        "encoder": made["encoder"]["name"],
        "size_l0": list(slide.size_l0),
        "mpp": slide.mpp,
        "zooms": zooms_of(slide),
        "patches": len(grid),
        "patch_px": grid.patch_px,
        "patch_mpp": grid.mpp,
        "patch_size_l0": grid.patch_size_l0,
        "dim": features.dim,
        "bounds_l0": list(PatchRaster.of(grid).bounds_l0) if len(grid) else None,
        "tissue": tissue,
        "tissue_mm2": (made.get("tissue") or {}).get("area_mm2"),
        "unread": unread,
        "notes": list(_notes(made["encoder"], len(unread), grid.overlap_px)),
    }


def _notes(encoder: dict[str, Any], unread: int, overlap_px: int) -> Iterator[str]:
    if encoder["name"] in FOR_TRYING:
        yield FOR_TRYING[encoder["name"]]
    if encoder.get("mismatch"):
        yield f"{encoder['mismatch']}."
    if unread:
        patches = "1 patch" if unread == 1 else f"{unread:,} patches"
        yield f"{patches} could not be read: the values shown there mean nothing."
    if overlap_px:
        yield "Patches overlap: a colour fills the middle of its patch, as wide as their distance."


def tissue_rings(path: Path) -> Rings:
    """The rings of an outline in level-0 pixels; none if it was never written or is damaged."""
    rings = [shapely.get_coordinates(ring)[:-1] for ring in shapely.get_rings(read_outline(path) or ())]
    return [np.round(ring).astype(int).tolist() for ring in rings]


def read_outline(path: Path) -> list[shapely.Polygon] | None:
    """The tissue's polygons in level-0 pixels; None if they were never written or are damaged."""
    try:
        return read_polygons(path)[0]
    except SealExtractError:
        return None


# --- tiles ---------------------------------------------------------------------------------------


class SlideTiles:
    """The tiles of one open slide; safe to use from several threads."""

    def __init__(self, slide: Slide) -> None:
        self.slide = slide
        self.zooms = zooms_of(slide)
        self._overview_downsample = max(self._first_large(), max(slide.size_l0) / OVERVIEW_PX)
        self._overview: Overview | None = None
        self._lock = threading.Lock()

    def tile(self, zoom: int, column: int, row: int) -> tuple[bytes, str]:
        """A tile as a file and its media type: JPEG, or PNG where it reaches over the slide's edge.

        Args:
            zoom: 0 is level 0, each further one half the size.
            column: counted from the left.
            row: counted from the top.

        Raises:
            UsageError: there is no such tile.
            ReadError: the slide is damaged there.
        """
        width, height = self.slide.size_l0
        side_l0 = TILE_PX << zoom if 0 <= zoom < self.zooms else 0
        x0, y0 = column * side_l0, row * side_l0
        if not side_l0 or not (0 <= x0 < width and 0 <= y0 < height):
            raise UsageError(
                f"there is no tile {zoom}/{column}/{row}; allowed: zooms 0 to {self.zooms - 1}, on the slide"
            )
        box = (x0, y0, min(x0 + side_l0, width), min(y0 + side_l0, height))
        size = (ceil((box[2] - x0) / (1 << zoom)), ceil((box[3] - y0) / (1 << zoom)))
        return _encoded(self.picture(box, size))

    def picture(self, box: Box, size_px: tuple[int, int]) -> Array:
        """A part of the slide at ``size_px`` (width, height), by area averages: uint8 [h, w, 3].

        Pixels that the file does not have are white.

        Raises:
            ReadError: the slide is damaged there.
        """
        downsample = min((box[2] - box[0]) / size_px[0], (box[3] - box[1]) / size_px[1])
        level = coarsest_level(self.slide, downsample)
        per_px = self.slide.levels[level].downsample
        w, h = (max(1, round(side / per_px)) for side in (box[2] - box[0], box[3] - box[1]))
        if w * h > MOST_READ_PX and downsample >= self._overview_downsample:
            part = _cut(self.overview(), box)
        else:
            part = self.slide.read_region((box[0], box[1]), level, (w, h))
            part = _unread_to_white(part)
        shrinks = part.shape[0] >= size_px[1]
        way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        return np.asarray(cv2.resize(part, size_px, interpolation=way), np.uint8)

    def overview(self) -> Overview:
        """The whole slide, no finer than tiles are cut from it; read once.

        Raises:
            ReadError: much of the slide cannot be read.
        """
        with self._lock:
            if self._overview is None:
                mpp = self.slide.mpp * self._overview_downsample
                self._overview = read_overview(self.slide, mpp, holes=True)
            return self._overview

    def _first_large(self) -> int:
        """Level-0 pixels per pixel of the finest tiles that would be much to read."""
        for zoom in range(self.zooms):
            level = self.slide.levels[coarsest_level(self.slide, 1 << zoom)]
            if (TILE_PX * (1 << zoom) / level.downsample) ** 2 > MOST_READ_PX:
                return 1 << zoom
        return 1 << self.zooms


def zooms_of(slide: Slide) -> int:
    """How many times a slide is there, each half as large as the one before."""
    return 1 + max(0, ceil(log2(max(slide.size_l0) / TILE_PX)))


def jpeg(rgb: Array, quality: int = JPEG_QUALITY) -> bytes:
    """uint8 [h, w, 3] as JPEG."""
    return cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def _encoded(rgb: Array) -> tuple[bytes, str]:
    height, width = rgb.shape[:2]
    if (height, width) == (TILE_PX, TILE_PX):
        return jpeg(rgb), "image/jpeg"
    rgba = np.zeros(
        (TILE_PX, TILE_PX, 4), np.uint8
    )  # beyond the slide: transparent, whatever the page's ground
    rgba[:height, :width, :3], rgba[:height, :width, 3] = rgb, 255
    return png(rgba), "image/png"


def _cut(overview: Overview, box: Box) -> Array:
    height, width = overview.scanned.shape
    x0, y0, x1, y1 = (v / overview.downsample for v in box)
    left, top = min(int(x0), width - 1), min(int(y0), height - 1)
    return overview.rgb[top : max(top + 1, round(y1)), left : max(left + 1, round(x1))]


def _unread_to_white(rgb: Array) -> Array:
    """Exactly black is what readers put where a file has nothing."""
    unread = cv2.inRange(rgb, (0, 0, 0), (0, 0, 0))
    return np.where(unread[..., None] > 0, np.uint8(255), rgb) if unread.any() else rgb
