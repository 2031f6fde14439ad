"""The slides of a results folder, for a viewer: features, pictures, outlines, and where the slides lie."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from seal_extract.errors import OutputError, SealExtractError, SlideOpenError, UsageError
from seal_extract.features.layout import CONTOURS, OVERLAYS, of_grid
from seal_extract.features.origin import open_origin
from seal_extract.features.store import SlideFeatures, read_features, read_provenance, scan_features
from seal_extract.names import shown, written_twice
from seal_extract.patches.grid import grid_name
from seal_extract.run.status_table import DONE, IGNORED, StatusRow, read_status_rows
from seal_extract.slides.drawing import FOR_TRYING
from seal_extract.slides.slide import Slide
from seal_extract.tissue.geojson import read_polygons
from seal_extract.view.heatmap import PatchRaster
from seal_extract.view.tiles import zooms_of

Rings = list[list[list[int]]]  # of points (x, y), level-0 pixels


@dataclass(frozen=True)
class ShownSlide:
    """One slide of a results folder.

    Attributes:
        name: of its results.
        features: its features file; None where it failed.
        provenance: what made them.
        status: its line of status.csv; None where there is none.
        slide: the slide's file as it was, or of its name in the folder given; None where it failed.
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
        """Why the slide cannot be shown, in a line; None where it can."""
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
        encoder: whose features they are.
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
            encoder: whose features; needed where there are several.
            slides: folder in which the slides lie now, below it too; they are found by their file names.

        Raises:
            UsageError: nothing finished there, several encoders or grids, an encoder that is not there.
        """
        out = Path(out)
        if not out.is_dir():
            raise UsageError(f"{out} is no folder; give the -o of a finished run")
        found = list(_features(out))
        if not found:
            raise UsageError(
                f"{out} holds no finished features file of seal_extract (looked for *.h5 in it and below); "
                "give the -o of a finished run"
            )
        encoder = _choose(out, encoder, sorted({p["encoder"]["name"] for _, p in found}))
        found = [(path, p) for path, p in found if p["encoder"]["name"] == encoder]
        _refuse_several_grids(out, found)
        return cls(out, encoder, tuple(_shown(_root(out), found, _by_name(slides))))


def _features(out: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Features files with their provenance; an export lies behind its original."""
    read = list(scan_features(out, read_provenance)[0].items())
    twice = written_twice(read)
    read = [file for file in read if file[0] not in twice]
    seen: set[tuple[str, ...]] = set()
    for path, provenance in sorted(read, key=lambda r: "exported_from" in r[1]):
        key = (path.stem, provenance["encoder"]["name"], *map(str, _grid(provenance)))
        if key not in seen:
            seen.add(key)
            yield path, provenance


def _grid(provenance: dict[str, Any]) -> tuple[int, float, int]:
    grid = provenance["grid"]
    return grid["patch_px"], round(grid["mpp"], 3), grid["overlap_px"]


def _choose(out: Path, encoder: str | None, there: list[str]) -> str:
    if encoder is None and len(there) > 1:
        raise UsageError(f"{out} holds features of {', '.join(there)}; type --encoder {there[0]}, or another")
    if encoder is not None and encoder not in there:
        raise UsageError(f"{out} holds no features of {encoder!r}; allowed: --encoder {', '.join(there)}")
    return encoder or there[0]


def _refuse_several_grids(out: Path, found: list[tuple[Path, dict[str, Any]]]) -> None:
    grids = {_grid(provenance): path for path, provenance in found}
    several = {path.stem for path, _ in found}
    if len(grids) > 1 and len(several) < len(found):
        folders = sorted({str(path.parent) for path in grids.values()})
        raise UsageError(
            f"{out} holds patches of several sizes; give one of their folders: {', '.join(folders)}"
        )


def _root(out: Path) -> Path:
    """The folder of the run, of which ``out`` may be a part."""
    places = (out, *out.resolve().parents[:3])
    return next((p for p in places if (p / "status.csv").exists() or (p / "overlays").is_dir()), out)


def _by_name(folder: str | os.PathLike[str] | None) -> dict[str, Path] | None:
    """Where each file below a folder lies, by its name."""
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise UsageError(f"--slides is {folder}, which is no folder; give the one that holds the slides now")
    return {path.name: path for path in sorted(Path(folder).resolve().rglob("*"), reverse=True)}


def _shown(
    root: Path, found: list[tuple[Path, dict[str, Any]]], moved: dict[str, Path] | None
) -> Iterator[ShownSlide]:
    rows = {(row.name, row.grid): row for row in read_status_rows(root / "status.csv")}
    attention: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("slide_features_*/*.h5")):
        attention.setdefault(path.stem, []).append(path)

    def one(name: str, grid: str, features: Path | None, provenance: dict[str, Any]) -> ShownSlide:
        slide = Path(provenance["slide"]["path"]) if provenance else None
        if slide is not None and moved is not None:
            slide = moved.get(slide.name, slide)
        return ShownSlide(
            name,
            features,
            provenance,
            rows.get((name, grid)) or rows.get((name, "")),  # an older version's
            slide,
            of_grid(root / OVERLAYS, grid, f"{name}.jpg"),
            of_grid(root / CONTOURS, grid, f"{name}.geojson"),
            tuple(attention.get(name, ())),
        )

    done = {path.stem for path, _ in found}
    for path, provenance in sorted(found, key=lambda f: f[0].stem):
        grid = provenance["grid"]
        name = grid_name(grid["patch_px"], grid["mpp"], grid["overlap_px"])
        yield one(path.stem, name, path, provenance)
    for (name, grid), row in sorted(rows.items()):
        if name not in done and row.status not in (DONE, IGNORED):
            yield one(name, grid, None, {})


# --- a slide as its page shows it -----------------------------------------------------------------


def describe_slide(slide: Slide, features: SlideFeatures, tissue: Rings) -> dict[str, Any]:
    """What the page of a slide needs, in the viewer and in a report; places are in level-0 pixels."""
    grid, made = features.grid, features.provenance
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
        "unread": [patch["row"] for patch in made.get("unreadable", [])],
        "notes": _notes(features),
    }


def _notes(features: SlideFeatures) -> list[str]:
    encoder = features.provenance["encoder"]
    unread = len(features.provenance.get("unreadable", []))
    notes = [FOR_TRYING[encoder["name"]]] if encoder["name"] in FOR_TRYING else []
    if encoder.get("mismatch"):
        notes.append(f"{encoder['mismatch']}.")
    if unread:
        words = "1 patch" if unread == 1 else f"{unread:,} patches"
        notes.append(f"{words} could not be read: what is shown there means nothing.")
    if features.grid.overlap_px:
        notes.append("Patches overlap: a colour fills the middle of its patch, as wide as their distance.")
    return notes


def tissue_rings(path: Path) -> Rings:
    """The rings of an outline in level-0 pixels; none if it was never written or is damaged."""
    polygons = read_outline(path) or ()
    rings = [shapely.get_coordinates(ring)[:-1] for ring in shapely.get_rings(polygons)]
    return [np.round(ring).astype(int).tolist() for ring in rings]


def read_outline(path: Path) -> list[shapely.Polygon] | None:
    """The tissue's polygons in level-0 pixels; None if they were never written or are damaged."""
    try:
        return read_polygons(path)[0]
    except SealExtractError:
        return None
