"""Decoded tiles that several jobs need: made by the first that comes, kept until the last has copied."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import ReadError
from seal_extract.slides.readers import Array

HELD_BYTES = 512 * 2**20  # of shared tiles; beyond, as for patches in random order, tiles are decoded again

Users = Mapping[int, list[int]]  # tile -> the patches of a job that it lies under
Pixels = Array | ReadError  # of a tile: uint8 [h, w, 3], or why it cannot be had


@dataclass
class _Held:
    pixels: Future[Pixels] = field(default_factory=Future)
    pins: int = 0  # jobs that may be copying from it


@dataclass(frozen=True)
class Claim:
    """What a job has to do for its tiles.

    Attributes:
        mine: to decode first, others wait for them.
        alone: to decode, needed by nobody else.
        theirs: being decoded, or decoded, elsewhere.
    """

    mine: dict[int, _Held]
    alone: list[int]
    theirs: dict[int, _Held]

    @property
    def held(self) -> dict[int, _Held]:
        """All that are shared."""
        return {**self.mine, **self.theirs}


class SharedTiles:
    """Counts the patches that have still to come for each tile, and keeps those that are needed again."""

    def __init__(self, uses: NDArray[np.int64], shape: tuple[int, int, int]) -> None:
        self._uses, self._shape = uses, shape
        self._most = HELD_BYTES // math.prod(shape)
        self._held: dict[int, _Held] = {}
        self._spare: list[Array] = []
        self._lock = threading.Lock()

    def claim(self, users: Users) -> Claim:
        """Divide the tiles of a job; to be released by the same ``users``."""
        claim = Claim({}, [], {})
        with self._lock:
            for tile, patches in users.items():
                if tile in self._held:
                    claim.theirs[tile] = self._held[tile]
                elif self._uses[tile] > len(patches) and len(self._held) < self._most:
                    claim.mine[tile] = self._held[tile] = _Held()
                else:
                    claim.alone.append(tile)
            for held in claim.held.values():
                held.pins += 1
        return claim

    def release(self, users: Users, claim: Claim) -> None:
        """The job has copied what it needs, or given up."""
        for held in claim.mine.values():  # nobody must wait for ever
            if not held.pixels.done():
                held.pixels.set_exception(RuntimeError("the thread that decoded this tile has failed"))
        with self._lock:
            for held in claim.held.values():
                held.pins -= 1
            for tile, patches in users.items():
                self._uses[tile] -= len(patches)
                if self._uses[tile] <= 0 and tile in self._held and not self._held[tile].pins:
                    self._drop(self._held.pop(tile))

    def _drop(self, held: _Held) -> None:
        if held.pixels.exception() is None and isinstance(room := held.pixels.result(), np.ndarray):
            self._spare.append(room)

    def room(self) -> Array:
        """Room for a shared tile; what was used before comes first, as new memory costs page faults."""
        with self._lock:
            if self._spare:
                return self._spare.pop()
        return np.empty(self._shape, np.uint8)
