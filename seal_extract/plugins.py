"""Installed packages that add encoders or readers by entry points; a broken one costs one warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

T = TypeVar("T")


def load_plugins(
    group: str, contents: Callable[[object], Iterable[T]]
) -> Iterator[tuple[T, Callable[[str], None]]]:
    """Yield what the entry points of a group stand for, each with a function that warns of its plugin.

    Args:
        group: of the entry points.
        contents: of a loaded entry point; it may raise.
    """
    for entry in sorted(entry_points(group=group), key=lambda e: e.name):

        def warn(what: str, entry: EntryPoint = entry) -> None:
            package = entry.dist.name if entry.dist is not None else "unknown package"
            message = f"plugin {entry.name} of {package} ({entry.value}): {what}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)

        try:
            found = list(contents(entry.load()))
        except (Exception, SystemExit) as exc:  # third-party code may raise anything, even its own exit
            warn(f"it is left out: {type(exc).__name__}: {' '.join(str(exc).split())[:160]}")
        else:
            yield from ((one, warn) for one in found)
