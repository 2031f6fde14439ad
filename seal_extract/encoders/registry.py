"""All encoders that have a name: the rows of `rows`, the bundled ones, and those of installed packages.

An encoder that comes with the package is a folder ``weights/NAME`` in this package's own format. A third
party adds rows by an entry point of the group ``seal_extract.encoders``, which loads to an `EncoderSpec`, to
an iterable of them, or to a function that returns either; in its ``pyproject.toml``::

    [project.entry-points."seal_extract.encoders"]
    ours = "our_package.rows:ROWS"

A row with `Published` states how its weight file is laid out. A row without it stands for a file
``model.safetensors`` in the repository ``source``, as `Encoder.save_pretrained` writes it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from seal_extract.encoders.folder import CONFIG, read_config, read_contents
from seal_extract.encoders.rows import ALIASES, ROWS
from seal_extract.encoders.spec import EncoderSpec
from seal_extract.errors import UsageError

DEFAULT = "seal-tiny"
GROUP = "seal_extract.encoders"
# a wheel has the weights inside the package, a checkout has them beside it
_PLACES = tuple(place / "weights" for place in Path(__file__).resolve().parents[1:3])


def list_encoders() -> tuple[EncoderSpec, ...]:
    """All encoders that have a name: SEAL's first, then the bundled ones, and those of plugins last."""
    return tuple(_all_rows().values())


def find_spec(name: str) -> EncoderSpec:
    """The row of a name, or of an alias of it.

    Raises:
        UsageError: there is no such name; the message holds the nearest ones.
    """
    name = ALIASES.get(name, name)
    if name in ROWS:
        return ROWS[name]
    rows = _all_rows()
    if name in rows:
        return rows[name]
    near = get_close_matches(name.lower(), rows, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(
        f"there is no encoder {name!r}; {hint}Names: {', '.join(rows)}; or give a folder or Hub repository "
        "with config.json and model.safetensors"
    )


def _all_rows() -> dict[str, EncoderSpec]:
    bundled_rows = {name: read_config(path / CONFIG) for name, path in bundled().items()}
    return {**ROWS, **bundled_rows, **plugin_rows()}


@lru_cache(maxsize=1)
def bundled() -> dict[str, Path]:
    """The folder of each bundled encoder, by name."""
    found = [path.parent for place in _PLACES for path in sorted(place.glob(f"*/{CONFIG}"))]
    return {path.name: path for path in reversed(found)}


def names_with_decoder() -> list[str]:
    """Names of the encoders that have an expression decoder."""
    published = [row.name for row in list_encoders() if row.published and row.published.decoder]
    return published + [name for name, path in bundled().items() if read_contents(path / CONFIG).decoder]


@lru_cache(maxsize=1)
def plugin_rows() -> dict[str, EncoderSpec]:
    """The rows of all installed plugins, by name; the plugins are asked once per process.

    A plugin that fails, an object that is no row, and a name that is taken cause one warning each; the other
    rows stay usable.
    """
    rows: dict[str, EncoderSpec] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        for row in _loaded(entry):
            if not isinstance(row, EncoderSpec):
                _warn(entry, f"a {type(row).__name__} in it is left out: allowed: EncoderSpec")
            elif not re.fullmatch(r"\w[\w.+-]*", row.name):
                _warn(entry, f"its encoder {row.name!r} is left out: allowed: letters, digits, . _ + -")
            elif row.name in ROWS or row.name in ALIASES or row.name in rows:
                _warn(entry, f"its encoder {row.name} is left out: the name is taken")
            else:
                rows[row.name] = row
    return rows


def _loaded(entry: EntryPoint) -> list[object]:
    try:
        loaded = entry.load()
        loaded = loaded() if callable(loaded) else loaded
        if isinstance(loaded, EncoderSpec):
            return [loaded]
        if isinstance(loaded, (str, bytes)) or not isinstance(loaded, Iterable):
            raise UsageError(
                f"{loaded!r} is neither an EncoderSpec, an iterable of them, nor a function for either"
            )
        return list(loaded)
    except (Exception, SystemExit) as exc:  # third-party code may raise anything, even its own exit
        _warn(entry, f"it is left out: {type(exc).__name__}: {' '.join(str(exc).split())[:160]}")
        return []


def _warn(entry: EntryPoint, what: str) -> None:
    package = entry.dist.name if entry.dist is not None else "unknown package"
    warnings.warn(f"plugin {entry.name} of {package} ({entry.value}): {what}", RuntimeWarning, stacklevel=2)
