"""Tiles shrunk into patches: Pillow's pixels within a grey level, and how far the fast way is from them."""

import numpy as np
import pytest
import torch
from conftest import shared
from PIL import Image
from slide_helpers import grid_at, openslides_regions, read, spread

from seal_extract.patches.grid import PatchGrid
from seal_extract.patches.regions import RegionReader
from seal_extract.patches.tiles import open_patch_reader
from seal_extract.slides.slide import open_slide

CPU = torch.device("cpu")


def patches_of(slide, grid, **kwargs):
    decoder = open_patch_reader(slide, grid, CPU, **kwargs)
    return read(decoder), decoder.name


@pytest.mark.parametrize(("patch_px", "patch_size_l0"), [(128, 256), (100, 300), (112, 200), (64, 512)])
def test_bicubic_is_pillows_within_one_grey_level(slide_of, patch_px, patch_size_l0):
    path = slide_of("422-208")
    with open_slide(path) as slide:
        grid = PatchGrid(
            np.array(spread(slide, 0, patch_size_l0)), patch_px, 1, patch_size_l0, 0, 0, patch_size_l0
        )
        got, _ = patches_of(slide, grid)
    for patch, region in zip(got, openslides_regions(path, grid), strict=True):
        want = np.asarray(Image.fromarray(region).resize((patch_px, patch_px), Image.Resampling.BICUBIC))
        assert np.abs(patch.astype(int) - want).max() <= 1


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("aligned", [True, False])
def test_area_is_pillows_box_within_one_grey_level(slide_of, factor, aligned):
    path = slide_of("420-240")
    with open_slide(path) as slide:
        xy = np.array([(0, 0), (120, 240), (60, 12), (1104, 612)]) + (0 if aligned else [7, 1])
        grid = PatchGrid(xy, 96, 1, 96 * factor, 0, 0, 96 * factor)
        got, name = patches_of(slide, grid, filter="area")
    assert name == "JPEG tiles"
    for patch, region in zip(got, openslides_regions(path, grid), strict=True):
        want = np.asarray(Image.fromarray(region).resize((96, 96), Image.Resampling.BOX))
        assert np.abs(patch.astype(int) - want).max() <= 1


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_area_tile_by_tile_is_area_patch_by_patch(slide_of, factor):
    with open_slide(slide_of("420")) as slide:
        xy = [(x, y) for x in range(0, 900, 8 * 13) for y in range(0, 500, 8 * 11)]
        grid = PatchGrid(np.array(xy), 64, 1, 64 * factor, 0, 0, 64 * factor)
        decoder = open_patch_reader(slide, grid, CPU, filter="area")
        assert decoder._reduction == factor
        by_region = RegionReader(slide, grid, decoder._resampling)
        np.testing.assert_array_equal(read(decoder), read(by_region))


FAR = [("420", 2), ("420", 4), ("420", 8), ("422-208", 4), ("rgb", 2), ("444", 4)]


@pytest.mark.parametrize(("kind", "factor"), FAR)
def test_fast_decode_stays_near_the_default(slide_of, kind, factor):
    with open_slide(slide_of(kind)) as slide:
        xy = [(x, y) for x in range(0, 900, 104) for y in range(0, 500, 88)]
        grid = PatchGrid(np.array(xy), 64, 1, 64 * factor, 0, 0, 64 * factor)
        want, name = patches_of(slide, grid, filter="area")
        got, fast_name = patches_of(slide, grid, filter="area", fast=True)
    assert (name, fast_name) == ("JPEG tiles", f"JPEG tiles at 1/{factor}")
    difference = got.astype(int) - want
    assert np.abs(difference).mean() < 1.5
    assert np.abs(difference.mean((0, 1, 2))).max() < 0.3


def test_fast_decode_of_the_real_slide_stays_near_the_default():
    with open_slide(shared("data/wsi/CMU-1-Small-Region.svs")) as slide:
        xy = [(x, y) for x in range(0, 1700, 448) for y in range(0, 2500, 448)]
        grid = PatchGrid(np.array(xy), 224, 1, 448, 0, 0, 448)
        want, _ = patches_of(slide, grid)
        got, name = patches_of(slide, grid, fast=True)
    assert name == "JPEG tiles at 1/2"
    difference = got.astype(int) - want
    assert np.abs(difference).mean() < 1.5
    assert np.abs(difference.mean((0, 1, 2))).max() < 0.3


def test_fast_decode_takes_the_largest_scale_that_fits_and_resamples_the_rest(slide_of):
    with open_slide(slide_of("420")) as slide:
        for factor, scale in ((6, 2), (12, 4)):
            grid = PatchGrid(np.array([(0, 0), (104, 88)]), 32, 1, 32 * factor, 0, 0, 32 * factor)
            want, _ = patches_of(slide, grid)
            got, name = patches_of(slide, grid, fast=True)
            assert name == f"JPEG tiles at 1/{scale}"
            assert np.abs(got.astype(int) - want).mean() < 1.5


@pytest.mark.parametrize(
    ("xy", "patch_px", "patch_size_l0"),
    [
        ([(0, 0), (101, 40)], 64, 128),  # between blocks of 2 px
        ([(0, 0), (100, 40)], 64, 192),  # a factor of 3
        ([(0, 0), (100, 40)], 64, 160),  # no whole factor
        ([(0, 0), (100, 40)], 64, 64),
        ([(0, 0), (1450, 40)], 64, 128),  # out of the slide
    ],
)
def test_fast_decode_changes_nothing_where_it_does_not_apply(slide_of, xy, patch_px, patch_size_l0):
    with open_slide(slide_of("420")) as slide:
        grid = grid_at(slide, xy, patch_px, patch_size_l0)
        grid = PatchGrid(grid.xy_l0, patch_px, 1, patch_size_l0, 0, 0, patch_size_l0)
        want, name = patches_of(slide, grid)
        got, fast_name = patches_of(slide, grid, fast=True)
    assert name == fast_name == "JPEG tiles"
    np.testing.assert_array_equal(got, want)


def test_jpeg_2000_knows_no_fast_decode(slide_of):
    with open_slide(slide_of("j2k")) as slide:
        grid = PatchGrid(np.array([(0, 0), (256, 512)]), 64, 1, 128, 0, 0, 128)
        _, name = patches_of(slide, grid, fast=True)
    assert name == "JPEG 2000 tiles"
