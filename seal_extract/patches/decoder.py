"""What every way to decode offers to the stream of batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from seal_extract.patches.grid import PatchGrid
from seal_extract.patches.resample import Filter, resample
from seal_extract.slides.readers import Array


@dataclass(frozen=True)
class Decoded:
    """What threads read on the host.

    Attributes:
        pixels: uint8 [B, 3, side, side], a view in channels-last memory.
        unreadable: why, for each grid row whose patch could not be read; its pixels are black.
    """

    pixels: Tensor
    unreadable: Mapping[int, str] = field(default_factory=dict)


class Decoder(Protocol):
    """Grid rows of one slide in, patches out.

    Attributes:
        grid: rows to read.
        name: of this way to decode, for the record.
        side_px: of what `read` gives.
    """

    grid: PatchGrid
    name: str
    side_px: int

    def read(self, rows: range) -> Decoded:
        """Read grid rows on the host; safe to call from several threads."""
        ...

    def to_patches(self, pixels: Tensor) -> Tensor:
        """What `read` gave, on any device -> uint8 [B, 3, patch_px, patch_px] on that device."""
        ...

    def close(self) -> None:
        """Release what was opened for reading; the slide stays open."""
        ...


@dataclass(frozen=True)
class Finish:
    """How regions become patches, and where.

    Attributes:
        patch_px: side of a patch.
        filter: of the resampling.
        early: resample in the reading threads, for patches that stay on the host.
        pinned: read into memory from which a GPU copies by itself.
    """

    patch_px: int
    filter: Filter = "bicubic"
    early: bool = True
    pinned: bool = False

    def empty(self, rows: int, side_px: int) -> Array:
        """New room for regions: uint8 [rows, side, side, 3]."""
        if self.pinned:
            room: Array = torch.empty(rows, side_px, side_px, 3, dtype=torch.uint8, pin_memory=True).numpy()
            return room
        return np.empty((rows, side_px, side_px, 3), np.uint8)

    def in_thread(self, regions: Array) -> Tensor:
        """What a thread hands over: patches if they are made early, else the regions; [B, 3, side, side]."""
        pixels = torch.from_numpy(regions).permute(0, 3, 1, 2)
        return self.on_device(pixels) if self.early else pixels

    def on_device(self, pixels: Tensor) -> Tensor:
        """Regions, on any device -> patches there."""
        return resample(pixels, (self.patch_px, self.patch_px), self.filter)
