"""Plain PNG and JPEG: decoded whole and strictly; what other programs show otherwise is refused."""

import io
import tracemalloc
import zlib

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from seal_extract import open_slide
from seal_extract.errors import ReadError, SlideOpenError, UnsupportedSlideError

NOISE = np.random.default_rng(0).integers(90, 256, (200, 300, 4), dtype=np.uint8)


def save(path, pixels=NOISE[..., :3], **kwargs):
    Image.fromarray(pixels).save(path, **kwargs)
    return path


def read(path):
    with open_slide(path, mpp=0.5) as slide:
        return slide.read_region((0, 0), 0, slide.size_l0)


PROGRESSIVE = {"subsampling": 2, "progressive": True}
RESTARTING = {"subsampling": 1, "restart_marker_blocks": 3}


@pytest.mark.parametrize("kwargs", [{"subsampling": 0}, PROGRESSIVE, RESTARTING, {"keep_rgb": True}])
def test_a_jpegs_pixels_are_pillows(tmp_path, kwargs):
    path = save(tmp_path / "a.jpg", **kwargs)
    np.testing.assert_array_equal(read(path), np.asarray(Image.open(path)))


def test_a_pngs_pixels_are_the_writers_and_black_where_transparent(tmp_path):
    pixels = NOISE.copy()
    pixels[:50, :, 3] = 0
    region = read(save(tmp_path / "a.png", pixels))
    assert not region[:50].any()
    np.testing.assert_array_equal(region[50:], pixels[50:, :, :3])


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_exif_orientation_is_refused_with_the_command(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    path = save(tmp_path / f"a.{suffix}", exif=exif)
    with pytest.raises(UnsupportedSlideError, match=rf"Orientation {orientation}\).*vips autorot"):
        open_slide(path, mpp=0.5)


DEEP = NOISE.astype(np.uint16) * 257


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (DEEP[..., :3], r"in 16 bits; allowed: 8-bit RGB"),
        (DEEP, r"in 16 bits; allowed: 8-bit RGB"),
        (NOISE[..., 0], "an image of mode L; allowed: 8-bit RGB"),
    ],
)
def test_a_deep_or_grey_png_is_refused(tmp_path, pixels, words):
    path = tmp_path / "a.png"
    path.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(pixels)))
    with pytest.raises(UnsupportedSlideError, match=words):
        open_slide(path, mpp=0.5)


def test_damage_that_libjpeg_only_warns_of_is_an_error_with_the_warning(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(NOISE[..., :3]).save(whole, "JPEG", quality=90)
    data, told = whole.getvalue(), set()
    for seed in range(60):
        rng, damaged = np.random.default_rng(seed), bytearray(data)
        for at in rng.integers(700, len(data) - 2, 4):
            damaged[at] = rng.integers(256)
        path = tmp_path / "a.jpg"
        path.write_bytes(damaged)
        try:
            np.asarray(Image.open(path))
        except OSError:
            continue  # libjpeg sees damage that it does not paint over
        try:
            read(path)
        except ReadError as exc:
            assert "\n" not in str(exc)
            told.add(str(exc).partition("(0, 0): ")[2].partition(";")[0])
    assert {words.partition(":")[0] for words in told} == {"Corrupt JPEG data"}, told


def test_damaged_png_and_cut_jpeg_are_errors(tmp_path):
    png, jpeg = save(tmp_path / "a.png"), save(tmp_path / "a.jpg")
    data = bytearray(png.read_bytes())
    data[len(data) // 2] ^= 1
    png.write_bytes(data)
    jpeg.write_bytes(jpeg.read_bytes()[:9000])
    for path, words in ((png, "CRC error"), (jpeg, "Premature end of JPEG file")):
        with pytest.raises(ReadError, match=words):
            read(path)


def test_a_header_that_pillow_cannot_read_is_one_line(tmp_path):
    path = save(tmp_path / "a.png")
    data, text = path.read_bytes(), b"zTXtComment\0\0" + zlib.compress(bytes(5_000_000))
    chunk = (len(text) - 4).to_bytes(4, "big") + text + zlib.crc32(text).to_bytes(4, "big")
    bomb = data[:33] + chunk + data[33:]
    for damaged, words in ((data[:20], "Truncated"), (bomb, "(MAX_TEXT_CHUNK|Too Large)")):
        path.write_bytes(damaged)
        with pytest.raises(SlideOpenError, match=f"no reader opens it.*Pillow: .*{words}"):
            open_slide(path, mpp=0.5)


def test_decoding_takes_the_memory_of_the_pixels_once(tmp_path):
    path = save(tmp_path / "a.png", np.zeros((3000, 4000, 3), np.uint8))
    tracemalloc.start()
    with open_slide(path, mpp=0.5) as slide:
        slide.read_region((0, 0), 0, (8, 8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * 3000 * 4000 * 3


def test_a_plain_image_too_large_to_decode_whole_is_refused_by_its_header(tmp_path):
    data = bytearray(save(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8)).read_bytes())
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(UnsupportedSlideError, match=r"100000 x 100000 px.*allowed: 600 Mpx.*vips tiffsave"):
        open_slide(tmp_path / "a.png", mpp=0.5)
