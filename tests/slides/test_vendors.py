"""Layouts of scanners of which no real file is at hand: the pixels are OpenSlide's, and so is µm/px."""

from pathlib import Path
from zipfile import ZipFile

import numpy as np
import openslide
import pytest
import torch
import vendor_slides
from slide_helpers import Damage, grid_of_level, openslides_regions, read, spread
from test_tiff import lines_about
from vendor_slides import MPP, SIZE, VENDORS, write_vendor

from seal_extract.errors import SlideOpenError, UnsupportedSlideError
from seal_extract.patches.reader import open_patch_reader
from seal_extract.patches.regions import RegionReader
from seal_extract.slides.entry import slide_files
from seal_extract.slides.listing import list_slides
from seal_extract.slides.slide import open_slide

CPU = torch.device("cpu")
TILES = "JPEG tiles"
PLACED = "regions: its XML says where tiles lie"
# vendor: OpenSlide's name of it, size of level 0, how each level is read
EXPECTED = {
    "leica": ("leica", (2400, 1100), [PLACED] * 3),
    "leica of two images": ("leica", (2400, 1100), [PLACED] * 3),
    "ventana": ("ventana", SIZE, [TILES] * 3),
    "ventana BIF": ("ventana", (708, 476), [PLACED] * 3),
    "ventana BIF of two areas": ("ventana", (1024, 640), [PLACED] * 2),  # the size of its directory
    "philips": ("philips", (1024, 768), [TILES] * 3),  # its directories are padded to whole tiles
    "argos": ("argos", SIZE, [TILES] * 3),
    "huron": ("huron", SIZE, [TILES] * 3),
}


@pytest.fixture(scope="module", params=VENDORS)
def vendor(request, tmp_path_factory):
    suffix = {"leica": "scn", "ventana BIF": "bif", "argos": "avs"}.get(request.param, "tif")
    return request.param, write_vendor(tmp_path_factory.mktemp("vendor") / f"a.{suffix}", request.param)


def test_every_level_is_openslides_at_edges_and_seams(vendor):
    name, path = vendor
    made_by, size, ways = EXPECTED[name]
    with openslide.OpenSlide(path) as theirs, open_slide(path) as slide:
        assert theirs.properties["openslide.vendor"] == made_by
        assert float(theirs.properties["openslide.mpp-x"]) == pytest.approx(MPP)
        assert (slide.size_l0, slide.mpp, slide.mpp_source) == (size, pytest.approx(MPP), "openslide.mpp-x")
        assert slide.sizes_px == list(theirs.level_dimensions)
    with open_slide(path) as slide:
        for level, way in enumerate(ways):
            grid = grid_of_level(slide, level, spread(slide, level, 100), 100)
            reader = open_patch_reader(slide, grid, CPU)
            assert reader.name.startswith(way), (level, reader.name)
            pixels = read(reader)
            np.testing.assert_array_equal(pixels, openslides_regions(path, grid))
            assert pixels.any()
            reader.close()


def test_dicom_of_several_files_is_openslides_on_every_level(tmp_path):
    """The files were written by wsidicomizer 0.26.1 of ``write_synthetic_slide(path, (440, 330), mpp=0.25,
    tile_px=128, downsamples=(1, 2, 4))``, with ``tile_size=128`` and without a thumbnail."""
    with ZipFile(Path(__file__).with_name("dicom.zip")) as archive:
        archive.extractall(tmp_path)
    assert len(list_slides([tmp_path])) == 1
    for path in sorted(tmp_path.iterdir()):  # whichever of them is given
        assert len(slide_files(path)) == 3
        with open_slide(path) as slide:
            assert (slide.sizes_px, slide.mpp) == ([(440, 330), (220, 165), (110, 82)], 0.25)
            for level in range(3):
                grid = grid_of_level(slide, level, spread(slide, level, 60), 60)
                reader = open_patch_reader(slide, grid, CPU)
                assert isinstance(reader, RegionReader)
                np.testing.assert_array_equal(read(reader), openslides_regions(path, grid))


def test_images_of_a_collection_lie_where_their_nanometres_say(tmp_path):
    path = write_vendor(tmp_path / "a.scn", "leica of two images")
    with open_slide(path) as slide:
        assert slide.bounds_l0 == (130, 70, 1971, 673)
        assert not slide.read_region((1031, 300), 0, (170, 100)).any()  # between the images
        for seed, (x, y) in enumerate([(130, 70), (1201, 83)]):
            drawn = vendor_slides.draw(SIZE, MPP, seed).astype(int)
            shown = slide.read_region((x, y), 0, SIZE).astype(int)
            assert np.abs(shown - drawn).mean() < 6  # of JPEG


def test_seams_of_overlapping_tiles_do_not_show(tmp_path):
    path = write_vendor(tmp_path / "a.bif", "ventana BIF")
    drawn = vendor_slides.draw((708, 476), MPP, 0).astype(int)
    with open_slide(path) as slide:
        assert np.abs(slide.read_region((0, 0), 0, (708, 476)).astype(int) - drawn).mean() < 6


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("leica of two images", b">40<", b">20<", "dissimilar main images"),
        ("leica", b"brightfield", b"fluorescenc", "Can't find main image"),
        ("ventana BIF", b'"RIGHT"', b'"LEFT!"', "Bad direction attribute"),
    ],
)
def test_what_openslide_refuses_is_not_shown_by_another_reader_in_other_places(
    tmp_path, name, old, new, words
):
    path = write_vendor(tmp_path / "a.tif", name)
    data = path.read_bytes()
    last = data.rindex(old)
    path.write_bytes(data[:last] + data[last:].replace(old, new))
    for mpp in (None, 0.25):
        with pytest.raises(
            SlideOpenError, match=rf"OpenSlide: .*{words}.*tiffslide would show tiles elsewhere"
        ):
            open_slide(path, mpp=mpp)


def of_other_colours(tiff, pixels, text=None, *, tags=(), missing=(), mpp=None, **more):
    """A directory of 16 bits, in place of JPEG."""
    if mpp is not None:
        more |= {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    tiff.write(
        pixels.astype(np.uint16) * 256,
        tile=(128, 128),
        description=text,
        metadata=None,
        extratags=list(tags),
        photometric="rgb",
        **{"software": False, **more},
    )


@pytest.mark.parametrize("name", VENDORS)
def test_16_bits_are_refused_also_where_no_directory_has_the_size_of_a_level(tmp_path, monkeypatch, name):
    monkeypatch.setattr(vendor_slides, "_write", of_other_colours)
    path = write_vendor(tmp_path / "a.tif", name)
    with pytest.raises(UnsupportedSlideError, match="3 channels of 16 bits, not 8-bit RGB brightfield"):
        open_slide(path)


def test_a_tile_that_claims_4_gb_ends_no_process_wherever_it_lies(tmp_path):
    """OpenSlide asks for the memory, and without it ends the process."""
    paths = []
    for name, page in (("leica", 1), ("ventana BIF", 1), ("philips", 2)):
        whole = write_vendor(tmp_path / f"{name}.tif", name)
        paths.append(
            Damage(whole, tmp_path / f"damaged {name}.tif", page).set("TileByteCounts", 0, 2**32 - 1).write()
        )
    for line in lines_about(paths):
        assert "truncated" in line
