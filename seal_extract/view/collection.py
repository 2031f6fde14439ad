"""The slides of a results folder, for the viewer: their files, features, pictures and outlines."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from seal_extract.errors import OutputError, SealExtractError, SlideOpenError, UsageError
from seal_extract.features.layout import CONTOURS, OVERLAYS, of_grid
from seal_extract.features.origin import open_origin
from seal_extract.features.store import (
    SlideFeatures,
    read_features,
    read_provenance,
    scan_features,
    without_copies,
)
from seal_extract.names import shown
from seal_extract.patches.grid import grid_name
from seal_extract.run.status_table import DONE, IGNORED, StatusRow, read_status_rows
from seal_extract.slides.drawing import FOR_TRYING
from seal_extract.slides.slide import Slide
from seal_extract.tissue.geojson import read_polygons
from seal_extract.view.heatmap import PatchRaster
from seal_extract.view.tiles import zooms_of

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
        if not (self.slide.is_absolute() and self.slide.exists()):
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
        return open_origin(self.read(), self.slide)


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
