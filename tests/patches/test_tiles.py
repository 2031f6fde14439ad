"""Tiles decoded by ourselves: OpenSlide's own pixels, each tile decoded once; shrunk, they are Pillow's."""

import threading
from concurrent.futures import ThreadPoolExecutor, wait

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from conftest import shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from slide_helpers import DOWNSAMPLES, KINDS, Damage, grid_of_level, openslides_regions, read, spread

from seal_extract.patches import tiles as tiles_module
from seal_extract.patches.codecs import Jpeg2000Codec, JpegCodec, TileError
from seal_extract.patches.grid import PatchGrid
from seal_extract.patches.reader import open_patch_reader
from seal_extract.patches.regions import RegionReader
from seal_extract.patches.tiled import open_level
from seal_extract.patches.tiles import TileReader
from seal_extract.slides.slide import open_slide

CPU = torch.device("cpu")


# --- pixels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_pixel_is_openslides(slide_of, kind, level):
    path = slide_of(kind)
    with open_slide(path) as slide:
        grid = grid_of_level(slide, level, spread(slide, level, 150), 150)
        decoder = open_patch_reader(slide, grid, CPU)
        assert isinstance(decoder, TileReader), decoder.name
        np.testing.assert_array_equal(read(decoder), openslides_regions(path, grid))


@pytest.mark.parametrize(("kind", "side"), [("420", 256), ("420-240", 240), ("j2k", 256)])
def test_patches_that_are_tiles_are_openslides(slide_of, kind, side):
    """One of them twice, one half outside; in memory that libjpeg-turbo does not write past the caches."""
    path = slide_of(kind)
    with open_slide(path) as slide:
        places = [(side, side), (2 * side, side), (side, side), (5 * side, 0), (0, 3 * side)]
        grid = grid_of_level(slide, 0, [*places, (6 * side - side // 2, 0)], side)
        decoder = open_patch_reader(slide, grid, CPU)
        np.testing.assert_array_equal(read(decoder), openslides_regions(path, grid))
        assert decoder.read(range(4)).pixels.data_ptr() % 2


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["420", "420-240", "422-208", "rgb"]),
    level=st.sampled_from(range(len(DOWNSAMPLES))),
    side=st.integers(1, 600),
    places=st.lists(st.tuples(st.integers(-700, 2300), st.integers(-700, 1900)), min_size=1, max_size=8),
)
def test_patches_of_any_grid_are_openslides_regions(slide_of, kind, level, side, places):
    path = slide_of(kind)
    with open_slide(path) as slide:
        grid = grid_of_level(slide, level, [(x // 2**level, y // 2**level) for x, y in places], side)
        decoder = open_patch_reader(slide, grid, CPU)
        np.testing.assert_array_equal(read(decoder), openslides_regions(path, grid))


@pytest.mark.parametrize("file", ["CMU-1-Small-Region.svs", "qupath_OS-1-detail.ome.tif"])
def test_real_slides_give_their_readers_regions(file):
    """The tags of the OME-TIFF say RGB although its tiles are YCbCr."""
    with open_slide(shared("data/wsi", file)) as slide:
        grid = grid_of_level(slide, 0, [(0, 0), (301, 77), (801, 801), (37, 101), (850, 20)], 300)
        decoder = open_patch_reader(slide, grid, CPU)
        assert decoder.name == "JPEG tiles"
        want = [slide.read_region(xy, 0, (300, 300)) for xy in grid.xy_l0.tolist()]
        np.testing.assert_array_equal(read(decoder), want)


def test_ycbcr_in_jpeg_2000_is_openslides_for_every_sort_of_colour(tmp_path, slide_of):
    """Noise without loss goes through the whole cube of colours, far beyond those of tissue."""
    path = slide_of("j2k-ycbcr")
    codec = Jpeg2000Codec(ycbcr=True)
    noise = np.random.default_rng(0).integers(0, 256, (240, 240, 3), dtype=np.uint8)
    data = imagecodecs.jpeg2k_encode(noise, level=0, codecformat="j2k", reversible=True, mct=False)
    np.testing.assert_array_equal(imagecodecs.jpeg2k_decode(data), noise)
    other = Damage(path, tmp_path / "noise.svs").swap_in(0, bytes(data)).write()
    ours = np.empty_like(noise)
    codec.decode(bytes(data), ours)
    with open_slide(other) as slide:
        np.testing.assert_array_equal(ours, slide.read_region((0, 0), 0, (240, 240)))


# --- each tile once, by any thread, in any order ----------------------------------------------


def count_decodes(monkeypatch):
    counts = []
    whole = JpegCodec.decode
    lock = threading.Lock()

    def decode(self, data, out, factor=1, lenient=False):
        with lock:
            counts.append(1)
        whole(self, data, out, factor, lenient)

    monkeypatch.setattr(JpegCodec, "decode", decode)
    return counts


def overlapping(slide, side=200, step=90):
    w, h = slide.size_l0
    return grid_of_level(slide, 0, [(x, y) for y in range(0, h, step) for x in range(0, w, step)], side)


def test_a_tile_is_decoded_once_however_many_patches_share_it(slide_of, monkeypatch):
    with open_slide(slide_of("420")) as slide:
        decoder = open_patch_reader(slide, overlapping(slide), CPU)
        counts = count_decodes(monkeypatch)
        for start in range(0, len(decoder.grid), 8):
            read(decoder, range(start, min(start + 8, len(decoder.grid))))
        assert len(counts) == 6 * 5  # tiles of 256 px
        assert not decoder._shared._held


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 40), twice=st.booleans(), most=st.integers(0, 30))
def test_eight_threads_read_every_row_right_without_waiting_for_ever(slide_of, seed, rows, twice, most):
    path = slide_of("420")
    with open_slide(path) as slide, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles_module, "HELD_BYTES", most * 3 * 256**2)
        decoder = open_patch_reader(slide, overlapping(slide), CPU)
        want = openslides_regions(path, decoder.grid)
        jobs = [range(a, min(a + rows, len(want))) for a in range(0, len(want), rows)] * (1 + twice)
        np.random.default_rng(seed).shuffle(jobs)
        pool = ThreadPoolExecutor(8)
        try:
            futures = {pool.submit(read, decoder, job): job for job in jobs}
            done, waiting = wait(futures, timeout=60)
            assert not waiting
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        for future in done:
            job = futures[future]
            np.testing.assert_array_equal(future.result(), want[job.start : job.stop])
        assert not decoder._shared._held
        assert len(decoder._shared._spare) <= most


def test_a_thread_that_fails_lets_the_others_fail_not_wait(slide_of, monkeypatch):
    with open_slide(slide_of("420")) as slide:
        decoder = open_patch_reader(slide, overlapping(slide), CPU)

        def fail(*_):
            raise MemoryError

        monkeypatch.setattr(decoder._tiled.codec.__class__, "decode", fail)
        pool = ThreadPoolExecutor(8)
        futures = [pool.submit(decoder.read, range(a, a + 4)) for a in range(0, 80, 4)]
        _, waiting = wait(futures, timeout=60)
        pool.shutdown(wait=False, cancel_futures=True)
        assert not waiting
        assert all(isinstance(f.exception(), (MemoryError, RuntimeError)) for f in futures)
        assert not any(held.pins for held in decoder._shared._held.values())


# --- what is left to the reader, and why ------------------------------------------------------


def jpeg_tiff(path, size, downsamples=(1,), **kwargs):
    """A generic tiled TIFF of noise at 0.5 µm/px, with levels as given."""
    with tifffile.TiffWriter(path) as tif:
        for i, d in enumerate(downsamples):
            shape = (int(size[1] / d), int(size[0] / d), 3)
            pixels = np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)
            mpp = {"resolution": (2e4 / d, 2e4 / d), "resolutionunit": "CENTIMETER"}
            tif.write(pixels, tile=(128, 128), photometric="rgb", subfiletype=int(i > 0), **mpp, **kwargs)
    return path


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("fluorescence.ndpi", "NDPI"),
        ("plain.png", "no TIFF"),
        ("dicom.dcm", "no TIFF"),
        ("deflate.tif", "DEFLATE in RGB"),
        ("plain.tif", "NONE in RGB"),
    ],
)
def test_other_formats_go_through_the_reader_and_say_why(tmp_path, file, reason):
    path = tmp_path / file
    if file.endswith("png"):
        Image.fromarray(np.full((400, 400, 3), 200, np.uint8)).save(path)
    elif file.endswith("tif"):
        jpeg_tiff(path, (400, 400), compression="deflate" if "deflate" in file else None)
    else:
        name = "test3-DAPI-2-387.ndpi" if file.endswith("ndpi") else "openslide-python_boxes_0.dcm"
        path = shared("data/wsi", name)
    with open_slide(path, mpp=0.5) as slide:
        grid = grid_of_level(slide, 0, [(0, 0), (3, 2)], 12)
        decoder = open_patch_reader(slide, grid, CPU)
        assert decoder.name == f"regions: {reason}"
        want = [slide.read_region(xy, 0, (12, 12)) for xy in grid.xy_l0.tolist()]
        np.testing.assert_array_equal(read(decoder), want)


def test_levels_that_do_not_fit_whole_pixels_go_through_the_reader(tmp_path, slide_of):
    odd = jpeg_tiff(tmp_path / "a.tif", (1000, 801), (1, 3.01), compression="jpeg")
    for path, corner, size_l0, reason in (
        (odd, [300, 200], 193, "level 1 is 3.0"),
        (slide_of("420"), [301, 200], 128, "patches lie between the pixels of level 1"),
    ):
        with open_slide(path) as slide:
            grid = PatchGrid(np.array([[0, 0], corner]), 64, 1.5, size_l0, 0, 1, 64)
            decoder = open_patch_reader(slide, grid, CPU)
            assert decoder.name.startswith(f"regions: {reason}")
            np.testing.assert_array_equal(read(decoder), openslides_regions(path, grid))


def test_a_codec_that_gives_other_pixels_is_found_out(slide_of, monkeypatch):
    path = slide_of("420")
    whole = JpegCodec.decode

    def wrong(self, data, out, factor=1, lenient=False):
        whole(self, data, out, factor, lenient)
        out[3, 5, 1] ^= 1

    monkeypatch.setattr(JpegCodec, "decode", wrong)
    with open_slide(path) as slide:
        grid = overlapping(slide)
        decoder = open_patch_reader(slide, grid, CPU)
        assert decoder.name.startswith("regions: its JPEG tiles decode to other pixels than openslide")
        np.testing.assert_array_equal(read(decoder), openslides_regions(path, grid))


def test_colours_taken_for_others_are_found_out(slide_of, monkeypatch):
    for kind in ("rgb", "420", "j2k-ycbcr"):
        with open_slide(slide_of(kind)) as slide:
            level = open_level(slide, 0)
            monkeypatch.setattr("seal_extract.patches.tiles.open_level", lambda *_, level=level: level)
            object.__setattr__(level.codec, "ycbcr", not level.codec.ycbcr)
            level.candidates = (level.codec,)
            decoder = open_patch_reader(slide, overlapping(slide), CPU)
            assert isinstance(decoder, RegionReader)
            assert "decode to other pixels" in decoder.name


def test_a_tile_of_another_size_or_kind_is_refused_at_every_scale(slide_of):
    with open_slide(slide_of("420")) as slide:
        level = open_level(slide, 0)
        ((_, data),) = level.read([8])
    out = np.empty((64, 64, 3), np.uint8)
    for factor in (1, 2, 8):
        with pytest.raises(
            TileError, match=rf"256 x 256 px x 3 instead of {64 * factor} x {64 * factor} x 3"
        ):
            level.codec.decode(data, out, factor)
    level.codec.decode(data, out, 4)
    for broken in (b"", b"\xff\xd8", b"\xff\xd8\xff", data[:3], data[:12], b"\xff\xd8" + b"\xff" * 50):
        with pytest.raises(TileError):
            level.codec.decode(broken, np.empty((256, 256, 3), np.uint8))


# --- tiles shrunk into patches ----------------------------------------------------------------


def shrinking(xy, patch_px, size_l0):
    """A grid that is read from level 0, whatever other levels there are."""
    return PatchGrid(np.array(xy), patch_px, 1, size_l0, 0, 0, size_l0)


def patches_of(slide, grid, **kwargs):
    reader = open_patch_reader(slide, grid, CPU, **kwargs)
    return read(reader).astype(int), reader.name


def pillows(regions, side, filter):
    resized = [Image.fromarray(region).resize((side, side), filter) for region in regions]
    return np.stack([np.asarray(image) for image in resized]).astype(int)


SIDES = [(128, 256), (100, 300), (112, 200), (64, 512), (224, 451), (224, 163)]


@pytest.mark.parametrize(("patch_px", "size_l0"), SIDES)
def test_bicubic_is_pillows_within_one_grey_level(slide_of, patch_px, size_l0):
    path = slide_of("422-208")
    with open_slide(path) as slide:
        grid = shrinking(spread(slide, 0, size_l0), patch_px, size_l0)
        got, _ = patches_of(slide, grid)
    want = pillows(openslides_regions(path, grid), patch_px, Image.Resampling.BICUBIC)
    assert np.abs(got - want).max() <= 1


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("aligned", [True, False])
def test_area_is_pillows_box_within_one_grey_level(slide_of, factor, aligned):
    path = slide_of("420-240")
    with open_slide(path) as slide:
        xy = np.array([(0, 0), (120, 240), (60, 12), (1104, 612)]) + (0 if aligned else [7, 1])
        grid = shrinking(xy, 96, 96 * factor)
        got, name = patches_of(slide, grid, filter="area")
    assert name == "JPEG tiles"
    want = pillows(openslides_regions(path, grid), 96, Image.Resampling.BOX)
    assert np.abs(got - want).max() <= 1


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_area_tile_by_tile_is_area_patch_by_patch(slide_of, factor):
    with open_slide(slide_of("420")) as slide:
        xy = [(x, y) for x in range(0, 900, 8 * 13) for y in range(0, 500, 8 * 11)]
        grid = shrinking(xy, 64, 64 * factor)
        decoder = open_patch_reader(slide, grid, CPU, filter="area")
        assert decoder._reduction == factor
        by_region = RegionReader(slide, grid, decoder._resampling)
        np.testing.assert_array_equal(read(decoder), read(by_region))


SMALL = [(x, y) for x in range(0, 900, 104) for y in range(0, 500, 88)]
REAL = [(x, y) for x in range(0, 1700, 448) for y in range(0, 2500, 448)]


@pytest.mark.parametrize(
    ("kind", "xy", "patch_px", "factor", "filter"),
    [
        *((kind, SMALL, 64, factor, "area") for kind, factor in (("420", 2), ("420", 4), ("420", 8))),
        *((kind, SMALL, 64, factor, "area") for kind, factor in (("422-208", 4), ("rgb", 2), ("444", 4))),
        ("real", REAL, 224, 2, "bicubic"),
    ],
)
def test_fast_decode_stays_near_the_default(slide_of, kind, xy, patch_px, factor, filter):
    path = shared("data/wsi/CMU-1-Small-Region.svs") if kind == "real" else slide_of(kind)
    with open_slide(path) as slide:
        grid = shrinking(xy, patch_px, patch_px * factor)
        want, name = patches_of(slide, grid, filter=filter)
        got, fast_name = patches_of(slide, grid, filter=filter, fast=True)
    assert (name, fast_name) == ("JPEG tiles", f"JPEG tiles at 1/{factor}")
    assert np.abs(got - want).mean() < 1.5
    assert np.abs((got - want).mean((0, 1, 2))).max() < 0.3


def test_fast_decode_takes_the_largest_scale_that_fits_and_resamples_the_rest(slide_of):
    with open_slide(slide_of("420")) as slide:
        for factor, scale in ((6, 2), (12, 4)):
            grid = shrinking([(0, 0), (104, 88)], 32, 32 * factor)
            want, _ = patches_of(slide, grid)
            got, name = patches_of(slide, grid, fast=True)
            assert name == f"JPEG tiles at 1/{scale}"
            assert np.abs(got - want).mean() < 1.5


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
        grid = shrinking(xy, patch_px, patch_size_l0)
        want, name = patches_of(slide, grid)
        got, fast_name = patches_of(slide, grid, fast=True)
    assert name == fast_name == "JPEG tiles"
    np.testing.assert_array_equal(got, want)


def test_jpeg_2000_knows_no_fast_decode(slide_of):
    with open_slide(slide_of("j2k")) as slide:
        _, name = patches_of(slide, shrinking([(0, 0), (256, 512)], 64, 128), fast=True)
    assert name == "JPEG 2000 tiles"
