"""Readers take a synthetic slide for Aperio's, its pixels are the section's, its levels averages of them."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import openslide
import pytest
import tifffile
import tiffslide

from seal_extract.errors import OutputError, UsageError
from seal_extract.synthetic import aperio, tissue_truth, write_synthetic_slide
from seal_extract.synthetic.anatomy import Window
from seal_extract.synthetic.section import Section

SIZE_PX, MPP = (1500, 1130), 0.5  # neither side a multiple of a tile
FLAVOURS = {
    "4:2:0": {},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:4:4": {"subsampling": "4:4:4"},
    "rgb": {"photometric": "rgb"},
    "rgb-240": {"photometric": "rgb", "tile_px": 240},
    "240": {"tile_px": 240, "downsamples": (1, 2, 8, 32)},
    "flat": {"downsamples": (1,)},
    "soiled": {"pen": True, "dust": True},
    "33005": {"compression": "jpeg2000"},
    "33003": {"compression": "jpeg2000", "photometric": "ycbcr"},
}


@pytest.fixture(scope="module", params=FLAVOURS)
def flavour(request, tmp_path_factory):
    """(name, options, path) of a slide in each flavour."""
    options = FLAVOURS[request.param]
    path = tmp_path_factory.mktemp("flavour") / "slide.svs"
    return request.param, options, write_synthetic_slide(path, SIZE_PX, mpp=MPP, seed=1, **options)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_synthetic_slide(tmp_path_factory.mktemp("plain") / "slide.svs", SIZE_PX, mpp=MPP, seed=1)


def section(*, tile_px=256, pen=False, dust=False, **_):
    return Section(SIZE_PX, MPP, cell_px=tile_px, seed=1, pen=pen, dust=dust)


def level_pixels(path, level=0, reader=openslide.OpenSlide):
    with reader(path) as slide:
        region = slide.read_region((0, 0), level, slide.level_dimensions[level])
    return np.asarray(region.convert("RGB")).astype(int)


def test_openslide_takes_it_for_an_aperio_slide(flavour):
    _, options, path = flavour
    downsamples = options.get("downsamples", (1, 4, 16))
    with openslide.OpenSlide(path) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == MPP
        assert slide.properties["openslide.objective-power"] == "20"
        assert slide.level_dimensions == tuple((SIZE_PX[0] // d, SIZE_PX[1] // d) for d in downsamples)
        assert slide.level_downsamples == pytest.approx(downsamples, rel=0.03)
        assert slide.properties["openslide.level[0].tile-width"] == str(options.get("tile_px", 256))
        assert max(slide.associated_images["thumbnail"].size) <= 1024


def test_pixels_are_the_sections(flavour):
    _, options, path = flavour
    error = level_pixels(path) - section(**options).render(Window(0, 0, *SIZE_PX))
    assert np.abs(error).mean() < 2.5
    assert np.abs(error.mean(axis=(0, 1))).max() < 1.5  # no colour cast


def test_tiffslide_reads_the_same_pixels(flavour):
    name, _, path = flavour
    if name == "33003":
        pytest.skip("tiffslide shows Aperio's YCbCr JPEG 2000 without turning it into RGB")
    assert (level_pixels(path) == level_pixels(path, reader=tiffslide.TiffSlide)).all()


def test_levels_average_level_0(flavour):
    _, options, path = flavour
    full = section(**options).render(Window(0, 0, *SIZE_PX)).astype(float)
    for level, times in enumerate(options.get("downsamples", (1, 4, 16))):
        width, height = SIZE_PX[0] // times, SIZE_PX[1] // times
        squares = full[: height * times, : width * times].reshape(height, times, width, times, 3)
        error = level_pixels(path, level) - squares.mean(axis=(1, 3))
        assert np.abs(error).mean() < 6  # the smaller the picture, the more JPEG has to drop
        assert np.abs(error.mean(axis=(0, 1))).max() < 2


def test_levels_average_exactly_before_encoding():
    pixels = section().render(Window(512, 512, 256, 256))
    for times in (4, 16):
        squares = pixels.reshape(256 // times, times, 256 // times, times, 3).mean(axis=(1, 3))
        assert np.abs(aperio._averaged(pixels, times) - squares).max() <= 0.5


def test_rgb_tiles_hide_their_colour_space_as_aperios_do(tmp_path):
    path = write_synthetic_slide(tmp_path / "rgb.svs", (500, 400), mpp=MPP, photometric="rgb")
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        tile = tiff.filehandle.read_segments(page.dataoffsets, page.databytecounts)
        first = next(iter(tile))[0]
        assert (page.photometric.name, page.subsampling) == ("RGB", (2, 2))
        assert page.jpegtables[:4] == b"\xff\xd8\xff\xdb"
    assert first[:4] == b"\xff\xd8\xff\xc0"  # no JFIF, no Adobe marker before the frame
    assert first[12:21] == bytes([0, 0x11, 0, 1, 0x11, 0, 2, 0x11, 0])  # components 0, 1, 2, unsampled


def test_the_same_arguments_give_the_same_file(plain, tmp_path):
    again = write_synthetic_slide(tmp_path / "again.svs", SIZE_PX, mpp=MPP, seed=1, workers=1)
    assert again.read_bytes() == plain.read_bytes()


def test_the_same_arguments_give_the_same_file_in_another_process(plain, tmp_path):
    path = tmp_path / "again.svs"
    arguments = f"{str(path)!r}, {SIZE_PX}, mpp={MPP}, seed=1"
    run(f"from seal_extract.synthetic import *; write_synthetic_slide({arguments})")
    assert path.read_bytes() == plain.read_bytes()


def test_another_seed_gives_another_specimen():
    masks = [tissue_truth(SIZE_PX, mpp=MPP, seed=seed) for seed in (0, 1)]
    assert (masks[0] != masks[1]).mean() > 0.02


@pytest.mark.parametrize(
    "options", [{}, {"tile_px": 240, "pen": True, "dust": True}], ids=["plain", "soiled"]
)
def test_windows_meet_without_a_seam(options):
    made = section(**options)
    whole = made.render(Window(0, 0, *SIZE_PX))
    for x, y, width, height in (
        (0, 0, 300, 300),
        (513, 257, 301, 77),
        (1201, 1001, 299, 129),
        (700, 500, 9, 9),
    ):
        part = made.render(Window(x, y, width, height))
        assert (part == whole[y : y + height, x : x + width]).all()


@pytest.mark.parametrize("size_px", [(16, 16), (256, 256), (257, 255), (2100, 40), (33, 1100)])
def test_any_size(tmp_path, size_px):
    path = write_synthetic_slide(tmp_path / "s.svs", size_px, mpp=MPP)
    assert level_pixels(path).shape == (size_px[1], size_px[0], 3)
    assert level_pixels(path, 2).shape[:2] == (size_px[1] // 16, size_px[0] // 16)


@pytest.mark.parametrize("mpp", [0.2501234, 1.0, 4.0])
def test_any_resolution(tmp_path, mpp):
    path = write_synthetic_slide(tmp_path / "s.svs", (400, 300), mpp=mpp)
    with openslide.OpenSlide(path) as slide:
        assert float(slide.properties["openslide.mpp-x"]) == mpp


def test_truth_depends_on_micrometres_only():
    coarse, fine = tissue_truth((1000, 800), mpp=0.5), tissue_truth((2000, 1600), mpp=0.25)
    assert coarse.shape == (50, 63)
    assert (coarse == fine).all()
    assert 0.2 < coarse.mean() < 0.6


def test_truth_bounds_what_is_stained():
    pixels = section().render(Window(0, 0, *SIZE_PX))
    truth = tissue_truth(SIZE_PX, mpp=MPP, seed=1, at_mpp=MPP)
    stained = pixels.min(axis=2) < 200
    assert truth.shape == stained.shape
    assert stained[truth].mean() > 0.6  # the rest: lumina, clefts, fat, what is pale between fibres
    assert stained[~truth].mean() < 0.01


def test_glass_is_bright_and_tissue_has_the_colours_of_haematoxylin_and_eosin():
    pixels = section().render(Window(0, 0, *SIZE_PX)).astype(int)
    truth = tissue_truth(SIZE_PX, mpp=MPP, seed=1, at_mpp=MPP)
    assert pixels[~truth].mean(axis=0).min() > 230
    red, green, blue = np.median(pixels[truth & (pixels.min(axis=2) < 200)], axis=0)
    assert 170 < red < 225
    assert 90 < green < 160
    assert 130 < blue < 200
    nuclei = pixels[pixels[..., 0] < 110]
    assert 0.01 < len(nuclei) / truth.sum() < 0.3
    assert (nuclei[:, 2] > nuclei[:, 1]).mean() > 0.95  # blue to violet


def test_is_glass_means_nothing_but_glass():
    made = section(dust=True)
    windows = [Window(x, y, 100, 100) for y in range(0, 1100, 100) for x in range(0, 1500, 100)]
    glass = [window for window in windows if made.is_glass(window)]
    assert len(glass) > 20
    assert min(made.render(window).min() for window in glass) > 220


def test_pen_and_dust_change_only_what_they_cover():
    window = Window(0, 0, *SIZE_PX)
    clean, soiled = section().render(window), section(pen=True, dust=True).render(window)
    assert 0.005 < (clean != soiled).any(axis=2).mean() < 0.2
    assert (soiled <= clean).all()


def test_bigtiff_where_32_bits_may_not_do(tmp_path, monkeypatch):
    monkeypatch.setattr(aperio, "CLASSIC_TIFF_BYTES", 0)
    path = write_synthetic_slide(tmp_path / "big.svs", (500, 400), mpp=MPP)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_bigtiff
    assert level_pixels(path).shape == (400, 500, 3)


def test_the_size_is_not_underestimated(plain):
    writer = aperio.Writer(
        aperio.Layout.checked(SIZE_PX, MPP, 256, (1, 4, 16)),
        aperio.Codec.checked("jpeg", None, None, 70),
        section(),
        "",
    )
    assert plain.stat().st_size < writer._bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"size_px": (0, 100)},
        {"size_px": (100.5, 100)},
        {"size_px": (10, 10)},
        {"mpp": 0},
        {"mpp": 250},
        {"mpp": float("nan")},
        {"tile_px": 100},
        {"tile_px": 0},
        {"downsamples": ()},
        {"downsamples": (2, 4)},
        {"downsamples": (1, 4, 4)},
        {"downsamples": (1, 2.5)},
        {"downsamples": (1, 37)},
        {"compression": "lzw"},
        {"photometric": "cmyk"},
        {"subsampling": "4:1:1"},
        {"subsampling": "4:2:0", "photometric": "rgb"},
        {"subsampling": "4:2:2", "compression": "jpeg2000"},
        {"jpeg_quality": 0},
        {"seed": -1},
        {"workers": 0},
    ],
    ids=str,
)
def test_arguments_that_cannot_be_meant_are_refused(tmp_path, change):
    arguments = {"size_px": (400, 300), "mpp": MPP, **change}
    with pytest.raises(UsageError, match=r": (give|use) "):
        write_synthetic_slide(tmp_path / "s.svs", **arguments)
    assert not list(tmp_path.iterdir())


def test_truth_refuses_no_resolution():
    with pytest.raises(UsageError, match="at_mpp"):
        tissue_truth((100, 100), at_mpp=0)


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        write_synthetic_slide(tmp_path / "file" / "s.svs", (100, 100), mpp=MPP)


def test_a_folder_is_made_and_an_older_file_replaced(tmp_path):
    path = tmp_path / "new" / "s.svs"
    for size_px in ((100, 100), (200, 100)):
        write_synthetic_slide(path, size_px, mpp=MPP)
    assert level_pixels(path).shape == (100, 200, 3)
    assert [file.name for file in path.parent.iterdir()] == ["s.svs"]


@pytest.mark.parametrize(
    ("error", "seen"),
    [(OSError(28, "No space left on device"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["disk full", "interrupted"],
)
def test_an_error_on_the_way_leaves_what_was_there(tmp_path, monkeypatch, error, seen):
    path = tmp_path / "s.svs"
    path.write_text("older")
    push = aperio.LowerLevel.push
    calls = []

    def failing(self, rows):
        calls.append(rows)
        if len(calls) == 3:  # in the second row of blocks
            raise error
        push(self, rows)

    monkeypatch.setattr(aperio.LowerLevel, "push", failing)
    with pytest.raises(seen):
        write_synthetic_slide(path, (300, 1500), mpp=MPP)
    assert [file.name for file in tmp_path.iterdir()] == ["s.svs"]
    assert path.read_text() == "older"


def run(code):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_needs_no_torch():
    run("import sys, seal_extract.synthetic; assert 'torch' not in sys.modules")


@pytest.mark.slow
def test_40_000_px_in_bounded_memory(tmp_path):
    path = tmp_path / "large.svs"
    status = run(
        "from seal_extract.synthetic import *\n"
        f"write_synthetic_slide({str(path)!r}, (40_000, 40_000))\n"
        "print(open('/proc/self/status').read())"
    )
    # not getrusage: what the parent held before exec counts there
    assert int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) < 1_000_000
    with openslide.OpenSlide(path) as slide:
        assert slide.level_dimensions == ((40_000, 40_000), (10_000, 10_000), (2_500, 2_500))
        assert slide.level_downsamples == (1, 4, 16)
        overview = np.asarray(slide.read_region((0, 0), 2, (2_500, 2_500)).convert("RGB"))
    truth = tissue_truth((40_000, 40_000), at_mpp=4.0)
    assert (overview[~truth].min(axis=1) < 200).mean() < 0.01
    assert overview[truth].mean() < 215
