"""OME-Zarr: every axis order, format and place gives the pixels that were written, and damage is told."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import openslide
import pytest
import torch
from cohort_fixtures import contents, draw_slides, run_here
from slide_helpers import grid_of_level
from zarr_stores import IS_ZARR_2, chunk_file, halved, write_attributes, write_store

from seal_extract import open_slide
from seal_extract.errors import ReadError, ResolutionError, SlideOpenError, UnsupportedSlideError
from seal_extract.features.store import open_origin, read_features
from seal_extract.patches.reader import open_patch_reader
from seal_extract.patches.stream import stream_batches
from seal_extract.run.cohort import extract_cohort
from seal_extract.slides import ome_zarr
from seal_extract.slides.listing import list_slides
from seal_extract.view.collection import Collection

ZARR_3 = pytest.mark.skipif(IS_ZARR_2, reason="zarr 2 reads 0.4, from a disk")


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    """Three levels of a drawn slide, of no whole number of chunks."""
    path = draw_slides(tmp_path_factory.mktemp("drawn"), 1)[0]
    with openslide.OpenSlide(path) as slide:
        return halved(np.asarray(slide.read_region((0, 0), 0, (900, 700)).convert("RGB")))


@pytest.fixture
def store(levels, tmp_path):
    return write_store(tmp_path / "slide.ome.zarr", levels)


def zipped(folder, top=""):
    path = folder.with_name("slide.ozx")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(file, top + file.relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"axes": "yxc", "chunk": 100},
        {"axes": "tczyx", "chunk": 512},
        {"axes": "czyx", "units": dict.fromkeys("zyx", "nanometer"), "mpp": 500.0},
        pytest.param({"version": "0.5"}, marks=ZARR_3),
        pytest.param({"version": "0.5", "axes": "yxc", "chunk": 64, "shard": 256}, marks=ZARR_3),
    ],
    ids=str,
)
def test_every_layout_shows_the_pixels_that_were_written(levels, tmp_path, how):
    with open_slide(write_store(tmp_path / "slide.zarr", levels, **how)) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.5, "OME-Zarr scale")
        assert [(level.size_px, level.downsample) for level in slide.levels] == [
            ((900, 700), 1), ((450, 350), 2), ((225, 175), 4)
        ]  # fmt: skip
        for level, pixels in enumerate(levels):
            h, w = pixels.shape[:2]
            assert np.array_equal(slide.read_region((0, 0), level, (w, h)), pixels)
            shifted = slide.read_region((-8, 80), level, (w, 60))
            left, top = 8 >> level, 80 >> level
            assert np.array_equal(shifted[:, left:], pixels[top : top + 60, : w - left])
            assert not shifted[:, :left].any()


def test_patches_come_from_chunks_that_are_read_once(levels, store, monkeypatch):
    with open_slide(store) as slide:
        grid = grid_of_level(slide, 0, [(x, y) for y in range(0, 560, 70) for x in range(0, 770, 55)], 128)
        reader = open_patch_reader(slide, grid, torch.device("cpu"))
        assert reader.name == "Zarr chunks"
        read, real = [], slide._pyramid.read

        def counted(*place):
            read.append(str(place))
            return real(*place)

        monkeypatch.setattr(slide._pyramid, "read", counted)
        (batch,) = stream_batches([reader], len(grid))
        for (x, y), patch in zip(grid.xy_l0.tolist(), batch.patches.numpy(), strict=True):
            assert np.array_equal(patch.transpose(1, 2, 0), levels[0][y : y + 128, x : x + 128])
        assert len(read) == len(set(read)) == 2 * 2  # tiles of 512 px


# --- bad input ----------------------------------------------------------------------------------------------


def plate(path):
    write_attributes(path, {"plate": {"wells": [{"path": "A/1"}, {"path": "B/2"}]}})


def of_several(path, *names):
    for i, name in enumerate(names):
        write_store(path / str(i), SMALL, name=name)
        write_attributes(path / str(i), {"multiscales": [named(path / str(i), name)]})
    write_attributes(path, {"bioformats2raw.layout": 3})


def named(path, name):
    return {**attributes(path)["multiscales"][0], "name": name}


def attributes(path):
    return json.loads((path / ".zattrs").read_text())


def changed(**more):
    """A store whose image has other metadata."""

    def make(path):
        write_store(path, SMALL)
        attrs = attributes(path)
        attrs["multiscales"][0] |= more
        write_attributes(path, attrs)

    return make


def written(**more):
    return lambda path: write_store(path, **{"levels": SMALL, **more})


SMALL = halved(np.full((256, 256, 3), 230, np.uint8), 1)


def placed(*steps, shift=0.0):
    """The metadata of two levels with other scales, and the second shifted."""
    return [
        {
            "path": str(i),
            "coordinateTransformations": [
                {"type": "scale", "scale": [1, 0.5 * step, 0.5 * step]},
                {"type": "translation", "translation": [0, 0, shift * i]},
            ],
        }
        for i, step in enumerate(steps)
    ]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (written(units={}), ResolutionError, r"\(only the scale 0.5, without a unit\); .*--slide-mpp"),
        (written(mpp=500), ResolutionError, "500 µm/px, which cannot be true"),
        (written(levels=[np.zeros((64, 64, 4), np.uint8)]), UnsupportedSlideError, "uint8 of c 4, y 64, x"),
        (written(levels=[np.zeros((64, 64, 3), np.uint16)]), UnsupportedSlideError, "holds uint16 of c 3"),
        (changed(axes=[{"name": axis} for axis in "tyx"]), UnsupportedSlideError, "of t 3, y 256, x 256; al"),
        (lambda path: deep(path, "z"), UnsupportedSlideError, r"holds 5 planes along z \(z 5, c 3, y 64"),
        (lambda path: deep(path, "t"), UnsupportedSlideError, "holds 5 planes along t"),
        (plate, UnsupportedSlideError, r"a plate of 2 wells \(A/1, B/2\); give one image in it, such as A/1"),
        (lambda path: of_several(path, "a", "b"), UnsupportedSlideError, r"holds 2 images \(0, 1\); give"),
        (changed(datasets=placed(1, 4)), UnsupportedSlideError, "level 1 of 128 x 128 px is 4 x 4 times"),
        (changed(datasets=placed(1, 2, shift=50)), UnsupportedSlideError, "level 1 lies 50 of its pixels"),
        (changed(axes=["c", "y", "x"]), SlideOpenError, "is OME-Zarr 0.4; allowed: 0.4"),
        (changed(coordinateTransformations=[{"type": "affine"}]), UnsupportedSlideError, "of type 'affine'"),
        (changed(coordinateTransformations=[{"type": "rotation", "rotation": [0, 1, 0]}]),
         UnsupportedSlideError, "of type 'rotation'"),
        (written(omero={"channels": None}), SlideOpenError, "is no OME-Zarr that can be read"),
        (written(omero={"channels": [{"color": c} for c in ("0000ff", "00FF00", "FF0000")]}),
         UnsupportedSlideError, "its channels are 0000FF, 00FF00, FF0000; allowed: red, green, blue"),
        (lambda path: write_attributes(path, {}), SlideOpenError, "whose metadata describe no image"),
        (lambda path: path.mkdir(), SlideOpenError, "is no OME-Zarr that can be read"),
        (lambda path: (written()(path), (path / "1" / ".zarray").unlink()), SlideOpenError, "is no OME-Zarr"),
        (lambda path: (written()(path), (path / ".zattrs").write_text("{")), SlideOpenError, "no OME-Zarr"),
    ],
)  # fmt: skip
def test_what_is_no_slide_is_refused_in_one_line(tmp_path, make, error, words):
    path = tmp_path / "slide.zarr"
    make(path)
    with pytest.raises(error, match=words) as caught:
        open_slide(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def deep(path, axis):
    """A stack of 5 planes, in which only the axis of one is longer."""
    write_store(path, SMALL, axes=f"{axis}cyx")
    array = {**json.loads((path / "0" / ".zarray").read_text()), "shape": [5, 3, 64, 64]}
    (path / "0" / ".zarray").write_text(json.dumps(array))


def test_of_a_slide_with_label_and_macro_the_slide_is_read(tmp_path):
    of_several(tmp_path / "slide.zarr", "slide", "label image", "macro image")
    with open_slide(tmp_path / "slide.zarr") as slide:
        assert slide.size_l0 == (256, 256)
    with open_slide(tmp_path / "slide.zarr" / "1") as slide:
        assert slide.path.name == "1"


@pytest.mark.parametrize(
    ("level", "damage", "words"),
    [
        (0, "cut", "cannot be read"),
        (0, "gone", "is missing, but the level beside level 0 has other pixels there"),
        (2, "gone", "is missing, but the level beside level 2 has other pixels there"),
        (0, "one gone", "is missing, but"),
    ],
)
def test_damaged_chunks_are_errors_and_no_pixels(store, level, damage, words):
    for row, column in np.ndindex(*(1, 1) if damage == "one gone" else (2, 2)):
        chunk = chunk_file(store, level, row, column)
        if damage.endswith("gone"):
            chunk.unlink()
        else:
            chunk.write_bytes(chunk.read_bytes()[:100])
    with open_slide(store) as slide:
        with pytest.raises(ReadError, match=words) as caught:
            slide.read_region((0, 0), level, (50, 50))
        assert "\n" not in str(caught.value)
        reader = open_patch_reader(slide, grid_of_level(slide, level, [(0, 0)], 50), torch.device("cpu"))
        assert words in reader.read(range(1)).unreadable[0]


@pytest.mark.parametrize("fill", [0, 255])
def test_chunks_that_the_scanner_left_out_are_no_damage(levels, tmp_path, fill):
    blank = levels[0].copy()
    blank[:512, :512] = fill
    store = write_store(tmp_path / "slide.zarr", halved(blank), fill=fill)
    for level, chunks in ((0, 4), (1, 2), (2, 1)):
        for row, column in np.ndindex(chunks, chunks):
            chunk_file(store, level, row, column).unlink(missing_ok=True)
    with open_slide(store) as slide:
        assert (slide.read_region((0, 0), 0, (512, 512)) == fill).all()
        assert (slide.read_region((600, 0), 0, (300, 300)) == levels[0][:300, 600:]).all()


# --- lists and runs ---------------------------------------------------------------------------------------


def test_a_store_is_one_slide_of_a_folder(levels, tmp_path):
    for name in ("a.ome.zarr", "deep/b.zarr", "without_suffix"):
        write_store(tmp_path / name, SMALL)
    write_attributes(tmp_path / "table.zarr", {"encoding-type": "anndata"})
    zipped(tmp_path / "a.ome.zarr").rename(tmp_path / "c.zarr.zip")
    (tmp_path / "notes.zip").touch()
    slides = list_slides([tmp_path])
    found = [str(entry.path.relative_to(tmp_path)) for entry in slides.entries]
    assert found == ["c.zarr.zip", "a.ome.zarr", "deep/b.zarr", "without_suffix"]
    assert [(path.name, reason) for path, reason in slides.ignored] == [
        ("notes.zip", ".zip is no slide"),
        ("table.zarr", "a Zarr store whose metadata describe no slide"),
    ]
    assert [e.name for e in list_slides([tmp_path / "a.ome.zarr"]).entries] == ["a.ome"]
    assert [e.path.name for e in list_slides([f"{tmp_path}/*.zarr"]).entries] == ["a.ome.zarr"]


def svs_and_store(tmp_path, **how):
    """A slide, and the same pixels as OME-Zarr."""
    (svs,) = draw_slides(tmp_path / "drawn", 1)
    with openslide.OpenSlide(svs) as slide:
        sizes = slide.level_dimensions
        levels = [np.asarray(slide.read_region((0, 0), i, s).convert("RGB")) for i, s in enumerate(sizes)]
        mpp = float(slide.properties[openslide.PROPERTY_NAME_MPP_X])
    return svs, write_store(tmp_path / "www" / f"{svs.stem}.zarr", levels, mpp=mpp, **how)


@pytest.mark.parametrize("place", ["folder", pytest.param("web", marks=ZARR_3)])
def test_features_are_those_of_a_tiff_of_the_same_pixels(place, web, encoder, tmp_path):
    """A finished store is known again until it changes."""
    svs, store = svs_and_store(tmp_path)
    source = store if place == "folder" else f"{web.url}/0.zarr"
    extract_cohort(svs, encoder, tmp_path / "tiff")
    (row,) = extract_cohort(source, encoder, tmp_path / "out").done
    assert row.reader.endswith("(Zarr chunks)")
    (one,), (other,) = (contents(tmp_path / out).values() for out in ("tiff", "out"))
    assert one == other
    (again,) = extract_cohort(source, encoder, tmp_path / "out").done
    assert again.seconds is None  # finished before
    features = read_features(next((tmp_path / "out").rglob("features_*/*.h5")))
    (shown,) = Collection.find(tmp_path / "out").slides
    with open_origin(features) as slide, shown.open() as again:
        assert again.size_l0 == slide.size_l0
        assert slide.content == features.provenance["request"]["slide"]["content"]
    chunk_file(store, 1, 0, 0).write_bytes(chunk_file(store, 1, 1, 1).read_bytes())
    (row,) = extract_cohort(source, encoder, tmp_path / "out").failed
    assert "(a slide with other content)" in row.reason


@pytest.mark.parametrize("top", ["", "slide.ome.zarr/"])
def test_a_zip_file_of_a_store_has_the_same_content(levels, store, top):
    with open_slide(store) as folder, open_slide(zipped(store, top)) as archive:
        assert archive.content == folder.content
        assert np.array_equal(archive.read_region((0, 0), 0, (900, 700)), levels[0])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux lists open files there")
def test_a_zip_file_that_is_refused_is_closed(levels, tmp_path):
    archive = zipped(write_store(tmp_path / "a.zarr", levels, units={}))
    with pytest.raises(ResolutionError):  # it keeps the frames, and they the reader
        open_slide(archive)
    assert str(archive) not in [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]


def test_stores_at_urls_are_listed_without_what_is_in_them(memory, levels, store):
    memory.put(str(store), "/bucket/deep/a.zarr", recursive=True)
    memory.pipe("/bucket/b.svs", b"x")
    slides = list_slides(["memory://bucket"])
    assert [e.source for e in slides.entries] == ["memory://bucket/b.svs", "memory://bucket/deep/a.zarr"]
    assert not slides.ignored
    assert [e.name for e in list_slides(["memory://bucket/*/*.zarr"]).entries] == ["a"]


@ZARR_3
def test_a_bucket_that_denies_what_it_lacks_is_read(web, levels, tmp_path):
    write_store(tmp_path / "www" / "a.zarr", levels)
    web.missing_code = 403
    with open_slide(f"{web.url}/a.zarr") as slide:
        assert np.array_equal(slide.read_region((0, 0), 0, (900, 700)), levels[0])
    with pytest.raises(
        SlideOpenError, match=r"b\.zarr is no OME-Zarr that can be read: it holds no zarr\.json"
    ):
        open_slide(f"{web.url}/b.zarr")


@ZARR_3
def test_a_request_that_fails_is_repeated(web, levels, tmp_path, monkeypatch):
    monkeypatch.setattr(ome_zarr, "RETRY_AFTER_S", (0.0, 0.0))
    write_store(tmp_path / "www" / "a.zarr", levels)
    with open_slide(f"{web.url}/a.zarr") as slide:
        web.fails = {f"/a.zarr/0/0.{i}.{i}": 2 for i in range(4)}
        assert np.array_equal(slide.read_region((0, 0), 0, (900, 700)), levels[0])
        assert not any(web.fails.values())


@ZARR_3
@pytest.mark.parametrize("how", ["fails", "gone"])
def test_a_store_that_disappears_fails_in_one_line(how, web, encoder, tmp_path, monkeypatch):
    _, store = svs_and_store(tmp_path)
    monkeypatch.setattr(ome_zarr, "RETRY_AFTER_S", (0.0, 0.0))
    real = ome_zarr.OmeZarrReader.read_tiles

    def read_tiles(slide, places):
        if how == "fails":
            web.fails = dict.fromkeys(["/"], 10**6)
        else:
            shutil.rmtree(store, ignore_errors=True)
        return real(slide, places)

    monkeypatch.setattr(ome_zarr.OmeZarrReader, "read_tiles", read_tiles)
    url = f"{web.url.replace('://', '://me:secret@')}/0.zarr"
    (row,) = extract_cohort(url, encoder, tmp_path / "out").failed
    assert row.reason.startswith(f"{web.url}/0.zarr")
    assert ("HTTP 503" if how == "fails" else "is gone") in row.reason
    assert "\n" not in row.reason
    assert "secret" not in row.reason
    assert not contents(tmp_path / "out")


@ZARR_3
def test_the_command_shows_what_it_would_read_of_a_store(web, levels, tmp_path):
    write_store(tmp_path / "www" / "a.zarr", levels)
    done = run_here(f"{web.url}/a.zarr", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "900 x 700" in done.stdout
    done = run_here(f"{web.url}/a.zarr?sig=secret", "--dry-run")
    assert "a.zarr is many files, and the signature of a URL is of one; download" in done.stderr
    assert "secret" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
