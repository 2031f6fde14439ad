"""Which slides a run is about: files, folders, patterns, URLs, CSV tables -> one list, each with a name.

Names are what results are called. Slides of one name in different folders get the folder in front of it,
``site_a__slide1`` and ``site_b__slide1``, so that none overwrites another.
"""

from __future__ import annotations

import csv
import errno
import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from seal_extract.errors import SlideOpenError, UsageError
from seal_extract.names import choose_names, shown
from seal_extract.slides import remote
from seal_extract.slides.entry import SEVERAL_FILES, SlideEntry
from seal_extract.slides.slide import check_path

SLIDE_SUFFIXES = {
    *(".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide"),
    *(".dcm", ".png", ".jpg", ".jpeg"),
}
SLIDE_COLUMNS = ("slide", "slide_id", "wsi")  # ours, CLAM's, TRIDENT's
OWN = "made by seal-extract"
RUN_FOLDERS = re.compile(r"overlays|contours.*|thumbnails|(slide_)?features_.*|expression_.*|.*px_overlap")
PICTURES = {"contact_sheet.png": "found.csv", "curves.png": "metrics.csv"}  # each with what lies beside it

Ignored = list[tuple[Path | str, str]]  # files, each with the reason


@dataclass(frozen=True)
class SlideList:
    """The slides of a run, and what lay beside them.

    Attributes:
        entries: in order of path, or of the table.
        ignored: files that are not embedded, each with the reason.
    """

    entries: tuple[SlideEntry, ...]
    ignored: tuple[tuple[Path | str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"SlideList({len(self.entries)} slides, {len(self.ignored)} files ignored)"

    def shard(self, index: int, count: int) -> SlideList:
        """Every ``count``-th slide from ``index`` on, counted from 1: all shards together are the whole list.

        Raises:
            UsageError: there is no such shard.
        """
        if not 1 <= index <= count:
            raise UsageError(f"--shard is {index}/{count}; allowed: 1/{count} to {count}/{count}")
        return SlideList(self.entries[index - 1 :: count], self.ignored)


def list_slides(
    sources: Sequence[str | os.PathLike[str]], slide_folder: str | os.PathLike[str] | None = None
) -> SlideList:
    """Find the slides that ``sources`` name.

    Args:
        sources: slide files, folders (with all below them), patterns such as ``site_*/*.svs``, URLs of all
            these as text, and ``.csv`` tables.
        slide_folder: where the slides of a table lie, if neither beside it nor in the working folder.

    Raises:
        UsageError: a source without slides, a table that cannot be read, a slide given twice.
        SlideOpenError: a URL cannot be listed.
    """
    entries: list[SlideEntry] = []
    ignored: Ignored = []
    for source in map(remote.address, sources):
        if isinstance(source, str):
            found, beside = _at_url(source)
        elif source.suffix.lower() == ".csv":
            folder = None if slide_folder is None else remote.address(slide_folder)
            found, beside = _in_table(source, folder), []
        elif source.is_dir():
            found, beside = _below(source)
        elif not source.exists() and glob.has_magic(str(source)):
            found, beside = _matching(str(source))
        elif is_own(source):
            raise UsageError(f"{source} was {OWN} and is no slide; give the slide that it was made of")
        else:
            found, beside = [SlideEntry.of(source)], []
        entries += found
        ignored += beside
    for url in {entry.url.partition(":")[0]: entry.url for entry in entries if entry.url}.values():
        remote.check_protocol(url)
    _refuse_twice(entries)
    return SlideList(tuple(with_names(entries)), tuple(ignored))


# --- folders ------------------------------------------------------------------------------------------


def _below(folder: Path) -> tuple[list[SlideEntry], Ignored]:
    found, ignored = _sort_out(files_below(folder))
    if not found and (OWN in (reason for _, reason in ignored)):
        raise UsageError(
            f"{folder} holds results of seal-extract and no slide; type: seal-extract verify {folder}, "
            "or give the folder of the slides"
        )
    if not found:
        raise UsageError(f"{folder} holds no slide; allowed: {' '.join(sorted(SLIDE_SUFFIXES))}")
    return found, ignored


def _matching(pattern: str) -> tuple[list[SlideEntry], Ignored]:
    found, ignored = _sort_out(
        p for p in map(Path, sorted(glob.glob(pattern, recursive=True))) if p.is_file()
    )
    if not found:
        raise UsageError(f"no slide matches {pattern}; allowed: {' '.join(sorted(SLIDE_SUFFIXES))}")
    return found, ignored


def _sort_out(files: Iterable[Path]) -> tuple[list[SlideEntry], Ignored]:
    files = list(files)
    vms = {path.parent for path in files if path.suffix.lower() in (".vms", ".vmu")}
    found: list[SlideEntry] = []
    ignored: Ignored = []
    series: dict[str, Path] = {}
    for path in files:
        suffix = path.suffix.lower()
        if is_own(path):
            ignored.append((path, OWN))
        elif suffix not in SLIDE_SUFFIXES:
            ignored.append((path, f"{suffix or 'no suffix'} is no slide"))
        elif suffix in (".jpg", ".jpeg") and path.parent in vms:
            ignored.append((path, "part of the VMS slide beside it"))
        elif suffix == ".dcm" and (first := series.setdefault(_dicom_series(path), path)) != path:
            ignored.append((path, f"of the same DICOM slide as {first.name}"))
        else:
            found.append(SlideEntry.of(path))
    return found, ignored


def _dicom_series(path: Path) -> str:
    """What the files of one DICOM slide have in common; the path itself where that is unknown."""
    import openslide

    try:
        check_path(path)
        with openslide.OpenSlide(path) as slide:
            return str(slide.properties.get("dicom.SeriesInstanceUID", path))
    except (openslide.OpenSlideError, SlideOpenError, OSError):
        return str(path)


def _at_url(url: str) -> tuple[list[SlideEntry], Ignored]:
    path = remote.place(url)
    if path.suffix.lower() == ".csv":
        raise UsageError(f"{remote.public(url)}: tables are read from files; download it and give the file")
    if path.suffix.lower() in SLIDE_SUFFIXES and not remote.has_magic(url):
        return [SlideEntry.of(url)], []
    found: list[SlideEntry] = []
    ignored: Ignored = []
    for file in remote.list_files(url):
        suffix = remote.place(file).suffix.lower()
        if suffix not in SLIDE_SUFFIXES:
            ignored.append((remote.public(file), f"{suffix or 'no suffix'} is no slide"))
        elif suffix in SEVERAL_FILES:
            ignored.append((remote.public(file), "slides of several files are not read from URLs"))
        else:
            found.append(SlideEntry.of(file))
    if not found:
        raise UsageError(
            f"{remote.public(url)} holds no slide that can be read from there; allowed: "
            f"{' '.join(sorted(SLIDE_SUFFIXES.difference(SEVERAL_FILES)))}"
        )
    return found, ignored


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


# --- tables -------------------------------------------------------------------------------------------


def _in_table(table: Path, slide_folder: Path | str | None) -> list[SlideEntry]:
    """The slides of a table; CLAM's ``process`` says what its patching still has to do, and is not read."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            rows = [(reader.line_num, row) for row in reader]
    except OSError as exc:
        raise UsageError(f"cannot read {table}: {exc.strerror}; check the path") from exc
    except (UnicodeDecodeError, csv.Error) as exc:
        raise UsageError(f"{table} is no CSV in UTF-8 ({exc}); save it as one") from exc
    column = next((name for name in SLIDE_COLUMNS if name in columns), None)
    if column is None:
        other = next((mark for mark in (";", "\t") if any(mark in name for name in columns)), None)
        if other is not None:
            raise UsageError(
                f"{table} has its cells separated by {'tabs' if other != ';' else repr(other)}; save it with "
                "commas, and numbers with a decimal point"
            )
        raise UsageError(
            f"{table} has the columns {', '.join(columns) or 'of nothing'}; it needs one of "
            f"{', '.join(SLIDE_COLUMNS)}, and may have mpp, case_id, roi"
        )
    found: list[SlideEntry] = []
    for line, row in rows:
        cells = {key: (value or "").strip() for key, value in row.items() if isinstance(value, str)}
        if not cells.get(column):
            raise UsageError(f"{table} line {line}: no {column}; fill it in or delete the line")
        for key in (column, "roi"):
            if not _can_be(remote.address(cells.get(key, "")), table):
                raise UsageError(f"{table} line {line}: {key} is {cells[key][:80]!r}; give a path")
        entry = SlideEntry.of(_locate(cells[column], table, slide_folder))
        found.append(_from_cells(entry, cells, table, line))
    if not found:
        raise UsageError(f"{table} names no slide; give one per line under {column}")
    return found


def _from_cells(entry: SlideEntry, cells: dict[str, str], table: Path, line: int) -> SlideEntry:
    text = cells.get("mpp", "")
    try:
        mpp = float(text) if text else None
    except ValueError as exc:
        raise UsageError(f"{table} line {line}: mpp is {text!r}; give µm/px, for example 0.25") from exc
    roi = cells.get("roi")
    case_id = cells.get("case_id") or None
    return replace(entry, mpp=mpp, case_id=case_id, roi=_beside(table, roi) if roi else None)


def _locate(text: str, table: Path, slide_folder: Path | str | None) -> Path | str:
    """A slide that a table names; where it is nowhere, the likeliest path, whose absence will be told."""
    where = remote.address(text)
    if isinstance(where, str) or where.is_absolute():
        return where
    if isinstance(slide_folder, str):
        return f"{slide_folder.rstrip('/')}/{text}"
    candidates = [*([slide_folder / text] if slide_folder else []), _beside(table, text), Path(text)]
    return next((path for path in candidates if path.exists()), candidates[0])


def _can_be(where: Path | str, table: Path) -> bool:
    """Whether a file could be called so, without NUL and not too long, whether or not there is one."""
    try:
        os.lstat(table if isinstance(where, str) else table.parent / where)
    except ValueError:
        return False
    except OSError as exc:
        return exc.errno != errno.ENAMETOOLONG
    return True


def _beside(table: Path, text: str) -> Path:
    return table.parent / text  # an absolute path stays what it is


# --- names --------------------------------------------------------------------------------------------


def _refuse_twice(entries: Sequence[SlideEntry]) -> None:
    resolved = [entry.resolved() for entry in entries]
    counts = Counter(entry.path for entry in resolved)
    twice = {entry.path: entry.source for entry in resolved if counts[entry.path] > 1}
    if twice:
        more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
        raise UsageError(f"{shown(next(iter(twice.values())))}{more} given twice; name each slide once")


def with_names(entries: Sequence[SlideEntry], given: Mapping[Path, str] | None = None) -> list[SlideEntry]:
    """The slides under names of their own; see `choose_names`."""
    names = [entry.name for entry in entries] if given is not None else None
    names = choose_names([entry.resolved().path for entry in entries], names, given)
    return [replace(entry, name=name) for entry, name in zip(entries, names, strict=True)]
