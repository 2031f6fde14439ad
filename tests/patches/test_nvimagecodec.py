"""JPEG 2000 tiles decoded on a device: by nvImageCodec on a CPU where it is installed, and by a stand-in."""

from functools import partial
from types import SimpleNamespace

import imagecodecs
import numpy as np
import pytest
import torch
from slide_helpers import Damage, grid_at
from synthetic_slide import write_synthetic_slide

from seal_extract.patches.codecs import Jpeg2000Codec, TileError
from seal_extract.patches.compressed import Compressed
from seal_extract.patches.resample import Resampling
from seal_extract.patches.taps import by_taps
from seal_extract.patches.tiled import Unsuitable
from seal_extract.patches.tiles import TileReader
from seal_extract.slides.slide import open_slide

pytest.importorskip("triton", reason="Triton is for Linux")
from seal_extract.patches import nvimagecodec
from seal_extract.patches.gpu_tiles import GpuTileReader

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE, TILE_PX = (144, 112), 48
CORNERS = [(0, 0), (37, 21), (96, 64)]


def stand_in(change=lambda pixels: pixels):
    """OpenJPEG behind the calls of nvImageCodec, with a change to the pixels; None where it refuses."""

    def decode(streams, images, params, cuda_stream):
        assert params == {"apply_exif_orientation": False, "color_spec": "as is", "sample_format": "as is"}
        done = []
        for stream, image in zip(streams, images, strict=True):
            pixels = change(imagecodecs.jpeg2k_decode(stream.tobytes()))
            if pixels is not None:
                torch.as_tensor(image).copy_(torch.from_numpy(pixels))
            done.append(None if pixels is None else image)
        return done

    as_is = SimpleNamespace(UNCHANGED="as is", I_UNCHANGED="as is")
    library = SimpleNamespace(
        CodeStream=lambda data: data,
        DecodeParams=dict,
        ColorSpec=as_is,
        SampleFormat=as_is,
        as_images=lambda targets, cuda_stream: targets,
    )
    return library, SimpleNamespace(decode=decode)


@pytest.fixture(params=["stand-in", "nvImageCodec"])
def library(request, monkeypatch):
    """Which of the two decodes; most tests of this file do not depend on it."""
    if request.param == "nvImageCodec":
        pytest.importorskip("nvidia.nvimgcodec")
    else:
        monkeypatch.setattr(nvimagecodec, "_open", lambda device: stand_in())


@pytest.fixture(scope="module", params=["rgb", "ycbcr"])
def slide_path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("j2k") / f"{request.param}.svs"
    how = {"compression": "jpeg2000", "photometric": request.param, "tile_px": TILE_PX}
    return write_synthetic_slide(path, SIZE, downsamples=(1,), **how)


def reader_of(slide):
    return GpuTileReader(slide, grid_at(slide, CORNERS, 24, 48), Resampling(24), DEVICE)


def exact(reader):
    """Regions as the host decodes them, resized with Pillow's integers."""
    rows = range(len(CORNERS))
    regions = TileReader(reader._slide, reader.grid, Resampling(24, early=False)).read(rows)
    return by_taps(regions.pixels, (24, 24)), regions.unreadable


def test_patches_are_those_of_the_host(library, slide_path):
    with open_slide(slide_path) as slide:
        reader = reader_of(slide)
        assert reader.name == "JPEG 2000 tiles on the GPU, within 3 grey levels"
        read = reader.read(range(len(CORNERS)))
        off = (read.pixels.cpu().int() - exact(reader)[0].int()).abs()
        assert off.max() <= (0 if DEVICE.type == "cpu" else 3)
        assert not read.unreadable


def test_damaged_tiles_and_others_are_left_to_the_host(library, slide_path, tmp_path):
    """One that ends too early, one of another header; and a comment in the header changes nothing."""
    damage = Damage(slide_path, tmp_path / "damaged.svs")
    short, other, renamed = 0, 4, 8  # tiles under one patch each, and each under the one in the middle
    damage.swap_in(short, damage.tile(short)[:-300])
    pixels = imagecodecs.jpeg2k_decode(damage.tile(other))
    damage.swap_in(other, imagecodecs.jpeg2k_encode(pixels, level=0, codecformat="j2k", reversible=True))
    damage.swap_in(renamed, damage.tile(renamed).replace(b"OpenJPEG", b"JPEGOpen"))
    with open_slide(damage.write()) as slide:
        reader = reader_of(slide)
        places = reader._decoder.places(reader._compressed(np.array([short, other, renamed]), 0))
        assert (places[:, 1] > 0).tolist() == [False, False, True]
        read = reader.read(range(len(CORNERS)))
        want, unreadable = exact(reader)
        assert read.unreadable == unreadable
        assert 0 in unreadable
        assert (read.pixels.cpu().int() - want.int()).abs().max() <= (0 if DEVICE.type == "cpu" else 3)
        assert not read.pixels[0].any()


def test_what_openjpeg_calls_damaged_is_odd(slide_path, monkeypatch):
    """Most damage behind the header is none to OpenJPEG; all that it refuses is found without decoding."""
    monkeypatch.setattr(nvimagecodec, "_open", lambda device: stand_in())
    rng = np.random.default_rng(0)
    codec, shape = Jpeg2000Codec(), (TILE_PX, TILE_PX, 3)
    with open_slide(slide_path) as slide:
        sound = [data for _, data in reader_of(slide)._tiled.read([0, 1, 3, 4])]
    tiles = nvimagecodec.Jpeg2000Tiles(codec, (TILE_PX, TILE_PX), sound[0], DEVICE)
    streams = list(sound)
    for i in range(1500):
        data = bytearray(sound[i % len(sound)])
        at = int(rng.integers(2 if i % 3 else 100, len(data) - 2))
        if i % 5 == 0:
            del data[at:]
        elif i % 5 == 1:
            data[at:-2] = bytes(data[at:-2][::-1])
        else:
            data[at : at + 16] = rng.bytes(16)[: len(data) - at]
        streams.append(bytes(data))
    joined, count = np.frombuffer(b"".join(streams), np.uint8), np.array([len(data) for data in streams])
    read = Compressed(np.arange(len(count)), torch.empty(0), joined, np.cumsum(count) - count, count)
    is_sound = tiles.places(read)[:, 1] > 0
    accepted = []
    for data in streams:
        try:
            codec.decode(data, np.empty(shape, np.uint8))
            accepted.append(True)
        except TileError:
            accepted.append(False)
    assert is_sound[: len(sound)].all()
    assert not (is_sound & ~np.array(accepted)).any()
    behind_the_header = np.arange(len(count)) >= len(sound)
    assert 0.2 < is_sound[behind_the_header].mean() < 0.9
    with pytest.raises(TileError):
        nvimagecodec.Jpeg2000Tiles(codec, (TILE_PX, TILE_PX), streams[accepted.index(False)], DEVICE)


def brighter(by, pixels, everywhere=False):
    """Pixels of which one, or all, are brighter."""
    changed = pixels.astype(int)
    changed[slice(None) if everywhere else (5, 7)] += by
    return changed.clip(0, 255).astype(np.uint8)


def test_pixels_may_be_off_by_three_but_not_by_more_nor_by_one_everywhere(slide_path, monkeypatch):
    with open_slide(slide_path) as slide:
        for by, everywhere in ((4, False), (1, True)):
            change = partial(brighter, by, everywhere=everywhere)
            monkeypatch.setattr(nvimagecodec, "_open", lambda device, change=change: stand_in(change))
            with pytest.raises(Unsuitable, match="to other pixels"):
                reader_of(slide)
        monkeypatch.setattr(nvimagecodec, "_open", lambda device: stand_in(partial(brighter, 1)))
        assert reader_of(slide).name.endswith("within 3 grey levels")


def test_a_library_that_refuses_tiles_or_is_missing_is_not_used(slide_path, monkeypatch):
    def missing(device):
        raise ImportError("nvidia")

    with open_slide(slide_path) as slide:
        monkeypatch.setattr(nvimagecodec, "_open", lambda device: stand_in(lambda pixels: None))
        with pytest.raises(Unsuitable, match="decodes none of a sample"):
            reader_of(slide)
        monkeypatch.setattr(nvimagecodec, "_open", missing)
        with pytest.raises(Unsuitable, match=r"nvImageCodec is not installed; type, .*\[gpu\]"):
            reader_of(slide)
