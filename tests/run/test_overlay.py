"""The picture per slide shows the tissue's outline, every patch, and says what it shows."""

from collections import Counter
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import ExifTags, Image

from seal_extract.patches.grid import make_grid
from seal_extract.run.job import find_tissue_and_grid
from seal_extract.run.options import ExtractOptions
from seal_extract.run.overlay import PATCH_RGB, TISSUE_RGB, draw_overlay
from seal_extract.slides.drawing import read_thumbnail, round_length
from seal_extract.slides.overview import read_picture
from seal_extract.tissue.mask import TissueMask


def half_tissue(slide, downsample=16.0):
    width, height = slide.size_l0
    mask = np.zeros((round(height / downsample), round(width / downsample)), bool)
    mask[:, : mask.shape[1] // 2] = True
    return TissueMask(mask, slide.mpp * downsample, downsample, slide.size_l0)


def near(picture, rgb, tolerance=40):
    """Where the picture has about this colour: bool [h, w]."""
    return (np.abs(picture.astype(int) - rgb) < tolerance).all(axis=2)


@pytest.fixture
def white(drawn):
    slide = drawn(1200, 800, mpp=0.5)
    slide.pixels[:] = 250
    return slide


def draw(path, slide, patch_px=100):
    """The picture of a slide whose left half is tissue, under patches of that size."""
    mask = half_tissue(slide)
    draw_overlay(slide, read_picture(slide), mask, make_grid(slide, mask, patch_px, 0.5), path)
    return np.asarray(Image.open(path))


@pytest.mark.parametrize(
    ("downsamples", "shape", "levels"),
    [((1.0, 4.0), (900, 1000), [1]), ((1.0,), (1843, 2048), [0]), ((1.0, 4.0, 16.0), (900, 1000), [1, 2])],
)
def test_no_pixel_is_read_for_the_picture_that_was_read_for_the_tissue(drawn, downsamples, shape, levels):
    """Where a coarse level does for the tissue, but for no picture, the next finer one is read too."""
    slide, read = drawn(4000, 3600, mpp=0.25, downsamples=downsamples), Counter()
    read_region = slide.read_region

    def counting(xy_l0, level, size_px):
        read[level] += size_px[0] * size_px[1]
        return read_region(xy_l0, level, size_px)

    slide.read_region = counting
    *_, picture = find_tissue_and_grid(slide, ExtractOptions())
    assert read == {level: np.prod(slide.levels[level].size_px) for level in levels}
    assert picture.shape == (*shape, 3)
    one, other = (Image.fromarray(pixels).reduce(8) for pixels in (picture, read_picture(slide)))
    assert np.abs(np.asarray(one, int) - other).max() < 12


def test_patches_and_outline_lie_where_they_should(white, tmp_path):
    picture = draw(tmp_path / "a.jpg", white)
    assert picture.shape[1] == 1200
    assert picture.shape[0] > 800  # the caption is added below
    canvas = picture[:800]
    lines = near(canvas, PATCH_RGB)
    assert lines[:, :598].any(axis=0).sum() > 500
    assert not lines[:, 610:].any()
    outline = near(canvas, TISSUE_RGB)
    assert outline[:, 590:610].any()
    assert not outline[:, 620:].any()
    inside, outside = canvas[20:80, 120:180].mean(), canvas[20:80, 900:1100].mean()
    assert inside < outside - 10  # patches are tinted


@pytest.mark.parametrize("patch_px", [100, 4])
def test_an_outline_leaves_the_stains_as_they_are_where_a_tint_does_not(white, tmp_path, patch_px):
    mask = half_tissue(white)
    grid = make_grid(white, mask, patch_px, 0.5)
    grid = replace(grid, xy_l0=grid.xy_l0[grid.xy_l0[:, 0] < 400])
    also = {tmp_path / "b.jpg": "outline"}
    draw_overlay(white, white.pixels, mask, grid, tmp_path / "a.jpg", also=also)
    draw_overlay(white, white.pixels, mask, grid, tmp_path / "c.jpg", style="outline")
    assert (tmp_path / "b.jpg").read_bytes() == (tmp_path / "c.jpg").read_bytes()
    tinted, outlined = (np.asarray(Image.open(tmp_path / name)) for name in ("a.jpg", "c.jpg"))
    inside = np.s_[115:185, 115:185]  # of a large patch, or in the middle of tiny ones
    assert np.abs(outlined[inside].astype(int) - 250).max() <= 4
    assert tinted[inside].mean() < 240
    assert near(outlined[100:700, 395:405], PATCH_RGB, 60).any(axis=1).all()  # where they end


def test_tiny_patches_are_filled_instead_of_framed(white, tmp_path):
    picture = draw(tmp_path / "a.jpg", white, 4)
    assert picture[100:700, 50:550].std(axis=(0, 1)).max() < 12
    assert picture[400, 300, 0] < picture[400, 900, 0] - 50


def test_no_patches_and_no_mask_still_give_a_picture(white, tmp_path):
    empty = TissueMask(np.zeros((50, 75), bool), 8.0, 16.0, white.size_l0)
    draw_overlay(white, white.pixels, None, make_grid(white, empty, 100, 0.5), tmp_path / "a.jpg")
    picture = np.asarray(Image.open(tmp_path / "a.jpg"))
    assert not near(picture, PATCH_RGB).any()
    assert not near(picture, TISSUE_RGB).any()


def test_small_slides_are_enlarged_and_large_ones_reduced(drawn, tmp_path):
    for side in (300, 5000):
        picture = draw(tmp_path / f"{side}.jpg", drawn(side, side, mpp=0.5), 64)
        assert 900 <= picture.shape[1] <= 2048


def test_an_overlay_carries_its_thumbnail_where_exif_has_it(white, tmp_path):
    picture = draw(tmp_path / "a.jpg", white)
    jpeg = read_thumbnail(tmp_path / "a.jpg")
    small = np.asarray(Image.open(BytesIO(jpeg)))
    assert small.shape == (213, 320, 3)  # 1200 x 800 px without the caption
    large = np.asarray(Image.fromarray(picture[:800]).resize((320, 213), Image.Resampling.LANCZOS))
    # 2.7 by the loss of two JPEGs at the thin lines; with the caption in it, or 8 px off, it were 9.8
    assert np.abs(small.astype(int) - large).mean() < 5
    with Image.open(tmp_path / "a.jpg") as opened:
        ifd = opened.getexif().get_ifd(ExifTags.IFD.IFD1)
    start, length = ifd[ExifTags.Base.JpegIFOffset], ifd[ExifTags.Base.JpegIFByteCount]
    assert (tmp_path / "a.jpg").read_bytes().find(jpeg) == 20 + 10 + start  # after JFIF's segment and "Exif"
    assert length == len(jpeg)


@pytest.mark.parametrize("times", [3, 9])
def test_the_caption_is_legible_and_fits_however_long_the_name_is(white, tmp_path, times):
    white.path = tmp_path / ("a-rather-long-slide-name-" * times + ".svs")
    picture = draw(tmp_path / "a.jpg", white)
    ink = picture[800:].mean(axis=2) < 128
    assert ink.sum() > 500
    assert not ink[:, -8:].any()  # nothing is cut off at the right
    assert not ink[:, 1020:1040].any()  # between the text and the scale bar


@pytest.mark.parametrize(("um", "bar"), [(130, 100), (1999, 1000), (2000, 2000), (740, 500), (0.9, 0.5)])
def test_scale_bars_are_round(um, bar):
    assert round_length(um) == pytest.approx(bar)
