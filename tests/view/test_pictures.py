"""Numbers over the slide: one cell per patch where it lies, colours, the picture; and contact sheets."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from seal_extract import find_tissue, make_grid, open_slide
from seal_extract.errors import GeometryError, UsageError
from seal_extract.features.store import list_features
from seal_extract.genes.index import Found
from seal_extract.patches.grid import PatchGrid
from seal_extract.slides.drawing import caption_font, draw_text, text_width
from seal_extract.view.layers import Layer, PatchRaster, colour, limits
from seal_extract.view.pictures import (
    GAP_PX,
    PATCH_PX,
    QUERY_RGB,
    TITLE_PX,
    draw_contact_sheet,
    draw_heatmap,
    legend_of,
    read_patch,
)


def grid_of(xy, size=224, overlap=0, patch_px=224):
    return PatchGrid(np.array(xy, np.int64).reshape(-1, 2), patch_px, 0.5, size, overlap, 0, size)


@pytest.fixture
def cut(drawn_slides):
    """A slide and its grid."""
    with open_slide(drawn_slides[0]) as slide:
        yield slide, make_grid(slide, find_tissue(slide), 224, 0.5)


@given(
    cells=st.sets(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1),
    corner=st.tuples(st.integers(0, 5000), st.integers(0, 5000)),
    size=st.integers(16, 900),
    overlap=st.sampled_from([0, 56, 112]),
)
@settings(deadline=None)
def test_every_patch_has_a_cell_in_its_middle(cells, corner, size, overlap):
    step = max(1, round(size * (224 - overlap) / 224))
    grid = grid_of([(corner[0] + x * step, corner[1] + y * step) for x, y in sorted(cells)], size, overlap)
    raster = PatchRaster.of(grid)
    rgb = np.random.default_rng(0).integers(0, 256, (len(grid), 3), dtype=np.uint8)
    picture = raster.paint(rgb)
    assert picture[..., 3].astype(bool).sum() == len(grid)
    column, row = np.floor(
        (grid.xy_l0 + grid.patch_size_l0 / 2 - np.array(raster.bounds_l0[:2])) / raster.cell_l0
    ).T.astype(int)
    np.testing.assert_array_equal(picture[row, column, :3], rgb)
    assert raster.bounds_l0[2] - raster.bounds_l0[0] == pytest.approx(raster.shape[1] * raster.cell_l0)


def test_patches_on_no_common_grid_are_drawn_finer():
    raster = PatchRaster.of(grid_of([(0, 0), (300, 17), (1000, 555)]))
    assert raster.cell_l0 == 28
    png = Layer(np.diag([9, 9, 9]).astype(np.uint8), {}).png(raster)
    rgba = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
    assert [int((rgba[..., channel] == 9).sum()) for channel in range(3)] == [64, 64, 64]
    assert (rgba[..., 3] > 0).sum() == 3 * 64


def test_no_patch_cannot_be_drawn():
    with pytest.raises(GeometryError, match="there is no patch to draw"):
        PatchRaster.of(grid_of([]))


def test_colours_go_from_dark_to_light_and_stop_at_the_ends():
    rgb = colour(np.array([-5.0, 0, 0.5, 1, 9]), 0, 1).astype(int)
    assert rgb.sum(1).tolist() == sorted(rgb.sum(1).tolist())
    assert rgb[0].tolist() == rgb[1].tolist()
    assert rgb[3].tolist() == rgb[4].tolist()
    assert limits(np.full(5, 3.0))[1] > 3.0


def test_the_picture_has_each_patch_in_its_colour(cut, tmp_path):
    slide, grid = cut
    values = np.arange(len(grid), dtype=float)
    low, high = draw_heatmap(slide, grid, values, tmp_path / "a.png", "CD24", unit="log1p")
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    wanted = colour(values, low, high).astype(int)
    x0, y0, x1, _ = PatchRaster.of(grid).bounds_l0
    margin = 0.04 * max(x1 - x0, PatchRaster.of(grid).bounds_l0[3] - y0)
    left, top = max(0, x0 - margin), max(0, y0 - margin)
    right = min(slide.size_l0[0], x1 + margin)
    scale = picture.shape[1] / (right - left)
    for (x, y), rgb in zip(grid.xy_l0 + grid.patch_size_l0 / 2, wanted, strict=True):
        seen = picture[int((y - top) * scale), int((x - left) * scale)]
        grey = (seen - 0.65 * rgb) / 0.35  # what lies under the colour is grey, so the same in all channels
        assert np.ptp(grey) < 6


def test_the_legend_says_what_lies_beyond_the_colours():
    values = np.concatenate([np.full(98, 0.5), [0.0, 9.0], np.linspace(0.4, 0.6, 100)])
    legend = legend_of("CD24", "log1p", "a.svs", values)
    assert legend.ends == ("≤ 0.402", "≥ 0.598")
    assert legend.span == "colours from the 1st to the 99th percentile; all from 0 to 9"
    assert legend_of("CD24", "log1p", "a.svs", np.full(7, 0.5)).ends == ("0.5", "0.5")


@pytest.mark.parametrize("sign", "µ²≤≥")
def test_signs_that_the_font_lacks_are_drawn(sign):
    def drawn(text):
        picture = Image.new("L", (60, 60), 255)
        draw_text(ImageDraw.Draw(picture), (10, 10), text, caption_font(24), ink=0)
        return np.asarray(picture)

    plain = drawn({"µ": "u", "²": "2", "≤": "<", "≥": ">"}[sign])
    lacking = np.asarray(drawn("\uffff"))
    assert (drawn(sign) != lacking).any()
    assert 0 < (drawn(sign) != plain).sum() < (plain != 255).size / 4
    assert text_width(f"7.4 mm{sign}", caption_font(24)) > text_width("7.4 mm", caption_font(24))


def test_values_that_do_not_fit_are_refused(cut, tmp_path):
    slide, grid = cut
    with pytest.raises(UsageError, match=r"values are \[1\] for \d+ patches"):
        draw_heatmap(slide, grid, np.zeros(1), tmp_path / "a.png", "x")
    with pytest.raises(UsageError, match="the value of patch 0 is not finite"):
        draw_heatmap(slide, grid, np.full(len(grid), np.nan), tmp_path / "a.png", "x")


def test_a_contact_sheet_shows_what_was_asked_with_first(viewer_out, tmp_path):
    slides, _ = list_features(viewer_out)
    asked, found = Found(slides[1], 0, 1.0), [Found(slides[0], 1, 0.5)]
    with open_slide(slides[1].provenance["slide"]["path"]) as slide:
        patch = np.asarray(read_patch(slide, slides[1], 0))
    for query in (asked, Image.fromarray(patch)):
        draw_contact_sheet(found, tmp_path / "sheet.png", "title", query=query)
        sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
        x, y = GAP_PX, TITLE_PX
        np.testing.assert_array_equal(sheet[y : y + PATCH_PX, x : x + PATCH_PX], patch)
        assert (sheet[y - 4 : y, x : x + PATCH_PX] == QUERY_RGB).all()
    draw_contact_sheet(found, tmp_path / "alone.png", "title")
    assert not (np.asarray(Image.open(tmp_path / "alone.png").convert("RGB")) == QUERY_RGB).all(2).any()
