"""Patches at the slide's edges: which there are, what they show beyond it, what no patch covers."""

from dataclasses import replace

import h5py
import numpy as np
import openslide
import pytest
import torch
from cohort_fixtures import run_here
from conftest import DrawnSlide, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from slide_helpers import Checksums, all_tissue, read
from synthetic_slide import write_synthetic_slide

from seal_extract import ExtractOptions, extract, open_slide
from seal_extract.errors import GeometryError, UsageError
from seal_extract.features.layouts import LAYOUTS
from seal_extract.patches.grid import make_grid, read_grid
from seal_extract.patches.reader import open_patch_reader
from seal_extract.patches.regions import RegionReader
from seal_extract.patches.resample import Resampling, resample
from seal_extract.run.status_table import read_status
from seal_extract.tissue.mask import TissueMask

ODD = (1212, 932)  # no whole number of patches of 448 or 224 level-0 px


@pytest.fixture(scope="module")
def svs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edges")
    return {
        kind: write_synthetic_slide(folder / f"{kind}.svs", ODD, mpp=0.25, downsamples=(1, 2, 4), **how)
        for kind, how in {"jpeg": {"tile_px": 240}, "j2k": {"compression": "jpeg2000"}}.items()
    }


# --- which patches ----------------------------------------------------------------------------

sizes = st.integers(1, 700)


@settings(max_examples=80, deadline=None)
@given(sizes, sizes, st.integers(20, 300), st.data())
def test_kept_patches_are_those_of_drop_and_cover_the_scanned_area(width, height, patch_px, data):
    slide = DrawnSlide(np.full((height, width, 3), 200, np.uint8), mpp=0.5)
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    wide, high = data.draw(st.integers(1, width - left)), data.draw(st.integers(1, height - top))
    slide.bounds_l0 = (left, top, wide, high)
    how = {"overlap_px": data.draw(st.integers(0, patch_px // 2)), "min_tissue": 0.0}
    kept = make_grid(slide, all_tissue(slide), patch_px, 0.5, edges="keep", **how)
    try:
        dropped = make_grid(slide, all_tissue(slide), patch_px, 0.5, **how).xy_l0.tolist()
    except GeometryError:
        dropped = []
    inside = (kept.xy_l0 + patch_px <= (left + wide, top + high)).all(1)
    assert kept.xy_l0[inside].tolist() == dropped  # those that reach nowhere, in the same order
    scanned = np.zeros((height + patch_px, width + patch_px), bool)
    scanned[top : top + high, left : left + wide] = True
    shown = np.zeros_like(scanned)
    padding = []
    for x, y in kept.xy_l0.tolist():
        shown[y : y + patch_px, x : x + patch_px] = True
        padding.append(1 - scanned[y : y + patch_px, x : x + patch_px].mean())
    assert shown[scanned].all()
    np.testing.assert_allclose(kept.padding, padding, atol=1e-9)
    assert max(padding) < 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_uncovered_is_the_share_of_tissue_under_no_patch(data):
    row = st.lists(st.booleans(), min_size=6, max_size=6)
    mask = np.array(data.draw(st.lists(row, min_size=5, max_size=5)))
    tissue = TissueMask(mask, 4.0, 8.0, (48, 40))
    step, size = data.draw(st.integers(3, 20)), data.draw(st.integers(1, 30))
    cells = [(x, y) for x in range(0, 48, step) for y in range(0, 40, step)]
    xy = np.array(data.draw(st.lists(st.sampled_from(cells), unique=True)), np.int64).reshape(-1, 2)
    free = np.kron(mask, np.ones((8, 8), bool)).astype(bool)
    before = free.sum()
    for x, y in xy.tolist():
        free[y : y + size, x : x + size] = False
    want = free.sum() / before if before else 0
    assert tissue.uncovered(xy, size) == pytest.approx(want, abs=1e-8)


def test_edges_that_do_not_exist_are_refused():
    with pytest.raises(UsageError, match="--edges is 'pad'; allowed: drop, keep"):
        ExtractOptions(edges="pad")


# --- what they show ---------------------------------------------------------------------------


def white_beyond(path, grid):
    """The regions of a grid, out of the level with white put around it: uint8 [N, S, S, 3]."""
    with openslide.OpenSlide(path) as slide:
        size = slide.level_dimensions[grid.level]
        level = np.asarray(slide.read_region((0, 0), grid.level, size).convert("RGB"))
        downsample = round(slide.level_downsamples[grid.level])
    side = grid.read_px
    level = np.pad(level, ((0, side), (0, side), (0, 0)), constant_values=255)
    corners = (grid.xy_l0 // downsample).tolist()
    return np.stack([level[y : y + side, x : x + side] for x, y in corners])


@pytest.mark.parametrize("kind", ["jpeg", "j2k"])
@pytest.mark.parametrize("how", ["bicubic", "area", "fast"])
@pytest.mark.parametrize(("patch_px", "mpp"), [(224, 0.25), (224, 0.5), (150, 0.6), (112, 1.0)])
def test_it_is_white_beyond_the_slide_before_anything_is_resampled(svs, kind, how, patch_px, mpp):
    filter = "area" if how == "area" else "bicubic"
    with open_slide(svs[kind]) as slide:
        grid = make_grid(slide, all_tissue(slide), patch_px, mpp, min_tissue=0.0, edges="keep")
        regions = torch.from_numpy(white_beyond(svs[kind], grid)).permute(0, 3, 1, 2)
        want = resample(regions, (patch_px, patch_px), filter).permute(0, 2, 3, 1).numpy().astype(int)
        tiles = open_patch_reader(slide, grid, torch.device("cpu"), filter=filter, fast=how == "fast")
        assert "regions" not in tiles.name
        for decoder in (tiles, RegionReader(slide, grid, Resampling(patch_px, filter))):
            assert np.abs(read(decoder).astype(int) - want).max() <= 1
            decoder.close()
    assert (grid.padding > 0).sum() >= 4
    assert (want[-1, -1, -1] == 255).all()


def test_real_slides_are_white_beyond_their_edges_by_every_reader(tmp_path):
    picture = tmp_path / "a.png"
    Image.fromarray(np.full((300, 410, 3), 90, np.uint8)).save(picture)
    for path, mpp in (
        (shared("data/wsi/CMU-1-Small-Region.svs"), None),
        (shared("data/wsi/qupath_OS-1-detail.ome.tif"), None),
        (picture, 0.5),
    ):
        with open_slide(path, mpp=mpp) as slide:
            grid = make_grid(slide, all_tissue(slide), 224, 0.5, min_tissue=0.0, edges="keep")
            decoder = open_patch_reader(slide, grid, torch.device("cpu"))
            last = read(decoder, range(len(grid) - 1, len(grid)))[0]
            assert 0 < grid.padding[-1] < 1
            assert (last[-2:, -2:] == 255).all()
            assert last[0, 0].max() < 255
            decoder.close()


# --- a run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_keeps_the_edges_in_every_layout(svs, encoder, tmp_path, layout):
    options = ExtractOptions(layout=layout, min_tissue=0.0)
    drop = extract(svs["jpeg"], encoder, tmp_path / "drop", options=options)
    keep = extract(svs["jpeg"], encoder, tmp_path / "keep", options=replace(options, edges="keep"))
    inside = keep.grid.padding == 0
    np.testing.assert_array_equal(keep.grid.xy_l0[inside], drop.grid.xy_l0)
    np.testing.assert_array_equal(keep.features[inside], drop.features)
    assert keep.provenance["tissue"]["uncovered"] == 0
    assert drop.provenance["tissue"]["uncovered"] > 0.01
    assert keep.provenance["padding"] == pytest.approx(keep.grid.padding.mean())
    with h5py.File(keep.path) as file:
        np.testing.assert_allclose(file["padding"][()], keep.grid.padding, atol=1e-6)
        assert file["padding"].dtype == np.float32
    with h5py.File(drop.path) as file:
        assert "padding" not in file


def test_coordinates_of_such_a_run_give_the_same_patches(svs, tmp_path):
    options = ExtractOptions(edges="keep", min_tissue=0.0)
    first = extract(svs["jpeg"], Checksums(), tmp_path / "a", options=options)
    (coords,) = (tmp_path / "a").rglob("*_patches.h5")
    with open_slide(svs["jpeg"]) as slide:
        assert read_grid(coords, slide).inside_l0 == (0, 0, *ODD)
    again = extract(svs["jpeg"], Checksums(), tmp_path / "b", options=ExtractOptions(coords=coords))
    np.testing.assert_array_equal(again.features, first.features)


def test_the_closing_line_the_table_and_the_report_say_what_no_patch_covers(svs, encoder_folder, tmp_path):
    words = (*svs.values(), "-o", tmp_path, "--encoder", encoder_folder, "-q", "--min-tissue", "0.1")
    done = run_here(*words)
    row = read_status(tmp_path / "status.csv")["jpeg"]
    assert 0 < row.uncovered < 1
    assert row.padding == 0
    assert f"patches/s; {row.uncovered:.1%} of the tissue under no patch -> " in done.stdout
    assert f"{row.uncovered:.1%} uncovered" in (tmp_path / "report.html").read_text()
    other = run_here(*words, "--edges", "keep")
    assert "(options edges drop, now keep)" in other.stderr
    done = run_here(*words, "--edges", "keep", "--overwrite")
    kept = read_status(tmp_path / "status.csv")["jpeg"]
    assert kept.uncovered < row.uncovered
    assert f"({kept.padding:.1%} of their area beyond the slide)" in done.stdout
