"""What was made is kept while it fits: the least recently used goes first; nothing is made twice at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class BoundedCache(Generic[V]):
    """Values by key, up to a total size; safe to use from several threads."""

    def __init__(self, limit: int, size: Callable[[V], int] = lambda _: 1) -> None:
        """Keep values whose ``size`` adds up to ``limit``; the newest stays even if it alone is larger."""
        self.limit, self.filled = limit, 0
        self._size = size
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._lock = threading.Lock()
        self._making: dict[Hashable, threading.Lock] = {}

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of a key, made if it is not there; whoever asks meanwhile waits for it.

        A value whose making fails is not kept: the next to ask tries again.
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            turn = self._making.setdefault(key, threading.Lock())
        with turn:
            with self._lock:
                if key in self._values:
                    return self._values[key]
            try:
                value = make()
                self._put(key, value)
            finally:
                with self._lock:
                    self._making.pop(key, None)
        return value

    def _put(self, key: Hashable, value: V) -> None:
        with self._lock:
            self._values[key] = value
            self.filled += self._size(value)
            while self.filled > self.limit and len(self._values) > 1:
                _, dropped = self._values.popitem(last=False)
                self.filled -= self._size(dropped)
