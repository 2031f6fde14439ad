"""Registration of serial sections: each is laid on the one before, rigidly by its tissue, then by its stain.

Stages: tissue and optical density at 8 µm/px -> the turn at which the masks overlap most -> the rigid and the
affine transform that densities agree on best (ECC: Evangelidis and Psarakis, IEEE TPAMI 30 (2008) 1858), by
OpenCV. Points are measured from the corner of the first pixel, as everywhere here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import GeometryError, UsageError
from seal_extract.publish import publish
from seal_extract.slides.entry import SlideEntry, open_entry
from seal_extract.slides.overview import read_overview
from seal_extract.slides.planes import Affine, inverse
from seal_extract.slides.readers import Array
from seal_extract.slides.slide import Slide
from seal_extract.tissue.mask import work_resolution
from seal_extract.tissue.segmentation import MASK_MPP, find_tissue

TURNS = 72  # that are tried
BLURS_PX = (12.0, 6.0, 3.0)  # sigma: coarse to fine
SEEN_PX = 3.0  # sigma at which densities are compared
LEAST_OVERLAP = 0.6
MOST_STRETCH = 1.1  # of an affine transform along any direction, either way
LEAST_GAIN = 0.02  # in agreement, for which an affine transform is preferred
PICTURE_PX = 500


@dataclass(frozen=True)
class Registered:
    """How a section lies on the one before.

    Attributes:
        name: of the section.
        transform: its level-0 pixels to those of the first section.
        overlap: of both tissues: twice what they share by the sum of both.
        agreement: correlation of their optical densities there.
        residual_um: median distance between their outlines.
        way: ``first``, ``rigid`` or ``affine``.
    """

    name: str
    transform: Affine
    overlap: float = 1.0
    agreement: float = 1.0
    residual_um: float = 0.0
    way: str = "first"

    def __str__(self) -> str:
        if self.way == "first":
            return f"{self.name}: the frame"
        return (
            f"{self.name}: {self.way}, tissue overlaps by {self.overlap:.1%}, outlines lie "
            f"{self.residual_um:.0f} µm apart, densities correlate by {self.agreement:.2f}"
        )


@dataclass(frozen=True)
class _Look:
    """A section at some 8 µm/px.

    Attributes:
        tissue: uint8 [h, w], 0 or 1.
        density: optical density in standard deviations from its mean; 0 beyond the tissue.
        rgb: uint8 [h, w, 3].
        downsample: level-0 px per px.
        mpp: µm/px.
    """

    tissue: Array
    density: NDArray[np.float32]
    rgb: Array
    downsample: float
    mpp: float

    @classmethod
    def at(cls, slide: Slide) -> _Look:
        overview = read_overview(slide, work_resolution(slide, MASK_MPP)[0])
        found = find_tissue(slide, overview=overview).mask.astype(np.uint8)
        height, width = found.shape
        if not found.any():
            raise GeometryError(f"{slide.path}: no tissue was found to register it by; leave it out")
        rgb = cv2.resize(overview.rgb, (width, height), interpolation=cv2.INTER_AREA)
        glass = np.median(rgb[found == 0], axis=0) if (found == 0).any() else np.full(3, 255.0)
        density = -np.log10(np.maximum(rgb, 1) / np.maximum(glass, 1)).mean(2)
        inside = density[found > 0]
        density = np.where(found > 0, (density - inside.mean()) / max(float(inside.std()), 1e-6), 0)
        downsample = slide.size_l0[0] / width
        return cls(
            found, density.astype(np.float32), np.asarray(rgb, np.uint8), downsample, slide.mpp * downsample
        )

    @property
    def centre(self) -> NDArray[np.float64]:
        return np.asarray(np.argwhere(self.tissue)[:, ::-1].mean(0) + 0.5)

    def blurred(self, sigma: float) -> NDArray[np.float32]:
        return np.asarray(cv2.GaussianBlur(self.density, (0, 0), sigma), np.float32)

    def moved(self, values: NDArray[Any], to: Affine, size_px: tuple[int, int]) -> NDArray[Any]:
        """One of its pictures in the frame of another: ``to`` takes its points there."""
        matrix = to.copy()
        matrix[:, 2] += to[:, :2] @ [0.5, 0.5] - 0.5  # OpenCV measures from the centre of the first pixel
        return np.asarray(cv2.warpAffine(values, matrix, size_px, flags=cv2.INTER_LINEAR))


def register_sections(
    sections: Sequence[SlideEntry],
    out: Path,
    spacing_um: float,
    *,
    mpp: float | None = None,
    overwrite: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> list[Registered]:
    """Lay serial sections on each other; write the JSON file of a volume, and a picture of each pair.

    Args:
        sections: in depth; the first is the frame.
        out: the JSON file; the picture lies beside it as a JPEG of the same name.
        spacing_um: µm between sections.
        mpp: µm/px at level 0, where a file does not state it.
        overwrite: replace the file.
        log: called with a line for each section.

    Raises:
        UsageError: fewer than two sections, or the file exists.
        GeometryError: the tissue of a section does not come to lie on that of the one before.
        SlideError: a section cannot be read.
    """
    if len(sections) < 2:
        raise UsageError(f"{len(sections)} section is given; give two or more, in the order of their depth")
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists; type --overwrite to replace it, or another -o")
    found: list[Registered] = []
    pictures: list[Array] = []
    before: _Look | None = None
    for entry in sections:
        with open_entry(entry, mpp) as slide:
            look = _Look.at(slide)
        if before is None:
            found.append(Registered(entry.name, np.eye(2, 3)))
        else:
            to, one = _lay(entry.name, look, before, found[-1].transform)
            if one.overlap < LEAST_OVERLAP:
                raise GeometryError(
                    f"{entry.name} cannot be laid on {found[-1].name}: their tissue overlaps by "
                    f"{one.overlap:.0%} (allowed: {LEAST_OVERLAP:.0%} or more); give its transform by hand"
                )
            found.append(one)
            pictures.append(_drawn(look, before, to))
        log(str(found[-1]))
        before = look
    planes = [
        {"slide": os.path.relpath(entry.path, out.parent), "name": entry.name}
        | ({"transform": one.transform.tolist()} if one.way != "first" else {})
        for entry, one in zip(sections, found, strict=True)
    ]
    file = {"spacing_um": spacing_um, "planes": planes} | ({} if mpp is None else {"mpp": mpp})
    with publish(out.with_suffix(".jpg")) as part:
        part.write_bytes(cv2.imencode(".jpg", np.hstack(pictures)[..., ::-1])[1].tobytes())
    with publish(out) as part:
        part.write_text(json.dumps(file, indent=1), encoding="utf-8")
    return found


def _lay(name: str, look: _Look, before: _Look, frame: Affine) -> tuple[Affine, Registered]:
    """The transform from a section to the one before, in pixels of `_Look`; and to the first, level-0."""
    size_px = before.tissue.shape[::-1]
    scale = look.mpp / before.mpp
    turns = []
    for turn in np.arange(TURNS) * (2 * math.pi / TURNS):
        linear = scale * np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        to = np.hstack([linear, (before.centre - linear @ look.centre)[:, None]])
        turns.append((_overlap(look, before, to), to))
    tried = [max(turns, key=lambda one: one[0])[1]]
    for sigma in BLURS_PX:
        tried.append(_refined(look, before, tried[-1], cv2.MOTION_EUCLIDEAN, sigma))
    rigid = max(tried, key=lambda to: _agreement(look, before, to))
    affine = _refined(look, before, rigid, cv2.MOTION_AFFINE, BLURS_PX[1])
    stretch = np.linalg.svd(affine[:, :2], compute_uv=False) / scale
    is_affine = (
        1 / MOST_STRETCH < stretch.min() <= stretch.max() < MOST_STRETCH
        and _agreement(look, before, affine) > _agreement(look, before, rigid) + LEAST_GAIN
        and _overlap(look, before, affine) > _overlap(look, before, rigid) - LEAST_GAIN
    )
    to = affine if is_affine else rigid
    own, theirs = (np.diag([d, d, 1.0]) for d in (look.downsample, before.downsample))
    level_0 = theirs @ np.vstack([to, [0, 0, 1]]) @ np.linalg.inv(own)
    whole = np.asarray((np.vstack([frame, [0, 0, 1]]) @ level_0)[:2])
    outline = cv2.morphologyEx(before.tissue, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    away = cv2.distanceTransform((outline == 0).astype(np.uint8), cv2.DIST_L2, 5)
    moved = look.moved(look.tissue, to, size_px)
    residual = np.median(away[cv2.morphologyEx(moved, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0])
    one = Registered(
        name,
        whole,
        _overlap(look, before, to),
        _agreement(look, before, to),
        float(residual * before.mpp),
        "affine" if is_affine else "rigid",
    )
    return to, one


def _overlap(look: _Look, before: _Look, to: Affine) -> float:
    moved = look.moved(look.tissue, to, before.tissue.shape[::-1]) > 0
    return float(2 * (moved & (before.tissue > 0)).sum() / (moved.sum() + before.tissue.sum()))


def _agreement(look: _Look, before: _Look, to: Affine) -> float:
    size_px = before.tissue.shape[::-1]
    both = (look.moved(look.tissue, to, size_px) > 0) & (before.tissue > 0)
    if both.sum() < 10:
        return 0.0
    moved = look.moved(look.blurred(SEEN_PX), to, size_px)[both]
    return float(np.nan_to_num(np.corrcoef(moved, before.blurred(SEEN_PX)[both])[0, 1]))


def _refined(look: _Look, before: _Look, to: Affine, kind: int, sigma: float) -> Affine:
    """The transform near ``to`` that densities agree on best; ``to`` itself where none is found."""
    scale = math.sqrt(abs(np.linalg.det(to[:, :2])))
    own = np.diag([scale, scale])  # a rigid transform of a picture that has been scaled first
    size_px = (max(1, round(side * scale)) for side in look.tissue.shape[::-1])
    scaled = look.moved(look.blurred(sigma), np.hstack([own, np.zeros((2, 1))]), tuple(size_px))
    back = inverse(np.hstack([to[:, :2] / scale, to[:, 2:]]))
    back[:, 2] += back[:, :2] @ [0.5, 0.5] - 0.5
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 60, 1e-5)
    try:
        _, found = cv2.findTransformECC(
            before.blurred(sigma), scaled, back.astype(np.float32), kind, criteria
        )
    except cv2.error:  # it does not converge
        return to
    matrix: Affine = np.asarray(found, np.float64)
    matrix[:, 2] += 0.5 - matrix[:, :2] @ [0.5, 0.5]
    refined = inverse(matrix)
    return np.hstack([refined[:, :2] * scale, refined[:, 2:]])


def _drawn(look: _Look, before: _Look, to: Affine) -> Array:
    """The section before with the moved one in the fields of a chessboard, and both outlines."""
    height, width = before.tissue.shape
    moved = 255 - look.moved(255 - look.rgb, to, (width, height))
    y, x = np.mgrid[:height, :width] * 12 // max(height, width)
    picture = np.where(((x + y) % 2 > 0)[..., None], moved, before.rgb)
    for tissue, colour in (
        (before.tissue, (0, 90, 255)),
        (look.moved(look.tissue, to, (width, height)), (255, 60, 0)),
    ):
        outlines, _ = cv2.findContours(tissue, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(picture, outlines, -1, colour, 2)
    return np.asarray(cv2.resize(picture, (PICTURE_PX, PICTURE_PX), interpolation=cv2.INTER_AREA), np.uint8)
