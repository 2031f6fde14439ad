"""A weight file that was found, here or on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FoundFile:
    """A weight file on this disk.

    Attributes:
        path: where it lies.
        source: the repository it came from, or its folder.
        revision: commit of that repository; None for a file that came from elsewhere.
        sha256: what its content must hash to, in hex, where the Hub said so.
        settings: a file beside it that changes what is made of it.
    """

    path: Path
    source: str
    revision: str | None = None
    sha256: str | None = None
    settings: Path | None = None
