"""Patches as regions through the slide's reader: every format, one region a patch."""

from __future__ import annotations

import threading

from torch import Tensor

from seal_extract.errors import ReadError
from seal_extract.patches.decoder import Decoded, Finish
from seal_extract.patches.grid import PatchGrid
from seal_extract.slides.readers import Array
from seal_extract.slides.slide import Slide, open_with_another_reader


class RegionDecoder:
    """Reads grid rows with `Slide.read_region`.

    Attributes:
        grid: rows to read.
        name: of this way to decode, with the reason for it.
        side_px: of what `read` gives.
    """

    def __init__(self, slide: Slide, grid: PatchGrid, finish: Finish, reason: str = "") -> None:
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
        """See `Decoder.to_patches`."""
        return self._finish.on_device(pixels)

    def read(self, rows: range) -> Decoded:
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
        return Decoded(self._finish.in_thread(regions), unreadable)

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
