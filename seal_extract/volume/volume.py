"""A volume: evenly spaced planes in one frame, each of them a `Slide`.

It is opened from a stack (OME-TIFF or OME-Zarr), from a folder of numbered planes, from a CSV or JSON file
that lists sections with their transforms, or from a JSON file of where measured sections lie in a stack.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from msgspec import Meta

from seal_extract.encoders.folder import plain_word
from seal_extract.errors import GeometryError, ResolutionError, SlideOpenError, UsageError
from seal_extract.slides.entry import SlideEntry, content, open_entry
from seal_extract.slides.listing import read_table
from seal_extract.slides.ngff import is_store
from seal_extract.slides.planes import Affine, AlignedSlide, Stack, StackPlane, StackPlanes, open_stack
from seal_extract.slides.readers import same_mpp
from seal_extract.slides.slide import Slide
from seal_extract.train.config import Options, Positive, Whole, convert

MOST_SPACING_UM = 1000.0
SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".svs", ".ndpi")
STACKS = (".tif", ".tiff")
ALLOWED = (
    "allowed: a stack (OME-TIFF, OME-Zarr), a folder of numbered planes, a CSV or a JSON file (see the guide)"
)
UNEVEN = 0.05  # of the spacing, that a section may lie beside its place
SAME_PX = 1e-6  # of two µm/px: planes lie on each other pixel by pixel

Row = tuple[float, float, float]


class PlaneEntry(Options, frozen=True):
    """A section of a list; in a CSV these are the columns.

    Attributes:
        slide: its file, from the folder of the list.
        name: of its results and of its expression; the file's by default.
        z: its number in depth; the place in the list by default.
        z_um: its depth in µm, in place of ``z``.
        mpp: µm/px at level 0, where its file does not state it.
        transform: two rows that take (x, y, 1) in its level-0 pixels to those of the first section; or their
            six numbers as text, or a file that holds them.
    """

    slide: str
    name: str | None = None
    z: Whole | None = None
    z_um: float | None = None
    mpp: Positive | None = None
    transform: tuple[Row, Row] | str | None = None


class SectionEntry(Options, frozen=True):
    """Where a section with measured expression lies in a stack.

    Attributes:
        name: as its expression has it.
        plane: the number of the plane, from 0.
        transform: two rows that take (x, y, 1) in its level-0 pixels to those of the plane.
    """

    name: str
    plane: Whole
    transform: tuple[Row, Row] | str | None = None


class VolumeFile(Options, frozen=True):
    """The JSON file of a volume, with either ``planes`` or ``stack``.

    Attributes:
        spacing_um: µm between neighbouring planes.
        mpp: µm/px of the planes, where their files do not state it.
        planes: sections, the first of which is the frame.
        stack: one file or OME-Zarr.
        window: values shown as black and as white, for grey stacks of more than 8 bits.
        sections: with measured expression, in a stack; planes have names of their own.
    """

    spacing_um: Annotated[float, Meta(gt=0, le=MOST_SPACING_UM)] | None = None
    mpp: Positive | None = None
    planes: tuple[PlaneEntry, ...] = ()
    stack: str | None = None
    window: tuple[float, float] | None = None
    sections: tuple[SectionEntry, ...] = ()


class Plane(NamedTuple):
    """One plane.

    Attributes:
        name: of its results.
        path: its file.
        open: opens it.
        content: a digest of its file.
        origin: where it lies in that file, as `open_plane` takes it; None if it is the whole file.
    """

    name: str
    path: Path
    open: Callable[[], Slide]
    content: Callable[[], str]
    origin: dict[str, Any] | None = None


@dataclass(frozen=True, repr=False)
class Volume:
    """Planes in one frame.

    Attributes:
        path: of the stack, the folder or the JSON file.
        size_px: (width, height) of every plane.
        mpp: µm/px of every plane.
        spacing_um: µm from a plane to the next.
        planes: in depth; names are unique.
        whole: opens all planes below each other, as `StackPlanes`; None where each has a file of its own.
        chunk: planes that are decoded together.
        sections: by name, the number of the plane in which expression was measured, and the transform from
            the section's level-0 pixels to the frame's.
    """

    path: Path
    size_px: tuple[int, int]
    mpp: float
    spacing_um: float
    planes: tuple[Plane, ...]
    sections: Mapping[str, tuple[int, Affine]]
    whole: Callable[[], Slide] | None = None
    chunk: int = 1

    def __post_init__(self) -> None:
        if len(self.planes) < 2:
            raise UsageError(
                f"{self.path} holds {'one' if self.planes else 'no'} plane, which is no volume; embed one "
                "plane as a slide: seal-extract SLIDE"
            )
        names = [plane.name for plane in self.planes]
        for name in names:
            try:
                plain_word(name)
            except ValueError as exc:
                raise UsageError(f"{self.path}: a plane's {exc}; give it another name") from exc
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"{self.path}: two planes have the name {twice}; give each its own")
        for name, (plane, _) in self.sections.items():
            if plane >= len(names):
                raise UsageError(
                    f"{self.path}: section {name} lies in plane {plane}, outside the volume; "
                    f"allowed: 0 to {len(names) - 1}"
                )

    def __len__(self) -> int:
        return len(self.planes)

    def __repr__(self) -> str:
        (w, h), depth = self.size_px, (len(self) - 1) * self.spacing_um
        return (
            f"Volume({self.path.name}: {len(self)} planes of {w} x {h} px, {self.mpp:.4g} µm/px, "
            f"{self.spacing_um:.4g} µm apart, {depth:.4g} µm deep)"
        )

    def around(self, plane: int, planes: int) -> list[int]:
        """The numbers of a plane and its neighbours in depth; beyond the ends the outermost is repeated."""
        half = planes // 2
        return [min(max(i, 0), len(self) - 1) for i in range(plane - half, plane + half + 1)]


def open_volume(
    path: Path,
    *,
    spacing_um: float | None = None,
    mpp: float | None = None,
    window: tuple[float, float] | None = None,
) -> Volume:
    """Open a volume: headers only; planes are opened one by one.

    Args:
        path: a stack, a folder of numbered planes, a JSON file of `VolumeFile`, or a CSV of `PlaneEntry`.
        spacing_um: µm between planes, where nothing states it.
        mpp: µm/px of the planes, where nothing states it.
        window: see `VolumeFile`.

    Raises:
        UsageError: it is nothing of these; a plane is missing; one plane only; a section lies outside.
        ResolutionError: no µm/px or no spacing, or two statements that contradict each other.
        GeometryError: planes of different size or µm/px without a transform.
        SlideError: a plane that cannot be opened.
    """
    if path.suffix.lower() == ".csv":
        file = VolumeFile(planes=_in_table(path))
    elif path.suffix.lower() == ".json":
        file = _read_file(path)
    elif (path.is_dir() and is_store(path)) or (path.suffix.lower() in STACKS and path.is_file()):
        file = VolumeFile(stack=path.name)
    elif path.is_dir():
        file = VolumeFile(planes=_numbered(path))
    else:
        raise UsageError(f"{path} is no volume; {ALLOWED}")
    stated = [("the volume's file", file.spacing_um), ("--spacing-um", spacing_um)]
    mpp, window = file.mpp or mpp, file.window or window
    if window is not None and not window[0] < window[1]:
        raise UsageError(f"{path}: the window is {window[0]:g} to {window[1]:g}; allowed: LOW below HIGH")
    if file.stack is None:
        stated.append(("z_um", _check_depths(path, file.planes)))
        planes, size_px, mpp_l0, sections = _listed(path, file.planes, mpp)
        return Volume(path, size_px, mpp_l0, _spacing(path, stated), planes, sections)
    stack = open_stack(path.parent / file.stack, window)
    planes, size_px, mpp_l0 = _planes_of_stack(stack, mpp)
    stated.append((stack.path.name, stack.spacing_um))
    sections = {entry.name: (entry.plane, _affine(path, entry.transform)) for entry in file.sections}
    whole, chunk = partial(StackPlanes, stack, 0, mpp_l0), stack.tile(0)[0]
    return Volume(path, size_px, mpp_l0, _spacing(path, stated), planes, sections, whole, chunk)


def _read_file(path: Path) -> VolumeFile:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise UsageError(f"{path} cannot be read as JSON: {exc}; {ALLOWED}") from exc
    file = convert(values, VolumeFile, str(path))
    if bool(file.planes) == (file.stack is not None) or (file.planes and file.sections):
        raise UsageError(f"{path}: give either planes, or a stack with the sections that lie in it")
    return file


def _numbered(folder: Path) -> tuple[PlaneEntry, ...]:
    """The planes of a folder by the last number in each name."""
    found = []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES):
        number = re.search(r"(\d+)\D*$", path.stem)
        if number is None:
            raise UsageError(
                f"{path} has no number in its name, so its depth is unknown; allowed: plane_001.tif"
            )
        found.append((int(number[1]), path))
    if not found:
        raise UsageError(f"{folder} holds no planes ({', '.join(SUFFIXES)}); {ALLOWED}")
    return tuple(PlaneEntry(slide=path.name, z=number) for number, path in sorted(found))


def _in_table(path: Path) -> tuple[PlaneEntry, ...]:
    column, rows = read_table(path, [name for name in PlaneEntry.__struct_fields__ if name != "slide"])
    lines = [
        (line, {"slide" if name == column else name: text for name, text in cells.items() if text})
        for line, cells in rows
    ]
    return tuple(convert(cells, PlaneEntry, f"{path} line {line}", strict=False) for line, cells in lines)


def _check_depths(path: Path, planes: Sequence[PlaneEntry]) -> float | None:
    """Refuse planes that are not evenly spaced; µm between them, where they state their depths."""
    numbers = [i if one.z is None else one.z for i, one in enumerate(planes)]
    um = np.array([one.z_um for one in planes], np.float64)  # NaN where there is none
    steps, spacing = np.diff(um), None
    if len(steps) and not np.isnan(um).all():
        times = steps / steps.min() if (steps > 0).all() else np.array([0.5])
        if (abs(times - np.round(times)) > UNEVEN).any():
            raise UsageError(
                f"{path}: z_um is {', '.join(f'{z:g}' for z in um)}; allowed: the depth of every section in "
                "µm, each below the one before, evenly spaced"
            )
        numbers = [0, *np.cumsum(np.round(times)).astype(int).tolist()]
        spacing = float(um[-1] - um[0]) / numbers[-1]
    for (before, first), (after, second) in pairwise(zip(numbers, planes, strict=True)):
        if after != before + 1:
            what = f"plane {before + 1} is missing" if after > before else "planes are out of order"
            raise UsageError(
                f"{path}: {what} between {first.slide} ({before}) and {second.slide} ({after}); planes are "
                "evenly spaced: give it, or a run of planes without a gap"
            )
    return spacing


def _listed(
    path: Path, entries: Sequence[PlaneEntry], mpp: float | None
) -> tuple[tuple[Plane, ...], tuple[int, int], float, dict[str, tuple[int, Affine]]]:
    """The planes of a list, the frame and its µm/px, and the sections that the planes are."""
    folder, frame = path if path.is_dir() else path.parent, None
    planes: list[Plane] = []
    sections = {}
    for i, one in enumerate(entries):
        entry = SlideEntry(folder / one.slide, one.name or Path(one.slide).stem, one.mpp)
        if not entry.path.exists():
            raise SlideOpenError(f"{path}: plane {entry.name} is missing: {entry.path} does not exist")
        opened = partial(open_entry, entry, mpp if entry.mpp is None else None)
        affine, origin = _affine(path, one.transform), None
        with opened() as slide:
            frame = frame or (slide.size_l0, slide.mpp)
            alike = slide.size_l0 == frame[0] and abs(slide.mpp / frame[1] - 1) <= SAME_PX
            if one.transform is None and not alike:
                (w, h), (width, height) = slide.size_l0, frame[0]
                raise GeometryError(
                    f"{path}: {entry.name} has {w} x {h} px at {slide.mpp:.4g} µm/px, {planes[0].name} "
                    f"{width} x {height} px at {frame[1]:.4g}; planes have to be alike, or have a transform: "
                    "seal-extract volume register"
                )
        if one.transform is not None:
            opened, origin = partial(_aligned, opened, affine, *frame), {"transform": affine.tolist()}
        planes.append(Plane(entry.name, entry.path, opened, partial(content, entry.path), origin))
        sections[entry.name] = (i, affine)
    size_px, mpp_l0 = frame or ((0, 0), 0.0)  # a list without planes is refused by `Volume`
    return tuple(planes), size_px, mpp_l0, sections


def _aligned(opened: Callable[[], Slide], affine: Affine, size_px: tuple[int, int], mpp: float) -> Slide:
    return AlignedSlide(opened(), affine, size_px, mpp)


def _planes_of_stack(stack: Stack, mpp: float | None) -> tuple[tuple[Plane, ...], tuple[int, int], float]:
    """The planes of a stack, the frame and its µm/px."""
    digits = len(str(stack.side(0, "z") - 1))
    planes = tuple(
        Plane(
            f"z{z:0{digits}}",
            stack.path,
            partial(StackPlane, stack, z, mpp),
            lambda: stack.content,
            {"z": z, "window": stack.window},
        )
        for z in range(stack.side(0, "z"))
    )
    with planes[0].open() as slide:
        if mpp is not None and not same_mpp(slide.mpp, mpp):
            raise ResolutionError(
                f"{stack.path}: {slide.mpp:.4g} µm/px by {slide.mpp_source}, but {mpp:.4g} is given; leave "
                "that out, or give a file with the true one"
            )
        return planes, slide.size_l0, slide.mpp


def _affine(path: Path, given: tuple[Row, Row] | str | None) -> Affine:
    """A transform as rows, or by the numbers in a text or in the file that it names: [2, 3], or [3, 3]."""
    affine = np.zeros((2, 3))
    if isinstance(given, str):
        file = path.parent / given
        with suppress(OSError, ValueError):  # numbers in any notation: of NumPy, CSV or JSON
            text = file.read_text(encoding="utf-8") if os.path.isfile(file) else given
            numbers = np.array([float(word) for word in re.split(r"[\s,;\[\]]+", text) if word])
            if len(numbers) == 6 or (len(numbers) == 9 and (numbers[6:] == (0, 0, 1)).all()):
                affine = numbers[:6].reshape(2, 3)
    else:
        affine = np.eye(2, 3) if given is None else np.array(given, np.float64)
    scale = abs(float(np.linalg.det(affine[:, :2])))
    if not np.isfinite(affine).all() or not 1e-4 < scale < 1e4:
        raise UsageError(
            f"{path}: transform {given} is no transform that can be undone; give [[a, b, x], [c, d, y]] in "
            "level-0 px, or a file with these numbers"
        )
    return affine


def _spacing(path: Path, stated: list[tuple[str, float | None]]) -> float:
    found = [(source, value) for source, value in stated if value is not None]
    if not found:
        raise ResolutionError(
            f"{path}: nothing says how many µm lie between two planes; look it up and type --spacing-um VALUE"
        )
    for source, value in found:
        if not 0 < value <= MOST_SPACING_UM:
            raise ResolutionError(
                f"{path}: {source} gives {value:.4g} µm between planes; "
                f"allowed: above 0 to {MOST_SPACING_UM:g}"
            )
        if not same_mpp(value, found[0][1]):
            raise ResolutionError(
                f"{path}: {found[0][0]} gives {found[0][1]:.4g} µm between planes, {source} {value:.4g}; "
                "give the true one alone"
            )
    return found[0][1]
