"""Slides damaged byte by byte: told in one line with the place, or recorded row by row; never embedded."""

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
import torch
from slide_helpers import Checksums, Damage, grid_of_level, openslides_regions
from synthetic_slide import write_synthetic_slide

from seal_extract import ExtractOptions, open_slide
from seal_extract.errors import ReadError, SlideError, SlideOpenError
from seal_extract.patches.codecs import JpegCodec, TileError
from seal_extract.patches.reader import open_patch_reader
from seal_extract.patches.regions import RegionReader
from seal_extract.patches.resample import Resampling
from seal_extract.patches.tiles import TileReader
from seal_extract.run.extract import extract_many
from seal_extract.run.job import SlideJob
from seal_extract.slides.overview import read_overview

CPU = torch.device("cpu")
SIZE, ACROSS = (1800, 1400), 8  # tiles of 256 px in a row
PLACES = [(x, y) for y in range(0, 1200, 200) for x in range(0, 1600, 200)]


@pytest.fixture(scope="module")
def svs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return write_synthetic_slide(folder / "small.svs", SIZE, mpp=0.5, downsamples=(1, 4), seed=2)


@pytest.fixture(scope="module")
def whole(svs, tmp_path_factory):
    """The undamaged slide's features."""
    return run(svs, tmp_path_factory.mktemp("out")).features[0]


@pytest.fixture(scope="module")
def tile(whole):
    """A tile in the middle of the tissue, under several patches."""
    x, y = whole.grid.xy_l0[len(whole.grid) // 2] + whole.grid.patch_size_l0 // 2
    return int(y // 256 * ACROSS + x // 256)


@pytest.fixture(scope="module")
def other_tile(tmp_path_factory):
    """A tile of 240 px."""
    path = tmp_path_factory.mktemp("other") / "b.svs"
    write_synthetic_slide(path, (700, 700), mpp=0.5, downsamples=(1,), tile_px=240, seed=4)
    return Damage(path, path).tile(4)


def run(path, out, **options):
    (result,) = extract_many([path], [Checksums()], out, options=ExtractOptions(**options))
    return result


def half_written(folder):
    return [p for p in folder.rglob("*") if p.suffix == ".part" or "features_" in str(p.parent)]


def under(tile, grid):
    """Rows of the patches that a tile of level 0 lies under."""
    x, y = tile % ACROSS * 256, tile // ACROSS * 256
    low, high = grid.xy_l0, grid.xy_l0 + grid.patch_size_l0
    return np.flatnonzero((low[:, 0] < x + 256) & (high[:, 0] > x) & (low[:, 1] < y + 256) & (high[:, 1] > y))


def random_bytes(count):
    return np.random.default_rng(0).bytes(count)


DAMAGES = {
    "zeros": lambda d, n, _: d.overwrite(n, bytes(d.counts[n])),
    "random": lambda d, n, _: d.overwrite(n, random_bytes(d.counts[n])),
    "zeros in the middle": lambda d, n, _: d.overwrite(n, bytes(200), d.counts[n] // 2),
    "random in the middle": lambda d, n, _: d.overwrite(
        n, random_bytes(d.counts[n] // 3).replace(b"\xff", b"\0"), d.counts[n] // 2
    ),
    "half of it": lambda d, n, _: d.set("TileByteCounts", n, d.counts[n] // 2),
    "another size": lambda d, n, other: d.swap_in(n, other),
    "nothing": lambda d, n, _: d.set("TileByteCounts", n, 0),
    "4 GB": lambda d, n, _: d.set("TileByteCounts", n, 2**32 - 1),
    "past the end": lambda d, n, _: d.set("TileOffsets", n, 2**31),
}
KNOWN_TO_READERS = [kind for kind in DAMAGES if kind != "nothing"]  # OpenSlide shows those as black


@pytest.fixture
def damaged(svs, tile, other_tile, tmp_path):
    return lambda kind: DAMAGES[kind](Damage(svs, tmp_path / "small.svs"), tile, other_tile).write()


# --- a damaged tile under patches -------------------------------------------------------------


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_tile_fails_the_slide_or_becomes_rows_of_zeros(damaged, whole, tile, tmp_path, kind):
    path, out = damaged(kind), tmp_path / "out"
    rows = under(tile, whole.grid)
    assert 0 < len(rows) < len(whole.grid)

    failed = run(path, out)
    assert isinstance(failed.error, ReadError)
    assert "\n" not in str(failed.error)
    assert str(path) in str(failed.error)
    assert f"level-0 ({tile % ACROSS * 256}, {tile // ACROSS * 256})" in str(failed.error)
    assert not half_written(out)

    (kept,) = run(path, out, max_read_errors=len(rows)).features
    np.testing.assert_array_equal(kept.grid.xy_l0, whole.grid.xy_l0)
    good = np.setdiff1d(np.arange(len(whole.grid)), rows)
    assert not kept.features[rows].any()
    np.testing.assert_array_equal(kept.features[good], whole.features[good])
    assert kept.provenance["read_errors"] == len(rows)
    assert [u["row"] for u in kept.provenance["unreadable"]] == rows.tolist()
    assert [u["xy_l0"] for u in kept.provenance["unreadable"]] == whole.grid.xy_l0[rows].tolist()
    assert all("damaged" in u["reason"] for u in kept.provenance["unreadable"])

    assert run(path, out, max_read_errors=len(rows) + 5).finished_before


def test_fewer_read_errors_allowed_than_there_are_is_told_and_done_again(damaged, whole, tile, tmp_path):
    path, out, most = damaged("zeros"), tmp_path / "out", len(under(tile, whole.grid))
    too_many = run(path, out, max_read_errors=most - 1)
    assert f"(patch {most} of this slide that cannot be read; --max-read-errors allows {most - 1})" in str(
        too_many.error
    )
    assert not half_written(out)
    assert run(path, out, max_read_errors=most).error is None
    assert isinstance(run(path, out, max_read_errors=most - 1).error, ReadError)


@pytest.mark.parametrize("kind", KNOWN_TO_READERS)
def test_the_reader_fails_at_the_damage_alone_from_any_thread(damaged, svs, tile, kind):
    """OpenSlide's handle fails for ever once it has failed; tiffslide would show damaged JPEG as tissue."""
    with open_slide(damaged(kind)) as slide:
        grid = grid_of_level(slide, 0, PLACES, 200)
        decoder, want = RegionReader(slide, grid, Resampling(200)), openslides_regions(svs, grid)
        rows = under(tile, grid).tolist()

        def read(_):
            return [decoder.read(range(a, a + 6)) for a in range(0, len(grid), 6)]

        with ThreadPoolExecutor(4) as pool:
            seen = list(pool.map(read, range(4)))
        decoder.close()
    for parts in seen:
        assert sorted(row for part in parts for row in part.unreadable) == rows
        pixels = torch.cat([part.pixels for part in parts]).permute(0, 2, 3, 1).numpy()
        want[rows] = 0
        np.testing.assert_array_equal(pixels, want)


@pytest.mark.parametrize("fast", [False, True])
def test_a_tile_that_only_our_decoder_rejects_is_the_readers(svs, tile, monkeypatch, fast):
    with open_slide(svs) as slide:
        grid = grid_of_level(slide, 0, PLACES, 200)
        decoder = open_patch_reader(slide, grid, CPU, fast=fast)
        assert isinstance(decoder, TileReader)
        ((_, rejected),) = decoder._tiled.read([tile])
        decode = JpegCodec.decode

        def picky(self, data, *args, **options):
            if data == rejected:
                raise TileError("not to our taste")
            decode(self, data, *args, **options)

        monkeypatch.setattr(JpegCodec, "decode", picky)
        got = decoder.read(range(len(grid)))
    assert not got.unreadable
    np.testing.assert_array_equal(got.pixels.permute(0, 2, 3, 1), openslides_regions(svs, grid))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kind", DAMAGES)
def test_shrinking_as_tiles_are_decoded_hides_no_damage(damaged, svs, tile, fast, kind):
    with open_slide(svs) as good, open_slide(damaged(kind)) as bad:
        grid = grid_of_level(good, 0, [(x, y) for y in range(0, 1200, 256) for x in range(0, 1600, 256)], 128)
        grid = type(grid)(grid.xy_l0, 64, 1.0, 128, 0, 0, 128)
        want, got = (
            open_patch_reader(slide, grid, CPU, filter="area", fast=fast).read(range(len(grid)))
            for slide in (good, bad)
        )
    rows = under(tile, grid).tolist()
    assert sorted(got.unreadable) == rows
    want.pixels[rows] = 0
    assert torch.equal(got.pixels, want.pixels)


def test_damage_that_a_lenient_reader_paints_over_is_not_tissue(tmp_path):
    """Tiffslide, the reader of OME-TIFF, shows what libjpeg makes of a broken tile."""
    path, metadata = tmp_path / "a.ome.tif", {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", compression="jpeg", metadata=metadata)
    broken = Damage(path, tmp_path / "b.ome.tif")
    broken.overwrite(3, bytes(2000), broken.counts[3] // 2).write()
    with open_slide(broken.path) as slide:
        assert slide.reader.startswith("tiffslide")
        assert slide.read_region((256, 256), 0, (256, 256)).any()
        grid = grid_of_level(slide, 0, [(0, 0), (256, 0), (0, 256), (256, 256), (150, 150)], 200)
        decoder = open_patch_reader(slide, grid, CPU)
        assert decoder.name == "JPEG tiles"
        unreadable = decoder.read(range(5)).unreadable
    assert sorted(unreadable) == [3, 4]
    assert all("at level-0 (256, 256) is damaged" in why for why in unreadable.values())


def test_tiles_that_the_file_leaves_out_are_what_the_reader_shows(svs, tile, tmp_path):
    path = Damage(svs, tmp_path / "a.svs").set("TileByteCounts", tile, 0).set("TileOffsets", tile, 0).write()
    with open_slide(path) as slide:
        grid = grid_of_level(slide, 0, [(tile % ACROSS * 256 - 50, tile // ACROSS * 256)], 200)
        got = open_patch_reader(slide, grid, CPU).read(range(1))
    assert not got.unreadable
    np.testing.assert_array_equal(got.pixels.permute(0, 2, 3, 1), openslides_regions(path, grid))


# --- tables, and what lies before the patches and around them ----------------------------------

BEFORE_PATCHES = {  # error, its words, the directory that is damaged, and how
    **{  # OpenSlide would show black for the rest, and black is taken for glass
        f"too few {tag} of page {page}": (
            SlideOpenError,
            "knows 2 of",
            page,
            lambda d, tag=tag: d.shorten(tag, 2),
        )
        for page in (0, 2)
        for tag in ("TileOffsets", "TileByteCounts")
    },
    **{
        f"JPEG tables {what}": (ReadError, "level-0 (0, 0)", 0, damage)
        for what, damage in {
            "missing": lambda d: d.rename("JPEGTables", 65000),
            "of zeros": lambda d: d.fill("JPEGTables", bytes(100), 20),
            "of noise": lambda d: d.fill("JPEGTables", random_bytes(100), 20),
        }.items()
    },
    "the level on which tissue is found": (
        ReadError,
        "of level 1 at level-0 (0, 0)",
        2,
        lambda d: d.overwrite(0, bytes(500)),
    ),
}


@pytest.mark.parametrize("limit", [0, 1000])
@pytest.mark.parametrize("what", BEFORE_PATCHES)
def test_damage_that_is_no_patch_s_fails_the_slide_in_one_line(svs, tmp_path, what, limit):
    kind, words, page, damage = BEFORE_PATCHES[what]
    path = damage(Damage(svs, tmp_path / "small.svs", page)).write()
    result = run(path, tmp_path / "out", max_read_errors=limit)
    assert isinstance(result.error, kind)
    assert words in str(result.error)
    assert "\n" not in str(result.error)
    assert not half_written(tmp_path / "out")


def test_damaged_glass_stops_nothing_and_is_white_in_the_picture(svs, whole, tmp_path):
    damage = Damage(svs, tmp_path / "small.svs")
    glass = next(n for n in range(len(damage.counts)) if not len(under(n, whole.grid)))
    path = damage.overwrite(glass, bytes(damage.counts[glass])).write()
    (kept,) = run(path, tmp_path / "out").features
    np.testing.assert_array_equal(kept.features, whole.features)
    assert kept.provenance["read_errors"] == 0
    with open_slide(path) as slide:
        with pytest.raises(ReadError):
            read_overview(slide, slide.mpp)
        picture = read_overview(slide, slide.mpp, holes=True)
    x, y = glass % ACROSS * 256, glass // ACROSS * 256
    assert (picture.rgb[y : y + 256, x : x + 256][:100, :100] == 255).all()
    assert not picture.scanned[y : y + 100, x : x + 100].any()
    assert 0.8 < picture.scanned.mean() < 1


# --- slides that change while they are read ---------------------------------------------------


def replace(path, svs):
    other = path.with_suffix(".new")
    shutil.copy(svs, other)
    os.replace(other, path)


CHANGES = {
    "replaced": replace,
    "appended to": lambda path, _: path.write_bytes(path.read_bytes() + b"more"),
    "cut": lambda path, _: os.truncate(path, path.stat().st_size // 20),
    "deleted": lambda path, _: path.unlink(),
}


MOMENTS = {
    "before it is opened": (SlideJob, "open"),
    "after patches are read": (TileReader, "read"),
    "after they are encoded": (Checksums, "compute"),
}


@pytest.mark.parametrize("when", MOMENTS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_slide_that_changes_while_it_is_read_fails(svs, tmp_path, monkeypatch, change, when):
    path = shutil.copy(svs, tmp_path / "small.svs")
    owner, name = MOMENTS[when]
    whole, changed = getattr(owner, name), threading.Event()

    def change_once():
        if not changed.is_set():
            changed.set()
            CHANGES[change](path, svs)

    def changing(*args, **kwargs):
        if owner is SlideJob:
            change_once()
        result = whole(*args, **kwargs)
        change_once()
        return result

    monkeypatch.setattr(owner, name, changing)
    result = run(path, tmp_path / "out", batch_size=4)
    assert changed.is_set()
    assert isinstance(result.error, SlideError)
    if owner is not SlideJob:  # else the first that opens it again may say that it is gone
        words = "is gone" if change == "deleted" else "was changed"
        assert words in str(result.error)
        assert "while it was read" in str(result.error)
    assert "\n" not in str(result.error)
    assert not half_written(tmp_path / "out")
