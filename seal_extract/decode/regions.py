"""Patches as regions through the slide's reader: every format, one region a patch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seal_extract.errors import ReadError
from seal_extract.grid import PatchGrid
from seal_extract.readers import Array
from seal_extract.resample import resample, resize_region, whole_factor
from seal_extract.slide import Slide


@dataclass(frozen=True)
class RegionDecoder:
    """Reads grid rows with `Slide.read_region` and resamples them with antialiased bicubic.

    Attributes:
        slide: read through its own reader.
        grid: rows to read.
        resize_early: resample in the reading threads where that is Pillow's work, for patches that stay on
            the host.
        name: of this way to decode.
    """

    slide: Slide
    grid: PatchGrid
    resize_early: bool = False
    name: str = "regions"

    def read(self, rows: range) -> Tensor:
        """Read grid rows on the host; safe to call from several threads.

        Returns:
            uint8 [B, 3, read_px, read_px] of the level read, or [B, 3, patch_px, patch_px] if resized early;
            a view in channels-last memory.

        Raises:
            ReadError: the file is damaged at one of them; the message names its level-0 pixels.
        """
        regions = np.stack([self._region(row) for row in rows])
        return torch.from_numpy(regions).permute(0, 3, 1, 2)

    def to_patches(self, regions: Tensor) -> Tensor:
        """What `read` gave, on any device -> uint8 [B, 3, patch_px, patch_px] on that device."""
        return resample(regions, self._patch_size, "bicubic")

    @property
    def _patch_size(self) -> tuple[int, int]:
        return (self.grid.patch_px, self.grid.patch_px)

    def _region(self, row: int) -> Array:
        x, y = self.grid.xy_l0[row].tolist()
        size_px = (self.grid.read_px, self.grid.read_px)
        region = self._checked((x, y), size_px)
        if self.resize_early and not whole_factor(size_px, self._patch_size):
            return resize_region(region, self._patch_size)
        return region

    def _checked(self, xy_l0: tuple[int, int], size_px: tuple[int, int]) -> Array:
        region = self.slide.read_region(xy_l0, self.grid.level, size_px)
        if region.shape != (size_px[1], size_px[0], 3):
            raise ReadError(
                f"{self.slide.path}: {self.slide.reader} gave {region.shape[1]} x {region.shape[0]} px "
                f"instead of {size_px[0]} x {size_px[1]} at level-0 {xy_l0}; the file is damaged there"
            )
        return region
