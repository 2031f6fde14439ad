"""Encoders that come with the package, as folders in this package's own format: ``weights/NAME``."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seal_extract.encoders.spec import EncoderSpec

DEFAULT = "seal-tiny"
# in a wheel they lie inside the package, in a checkout beside it
_PLACES = tuple(place / "weights" for place in Path(__file__).resolve().parents[1:3])


@lru_cache(maxsize=1)
def bundled() -> dict[str, Path]:
    """Folder of each, by name."""
    from seal_extract.encoders.folder import CONFIG

    found = [path.parent for place in _PLACES for path in sorted(place.glob(f"*/{CONFIG}"))]
    return {path.name: path for path in reversed(found)}


def bundled_rows() -> dict[str, EncoderSpec]:
    """The row of each, by name."""
    from seal_extract.encoders.folder import CONFIG, read_config

    return {name: read_config(path / CONFIG) for name, path in bundled().items()}


def names_with_decoder() -> list[str]:
    """Encoders with an expression decoder that can be asked for by name."""
    from seal_extract.encoders.folder import CONFIG, read_contents
    from seal_extract.encoders.registry import list_encoders

    published = [row.name for row in list_encoders() if row.published and row.published.decoder]
    return published + [name for name, path in bundled().items() if read_contents(path / CONFIG).decoder]
