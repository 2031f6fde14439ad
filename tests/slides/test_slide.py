"""Opening slides: the reader per file, µm/px with its source, and every refusal in one line."""

import os
import struct

import numpy as np
import openslide
import pytest
import tifffile
from conftest import shared
from PIL import Image
from synthetic_slide import write_synthetic_slide

from seal_extract.errors import ReadError, ResolutionError, SlideOpenError, UnsupportedSlideError
from seal_extract.slides.listing import list_slides
from seal_extract.slides.overview import read_overview
from seal_extract.slides.readers import OpenSlideReader, TiffSlideReader
from seal_extract.slides.slide import coarsest_level, open_slide


@pytest.fixture(scope="module")
def svs(tmp_path_factory):
    return write_synthetic_slide(
        tmp_path_factory.mktemp("svs") / "small.svs", (1500, 1100), mpp=0.25, downsamples=(1, 4)
    )


def tiff(path, pixels, mpp=None, **kwargs):
    if mpp is not None:
        kwargs |= {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, tile=(64, 64), **kwargs)
    return path


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(90, 256, shape).astype(dtype)


# --- the right reader, the right µm/px --------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "reader", "size", "mpp", "source", "levels"),
    [
        ("CMU-1-Small-Region.svs", "openslide", (2220, 2967), 0.499, "openslide.mpp-x", 1),
        ("test3-DAPI-2-387.ndpi", "openslide", (3968, 4864), 0.228175, "openslide.mpp-x", 7),
        ("qupath_OS-1-detail.ome.tif", "tiffslide", (1101, 1101), 0.227097, "OME PhysicalSizeX", 1),
        ("openslide-python_boxes_0.dcm", "openslide", (16, 16), 0.499, "openslide.mpp-x", 1),
    ],
)
def test_real_slides_open_with_the_reader_that_knows_their_resolution(
    file, reader, size, mpp, source, levels
):
    with open_slide(shared("data/wsi", file)) as slide:
        assert slide.reader.startswith(reader)
        assert slide.size_l0 == size
        assert slide.mpp == pytest.approx(mpp, abs=1e-6)
        assert slide.mpp_source == source
        assert len(slide.levels) == levels


def test_a_slide_introduces_itself(svs):
    with open_slide(svs) as slide:
        assert repr(slide).startswith(
            "Slide(small.svs: 1500 x 1100 px, 0.25 µm/px by openslide.mpp-x, 2 levels"
        )
        assert slide.levels[1].size_px == (375, 275)
        assert slide.levels[1].downsample == pytest.approx(4)


def test_given_resolution_counts_and_the_files_own_is_told(svs):
    with open_slide(svs, mpp=0.3) as slide:
        assert slide.mpp == 0.3
        assert slide.mpp_source == "given (file: 0.25, openslide.mpp-x)"


def test_generic_tiff_takes_its_resolution_tag(tmp_path):
    with open_slide(tiff(tmp_path / "a.tif", noise(200, 300, 3), mpp=0.5)) as slide:
        assert slide.size_l0 == (300, 200)
        assert slide.mpp == pytest.approx(0.5)
        assert "resolution tag" in slide.mpp_source


def test_ome_units_are_honoured(tmp_path):
    path = tmp_path / "a.ome.tif"
    metadata = {"axes": "YXS"}
    for axis in "XY":
        metadata |= {f"PhysicalSize{axis}": 250, f"PhysicalSize{axis}Unit": "nm"}
    tifffile.imwrite(path, noise(128, 128, 3), tile=(64, 64), photometric="rgb", metadata=metadata)
    with open_slide(path) as slide:
        assert (slide.mpp, slide.mpp_source) == (pytest.approx(0.25), "OME PhysicalSizeX")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_plain_images_need_a_given_resolution(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise(40, 60, 3)).save(path, dpi=(72, 72))
    with pytest.raises(ResolutionError, match=r"does not say how many µm.*type --slide-mpp VALUE"):
        open_slide(path)
    with open_slide(path, mpp=0.5) as slide:
        assert slide.size_l0 == (60, 40)


def test_levels_of_another_shape_are_never_chosen(tmp_path):
    path = tmp_path / "thumb.tif"
    tiles = {"tile": (64, 64), "photometric": "rgb"}
    with tifffile.TiffWriter(path) as tif:
        tif.write(noise(512, 512, 3), resolution=(2e4, 2e4), resolutionunit="CENTIMETER", **tiles)
        tif.write(noise(100, 256, 3), subfiletype=1, **tiles)
    with open_slide(path) as slide:
        assert [level.faithful for level in slide.levels] in ([True], [True, False])
        assert coarsest_level(slide, 4) == 0


@pytest.mark.parametrize(
    ("wanted", "level"), [(0.5, 0), (1, 0), (1.9, 0), (2, 1), (3.97, 2), (4, 2), (100, 2)]
)
def test_coarsest_level_that_is_fine_enough(drawn, wanted, level):
    assert coarsest_level(drawn(400, 400, downsamples=(1.0, 2.0005, 4.0001)), wanted) == level


# --- the pixels -------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1])
def test_regions_are_openslides_own_bit_by_bit(svs, level):
    with open_slide(svs) as slide, openslide.OpenSlide(svs) as reference:
        for xy in [(0, 0), (37, 411), (1400, 1000), (1499, 1099), (-20, -30)]:
            want = np.asarray(reference.read_region(xy, level, (97, 61)).convert("RGB"))
            np.testing.assert_array_equal(slide.read_region(xy, level, (97, 61)), want)


def test_tiffslide_and_openslide_agree_on_the_pixels(svs):
    with OpenSlideReader(svs) as a, TiffSlideReader(svs) as b:
        assert a.mpp == b.mpp
        for xy in [(0, 0), (500, 333), (1450, 1050)]:
            np.testing.assert_array_equal(a.read_region(xy, 0, (80, 80)), b.read_region(xy, 0, (80, 80)))


def test_tiffslide_is_not_asked_for_colours_it_gets_wrong(tmp_path):
    path = write_synthetic_slide(tmp_path / "a.svs", (600, 600), compression="jpeg2000", photometric="ycbcr")
    with pytest.raises(SlideOpenError, match=r"YCbCr of compression 33003 in false colours"):
        TiffSlideReader(path)
    with open_slide(path) as slide:
        assert slide.reader.startswith("openslide")


def test_outside_the_slide_is_black_for_every_reader(tmp_path, svs):
    image, ome = tmp_path / "a.png", tmp_path / "a.ome.tif"
    Image.fromarray(noise(128, 128, 3)).save(image)
    tifffile.imwrite(ome, noise(128, 128, 3), tile=(64, 64), photometric="rgb", metadata={"axes": "YXS"})
    for path, (w, h) in ((svs, (1500, 1100)), (image, (128, 128)), (ome, (128, 128))):
        with open_slide(path, mpp=0.5) as slide:
            region = slide.read_region((w - 10, h - 10), 0, (40, 40))
            assert region[:10, :10].any(), path
            assert not region[10:].any(), path
            assert not region[:, 10:].any(), path


def test_overview_is_the_area_average_block_by_block(drawn):
    slide = drawn(4160, 2080, mpp=0.5)  # of more than a block
    overview = read_overview(slide, 8.0)
    want = slide.pixels.reshape(130, 16, 260, 16, 3).mean(axis=(1, 3))
    assert overview.rgb.shape == (130, 260, 3)
    assert overview.downsample == 16
    assert np.abs(overview.rgb - want).max() <= 1
    assert overview.scanned.all()


def test_unscanned_black_becomes_white_and_is_told(drawn):
    slide = drawn(640, 480, mpp=0.5)
    slide.pixels[:, :320] = 0
    overview = read_overview(slide, 8.0)
    assert (overview.scanned == (np.arange(40) >= 20)).all()
    assert (overview.rgb[:, :20] == 255).all()


# --- refusals ---------------------------------------------------------------------------------


def test_missing_folder_empty_and_text_are_told_apart(tmp_path):
    text, empty = tmp_path / "text.svs", tmp_path / "empty.svs"
    text.write_text("not a slide at all\n")
    empty.touch()
    for path, message in [
        (tmp_path / "no.svs", "does not exist"),
        (tmp_path, "is a folder; give a slide file"),
        (empty, r"is empty \(0 bytes\)"),
        (text, r"it is text, beginning 'not a slide at a'; allowed: SVS, NDPI"),
    ]:
        with pytest.raises(SlideOpenError, match=message):
            open_slide(path)


def test_broken_svs_is_refused_and_an_unreadable_one_names_the_place():
    with pytest.raises(SlideOpenError, match=r"no reader opens it.*allowed: SVS"):
        open_slide(shared("data/wsi/broken.svs"))
    unreadable = shared("data/wsi/unreadable.svs")
    with open_slide(unreadable) as slide, pytest.raises(ReadError, match=r"level-0 \(0, 0\)"):
        slide.read_region((0, 0), 0, (16, 16))


@pytest.mark.parametrize("share", [0.2, 0.6, 0.9, 0.999])
def test_truncated_svs_fails_on_opening_or_on_reading(svs, tmp_path, share):
    cut = tmp_path / "cut.svs"
    cut.write_bytes(svs.read_bytes()[: int(svs.stat().st_size * share)])
    with pytest.raises((SlideOpenError, ReadError), match=r"truncated|damaged"), open_slide(cut) as slide:
        for y in range(0, 1100, 100):
            slide.read_region((0, y), 0, (1500, 100))


@pytest.mark.parametrize(
    ("per_cm", "words"),
    [
        ((1e4 / 352.8, 1e4 / 352.8), r"resolution tag\) gives 352.8 µm/px.*allowed: 0.1 to 10.*--slide-mpp"),
        ((2e4, 3e4), "square pixels within 5%"),
        (None, "type --slide-mpp VALUE"),
    ],
)
def test_a_resolution_that_cannot_be_true_is_refused_unless_one_is_given(tmp_path, per_cm, words):
    stated = {"resolution": per_cm, "resolutionunit": "CENTIMETER"} if per_cm else {}
    path = tiff(tmp_path / "a.tif", noise(200, 200, 3), **stated)
    with pytest.raises(ResolutionError, match=words):
        open_slide(path)
    with open_slide(path, mpp=0.5) as slide:
        assert slide.mpp == 0.5


@pytest.mark.parametrize("mpp", [0.0, 0.01, 25, float("nan"), -1])
def test_absurd_given_resolution_is_refused(svs, mpp):
    with pytest.raises(ResolutionError, match="--slide-mpp gives"):
        open_slide(svs, mpp=mpp)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((200, 200, 3), np.uint16), ((200, 200), np.uint8), ((200, 200), np.uint16)]
)
def test_other_than_8_bit_rgb_is_refused(tmp_path, shape, dtype):
    photometric = "rgb" if len(shape) == 3 else "minisblack"
    path = tiff(tmp_path / "a.tif", noise(*shape, dtype=dtype), mpp=0.5, photometric=photometric)
    with pytest.raises(UnsupportedSlideError, match="not 8-bit RGB brightfield"):
        open_slide(path)


def test_fluorescence_is_refused():
    words, path = r"not a brightfield slide.*fluorescence", shared("data/wsi/test3-DAPI-2-387.ndpi")
    with open_slide(path) as slide, pytest.raises(UnsupportedSlideError, match=words):
        read_overview(slide, 8.0)


def test_a_message_of_openslide_with_a_line_break_in_it_is_told_in_one_line(tmp_path):
    def element(group, number, kind, value):
        length = struct.pack("<HI", 0, len(value)) if kind == b"OB" else struct.pack("<H", len(value))
        return struct.pack("<HH", group, number) + kind + length + value

    uids = {2: b"1.2.840.10008.5.1.4.1.1.77.1.6\0\0", 3: b"1.2\0", 16: b"1.2.840.10008.1.2.1\0", 18: b"1.2\0"}
    meta = element(2, 1, b"OB", b"\0\1") + b"".join(element(2, n, b"UI", uid) for n, uid in uids.items())
    path = tmp_path / "a.dcm"
    head = bytes(128) + b"DICM" + element(2, 0, b"UL", struct.pack("<I", len(meta)))
    path.write_bytes(head + meta + element(8, 48, b"T\n", b"12"))
    with pytest.raises(SlideOpenError, match="cannot have VR 'T '") as caught:
        open_slide(path)
    assert "\n" not in str(caught.value)


# --- what is no file --------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["a FIFO", "a link to a FIFO", "a device"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, target):
    fifo, path = tmp_path / "fifo", tmp_path / "a.svs"
    os.mkfifo(fifo)
    path.symlink_to("/dev/zero" if target == "a device" else fifo)
    with pytest.raises(SlideOpenError, match="is no regular file"):
        open_slide(fifo if target == "a FIFO" else path)


@pytest.mark.parametrize(
    ("slide", "data", "fifo"),
    [
        ("a.dcm", bytes(128) + b"DICM", "b.dcm"),
        ("a.mrxs", b"x", "a/Slidedat.ini"),
        ("a.vms", b"[Virtual Microscope Specimen]\nImageFile=a.jpg\n", "a.jpg"),
    ],
)
def test_a_fifo_among_the_files_of_a_slide_is_refused_and_not_waited_for(tmp_path, slide, data, fifo):
    (tmp_path / slide).write_bytes(data)
    (tmp_path / fifo).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / fifo)
    with pytest.raises(SlideOpenError, match=f"{fifo} is no regular file, and {slide} may be made of it"):
        open_slide(tmp_path / slide)
    assert len(list_slides([tmp_path])) > 0
