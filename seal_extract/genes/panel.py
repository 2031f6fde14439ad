"""Gene panels from files: which gene each column of a table of expression is."""

from __future__ import annotations

import os
import stat
import unicodedata
from pathlib import Path

from seal_extract.errors import UsageError

MOST_BYTES = 256_000_000  # all of MSigDB as GMT has 20 MB


def read_panel(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Gene names in the order of the columns, from a text file with one name per line.

    Lines are stripped of surrounding space; a last empty line is no name, any other is an error.

    Raises:
        UsageError: missing, not UTF-8 text, empty, or with a line that holds no name or more than one.
    """
    text = read_text(path, f"the gene panel {path}", "one name per line")
    names = tuple(line.strip() for line in text.splitlines())
    for number, name in enumerate(names, 1):
        if not name or any(separator in name for separator in ",;\t") or not is_plain(name):
            raise UsageError(f"line {number} of the gene panel {path} is {name!r}; give one name per line")
    if not names:
        raise UsageError(f"the gene panel {path} is empty; give one name per line")
    return names


def is_plain(name: str) -> bool:
    """Whether a name is text that every file can hold: no control character, no byte that was no UTF-8."""
    return not any(unicodedata.category(char) in ("Cc", "Cs") for char in name)


def read_text(path: str | os.PathLike[str], what: str, give: str) -> str:
    """The text of a small file.

    Raises:
        UsageError: missing, no regular file, larger than 256 MB, or not UTF-8; ``what`` it is and what to
            ``give`` are in the message.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > MOST_BYTES:
            raise ValueError(f"it has {status.st_size / 1e6:.0f} MB; allowed: {MOST_BYTES / 1e6:.0f}")
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as exc:
        reason = str(exc.strerror if isinstance(exc, OSError) else exc)
        if isinstance(exc, UnicodeDecodeError):
            reason = "it is not UTF-8 text"
        raise UsageError(f"cannot read {what}: {reason}; give {give}") from exc
