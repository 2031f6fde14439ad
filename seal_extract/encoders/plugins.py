"""Rows of third parties: installed packages that name an entry point of the group ``seal_extract.encoders``.

The entry point loads to an `EncoderSpec`, to an iterable of them, or to a function that returns either. In
the third party's own ``pyproject.toml``::

    [project.entry-points."seal_extract.encoders"]
    ours = "our_package.rows:ROWS"

A row with `Published` says how its weight file is laid out; one without stands for a file
``model.safetensors`` in the repository ``source``, as `Encoder.save_pretrained` writes it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

from seal_extract.encoders.registry import ALIASES, ROWS, EncoderSpec
from seal_extract.errors import UsageError

GROUP = "seal_extract.encoders"


@lru_cache(maxsize=1)
def plugin_rows() -> dict[str, EncoderSpec]:
    """By name, what all installed plugins bring; asked once, when a table or an unknown name is.

    A plugin that fails, a row that is none, and a name that is taken give one warning each, and the others
    are there all the same.
    """
    rows: dict[str, EncoderSpec] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        for row in _rows_of(entry):
            if not re.fullmatch(r"\w[\w.+-]*", row.name):
                _warn(entry, f"its encoder {row.name!r} is left out: allowed: letters, digits, . _ + -")
            elif row.name in ROWS or row.name in ALIASES or row.name in rows:
                _warn(entry, f"its encoder {row.name} is left out: the name is taken")
            else:
                rows[row.name] = row
    return rows


def _rows_of(entry: EntryPoint) -> Iterator[EncoderSpec]:
    try:
        loaded = entry.load()
        if callable(loaded):
            loaded = loaded()
        found = [loaded] if isinstance(loaded, EncoderSpec) else list(_iterable(loaded))
    # of somebody else's code: whatever it is, its own exit included, the other encoders stay usable
    except (Exception, SystemExit) as exc:
        _warn(entry, f"it is left out: {type(exc).__name__}: {' '.join(str(exc).split())[:160]}")
        return
    for row in found:
        if isinstance(row, EncoderSpec):
            yield row
        else:
            _warn(entry, f"a {type(row).__name__} in it is left out: allowed: EncoderSpec")


def _iterable(loaded: object) -> Iterable[object]:
    if isinstance(loaded, (str, bytes)) or not isinstance(loaded, Iterable):
        raise UsageError(f"{loaded!r} is no EncoderSpec, iterable of them, or function that returns either")
    return loaded


def _warn(entry: EntryPoint, what: str) -> None:
    package = entry.dist.name if entry.dist is not None else "unknown package"
    warnings.warn(f"plugin {entry.name} of {package} ({entry.value}): {what}", RuntimeWarning, stacklevel=2)
