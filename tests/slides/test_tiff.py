"""What a TIFF claims is held to its size before anybody uses it, and its pixels are the writer's."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from bombs import write_tiffs
from conftest import shared
from slide_helpers import Damage
from synthetic_slide import write_synthetic_slide

from seal_extract import open_slide
from seal_extract.errors import ResolutionError, SlideOpenError, UnsupportedSlideError
from seal_extract.slides.entry import SlideEntry, open_entry

NOISE = np.random.default_rng(0).integers(90, 256, (200, 300, 4), dtype=np.uint8)
RGB = NOISE[..., :3]
HALF_MICRON = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
LAYOUTS = {"tiles": {"tile": (64, 64)}, "strips": {"rowsperstrip": 16}}


def tiff(path, pixels=RGB, tags=None, **kwargs):
    """Write a TIFF of 0.5 µm/px and change tags of its first directory afterwards."""
    path.parent.mkdir(exist_ok=True)
    tifffile.imwrite(path, pixels, **{"photometric": "rgb", **LAYOUTS["tiles"], **HALF_MICRON, **kwargs})
    with tifffile.TiffFile(path, mode="r+b") as written:
        for tag, value in (tags or {}).items():
            written.pages[0].tags[tag].overwrite(value)
    return path


def lines_about(paths, most_bytes=3 * 2**30, seconds=10):
    """What a process with limits says of each file."""
    program = [sys.executable, str(Path(__file__).parents[1] / "bombs.py"), str(most_bytes), str(seconds)]
    done = subprocess.run([*program, *map(str, paths)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout[-500:]} {done.stderr[-2000:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_directories_that_claim_more_than_there_is_are_refused_at_once(tmp_path):
    told = write_tiffs(tmp_path)
    for (path, words), line in zip(told.items(), lines_about(told), strict=True):
        assert words in line, path.name
        assert line.startswith(str(path)), line
        assert "\n" not in line


def test_four_damaged_bytes_of_a_real_slide_do_not_hang(tmp_path):
    data = bytearray(shared("data/wsi/CMU-1-Small-Region.svs").read_bytes())
    struct.pack_into("<I", data, 1938394, 1275950)
    path = tmp_path / "a.svs"
    path.write_bytes(data)
    (line,) = lines_about([path])
    assert "lead in a circle" in line
    with pytest.raises(SlideOpenError, match="lead in a circle"):
        open_slide(path)


def test_a_tile_that_claims_4_gb_is_refused_without_asking_for_them(tmp_path):
    """Without the memory OpenSlide ends the process."""
    svs = write_synthetic_slide(tmp_path / "a.svs", (600, 500), mpp=0.5, downsamples=(1,))
    path = Damage(svs, tmp_path / "b.svs").set("TileByteCounts", 0, 2**32 - 1).write()
    (line,) = lines_about([path])
    assert "level-0 (0, 0): a tile claims more bytes than the file has" in line
    with open_slide(path) as slide, open_slide(svs) as whole:
        np.testing.assert_array_equal(
            slide.read_region((300, 256), 0, (200, 200)), whole.read_region((300, 256), 0, (200, 200))
        )


# --- pixels -----------------------------------------------------------------------------------


GREY = {"planarconfig": "contig"}
ALPHA = "is no unassociated alpha.*vips flatten"
TURNED = r"turned or mirrored \(Orientation {}\).*vips autorot"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("pixels", "kwargs", "words"),
    [
        (RGB, {"tags": {"PhotometricInterpretation": 8}}, "its colours are CIELAB"),
        (RGB, {"tags": {"PhotometricInterpretation": 9}}, "its colours are ICCLAB"),
        (RGB, {"tags": {"PhotometricInterpretation": 6}}, "YCbCr without JPEG"),
        (RGB, GREY | {"photometric": "minisblack"}, "its colours are BlackIsZero"),
        (RGB, GREY | {"photometric": "miniswhite"}, "its colours are WhiteIsZero"),
        (NOISE, {"photometric": "separated"}, "its colours are CMYK"),
        ((RGB // 2).astype(np.int8), {}, "its numbers are signed or floating-point"),
        *((NOISE, {"extrasamples": [kind]}, ALPHA) for kind in ("assocalpha", "unspecified")),
        *((RGB, {"extratags": [(274, 3, 1, turn, True)]}, TURNED.format(turn)) for turn in (3, 6)),
    ],
)
def test_colours_numbers_and_orientations_that_readers_differ_on_are_refused(
    tmp_path, layout, pixels, kwargs, words
):
    path = tiff(tmp_path / "a.tif", pixels, **LAYOUTS[layout], **kwargs)
    with pytest.raises(UnsupportedSlideError, match=words):
        open_slide(path)


def test_a_lower_level_of_another_colour_is_refused_too(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tif:
        tif.write(RGB, photometric="rgb", tile=(64, 64), **HALF_MICRON)
        tif.write(
            RGB[::2, ::2], photometric="minisblack", planarconfig="contig", tile=(64, 64), subfiletype=1
        )
    with pytest.raises(UnsupportedSlideError, match="its colours are BlackIsZero"):
        open_slide(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_colours_under_unassociated_alpha_are_the_writers_and_black_where_it_is_zero(tmp_path, layout):
    pixels = NOISE.copy()
    pixels[:100, :, 3] = 0
    with open_slide(
        tiff(tmp_path / "a.tif", pixels, extrasamples=["unassalpha"], **LAYOUTS[layout])
    ) as slide:
        region = slide.read_region((0, 0), 0, (300, 200))
    assert not region[:100].any()
    np.testing.assert_array_equal(region[100:], RGB[100:])


def test_strips_that_cannot_be_read_in_pieces_have_a_limit(tmp_path):
    path = tmp_path / "a.tif"
    zeros = np.zeros((1, 20_000, 3), np.uint8)
    tifffile.imwrite(path, zeros, photometric="rgb", compression="deflate", rowsperstrip=1, **HALF_MICRON)
    with tifffile.TiffFile(path, mode="r+b") as tif:
        tif.pages[0].tags["ImageLength"].overwrite(20_000)
        tif.pages[0].tags["RowsPerStrip"].overwrite(20_000)
    with pytest.raises(SlideOpenError, match=r"strips of 20000 x 20000 px.*allowed: 67 Mpx.*vips"):
        open_slide(path)


# --- images of OME-TIFF -----------------------------------------------------------------------


def ome(path, *shapes, names=(), **metadata):
    with tifffile.TiffWriter(path, ome=True) as tif:
        for i, shape in enumerate(shapes):
            name = {"Name": names[i]} if names else {}
            sizes = {"axes": "ZYXS"[-len(shape) :], "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, **name}
            tif.write(np.full(shape, 200, np.uint8), photometric="rgb", tile=(64, 64), metadata=sizes)
    return path


def test_other_images_of_an_ome_tiff_are_told_but_not_label_and_macro(tmp_path):
    names = ["section 1", "section 2", "label image", "macro image"]
    path = ome(tmp_path / "a.ome.tif", (200, 300, 3), (150, 100, 3), (50, 60, 3), (60, 50, 3), names=names)
    words = r"of its 4 images only the first, 'section 1', is read, and not 'section 2' \(100 x 150 px\);"
    with pytest.warns(UserWarning, match=words), open_slide(path) as slide:
        assert slide.size_l0 == (300, 200)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([(50, 60, 3), (200, 300, 3)], "'image 0', is smaller than others: 'image 1'.*bfconvert -series"),
        ([(4, 200, 300, 3)], "3 channels in 4 planes.*export the plane"),
    ],
)
def test_ome_tiffs_whose_image_is_in_doubt_are_refused(tmp_path, shapes, words):
    path = ome(tmp_path / "a.ome.tif", *shapes, names=[f"image {i}" for i in range(len(shapes))])
    with pytest.raises(UnsupportedSlideError, match=words):
        open_slide(path)


# --- µm/px ------------------------------------------------------------------------------------


def test_four_percent_between_x_and_y_are_told(tmp_path):
    path = tiff(tmp_path / "a.tif", resolution=(2e4, 2e4 / 1.04))
    with pytest.warns(UserWarning, match=r"0.5 µm/px across and 0.52 down"):
        slide = open_slide(path)
    with slide:
        assert slide.mpp == pytest.approx(0.5)
        assert "0.52 down" in slide.mpp_conflict
    with open_slide(path, mpp=0.51) as slide:
        assert not slide.mpp_conflict


def hest(folder, metadata):
    """A section as HEST writes it: its TIFF states a tenth of 0.688 µm/px."""
    path = tiff(folder / "wsis" / "TENX1.tif", resolution=(1e4 / 0.0688, 1e4 / 0.0688))
    if metadata is not None:
        (folder / "metadata").mkdir()
        (folder / "metadata/TENX1.json").write_text(json.dumps(metadata))
    return path


def test_a_tenth_of_the_true_resolution_is_refused_with_the_command(tmp_path):
    words = r"0.0688 µm/px.*allowed: 0.1 to 10.*would be 0.688\).*type --slide-mpp VALUE"
    with pytest.raises(ResolutionError, match=words):
        open_slide(hest(tmp_path, None))


def test_metadata_of_a_hest_folder_count_and_for_a_copy_elsewhere_too(tmp_path):
    path = hest(tmp_path, {"pixel_size_um_estimated": 0.688, "pixel_size_um_embedded": 0.7})
    copy = tmp_path / "copy.tif"
    copy.write_bytes(path.read_bytes())
    for entry in (SlideEntry(path, "a"), SlideEntry(path, "a", copy=copy)):
        with open_entry(entry) as slide:
            assert slide.mpp == 0.688
            assert slide.mpp_source.startswith("pixel_size_um_estimated of metadata/TENX1.json")
    with open_slide(path, mpp=0.5) as slide:
        assert slide.mpp == 0.5


@pytest.mark.parametrize(("value", "words"), [(0.0688, "0.0688 µm/px"), (10**400, "0.0688"), ("a", "0.0688")])
def test_metadata_of_hest_that_cannot_be_true_are_refused(tmp_path, value, words):
    with pytest.raises(ResolutionError, match=words):
        open_slide(hest(tmp_path, {"pixel_size_um_estimated": value}))
