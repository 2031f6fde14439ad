"""Gene panels from files: which gene each column of a table of expression is."""

from __future__ import annotations

import os
from pathlib import Path

from seal_extract.errors import UsageError


def read_panel(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Gene names in the order of the columns, from a text file with one name per line.

    Lines are stripped of surrounding space; a last empty line is no name, any other is an error.

    Raises:
        UsageError: missing, not UTF-8 text, empty, or with a line that holds no name or more than one.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8 text"
        raise UsageError(f"cannot read the gene panel {path}: {reason}; give one name per line") from exc
    names = tuple(line.strip() for line in lines)
    for number, name in enumerate(names, 1):
        if not name or any(separator in name for separator in ",;\t"):
            raise UsageError(f"line {number} of the gene panel {path} is {name!r}; give one name per line")
    if not names:
        raise UsageError(f"the gene panel {path} is empty; give one name per line")
    return names
