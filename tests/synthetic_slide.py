"""Small slides for tests: tissue of the bundled real slide in an ellipse on glass, as an Aperio pyramid."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import tifffile

from seal_extract.bench.large_slide import abbreviated_jpeg, jpeg_tags
from seal_extract.demo import demo_slide

GLASS = 240


def write_synthetic_slide(
    path: Path,
    size_px: tuple[int, int],
    *,
    mpp: float = 0.25,
    tile_px: int = 256,
    downsamples: tuple[int, ...] = (1, 4, 16),
    compression: str = "jpeg",
    photometric: str | None = None,
    subsampling: str = "4:2:0",
    seed: int = 0,
) -> Path:
    """Write a slide that OpenSlide and tiffslide read as Aperio's; any other seed gives another specimen.

    JPEG and JPEG 2000 tiles are YCbCr or RGB (``photometric``); the latter as Aperio's 33003 and 33005.
    """
    pixels = draw(size_px, mpp, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as tiff:
        for downsample in downsamples:
            width, height = (side // downsample for side in size_px)
            whole = pixels[: height * downsample, : width * downsample]
            level = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)
            padding = ((0, -height % tile_px), (0, -width % tile_px), (0, 0))
            padded = np.pad(level, padding, mode="edge")
            tiles = [
                padded[y : y + tile_px, x : x + tile_px]
                for y in range(0, height, tile_px)
                for x in range(0, width, tile_px)
            ]
            if compression == "jpeg":
                colours = "rgb" if photometric == "rgb" else subsampling.replace(":", "")
                encoded = [abbreviated_jpeg(tile, colours, quality=30) for tile in tiles]
                data, tags = [stream for _, stream in encoded], jpeg_tags(colours, encoded[0][0])
            else:
                data = [_jpeg2000(tile, photometric != "ycbcr") for tile in tiles]
                tags = {"compression": 33003 if photometric == "ycbcr" else 33005, "photometric": "rgb"}
            _write_page(tiff, data, tags, level, (tile_px, tile_px), _text(size_px, level, mpp, tile_px))
            if downsample == 1:  # the thumbnail, in strips, lies between the first level and the others
                _write_thumbnail(tiff, level, mpp)
    return path


def _write_page(tiff, data, tags, level, tile, text):
    where = {"tile": tile} if tile else {"rowsperstrip": 16}
    how = {"dtype": np.uint8, "metadata": None, "software": False, "description": text}
    tiff.write(iter(data), shape=level.shape, **where, **how, **tags)


def _write_thumbnail(tiff, level, mpp):
    step = -(-max(level.shape) // 1024)
    size_px = (level.shape[1] // step, level.shape[0] // step)
    small = cv2.resize(level, size_px, interpolation=cv2.INTER_AREA)
    encoded = [abbreviated_jpeg(small[y : y + 16], "420") for y in range(0, len(small), 16)]
    text = _text(level.shape[1::-1], small, mpp, None)
    _write_page(tiff, [data for _, data in encoded], jpeg_tags("420", encoded[0][0]), small, None, text)


def _text(size_px, level, mpp, tile_px):
    """Aperio's description of a page."""
    whole, own = ("{}x{}".format(*px) for px in (size_px, level.shape[1::-1]))
    tiled = f" ({tile_px}x{tile_px})" if tile_px else ""
    reduced = "" if own == whole and tile_px else f" -> {own}"
    head = f"Aperio Image Library v12.0.16 \r\n{whole} [0,0 {whole}]{tiled}{reduced}"
    return f"{head} JPEG|AppMag = {10 / mpp:g}|MPP = {mpp}"


def draw(size_px: tuple[int, int], mpp: float, seed: int) -> np.ndarray:
    """The picture, uint8 [h, w, 3]: the tissue's texture at its true scale, mirrored beyond its borders."""
    rng = np.random.default_rng(seed)
    (width, height), scale = size_px, mpp / 0.499
    window = np.array([[scale, 0, rng.uniform(0, 300)], [0, scale, rng.uniform(0, 300)]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    pixels = cv2.warpAffine(tissue(), window, size_px, flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    x, y = np.arange(width, dtype=np.float32) / width, np.arange(height, dtype=np.float32)[:, None] / height
    (x0, y0), (a, b) = rng.uniform(0.46, 0.54, 2), rng.uniform(0.33, 0.38, 2)
    angle = np.arctan2(y - y0, x - x0)
    outline = 1 + 0.06 * np.sin(3 * angle + rng.uniform(0, 6)) + 0.03 * np.sin(11 * angle)
    outside = np.hypot((x - x0) / a, (y - y0) / b) > outline
    pixels[outside] = rng.integers(GLASS - 2, GLASS + 3, (int(outside.sum()), 1), np.uint8)
    return pixels


@cache
def tissue() -> np.ndarray:
    """A part of the bundled slide without glass, uint8 [1200, 700, 3] at 0.499 µm/px."""
    return tifffile.imread(demo_slide(), key=0)[1650:2850, 750:1450]


def _jpeg2000(rgb: np.ndarray, as_rgb: bool) -> bytes:
    planes = rgb if as_rgb else cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
    planes = np.ascontiguousarray(planes)
    return imagecodecs.jpeg2k_encode(planes, level=46, codecformat="j2k", reversible=False, mct=as_rgb)
