"""Compressed tiles on the host, and what decodes them on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from seal_extract.slides.readers import Array

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Compressed:
    """Compressed tiles on the host.

    Attributes:
        tiles: their numbers in the level.
        memory: uint8, from which the device copies by itself; numbers for it fit behind the data.
        data: uint8, the bytes of all tiles, where the memory begins.
        first: where each begins in ``data``.
        count: its bytes; 0 if the file does not hold it.
    """

    tiles: Numbers
    memory: Tensor
    data: Array
    first: Numbers
    count: Numbers

    def bytes_of(self, i: int) -> bytes:
        """The bytes of one tile."""
        return self.data[self.first[i] : self.first[i] + self.count[i]].tobytes()


class DeviceDecoder(Protocol):
    """Decodes tiles of one level, of which a sample is known.

    Attributes:
        tolerance: how far pixels may be from the host's, in grey levels: (each, mean of a tile).
        takes_bytes: whether the compressed bytes have to be on the device.
    """

    tolerance: tuple[int, float]
    takes_bytes: bool

    def places(self, read: Compressed) -> Numbers:
        """Look for damage on the host: int64 [T, 3], whose second column is 0 for a tile that is odd."""
        ...

    def decode(
        self, read: Compressed, places: Numbers, there: Tensor, places_there: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Decode tiles.

        Args:
            read: the tiles.
            places: from `places`.
            there: the bytes on the device, if it takes them.
            places_there: likewise, int32 [T, 3].

        Returns:
            pixels: uint8 [T, h, w, 3] on the device.
            odd: int32 [T] anywhere, 1 where the data may be damaged or of another kind, so that the pixels
                mean nothing.
        """
        ...
