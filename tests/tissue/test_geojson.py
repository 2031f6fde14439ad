"""Tissue goes to GeoJSON and comes back; QuPath's variants are read, all else is refused in one line."""

import json
import os
import time
import tracemalloc

import cv2
import numpy as np
import pytest
import shapely
from conftest import DrawnSlide
from hypothesis import given, settings
from hypothesis import strategies as st
from slide_helpers import masks

from seal_extract.errors import GeometryError, OutputError, UsageError
from seal_extract.tissue.geojson import fill_polygons, inside_polygons, trace_polygons
from seal_extract.tissue.mask import TissueMask

SLIDE = DrawnSlide(np.zeros((600, 800, 3), np.uint8), 0.5)


def ring(x0, y0, x1, y1):
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def polygon(*rings):
    return {"type": "Polygon", "coordinates": list(rings)}


def feature(geometry, name="Tissue"):
    return {"type": "Feature", "geometry": geometry, "properties": {"classification": {"name": name}}}


def read(tmp_path, content, mpp=8.0):
    path = tmp_path / "tissue.geojson"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return TissueMask.from_geojson(path, SLIDE, mpp)


# --- tracing and filling ----------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(masks(16))
def test_a_mask_is_traced_into_valid_polygons_of_its_area_and_filled_again(mask):
    polygons = trace_polygons(mask)
    assert (fill_polygons(polygons, mask.shape) == mask).all()
    assert all(polygon.is_valid for polygon in polygons)
    rings = shapely.get_rings(polygons)
    points = shapely.get_coordinates(list(rings))
    assert len(np.unique(points, axis=0)) == len(points) - len(rings)  # none touch
    for polygon in polygons:
        assert polygon.exterior.is_ccw
        assert not any(hole.is_ccw for hole in polygon.interiors)
        assert len(polygon.exterior.coords) == len(polygon.exterior.simplify(0).coords)  # corners only


def test_pixels_that_touch_at_a_corner_are_polygons_of_their_own():
    first, second = trace_polygons(np.eye(2, dtype=bool))
    assert first.area == second.area == 1 - 1 / 8


def test_polygons_run_along_the_edges_of_pixels():
    mask = np.zeros((40, 60), bool)
    mask[5:30, 10:50] = True
    mask[10:20, 20:30] = False
    (polygon,) = trace_polygons(mask)
    assert polygon.equals(shapely.box(10, 5, 50, 30) - shapely.box(20, 10, 30, 20))


def test_polygons_are_filled_by_pixel_centres_and_united():
    y, x = np.mgrid[:12, :12] + 0.5
    triangle = shapely.Polygon([(0, 0), (10, 0), (0, 10)])
    assert (fill_polygons([triangle], (12, 12)) == (x + y < 10)).all()
    filled = fill_polygons([shapely.box(0, 0, 6, 6), shapely.box(3, 3, 9, 9)], (10, 10))
    assert filled[4, 4]
    assert filled.sum() == 36 + 36 - 9


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=9, unique=True))
def test_points_and_pixel_centres_are_inside_by_one_rule(ring):
    """Also where an outline crosses itself, and where a centre lies on it."""
    polygon = shapely.Polygon([(x + 0.5, y + 0.5) for x, y in ring])
    centres = np.stack(np.meshgrid(np.arange(11), np.arange(11)), -1).reshape(-1, 2) + 0.5
    filled = fill_polygons([polygon], (11, 11))
    assert (inside_polygons([polygon], centres) == filled.ravel()).all()


# --- out and back -----------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(masks(16), st.floats(0.25, 8.0), st.integers(100, 900), st.integers(100, 900))
def test_round_trip_changes_only_border_pixels(tmp_path_factory, noise, slide_mpp, width, height):
    slide = DrawnSlide(np.zeros((height, width, 3), np.uint8), slide_mpp)
    path = tmp_path_factory.mktemp("round") / "tissue.geojson"
    path.write_text(json.dumps(polygon(ring(0, 0, width, height))))
    whole = TissueMask.from_geojson(path, slide)
    (h, w), block = whole.mask.shape, np.kron(noise, np.ones((4, 4), bool))
    mask = np.tile(block, (-(-h // block.shape[0]), -(-w // block.shape[1])))[:h, :w]

    TissueMask(mask, whole.mpp, whole.downsample, whole.size_l0).to_geojson(path)
    again = TissueMask.from_geojson(path, slide).mask if mask.any() else mask
    border = cv2.morphologyEx(mask.view(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    border[-1] = border[:, -1] = True  # may lie more than half outside the slide
    assert ((again == mask) | border).all()


def test_qupath_finds_annotations_of_class_tissue_in_level0_pixels(tmp_path):
    mask = np.zeros((38, 50), bool)
    mask[10:20, 5:30] = True
    mask[12:14, 10:12] = False
    TissueMask(mask, 8.0, 16.0, SLIDE.size_l0).to_geojson(tmp_path / "out" / "tissue.geojson")
    written = json.loads((tmp_path / "out" / "tissue.geojson").read_text())
    assert written["type"] == "FeatureCollection"
    (only,) = written["features"]
    assert only["properties"]["objectType"] == "annotation"
    assert only["properties"]["classification"]["name"] == "Tissue"
    exterior, hole = only["geometry"]["coordinates"]
    assert exterior[0] == exterior[-1]
    assert sorted(map(tuple, exterior[:-1])) == [(80, 160), (80, 320), (480, 160), (480, 320)]
    assert sorted(map(tuple, hole[:-1])) == [(160, 192), (160, 224), (192, 192), (192, 224)]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tissue.geojson"]


def test_no_tissue_is_an_empty_collection(tmp_path):
    TissueMask(np.zeros((38, 50), bool), 8.0, 16.0, SLIDE.size_l0).to_geojson(tmp_path / "none.geojson")
    written = json.loads((tmp_path / "none.geojson").read_text())
    assert written == {"type": "FeatureCollection", "features": []}


def test_a_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    tissue = TissueMask(np.ones((38, 50), bool), 8.0, 16.0, SLIDE.size_l0)
    with pytest.raises(OutputError, match="a part of the path is a file"):
        tissue.to_geojson(tmp_path / "file" / "tissue.geojson")


# --- what QuPath and others write -------------------------------------------------------------

SQUARE = ring(160, 160, 480, 320)
MULTI = {"type": "MultiPolygon", "coordinates": [[SQUARE], [ring(0, 0, 64, 64)]]}


@pytest.mark.parametrize(
    ("content", "area_px"),
    [
        ({"type": "FeatureCollection", "features": [feature(polygon(SQUARE))]}, 200),
        (feature(polygon(SQUARE)), 200),
        (polygon(SQUARE), 200),
        ([feature(polygon(SQUARE)), feature(polygon(ring(0, 0, 64, 64)))], 216),
        (MULTI, 216),
        ({"type": "GeometryCollection", "geometries": [polygon(SQUARE), MULTI]}, 216),
        (polygon(SQUARE, ring(192, 192, 256, 256)), 184),
        (polygon([[x, y, 0] for x, y in SQUARE]), 200),  # a z that no one asked for
        (polygon(SQUARE[:-1]), 200),  # not closed
        (polygon(ring(480, 320, 160, 160)), 200),
        (polygon(ring(-500, 160, 160, 320)), 100),  # partly outside the slide
        ({"type": "Feature", "geometry": polygon(SQUARE), "properties": None}, 200),
        ("\ufeff" + json.dumps(polygon(SQUARE)), 200),  # a byte order mark
    ],
)
def test_polygons_in_all_their_packings(tmp_path, content, area_px):
    tissue = read(tmp_path, content)
    assert tissue.mask.shape == (38, 50)
    assert tissue.mask.sum() == area_px


@pytest.mark.parametrize(
    ("classification", "area_px"),
    [({"name": "Ignore*"}, 116), ({"names": ["Tumor", "Necrosis*"]}, 116), ({"names": 5, "name": "A"}, 216)],
)
def test_ignored_classes_are_cut_out(tmp_path, classification, area_px):
    hole = feature(polygon(ring(320, 160, 480, 320)))
    hole["properties"]["classification"] = classification
    tissue = read(tmp_path, [feature(polygon(SQUARE)), hole, feature(polygon(ring(0, 0, 64, 64)), "Tumor")])
    assert tissue.mask.sum() == area_px


def test_the_mask_has_the_resolution_asked_for(tmp_path):
    tissue = read(tmp_path, polygon(SQUARE), mpp=2.0)
    assert tissue.downsample == 4
    assert tissue.area_mm2 == pytest.approx(320 * 160 * 0.25 / 1e6)
    with pytest.raises(UsageError, match="allowed: 1 to 20"):
        read(tmp_path, polygon(SQUARE), mpp=0.1)


# --- what is refused --------------------------------------------------------------------------

RING, NESTED = "a ring is not a list of 3 or more points", "collections are nested deeper than 50"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "is not GeoJSON"),
        ("{", "is not GeoJSON"),
        ("[" * 100_000, "is not GeoJSON"),
        ("[" * 60 + "]" * 60, NESTED),
        ("null", "it holds a NoneType; allowed: Polygon"),
        ("[3]", "it holds a int; allowed: Polygon"),
        ({"a": 1}, "holds a None; allowed: Polygon, MultiPolygon"),
        ({"type": "Point", "coordinates": [1, 2]}, "holds a Point; allowed: Polygon, MultiPolygon"),
        (feature({"type": "LineString", "coordinates": SQUARE}), "holds a LineString; allowed: Polygon"),
        ({"type": "Line\nString", "coordinates": []}, "holds a Line String; allowed"),
        ({"type": "P" * 10_000}, "holds a PPP"),
        ({"type": "FeatureCollection"}, "a NoneType where GeoJSON has a list"),
        ({"type": "FeatureCollection", "features": []}, "holds no polygons; draw the tissue"),
        (feature(polygon(SQUARE), "Ignore*"), "holds no polygons"),
        (polygon(), RING),
        *((polygon(odd), RING) for odd in ([[0, 0], [1, 1], [0, 0]], [0, 1, 2], [["a", "b"]] * 4)),
        *((polygon([[0, 0], odd, [2, 2], [0, 0]]), RING) for odd in ([1], [10**400, 0], [1e300, 0])),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [NaN, 1], [2, 2]]]}', RING),
        ({"type": "Polygon", "coordinates": "none"}, "a str where GeoJSON has a list"),
        (polygon(ring(5000, 100, 6000, 200)), "y 100 to 200, but drawn.svs has x 0 to 800"),
    ],
)
def test_anything_else_is_refused_in_one_short_line(tmp_path, content, complaint):
    with pytest.raises(GeometryError, match=complaint) as caught:
        read(tmp_path, content)
    assert "\n" not in str(caught.value)
    assert "tissue.geojson" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_what_is_no_file_of_sane_size_is_refused_before_it_is_read(tmp_path):
    large, fifo = tmp_path / "large.geojson", tmp_path / "fifo.geojson"
    large.touch()
    os.truncate(large, 2**34)
    os.mkfifo(fifo)
    no_file = "it (cannot be read|is no regular file).*; give a GeoJSON file"
    for path in (tmp_path / "none.geojson", tmp_path, fifo):
        with pytest.raises(GeometryError, match=no_file):
            TissueMask.from_geojson(path, SLIDE)
    with pytest.raises(GeometryError, match="has 17180 MB; allowed: 134 MB"):
        TissueMask.from_geojson(large, SLIDE)


def test_a_zigzag_takes_bounded_memory_and_too_long_a_one_is_refused():
    x = np.linspace(0, 400, 20_001)
    zigzag = np.stack([x, np.arange(len(x)) % 2 * 400.0], 1)
    tracemalloc.start()
    mask = fill_polygons([shapely.Polygon([*zigzag, (400, 0)])], (400, 400))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert mask.shape == (400, 400)
    assert peak < 200e6  # 8 million crossings at a time would take 600 MB
    with pytest.raises(GeometryError, match=r"cross 3e.08 rows of pixels"):
        fill_polygons([shapely.Polygon(zigzag * (1, 37.5))], (15_000, 400))


def test_an_outline_of_a_quarter_million_edges_is_looked_up_in_seconds():
    turn = np.linspace(0, 2 * np.pi, 250_000)
    radius = 5e4 * (1 + 0.1 * np.sin(500 * turn))
    points = np.random.default_rng(0).uniform(-6e4, 6e4, (20_000, 2))
    began = time.perf_counter()
    inside = inside_polygons(
        [shapely.Polygon(np.stack([np.cos(turn), np.sin(turn)], 1) * radius[:, None])], points
    )
    assert time.perf_counter() - began < 10  # edge by edge it takes minutes
    angle, distance = np.arctan2(*points.T[::-1]), np.hypot(*points.T)
    clear = abs(distance - 5e4 * (1 + 0.1 * np.sin(500 * angle))) > 100
    assert (inside == (distance < 5e4 * (1 + 0.1 * np.sin(500 * angle))))[clear].all()
