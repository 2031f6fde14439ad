"""What was read or computed last, held in bounded memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class LruCache(Generic[V]):
    """Thread-safe, size-limited LRU cache; each key is computed once, however many threads ask for it."""

    def __init__(self, limit: int, size: Callable[[V], int] = lambda _: 1) -> None:
        """Hold values whose ``size`` adds up to ``limit``; the newest is held even if it alone is larger."""
        self._limit, self._size, self.filled = limit, size, 0
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._lock = threading.Lock()
        self._computing: dict[Hashable, threading.Lock] = {}

    def get(self, key: Hashable, compute: Callable[[], V]) -> V:
        """The value of a key, computed if it is missing; other threads wait for it.

        A computation that fails is not held: the next thread tries again.
        """
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            turn = self._computing.setdefault(key, threading.Lock())
        with turn:
            with self._lock:
                if key in self._values:
                    return self._values[key]
            try:
                value = compute()
                self._put(key, value)
            finally:
                with self._lock:
                    self._computing.pop(key, None)
        return value

    def _put(self, key: Hashable, value: V) -> None:
        with self._lock:
            self._values[key] = value
            self.filled += self._size(value)
            while self.filled > self._limit and len(self._values) > 1:
                _, dropped = self._values.popitem(last=False)
                self.filled -= self._size(dropped)
