"""TIFFs at random: their pixels are those of an independent decoder, or one line says why not."""

import warnings

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from slide_helpers import grid_of_level

from seal_extract import open_slide
from seal_extract.errors import SealExtractError
from seal_extract.patches.reader import open_patch_reader

SIDE = 32  # of the patches that are read
CPU = torch.device("cpu")
COMPRESSIONS = [None, "lzw", "deflate", "zstd", "packbits", "jpeg", "jpeg2000", "webp"]
KINDS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1000),
        "size": st.tuples(st.integers(33, 150), st.integers(33, 150)),
        "layout": st.sampled_from([{"tile": (32, 32)}, {"tile": (64, 48)}, {"rowsperstrip": 7}, {}]),
        "compression": st.sampled_from(COMPRESSIONS),
        "predictor": st.booleans(),
        "byteorder": st.sampled_from("<>"),
        "bigtiff": st.booleans(),
        "planar": st.sampled_from([False, False, True]),
        "photometric": st.sampled_from(["rgb"] * 3 + ["minisblack", "miniswhite", "cielab", "separated"]),
        "alpha": st.sampled_from([None] * 5 + ["unassalpha"] * 3 + ["assocalpha", "unspecified"]),
        "dtype": st.sampled_from([np.uint8] * 20 + [np.int8, np.uint16, np.float32]),
        "orientation": st.sampled_from([1] * 30 + [2, 3, 4, 5, 6, 7, 8]),
        "damage": st.sampled_from([0] * 4 + [1, 4, 0.01]),
    }
)


def write(path, kind):
    """Write a TIFF as it is asked for; [H, W, C] as it holds them, or None where TIFF knows no such thing."""
    rng = np.random.default_rng(kind["seed"])
    (h, w), alpha = kind["size"], kind["alpha"]
    channels = 3 + (alpha is not None or kind["photometric"] == "separated")
    # smooth, so that JPEG is an image and no noise
    pixels = np.kron(rng.integers(30, 226, (h // 8 + 1, w // 8 + 1, channels)), np.ones((8, 8, 1)))[:h, :w]
    if alpha is not None:
        pixels[..., 3] = rng.choice([0, 255, 255, 99], (h, w))
    planes = np.moveaxis(pixels, 2, 0) if kind["planar"] else pixels
    options = {
        **kind["layout"],
        "compression": kind["compression"],
        "predictor": kind["predictor"] and kind["compression"] in ("lzw", "deflate", "zstd"),
        "photometric": "rgb" if kind["photometric"] == "cielab" else kind["photometric"],
        "planarconfig": "separate" if kind["planar"] else "contig",
        "extrasamples": None if alpha is None or kind["photometric"] == "separated" else [alpha],
        "extratags": [(274, 3, 1, kind["orientation"], True)],
        "resolution": (2e4, 2e4),
        "resolutionunit": "CENTIMETER",
        "metadata": None,
    }
    try:
        with tifffile.TiffWriter(path, byteorder=kind["byteorder"], bigtiff=kind["bigtiff"]) as tif:
            tif.write(planes.astype(kind["dtype"]), **options)
    except (ValueError, RuntimeError, TypeError, NotImplementedError, KeyError):  # tifffile, imagecodecs
        return None
    if kind["photometric"] == "cielab":
        with tifffile.TiffFile(path, mode="r+b") as tif:
            tif.pages[0].tags["PhotometricInterpretation"].overwrite(8)
    data = bytearray(path.read_bytes())
    damage = kind["damage"]
    for at in rng.integers(8, len(data), round(len(data) * damage) if 0 < damage < 1 else damage):
        data[at] = rng.integers(256)
    path.write_bytes(data)
    return pixels.astype(np.uint8)


def independently(path):
    """uint8 [H, W, 3] by Pillow and its libtiff, black under no alpha; None where it refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                pixels = np.asarray(image)
    except Exception:  # Pillow raises errors of every kind over damaged directories
        return None
    return black_without_alpha(pixels) if image.mode in ("RGB", "RGBA") else None


def black_without_alpha(pixels):
    return pixels if pixels.shape[2] == 3 else np.where(pixels[..., 3:] > 0, pixels[..., :3], 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiffs")


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(kind=KINDS)
def test_the_pixels_are_an_independent_decoders_or_one_line_says_why_not(folder, kind):
    path = folder / "a.tif"
    written = write(path, kind)
    if written is None:
        return
    try:
        with open_slide(path) as slide:
            w, h = slide.size_l0
            places = [(x, y) for y in range(0, h, SIDE) for x in range(0, w, SIDE)]
            grid = grid_of_level(slide, 0, places, SIDE)
            decoder = open_patch_reader(slide, grid, CPU)
            decoded = decoder.read(range(len(grid)))
            patches = decoder.to_patches(decoded.pixels).permute(0, 2, 3, 1).numpy()
            decoder.close()
    except SealExtractError as exc:
        assert "\n" not in str(exc)
        assert str(exc).startswith(str(path))
        return
    lossless = kind["compression"] != "jpeg" and not kind["damage"]
    want = black_without_alpha(written) if lossless else independently(path)
    if want is None:
        return
    assert want.shape == (h, w, 3)
    padded = np.pad(want, ((0, SIDE), (0, SIDE), (0, 0)))
    for row, (x, y) in enumerate(places):
        if row not in decoded.unreadable:
            np.testing.assert_array_equal(
                patches[row], padded[y : y + SIDE, x : x + SIDE], err_msg=f"{x}, {y}"
            )
