"""Patches as regions through the slide's reader: every format, one region a patch."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from seal_extract.errors import ReadError
from seal_extract.patches.grid import PatchGrid
from seal_extract.patches.resample import Filter, resample
from seal_extract.slides.readers import Array
from seal_extract.slides.slide import Slide, open_with_another_reader


@dataclass(frozen=True)
class HostPixels:
    """What threads read on the host.

    Attributes:
        pixels: uint8 [B, 3, side, side], a view in channels-last memory.
        unreadable: why, for each grid row whose patch could not be read; its pixels are black.
    """

    pixels: Tensor
    unreadable: Mapping[int, str] = field(default_factory=dict)


class PatchReader(Protocol):
    """Grid rows of one slide in, patches out.

    Attributes:
        grid: rows to read.
        name: of this way to decode, for the record.
        side_px: of what `read` gives.
    """

    grid: PatchGrid
    name: str
    side_px: int

    def read(self, rows: range) -> HostPixels:
        """Read grid rows on the host; safe to call from several threads."""
        ...

    def to_patches(self, pixels: Tensor) -> Tensor:
        """What `read` gave, on any device -> uint8 [B, 3, patch_px, patch_px] on that device."""
        ...

    def close(self) -> None:
        """Release what was opened for reading; the slide stays open."""
        ...


@dataclass(frozen=True)
class Resampling:
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


class RegionReader:
    """Reads grid rows with `Slide.read_region`.

    Attributes:
        grid: rows to read.
        name: of this way to decode, with the reason for it.
        side_px: of what `read` gives.
    """

    def __init__(self, slide: Slide, grid: PatchGrid, finish: Resampling, reason: str = "") -> None:
        self.grid, self._slide, self._finish = grid, slide, finish
        self.name = f"regions: {reason}" if reason else "regions"
        self.side_px = grid.patch_px if finish.early else grid.read_px
        self._other: list[Slide | None] = []  # the other reader, once it was needed
        self._lock = threading.Lock()

    def close(self) -> None:
        """Release the other reader, if there was need of one."""
        for other in self._other:
            if other is not None:
                other.close()

    def to_patches(self, pixels: Tensor) -> Tensor:
        """See `PatchReader.to_patches`."""
        return self._finish.on_device(pixels)

    def read(self, rows: range) -> HostPixels:
        """Read grid rows on the host; safe to call from several threads."""
        regions = self._finish.empty(len(rows), self.grid.read_px)
        unreadable: dict[int, str] = {}
        for i, row in enumerate(rows):
            try:
                regions[i] = self._region(row)
                self.grid.whiten(regions[i], row, self._slide)
            except ReadError as exc:
                regions[i] = 0
                unreadable[row] = str(exc)
        return HostPixels(self._finish.in_thread(regions), unreadable)

    def _region(self, row: int) -> Array:
        try:
            return self._read(self._slide, row)
        except ReadError:
            with self._lock:
                if not self._other:
                    self._other.append(open_with_another_reader(self._slide))
            other = self._other[0]
            if other is None:
                raise
            try:
                return self._read(other, row)
            except ReadError:
                pass
            raise

    def _read(self, slide: Slide, row: int) -> Array:
        x, y = self.grid.xy_l0[row].tolist()
        side = self.grid.read_px
        region = slide.read_region((x, y), self.grid.level, (side, side))
        if region.shape != (side, side, 3):
            raise ReadError(
                f"{slide.path}: {slide.reader} gave {region.shape[1]} x {region.shape[0]} px instead of "
                f"{side} x {side} at level-0 ({x}, {y}); the file is damaged there"
            )
        return region
