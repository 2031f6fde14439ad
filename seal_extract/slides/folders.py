"""Files below folders, in order; what this package wrote there is told apart from slides."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

RUN_FOLDERS = re.compile(r"overlays|contours.*|thumbnails|(slide_)?features_.*|expression_.*|.*px_overlap")
PICTURES = {"contact_sheet.png": "found.csv", "curves.png": "metrics.csv"}  # each with what lies beside it


def files_below(folder: Path) -> Iterator[Path]:
    """All files below, in order, through links but in no circle; not the inside of a slide of many files.

    A folder that `is_own` is yielded itself, and nothing of what is in it.
    """
    seen: set[str] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        slides = {Path(name).stem for name in files if name.lower().endswith(".mrxs")}
        wanted = [name for name in sorted(folders) if not name.startswith(".") and name not in slides]
        own = [name for name in wanted if is_own(Path(here, name))]
        folders[:] = [name for name in wanted if name not in own]
        yield from (Path(here, name) for name in own)
        yield from (Path(here, name) for name in sorted(files) if not name.startswith("."))


def is_own(path: Path) -> bool:
    """Whether a run wrote this file or folder: its pictures would be taken for slides otherwise."""
    beside = PICTURES.get(path.name)
    if beside is not None and path.with_name(beside).exists():
        return True
    path = path.absolute()
    return any(RUN_FOLDERS.fullmatch(p.name) and _is_run(p.parent) for p in (path, *path.parents))


def _is_run(folder: Path) -> bool:
    """Whether results lie here: a table of what became of slides, or pictures of them beside their files."""
    try:
        names = [path.name for path in folder.iterdir()]
        tables = [folder / name for name in names if re.fullmatch(r"status.*\.csv", name)]
        if any(table.read_bytes()[:11] == b"slide,name," for table in tables):
            return True
    except OSError:
        return False
    return "overlays" in names and sum(bool(RUN_FOLDERS.fullmatch(name)) for name in names) > 1
