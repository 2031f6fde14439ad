"""Read patches region by region through the slide's reader, for every format; what patch readers share."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from seal_extract.errors import ReadError
from seal_extract.patches.grid import PatchGrid
from seal_extract.patches.resample import Memory, Resampling
from seal_extract.slides.readers import Array
from seal_extract.slides.slide import Slide, open_with_another_reader

ROWS_AT_ONCE = 16  # patches a thread reads at a time: large enough that handing over costs nothing


@dataclass(frozen=True)
class HostPixels:
    """What a thread has read.

    Attributes:
        pixels: uint8 [B, 3, side, side]: on the host a view in channels-last memory; or on the device.
        unreadable: the reason for each grid row whose patch cannot be read; its pixels are black.
    """

    pixels: Tensor
    unreadable: Mapping[int, str] = field(default_factory=dict)


class PatchReader(Protocol):
    """Reads grid rows of one slide.

    Attributes:
        grid: rows to read.
        name: of the way to read, as recorded in the results.
        side_px: of what `read` gives.
        rows_at_once: that a thread reads best.
        on_device: whether `read` gives patches on a GPU; else it gives what `to_patches` takes, on the host.
    """

    grid: PatchGrid
    name: str
    side_px: int
    rows_at_once: int
    on_device: bool

    def read(self, rows: range, out: Memory | None = None) -> HostPixels:
        """Read grid rows; safe to call from several threads.

        Args:
            rows: to read.
            out: host memory of that many rows and ``side_px``, which may take the pixels.
        """
        ...

    def to_patches(self, pixels: Tensor) -> Tensor:
        """Resample what `read` gave, on any device, to uint8 [B, 3, patch_px, patch_px]."""
        ...

    def close(self) -> None:
        """Release what was opened for reading; the slide stays open."""
        ...


class RegionReader:
    """Reads each patch with `Slide.read_region`; see `PatchReader`."""

    rows_at_once = ROWS_AT_ONCE
    on_device = False

    def __init__(self, slide: Slide, grid: PatchGrid, resampling: Resampling, reason: str = "") -> None:
        self.grid, self._slide, self._resampling = grid, slide, resampling
        self.name = f"regions: {reason}" if reason else "regions"
        self.side_px = grid.patch_px if resampling.early else grid.read_px
        self.to_patches = resampling.on_device
        self._other: list[Slide | None] = []  # another reader of the slide, once it was needed
        self._lock = threading.Lock()

    def close(self) -> None:
        """Release the other reader, if there was need of one."""
        for other in self._other:
            if other is not None:
                other.close()

    def read(self, rows: range, out: Memory | None = None) -> HostPixels:
        """See `PatchReader.read`; what the slide's reader cannot read is tried with another reader."""
        regions = self._resampling.regions(len(rows), self.grid.read_px, out)
        unreadable: dict[int, str] = {}
        for i, row in enumerate(rows):
            try:
                regions[i] = self._region(row)
                self.grid.whiten(regions[i], row, self._slide)
            except ReadError as exc:
                regions[i] = 0
                unreadable[row] = str(exc)
        return HostPixels(self._resampling.in_thread(regions, out), unreadable)

    def _region(self, row: int) -> Array:
        x, y = self.grid.xy_l0[row].tolist()
        place = ((x, y), self.grid.level, (self.grid.read_px, self.grid.read_px))
        try:
            return read_exactly(self._slide, *place)
        except ReadError as exc:
            with self._lock:
                if not self._other:
                    self._other.append(open_with_another_reader(self._slide))
            if (other := self._other[0]) is None:
                raise
            try:
                return read_exactly(other, *place)
            except ReadError:
                raise exc from None


def read_exactly(slide: Slide, xy_l0: tuple[int, int], level: int, size_px: tuple[int, int]) -> Array:
    """`Slide.read_region`, held to the size that was asked for.

    Raises:
        ReadError: the region cannot be read, or has another size.
    """
    region = slide.read_region(xy_l0, level, size_px)
    if region.shape != (size_px[1], size_px[0], 3):
        raise ReadError(
            f"{slide.path}: {slide.reader} gave {region.shape[1]} x {region.shape[0]} px instead of "
            f"{size_px[0]} x {size_px[1]} at level-0 {xy_l0}; the file is damaged there"
        )
    return region
