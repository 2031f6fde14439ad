"""A weight file that was found, here or on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from seal_extract.errors import CheckpointError


@dataclass(frozen=True)
class FoundFile:
    """A weight file on this disk.

    Attributes:
        path: where it lies.
        source: the repository it came from, or its folder.
        revision: commit of that repository; None for a file that came from elsewhere.
        sha256: what its content must hash to, in hex, where the Hub said so.
        settings: a file beside it that changes what is made of it.
        pins: the sha256 that its row knows, whole or their beginnings; it is one of the pinned files if its
            own begins with one of them.
        held: another content is refused, before anything of it is read.
    """

    path: Path
    source: str
    revision: str | None = None
    sha256: str | None = None
    settings: Path | None = None
    pins: tuple[str, ...] = ()
    held: bool = False


def check_regular(path: Path) -> None:
    """Refuse what is no file before it is opened: a pipe or a device would be read without end.

    Raises:
        CheckpointError: it is missing, a folder, a pipe or a device.
    """
    try:
        path.stat()
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise CheckpointError(f"cannot read {path}: {reason}; give the path of a file") from exc
    if not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe or device"
        raise CheckpointError(f"{path} is {what}; give the path of a file")
