"""Polygons between a mask, level-0 pixels and QuPath: traced, filled, written to GeoJSON, read back.

Rings follow the edges between pixels, so that a mask traced and filled again is the same mask. Orientation
is RFC 7946's (exterior counter-clockwise, holes clockwise, by the formula; on a screen, with y downwards, it
looks the other way round).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import GeometryError
from seal_extract.publish import publish

Mask: TypeAlias = NDArray[np.bool_]
Ring: TypeAlias = NDArray[np.float64]  # [K, 2], (x, y), the first point not repeated

ALLOWED = "Polygon, MultiPolygon and collections of these"
MOST_BYTES = 2**27  # of a file, which takes ten times as much to read
MOST_CROSSINGS = 2**28  # of outlines with rows of pixels: half a minute
CROSSINGS_AT_A_TIME = 2**20
MOST_DEPTH = 50  # of collections
FARTHEST_PX = 2**40  # coordinates beyond are no slide's
IN_QUPATH = "in QuPath: select the annotations, File > Export objects as GeoJSON"
TISSUE_RGB = (0, 128, 128)
MADE_OF = "seal_extract"  # a member of our own, which RFC 7946 (6.1) allows and QuPath passes over
MOST_HEAD = 2**24  # characters of the first line


class Polygon(NamedTuple):
    """A ring and the rings of its holes, each [K, 2] of (x, y)."""

    exterior: Ring
    holes: tuple[Ring, ...] = ()


# --- mask to polygons and back ----------------------------------------------------------------


def trace_polygons(mask: Mask) -> list[Polygon]:
    """Trace the connected parts of ``mask`` along pixel edges.

    Args:
        mask: bool [h, w].

    Returns:
        Polygons in pixels of the mask, (0, 0) its top-left corner. Where pixels touch only at a corner, that
        corner is cut off by half a pixel, because a ring that touches itself is no valid polygon.
    """
    contours, hierarchy = cv2.findContours(_tripled(mask), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    polygons = []
    for index, contour in enumerate(contours):
        _, _, child, parent = hierarchy[0][index]
        if parent >= 0:
            continue
        holes = []
        while child >= 0:
            holes.append(_corners(np.asarray(contours[child]), counter_clockwise=False))
            child = hierarchy[0][child][0]
        polygons.append(Polygon(_corners(np.asarray(contour), counter_clockwise=True), tuple(holes)))
    return polygons


def fill_polygons(polygons: Iterable[Polygon], shape: tuple[int, int]) -> Mask:
    """Set the pixels whose centre lies in any of ``polygons``, given in pixels of the mask: bool [h, w]."""
    mask = np.zeros(shape, np.bool_)
    for exterior, holes in polygons:
        left, top = np.clip(np.floor(exterior.min(axis=0)), 0, shape[::-1]).astype(int)
        right, bottom = np.clip(np.ceil(exterior.max(axis=0)), 0, shape[::-1]).astype(int)
        if right > left and bottom > top:
            rings = [ring - (left, top) for ring in (exterior, *holes)]
            mask[top:bottom, left:right] |= _fill_even_odd(rings, (bottom - top, right - left))
    return mask


def _tripled(mask: Mask) -> NDArray[np.uint8]:
    """Each pixel as 3 x 3, without the corners at which pixels touch and share no side."""
    fine = cv2.resize(mask.view(np.uint8), None, fx=3, fy=3, interpolation=cv2.INTER_NEAREST)
    a, b, c, d = mask[:-1, :-1], mask[:-1, 1:], mask[1:, :-1], mask[1:, 1:]
    for touching, shifts in ((a & d & ~b & ~c, (2, 3)), (b & c & ~a & ~d, (3, 2))):
        row, column = np.nonzero(touching)
        fine[3 * row + 2, 3 * column + shifts[0]] = 0
        fine[3 * row + 3, 3 * column + shifts[1]] = 0
    return np.asarray(fine, np.uint8)


def _corners(contour: NDArray[np.integer], *, counter_clockwise: bool) -> Ring:
    """The corners of a contour of the tripled mask, in pixels of the mask.

    Of the three pixels 3i, 3i + 1, 3i + 2 the outer ones border the edges i and i + 1, the middle one lies
    between: so they go to i, i + 0.5, i + 1, and the contour lies on the edges instead of inside them.
    """
    ring = contour[:, 0] // 3 + contour[:, 0] % 3 / 2
    ring = ring[(ring != np.roll(ring, 1, axis=0)).any(axis=1)]
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    ring = ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
    return np.asarray(ring if (signed_area(ring) > 0) == counter_clockwise else ring[::-1])


def signed_area(ring: Ring) -> float:
    """Area of a ring, positive where it runs counter-clockwise (shoelace formula)."""
    following = np.roll(ring, -1, axis=0)
    return float((ring[:, 0] * following[:, 1] - following[:, 0] * ring[:, 1]).sum() / 2)


def _fill_even_odd(rings: Sequence[Ring], shape: tuple[int, int]) -> Mask:
    """Pixels whose centre has an odd number of edges to its left."""
    height, width = shape
    start = np.concatenate(rings)
    end = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    ends_y = np.stack([start[:, 1], end[:, 1]])
    first, stop = (
        np.clip(np.ceil(y - 0.5), 0, height).astype(int) for y in (ends_y.min(axis=0), ends_y.max(axis=0))
    )
    reached = np.cumsum(stop - first)  # rows whose centre line each edge and those before it cross
    if reached[-1] > MOST_CROSSINGS:
        raise GeometryError(
            f"outlines that cross {reached[-1]:.3g} rows of pixels are no tissue's; "
            f"allowed: {MOST_CROSSINGS:.3g}; draw them anew"
        )
    toggles = np.zeros(height * (width + 1), np.uint8)
    for begin in range(0, reached[-1], CROSSINGS_AT_A_TIME):
        crossing = np.arange(begin, min(begin + CROSSINGS_AT_A_TIME, reached[-1]))
        edge = np.searchsorted(reached, crossing, side="right")
        row = stop[edge] - reached[edge] + crossing
        (x0, y0), (x1, y1) = start[edge].T, end[edge].T
        x = x0 + (row + 0.5 - y0) * (x1 - x0) / (y1 - y0)
        column = np.clip(np.ceil(x - 0.5), 0, width).astype(int)
        np.add.at(toggles, row * (width + 1) + column, 1)
    toggles &= 1
    return np.asarray(np.bitwise_xor.accumulate(toggles.reshape(height, -1), axis=1)[:, :width] > 0)


def inside_polygons(polygons: Iterable[Polygon], points: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Points that lie in one of the polygons, by the even-odd rule: float [N, 2] to bool [N]."""
    found = np.zeros(len(points), np.bool_)
    for polygon in polygons:
        odd = np.zeros(len(points), np.bool_)
        for ring in (polygon.exterior, *polygon.holes):
            for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
                if y0 != y1:
                    crosses = (points[:, 1] < y0) != (points[:, 1] < y1)
                    at = x0 + (points[:, 1] - y0) * ((x1 - x0) / (y1 - y0))
                    odd ^= crosses & (points[:, 0] < at)
        found |= odd
    return found


# --- GeoJSON ----------------------------------------------------------------------------------


def write_polygons(path: Path, polygons: Iterable[Polygon], name: str = "Tissue") -> None:
    """Write level-0 polygons as annotations that QuPath imports, classified ``name``.

    Raises:
        OutputError: the file cannot be written.
    """
    properties = {"objectType": "annotation", "classification": {"name": name, "color": TISSUE_RGB}}
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [_closed(ring) for ring in (exterior, *holes)]},
            "properties": properties,
        }
        for exterior, holes in polygons
    ]
    with publish(path) as part:
        part.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")


def write_patches(
    path: Path,
    xy_l0: NDArray[np.int64],
    patch_size_l0: int,
    measurements: dict[str, NDArray[Any]],
    made_of: dict[str, Any] | None = None,
) -> None:
    """Write patches as tiles that QuPath imports, with numbers that its measurement maps show.

    Args:
        path: the file.
        xy_l0: int64 [N, 2], top-left corners in level-0 pixels.
        patch_size_l0: their side in level-0 pixels.
        measurements: finite numbers [N] by the name that QuPath shows.
        made_of: JSON that `read_made_of` gives back.

    Raises:
        OutputError: the file cannot be written.
    """
    columns = {name: values.tolist() for name, values in measurements.items()}
    with publish(path) as part, part.open("w", encoding="utf-8") as file:
        about = "" if made_of is None else f'"{MADE_OF}": {json.dumps(made_of)}, '
        file.write(f'{{"type": "FeatureCollection", {about}"features": [')
        for row, (x, y) in enumerate(xy_l0.tolist()):
            right, bottom = x + patch_size_l0, y + patch_size_l0
            ring = [[x, y], [right, y], [right, bottom], [x, bottom], [x, y]]
            numbers = {name: float(f"{column[row]:.6g}") for name, column in columns.items()}
            tile = {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"objectType": "tile", "measurements": numbers},
            }
            file.write(f"{',' if row else ''}\n{json.dumps(tile)}")
        file.write("\n]}\n")


def read_made_of(path: Path) -> dict[str, Any] | None:
    """What `write_patches` was told that tiles were made of; None where the first line does not say it."""
    try:
        with path.open(encoding="utf-8") as file:
            found = json.loads(file.readline(MOST_HEAD) + "]}")[MADE_OF]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_polygons(path: Path) -> tuple[list[Polygon], list[Polygon]]:
    """Read the polygons of a GeoJSON file: a FeatureCollection, a Feature, a geometry, or a list of these.

    Returns:
        Those that are tissue, and those of a class that QuPath ignores (its name ends in ``*``).

    Raises:
        GeometryError: not GeoJSON, or a geometry other than polygons.
    """
    kept: list[Polygon] = []
    ignored: list[Polygon] = []
    for geometry, properties in _geometries(path, _load(path), {}):
        polygons = ignored if _is_ignored(properties) else kept
        several = geometry["type"] == "MultiPolygon"
        for rings in _list(path, geometry.get("coordinates")) if several else [geometry.get("coordinates")]:
            exterior, *holes = (_open(path, ring) for ring in _list(path, rings) or [None])
            polygons.append(Polygon(exterior, tuple(holes)))
    return kept, ignored


def _load(path: Path) -> Any:
    try:
        if not path.is_file() and path.exists():
            raise GeometryError(f"cannot read {path}: it is no regular file; give a GeoJSON file")
        if path.stat().st_size > MOST_BYTES:
            raise GeometryError(
                f"{path} has {path.stat().st_size / 1e6:.0f} MB; allowed: {MOST_BYTES / 1e6:.0f} MB; "
                "export the outlines of the tissue only, not its cells"
            )
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as exc:
        raise GeometryError(f"cannot read {path}: {exc.strerror or exc}; give a GeoJSON file") from exc
    except (ValueError, RecursionError) as exc:  # both JSON and UTF-8
        raise GeometryError(f"{path} is not GeoJSON ({exc}); {IN_QUPATH}") from exc


def _geometries(
    path: Path, node: Any, properties: Any, depth: int = 0
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Walk to the polygons; each comes with the properties of the feature it belongs to."""
    members: Any
    if isinstance(node, list):
        members = node
    elif not isinstance(node, dict):
        raise GeometryError(
            f"{path} holds a {type(node).__name__} where a GeoJSON object belongs; {IN_QUPATH}"
        )
    elif node.get("type") in ("Polygon", "MultiPolygon"):
        yield node, properties
        return
    elif node.get("type") == "Feature":
        members, properties = [node.get("geometry")], node.get("properties")
    elif node.get("type") == "FeatureCollection":
        members = _list(path, node.get("features"))
    elif node.get("type") == "GeometryCollection":
        members = _list(path, node.get("geometries"))
    else:
        kind = " ".join(str(node.get("type")).split())[:40]
        raise GeometryError(f"{path} holds a {kind}; allowed: {ALLOWED}; {IN_QUPATH} of areas only")
    if depth == MOST_DEPTH:
        raise GeometryError(f"{path} nests its collections deeper than {MOST_DEPTH}; {IN_QUPATH}")
    for member in members:
        yield from _geometries(path, member, properties, depth + 1)


def _is_ignored(properties: Any) -> bool:
    """QuPath's convention: classes such as ``Ignore*`` are to be left out."""
    found = properties.get("classification") if isinstance(properties, dict) else None
    if not isinstance(found, dict):
        return False
    names = found.get("names")
    if not isinstance(names, list) or not names:
        names = [found.get("name")]
    return any(str(name).endswith("*") for name in names)


def _list(path: Path, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise GeometryError(f"{path}: a {type(value).__name__} where GeoJSON has a list; {IN_QUPATH}")
    return value


def _open(path: Path, ring: Any) -> Ring:
    """[[x, y], ...] with the first point repeated at the end -> float64 [K, 2] without it."""
    try:
        points = np.array([point[:2] for point in ring], np.float64)
    except (TypeError, ValueError, IndexError, KeyError, OverflowError):
        points = np.empty(0)
    if points.ndim == 2 and len(points) > 1 and (points[0] == points[-1]).all():
        points = points[:-1]
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3 or not (abs(points) < FARTHEST_PX).all():
        raise GeometryError(
            f"{path}: a ring is not a list of 3 or more points [x, y] in level-0 pixels; {IN_QUPATH}"
        )
    return points


def _closed(ring: Ring) -> list[list[float]]:
    points = [[int(v) if v == int(v) else v for v in point] for point in ring.tolist()]
    return [*points, points[0]]
