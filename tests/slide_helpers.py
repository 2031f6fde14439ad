"""What tests of reading share: grids at will, an encoder that no pixel escapes, slides damaged at will."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import tifffile
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from seal_extract.demo import UNTRAINED
from seal_extract.encoders.encoder import Encoder
from seal_extract.encoders.spec import InputRule
from seal_extract.patches.grid import PatchGrid, level_to_read
from seal_extract.patches.regions import PatchReader
from seal_extract.slides.slide import Slide
from seal_extract.tissue.mask import TissueMask

PRIME = 1_000_003
KINDS = {
    "420": {"subsampling": "4:2:0"},
    "422": {"subsampling": "4:2:2"},
    "444": {"subsampling": "4:4:4"},
    "rgb": {"photometric": "rgb"},
    "420-240": {"subsampling": "4:2:0", "tile_px": 240},
    "422-208": {"subsampling": "4:2:2", "tile_px": 208},
    "j2k": {"compression": "jpeg2000"},
    "j2k-ycbcr": {"compression": "jpeg2000", "photometric": "ycbcr", "tile_px": 240},
}
SIZE = (1504, 1104)  # whole at every level, no whole number of tiles
DOWNSAMPLES = (1, 2, 4)


def grid_at(slide: Slide, xy_l0: Iterable[tuple[int, int]], patch_px: int, patch_size_l0: int) -> PatchGrid:
    """Patches at ``xy_l0``, read from the level that the package would choose."""
    level, read_px = level_to_read(slide, patch_px, patch_size_l0)
    mpp = slide.mpp * patch_size_l0 / patch_px
    xy = np.asarray(list(xy_l0), np.int64).reshape(-1, 2)
    return PatchGrid(xy, patch_px, mpp, patch_size_l0, 0, level, read_px)


def grid_of_level(slide: Slide, level: int, xy_level: Iterable[tuple[int, int]], side_px: int) -> PatchGrid:
    """Patches of one level as they are, at whole pixels ``xy_level`` of it."""
    downsample = round(slide.levels[level].downsample)
    xy = np.asarray(list(xy_level), np.int64).reshape(-1, 2) * downsample
    return PatchGrid(xy, side_px, slide.mpp * downsample, side_px * downsample, 0, level, side_px)


def all_tissue(slide: Slide, downsample: float = 8.0) -> TissueMask:
    """A mask that is tissue everywhere."""
    shape = tuple(math.ceil(side / downsample) for side in slide.size_l0[::-1])
    return TissueMask(np.ones(shape, np.bool_), slide.mpp * downsample, downsample, slide.size_l0)


def masks(most_px: int) -> st.SearchStrategy[NDArray[np.bool_]]:
    """Masks of random pixels with sides of up to ``most_px``."""
    return st.builds(
        lambda seed, h, w, density: np.random.default_rng(seed).random((h, w)) < density,
        *(st.integers(0, 2**32 - 1), st.integers(1, most_px), st.integers(1, most_px), st.floats(0, 1)),
    )


def openslides_regions(path: Path, grid: PatchGrid) -> NDArray[np.uint8]:
    """What OpenSlide itself shows at a grid: uint8 [N, side, side, 3], before resampling."""
    with openslide.OpenSlide(path) as reference:
        regions = [
            np.asarray(reference.read_region(xy, grid.level, (grid.read_px,) * 2).convert("RGB"))
            for xy in grid.xy_l0.tolist()
        ]
    return np.stack(regions)


class Checksums(Encoder):
    """Embeds a patch as sums over its pixels modulo a prime: no other pixels give the same numbers."""

    def __init__(self, name: str = "checksums") -> None:
        row = replace(UNTRAINED, name=name, dim=4, input=InputRule(1))
        super().__init__(row, nn.Identity(), (), torch.float32)

    def compute(self, images: Tensor) -> Tensor:
        pixels = images.contiguous().reshape(len(images), -1).long() + 1
        places = torch.arange(1, pixels.shape[1] + 1)
        sums = [(pixels * (places * step % PRIME)).sum(1) % PRIME for step in (1, 7, 131, 1009)]
        return torch.stack(sums, 1).float()


class ImaginaryGpu(Encoder):
    """Takes ``1 / rate`` s a patch, one batch after another, and none of the CPU."""

    def __init__(self, rate: float, name: str = "imaginary") -> None:
        super().__init__(replace(UNTRAINED, name=name, dim=4), nn.Identity(), (), torch.float32)
        self._rate, self._busy_s, self._began_s, self._free_s = rate, 0.0, 0.0, 0.0
        self._turn = threading.Lock()

    def queue(self, patches: Tensor) -> Callable[[], NDArray[np.float32]]:
        """Begin to encode once it is free; a function that waits for the end."""
        seconds = len(patches) / self._rate
        with self._turn:
            now = time.perf_counter()
            self._began_s = self._began_s or now
            self._free_s = done_s = max(self._free_s, now) + seconds
            self._busy_s += seconds

        def wait() -> NDArray[np.float32]:
            time.sleep(max(0.0, done_s - time.perf_counter()))
            return np.zeros((len(patches), self.spec.dim), np.float32)

        return wait

    def encode_unchecked(self, patches: Tensor, *_: object) -> Tensor:
        return torch.from_numpy(self.queue(patches)())

    @property
    def busy(self) -> float:
        """Share of the time from its first patch to its last in which it computed."""
        return self._busy_s / (self._free_s - self._began_s)


class Damage:
    """A copy of a slide whose bytes can be changed at the places that its directories name."""

    def __init__(self, path: Path, copy: Path, page: int = 0) -> None:
        self.path, self._data = copy, bytearray(path.read_bytes())
        with tifffile.TiffFile(path) as tif:
            directory = tif.pages[page]
            self.tags = {t.name: (t.offset, t.valueoffset, t.count, t.dtype) for t in directory.tags}
            self.offsets, self.counts = directory.dataoffsets, directory.databytecounts

    def tile(self, number: int) -> bytes:
        """The tile's bytes."""
        return bytes(self._data[self.offsets[number] : self.offsets[number] + self.counts[number]])

    def overwrite(self, number: int, data: bytes, at: int = 0) -> Damage:
        """Put bytes over a tile's, from ``at`` on."""
        start = self.offsets[number] + at
        assert at + len(data) <= self.counts[number]
        self._data[start : start + len(data)] = data
        return self

    def swap_in(self, number: int, data: bytes) -> Damage:
        """Append a tile to the file and let the table point at it."""
        self.set("TileOffsets", number, len(self._data)).set("TileByteCounts", number, len(data))
        self._data += data
        return self

    def set(self, tag: str, index: int, value: int) -> Damage:
        """Change one value of a table of 32-bit numbers."""
        _, at, count, dtype = self.tags[tag]
        assert dtype == tifffile.DATATYPE.LONG
        assert index < count
        self._data[at + 4 * index : at + 4 * index + 4] = value.to_bytes(4, "little")
        return self

    def shorten(self, tag: str, count: int) -> Damage:
        """Let a tag claim fewer values."""
        at = self.tags[tag][0]
        self._data[at + 4 : at + 8] = count.to_bytes(4, "little")
        return self

    def rename(self, tag: str, number: int) -> Damage:
        """Turn a tag into another, so that it is missing."""
        at = self.tags[tag][0]
        self._data[at : at + 2] = number.to_bytes(2, "little")
        return self

    def fill(self, tag: str, data: bytes, at: int = 0) -> Damage:
        """Put bytes over a tag's value."""
        start = self.tags[tag][1] + at
        self._data[start : start + len(data)] = data
        return self

    def write(self) -> Path:
        """Write the copy."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(self._data)
        return self.path


def read(decoder: PatchReader, rows: range | None = None) -> NDArray[np.uint8]:
    """uint8 [N, S, S, 3] as the decoder gives it."""
    decoded = decoder.read(rows or range(len(decoder.grid)))
    assert not decoded.unreadable
    return decoder.to_patches(decoded.pixels).permute(0, 2, 3, 1).contiguous().numpy()


def spread(slide: Slide, level: int, side: int) -> list[tuple[int, int]]:
    """Corners in pixels of the level: aligned to tiles and not, overlapping, at the edges and beyond them."""
    w, h = slide.levels[level].size_px
    step = max(side * 2 // 3, min(w, h) // 5)
    inside = [(x, y) for y in range(0, h, step) for x in range(0, w, step)]
    return [*inside, (37, 101), (w - side, h - side), (w - 5, 3), (-20, -31), (-side, 0), (w, h), (w + 9, 8)]
