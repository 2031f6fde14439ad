"""Tiles decoded by kernels, on a CPU by Triton's interpreter: the patches of the host's decoder."""

import numpy as np
import pytest
import torch
from slide_helpers import Damage, grid_at
from synthetic_slide import write_synthetic_slide

from seal_extract.errors import UsageError
from seal_extract.patches.reader import open_patch_reader
from seal_extract.patches.resample import Resampling, kernels_run_on
from seal_extract.patches.taps import by_taps
from seal_extract.patches.tiled import Unsuitable
from seal_extract.patches.tiles import TileReader
from seal_extract.slides.slide import open_slide

pytest.importorskip("triton", reason="Triton is for Linux")
from seal_extract.patches import gpu_tiles
from seal_extract.patches.gpu_tiles import GpuTileReader

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = (144, 112)
CORNERS = [(8, 8), (37, 21), (96, 64)]


@pytest.fixture(scope="module")
def slide_of(tmp_path_factory):
    """A slide of 9 x 7 tiles of 16 px, by subsampling or RGB; enlarged, because each code costs a step."""

    def make(kind):
        path = tmp_path_factory.mktemp("small") / f"{kind}.svs"
        colours = {"photometric": "rgb"} if kind == "rgb" else {"subsampling": kind}
        return write_synthetic_slide(path, SIZE, mpp=0.1, tile_px=16, downsamples=(1,), **colours)

    return make


def reader_of(slide, xy=CORNERS, filter="bicubic"):
    return GpuTileReader(slide, grid_at(slide, xy, 12, 16), Resampling(12, filter), DEVICE)


def exact(reader, rows):
    """Regions as the host decodes them, resized with Pillow's integers, which all GPUs have."""
    regions = TileReader(reader._slide, reader.grid, Resampling(reader.grid.patch_px, early=False)).read(rows)
    return by_taps(regions.pixels, (reader.grid.patch_px,) * 2), regions.unreadable


@pytest.mark.parametrize("kind", ["4:2:0", pytest.param("rgb", marks=pytest.mark.slow)])
def test_patches_are_those_of_the_host(slide_of, kind):
    with open_slide(slide_of(kind)) as slide:
        reader, rows = reader_of(slide), range(len(CORNERS))
        assert reader.name == "JPEG tiles on the GPU"
        assert reader.rows_at_once == 256
        want, _ = exact(reader, rows)
        assert torch.equal(reader.to_patches(reader.read(rows).pixels).cpu(), want)


def test_a_damaged_tile_makes_patches_unreadable_and_another_header_does_not(slide_of, tmp_path):
    """The host decides on both: libjpeg and OpenSlide refuse zeros, but not other names of components."""
    damage = Damage(slide_of("4:2:0"), tmp_path / "damaged.svs")
    zeros, renamed = 10, 21  # tiles at (16, 16) and (48, 32)
    size, header = len(damage.tile(zeros)), bytearray(damage.tile(renamed))
    damage.overwrite(zeros, bytes(size // 3), at=size // 2)
    frame, scan = header.index(b"\xff\xc0"), header.index(b"\xff\xda")
    for at in (frame + 10, frame + 13, frame + 16, scan + 5, scan + 7, scan + 9):
        header[at] += 100
    damage.overwrite(renamed, header)
    with open_slide(damage.write()) as slide:
        reader, rows = reader_of(slide), range(len(CORNERS))
        read = reader.read(rows)
        want, unreadable = exact(reader, rows)
        assert read.unreadable == unreadable
        assert list(unreadable) == [0]
        assert "level-0 (16, 16)" in unreadable[0]
        assert torch.equal(read.pixels.cpu()[1:], want[1:])
        assert not read.pixels[0].any()


def test_what_the_gpu_does_not_decode_is_said(slide_of, tmp_path):
    cpu = torch.device("cpu")
    with open_slide(slide_of("4:2:0")) as slide:
        with pytest.raises(Unsuitable, match="--resample area"):
            reader_of(slide, filter="area")
        with pytest.raises(Unsuitable, match="reach beyond"):
            reader_of(slide, [(136, 0)])
        grid = grid_at(slide, CORNERS, 24, 48)
        with pytest.raises(UsageError, match=r"cannot decode its tiles \(.*\); type --gpu-decode auto"):
            open_patch_reader(slide, grid, cpu, gpu_decode="on")
        for gpu_decode in ("auto", "off"):
            assert open_patch_reader(slide, grid, cpu, gpu_decode=gpu_decode).name == "JPEG tiles"
    large = write_synthetic_slide(tmp_path / "large.svs", (1100, 200), tile_px=1040, downsamples=(1,))
    with open_slide(large) as slide, pytest.raises(Unsuitable, match="tiles of more than 1024 px"):
        reader_of(slide)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here its kernels run")
def test_without_kernels_a_gpu_leaves_its_tiles_to_the_host_and_says_why(slide_of):
    kernels_run_on.cache_clear()
    with open_slide(slide_of("4:2:0")) as slide:
        grid = grid_at(slide, CORNERS, 24, 48)
        with pytest.warns(UserWarning, match=r"kernels do not run on cuda \(.*\); torch resamples instead"):
            reader = open_patch_reader(slide, grid, torch.device("cuda"))
        assert reader.name == "JPEG tiles, not on the GPU: Triton's kernels do not run on cuda"


def test_fewer_patches_are_read_at_once_where_they_lie_over_more_tiles(slide_of, monkeypatch):
    monkeypatch.setattr(gpu_tiles, "BYTES_AT_ONCE", 2 * 16 * 3 * 16**2)
    with open_slide(slide_of("4:2:0")) as slide:
        assert reader_of(slide, [(0, 0), (48, 48)]).rows_at_once == 32  # each over a tile
        assert reader_of(slide, [(8, 8), (24, 40)]).rows_at_once == 8  # each over 4


def test_a_gpu_that_fails_or_decodes_to_other_pixels_is_not_used(slide_of, monkeypatch):
    from seal_extract.patches.jpeg import JpegDecoder

    whole = JpegDecoder.decode

    def wrong(self, *args):
        pixels, odd = whole(self, *args)
        pixels[0, 3, 5, 1] ^= 1
        return pixels, odd

    def fail(self, *args):
        raise RuntimeError("ptxas is\nmissing")

    with open_slide(slide_of("4:2:0")) as slide:
        for decode, reason in ((wrong, "to other pixels"), (fail, "^ptxas is missing$")):
            monkeypatch.setattr(JpegDecoder, "decode", decode)
            with pytest.raises(Unsuitable, match=reason):
                reader_of(slide)


def test_tiles_are_read_in_few_pieces_and_missing_ones_are_empty(slide_of, tmp_path):
    damage = Damage(slide_of("4:2:0"), tmp_path / "short.svs")
    path = damage.set("TileOffsets", 5, 0).write()
    with open_slide(path) as slide:
        tiled = TileReader(slide, grid_at(slide, CORNERS, 24, 48), Resampling(24))._tiled
        tiles = np.array([40, 3, 5, 4])
        data, first, count = tiled.read_into(tiles, lambda size: np.zeros(size, np.uint8))
        want = dict(tiled.read(tiles.tolist()))
        assert [data[a : a + n].tobytes() for a, n in zip(first, count, strict=True)] == [
            want[t] for t in tiles
        ]
        assert count[2] == 0
