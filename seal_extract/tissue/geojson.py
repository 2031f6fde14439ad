"""Tissue outlines as polygons: traced from a mask, filled into a mask, written as GeoJSON and read from it.

Polygons are those of shapely. Their rings follow the edges between pixels, so that a mask that is traced and
filled again is the same mask. Exteriors run counter-clockwise and holes clockwise by the formula of RFC 7946
(on a screen, where y points down, it looks the other way round).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray

from seal_extract.errors import GeometryError
from seal_extract.publish import publish

Mask: TypeAlias = NDArray[np.bool_]
Points: TypeAlias = NDArray[np.float64]  # [K, 2] of (x, y)

MOST_BYTES = 2**27  # of a file; reading it takes ten times as much memory
MOST_CROSSINGS = 2**28  # of outlines with rows of pixels: half a minute
CROSSINGS_AT_A_TIME = 2**20
MOST_DEPTH = 50  # of nested collections
FARTHEST_PX = 2**40  # no slide has coordinates beyond
EXPORT = "export areas from QuPath: select the annotations, File > Export objects as GeoJSON"
TISSUE_RGB = (0, 128, 128)
MADE_OF = "seal_extract"  # a member of our own, which RFC 7946 (6.1) allows and QuPath ignores
MOST_HEAD = 2**24  # characters of the first line


# --- mask to polygons and back ----------------------------------------------------------------


def trace_polygons(mask: Mask) -> list[shapely.Polygon]:
    """Trace the connected parts of ``mask`` along pixel edges.

    Args:
        mask: bool [h, w].

    Returns:
        Polygons in pixels of the mask, (0, 0) its top-left corner. Where pixels touch only at a corner, that
        corner is cut off by half a pixel, because a ring that touches itself is no valid polygon.
    """
    contours, hierarchy = cv2.findContours(_tripled(mask), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    rings = [_corners(np.asarray(contour)) for contour in contours]
    parents = hierarchy[0, :, 3].tolist() if rings else []  # -1 of an exterior
    inside = defaultdict(list)
    for ring, parent in zip(rings, parents, strict=True):
        inside[parent].append(ring)
    return [shapely.Polygon(ring, inside[i]) for i, ring in enumerate(rings) if parents[i] < 0]


def _tripled(mask: Mask) -> NDArray[np.uint8]:
    """Each pixel as 3 x 3, without the corners at which pixels touch and share no side."""
    fine = cv2.resize(mask.view(np.uint8), None, fx=3, fy=3, interpolation=cv2.INTER_NEAREST)
    a, b, c, d = mask[:-1, :-1], mask[:-1, 1:], mask[1:, :-1], mask[1:, 1:]
    for touching, shifts in ((a & d & ~b & ~c, (2, 3)), (b & c & ~a & ~d, (3, 2))):
        row, column = np.nonzero(touching)
        fine[3 * row + 2, 3 * column + shifts[0]] = 0
        fine[3 * row + 3, 3 * column + shifts[1]] = 0
    return np.asarray(fine, np.uint8)


def _corners(contour: NDArray[np.integer]) -> Points:
    """The corners of a contour of the tripled mask, in pixels of the mask.

    Of the three pixels 3i, 3i + 1, 3i + 2 the outer ones border the edges i and i + 1, the middle one lies
    between: so they go to i, i + 0.5, i + 1, and the contour lies on the edges instead of inside them.
    OpenCV's contours are oriented the other way round than RFC 7946's rings.
    """
    ring = contour[:, 0] // 3 + contour[:, 0] % 3 / 2
    ring = ring[(ring != np.roll(ring, 1, axis=0)).any(axis=1)]
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return np.asarray(ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]][::-1])


def fill_polygons(polygons: Iterable[shapely.Polygon], shape: tuple[int, int]) -> Mask:
    """Set the pixels whose centre lies in any of ``polygons``, given in pixels of the mask: bool [h, w].

    Each polygon is filled by the even-odd rule. OpenCV's own filling would add the pixels of the outline.

    Raises:
        GeometryError: the outlines are too long to be those of tissue.
    """
    mask = np.zeros(shape, np.bool_)
    for polygon in polygons:
        x0, y0, x1, y1 = polygon.bounds
        left, right = np.clip((np.floor(x0), np.ceil(x1)), 0, shape[1]).astype(int)
        top, bottom = np.clip((np.floor(y0), np.ceil(y1)), 0, shape[0]).astype(int)
        if right > left and bottom > top:
            rings = [shapely.get_coordinates(ring) - (left, top) for ring in shapely.get_rings(polygon)]
            mask[top:bottom, left:right] |= _fill_even_odd(rings, (bottom - top, right - left))
    return mask


def _fill_even_odd(rings: Sequence[Points], shape: tuple[int, int]) -> Mask:
    """Pixels whose centre has an odd number of edges to its left."""
    height, width = shape
    start = np.concatenate([ring[:-1] for ring in rings])
    end = np.concatenate([ring[1:] for ring in rings])
    ends_y = np.stack([start[:, 1], end[:, 1]])
    first, stop = (
        np.clip(np.ceil(y - 0.5), 0, height).astype(int) for y in (ends_y.min(axis=0), ends_y.max(axis=0))
    )
    reached = np.cumsum(stop - first)  # rows whose centre line each edge and those before it cross
    if reached[-1] > MOST_CROSSINGS:
        raise GeometryError(
            f"its outlines cross {reached[-1]:.3g} rows of pixels, too many for tissue; "
            f"allowed: {MOST_CROSSINGS:.3g}; draw them again, simpler"
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


def inside_polygons(polygons: Sequence[shapely.Polygon], points: NDArray[np.number]) -> Mask:
    """Points that lie in one of the polygons, by the even-odd rule: [N, 2] of (x, y) to bool [N].

    A point on an edge belongs to the polygon on the right of the edge, or below it, so that polygons with a
    common edge have no point in common.
    """
    inside = np.zeros(len(points), np.bool_)
    just_beyond = np.array([2**-20, 2**-30])  # of an edge on which a point lies, px
    tree = shapely.STRtree(shapely.points(points + just_beyond))
    inside[tree.query(polygons, predicate="contains")[1]] = True
    return inside


# --- GeoJSON ----------------------------------------------------------------------------------


def write_polygons(path: Path, polygons: Iterable[shapely.Polygon], name: str = "Tissue") -> None:
    """Write level-0 polygons as annotations that QuPath imports, classified ``name``.

    Raises:
        OutputError: the file cannot be written.
    """
    properties = {"objectType": "annotation", "classification": {"name": name, "color": TISSUE_RGB}}
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [*map(_positions, shapely.get_rings(polygon))]},
            "properties": properties,
        }
        for polygon in polygons
    ]
    with publish(path) as part:
        part.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")


def _positions(ring: shapely.LinearRing) -> list[list[float]]:
    return [[int(v) if v == int(v) else v for v in point] for point in shapely.get_coordinates(ring).tolist()]


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
    """The ``made_of`` of `write_patches`; None if the first line of the file does not state it."""
    try:
        with path.open(encoding="utf-8") as file:
            found = json.loads(file.readline(MOST_HEAD) + "]}")[MADE_OF]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_polygons(path: Path) -> tuple[list[shapely.Polygon], list[shapely.Polygon]]:
    """Read the polygons of a GeoJSON file: a FeatureCollection, a Feature, a geometry, or a list of these.

    Returns:
        Those that are tissue, and those of a class that QuPath ignores (its name ends in ``*``).

    Raises:
        GeometryError: not GeoJSON, or a geometry other than polygons.
    """
    found: tuple[list[shapely.Polygon], list[shapely.Polygon]] = ([], [])
    try:
        for polygon, properties in _polygons(_load(path), None):
            found[_is_ignored(properties)].append(polygon)
    except GeometryError as exc:
        raise GeometryError(f"{path}: {exc}") from exc
    return found


def _load(path: Path) -> Any:
    try:
        if not path.is_file() and path.exists():
            raise GeometryError("it is no regular file; give a GeoJSON file")
        if path.stat().st_size > MOST_BYTES:
            raise GeometryError(
                f"it has {path.stat().st_size / 1e6:.0f} MB; allowed: {MOST_BYTES / 1e6:.0f} MB; "
                "export the outlines of the tissue only, not its cells"
            )
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as exc:
        raise GeometryError(f"it cannot be read ({exc.strerror or exc}); give a GeoJSON file") from exc
    except (ValueError, RecursionError) as exc:  # both JSON and UTF-8
        raise GeometryError(f"it is not GeoJSON ({exc}); {EXPORT}") from exc


def _polygons(node: Any, properties: Any, depth: int = 0) -> Iterator[tuple[shapely.Polygon, Any]]:
    """All polygons below a node of GeoJSON, each with the properties of the feature it belongs to."""
    kind = node.get("type") if isinstance(node, dict) else type(node).__name__
    match node:
        case {"type": "Polygon"}:
            yield _polygon(node.get("coordinates")), properties
            return
        case {"type": "MultiPolygon"}:
            yield from ((_polygon(rings), properties) for rings in _list(node.get("coordinates")))
            return
        case {"type": "Feature"}:
            members, properties = [node.get("geometry")], node.get("properties")
        case {"type": "FeatureCollection"}:
            members = _list(node.get("features"))
        case {"type": "GeometryCollection"}:
            members = _list(node.get("geometries"))
        case list():
            members = node
        case _:
            raise GeometryError(
                f"it holds a {' '.join(str(kind).split())[:40]}; "
                f"allowed: Polygon, MultiPolygon and collections of these; {EXPORT}"
            )
    if depth == MOST_DEPTH:
        raise GeometryError(f"its collections are nested deeper than {MOST_DEPTH}; {EXPORT}")
    for member in members:
        yield from _polygons(member, properties, depth + 1)


def _is_ignored(properties: Any) -> bool:
    """QuPath's convention: classes such as ``Ignore*`` are to be left out."""
    found = properties.get("classification") if isinstance(properties, dict) else None
    if not isinstance(found, dict):
        return False
    names = found.get("names")
    return any(
        str(name).endswith("*")
        for name in (names if names and isinstance(names, list) else [found.get("name")])
    )


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise GeometryError(f"it has a {type(value).__name__} where GeoJSON has a list; {EXPORT}")
    return value


def _polygon(rings: Any) -> shapely.Polygon:
    """A polygon of rings [[x, y], ...], closed or not."""
    exterior, *holes = map(_ring, _list(rings) or [None])
    return shapely.Polygon(exterior, holes)


def _ring(points: Any) -> Points:
    try:
        ring = np.array([point[:2] for point in points], np.float64)
    except (TypeError, ValueError, IndexError, KeyError, OverflowError):
        ring = np.empty(0)
    if ring.ndim == 2 and len(ring) > 1 and (ring[0] == ring[-1]).all():
        ring = ring[:-1]
    if ring.ndim != 2 or ring.shape[1] != 2 or len(ring) < 3 or not (abs(ring) < FARTHEST_PX).all():
        raise GeometryError(f"a ring is not a list of 3 or more points [x, y] in level-0 pixels; {EXPORT}")
    return ring
