"""JPEG decoded by kernels, on a CPU by Triton's interpreter: the pixels of libjpeg-turbo, and its damage."""

import numpy as np
import pytest
import simplejpeg
import torch

from seal_extract.patches.codecs import ADOBE, RGB, SOI, YCBCR, TileError
from seal_extract.patches.jpeg import JpegDecoder, header_bytes, read_frame

pytest.importorskip("triton", reason="Triton is for Linux")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def picture(seed, width, height):
    """Smooth colours and some grain, uint8 [h, w, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3)).repeat(8, 0).repeat(8, 1)
    return (coarse[:height, :width] + rng.integers(-20, 20, (height, width, 3))).clip(0, 255).astype(np.uint8)


def decode(streams):
    """Pixels uint8 [T, h, w, 3], and whether each tile is odd."""
    start = header_bytes(streams[0])
    data = [stream[start:].removesuffix(b"\xff\xd9") for stream in streams]
    counts = np.array([len(d) for d in data])
    words = -(-counts // 4) + 2
    places = np.stack([np.cumsum(counts) - counts, counts, np.cumsum(words) - words], 1).astype(np.int32)
    raw = torch.from_numpy(np.frombuffer(b"".join(data), np.uint8).copy()).to(DEVICE)
    decoder = JpegDecoder(read_frame(streams[0][:start]), DEVICE)
    pixels, odd = decoder.decode(raw, torch.from_numpy(places).to(DEVICE), int(words.sum()))
    return pixels.cpu().numpy(), odd.cpu().numpy()


@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
@pytest.mark.parametrize(
    "size",
    [(17, 9), *(pytest.param(size, marks=pytest.mark.slow) for size in ((32, 16), (24, 24), (17, 19)))],
)
def test_pixels_are_libjpegs(subsampling, size):
    pictures = [picture(seed, *size) for seed in range(3)]
    streams = [simplejpeg.encode_jpeg(p, quality=30, colorsubsampling=subsampling) for p in pictures]
    pixels, odd = decode(streams)
    assert not odd.any()
    np.testing.assert_array_equal(pixels, np.stack([simplejpeg.decode_jpeg(s) for s in streams]))


def test_colours_are_those_that_the_markers_state():
    """Without JFIF, Adobe's marker counts: 0 is RGB, 1 is YCbCr; without both, names of components."""
    stream = simplejpeg.encode_jpeg(picture(0, 8, 8), quality=30, colorsubsampling="444")
    start = 2 + 2 + int.from_bytes(stream[4:6], "big")
    jfif, rest = stream[:start], stream[start:]
    rgb, ycbcr = ADOBE + RGB, ADOBE + YCBCR
    streams = [stream, SOI + rest, SOI + rgb + rest, SOI + ycbcr + rest, jfif + rgb + rest]
    assert [read_frame(s[: header_bytes(s)]).ycbcr for s in streams] == [True, True, False, True, True]
    for stream in streams[1:3]:
        pixels, odd = decode([stream])
        assert not odd
        np.testing.assert_array_equal(pixels[0], simplejpeg.decode_jpeg(stream))


DAMAGES = {
    "a bit": lambda rng, data: _put(
        data, at := rng.integers(len(data)), bytes([data[at] ^ 1 << rng.integers(8)])
    ),
    "an end": lambda rng, data: data[: rng.integers(1, len(data) - 2)],
    "zeros": lambda rng, data: _put(data, rng.integers(len(data)), bytes(12)),
    "noise": lambda rng, data: _put(data, rng.integers(len(data)), rng.bytes(12)),
    "a marker": lambda rng, data: _put(data, rng.integers(len(data)), b"\xff\xd9"),
    "too much": lambda rng, data: data + rng.bytes(9).replace(b"\xff", b"\0"),
}


def _put(data, at, other):
    return data[:at] + other + data[at + len(other) :]


def is_damaged(stream):
    try:
        simplejpeg.decode_jpeg(stream, strict=True)
    except ValueError:
        return True
    return False


def test_what_strict_libjpeg_calls_damaged_is_odd_and_all_else_is_its_pixels():
    stream = simplejpeg.encode_jpeg(picture(1, 16, 16), quality=30, colorsubsampling="420")
    start, rng = header_bytes(stream), np.random.default_rng(0)
    damaged = [damage(rng, stream[start:-2]) for damage in DAMAGES.values() for _ in range(6)]
    streams = [stream, *(stream[:start] + data + b"\xff\xd9" for data in damaged)]
    pixels, odd = decode(streams)
    wrong = np.array([is_damaged(s) for s in streams])
    assert wrong[1:].reshape(-1, 6).any(1).all()
    assert odd[wrong].all()
    assert 0 < odd.sum() < len(streams) - 1  # some changes are not seen, by libjpeg neither
    for i in np.flatnonzero(odd == 0):
        np.testing.assert_array_equal(pixels[i], simplejpeg.decode_jpeg(streams[i]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: simplejpeg.encode_jpeg(picture(0, 16, 16), colorsubsampling="440"), "another subsampling"),
        (
            lambda s: simplejpeg.encode_jpeg(np.zeros((16, 16, 1), np.uint8), colorspace="GRAY"),
            "1 components of 8",
        ),
        (lambda s: s.replace(b"\xff\xc0", b"\xff\xc2"), "not baseline"),
        (lambda s: s.replace(b"\xff\xda", b"\xff\xdd\0\4\0\1\xff\xda"), "restart intervals"),
        (lambda s: s.replace(b"\xff\xdb", b"\xff\xe9"), r"header is damaged \(KeyError\)"),
        (lambda s: s[:200], "no entropy-coded data"),
    ],
)
def test_other_kinds_of_jpeg_are_refused(change, message):
    stream = change(simplejpeg.encode_jpeg(picture(0, 16, 16)))
    with pytest.raises(TileError, match=message):
        read_frame(stream[: header_bytes(stream)])
