"""A bounded queue between two threads, which either of them can end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """The run was stopped while this thread waited for another one."""


class Channel(Generic[T]):
    """Items from one thread to another, in order; iterating waits for the next item, until `end`.

    ``queue.Queue`` can be shut down in this way from Python 3.13 on.
    """

    def __init__(self, size: int | None = None) -> None:
        """Hold at most ``size`` items, any number by default."""
        self._size = size
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended = self._stopped = False
        self._error: BaseException | None = None

    def put(self, item: T) -> None:
        """Hand over an item; waits while the channel is full.

        Raises:
            Stopped: the channel was stopped.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or self._size is None or len(self._items) < self._size
            )
            self.check()
            self._items.append(item)
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will come: iterating ends after the items that are there, or raises ``error``."""
        with self._changed:
            self._error = self._error or error
            self._ended = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Make both sides raise `Stopped`, at once if they are waiting."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def check(self) -> None:
        """Raise `Stopped` if the channel was stopped."""
        if self._stopped:
            raise Stopped

    def is_ready(self) -> bool:
        """Whether iterating goes on without waiting."""
        return bool(self._items) or self._ended or self._stopped

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(self.is_ready)
            self.check()
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
        if self._error is not None:
            raise self._error
        raise StopIteration
