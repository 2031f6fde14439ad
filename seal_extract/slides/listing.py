"""Find the slides that a run is given as files, folders, patterns, URLs or CSV tables, and name them."""

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
from seal_extract.slides.extras import EXTRAS, plugin_readers
from seal_extract.slides.ngff import METADATA, ZIPPED, has_image, is_store
from seal_extract.slides.slide import check_path, parts_folder

SLIDE_SUFFIXES = {
    *(".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide"),
    *(".dcm", ".png", ".jpg", ".jpeg", ".avs", remote.STORE, *ZIPPED),
    *(suffix for reader in EXTRAS for suffix in reader.suffixes),
}
SLIDE_COLUMNS = ("slide", "slide_id", "wsi")  # ours, CLAM's, TRIDENT's
OWN = "made by seal-extract"
RUN_FOLDERS = re.compile(
    r"overlays|contours.*|thumbnails|((slide|patient)_)?features_.*|expression_.*|.*px_overlap"
)
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
        elif source.is_dir() and not is_store(source):
            found, beside = _sort_out(files_below(source))
        elif not source.exists() and glob.has_magic(str(source)):
            matching = map(Path, sorted(glob.glob(str(source), recursive=True)))
            found, beside = _sort_out(path for path in matching if path.is_file() or is_store(path))
        elif is_own(source):
            raise UsageError(f"{source} was {OWN} and is no slide; give the slide that it was made from")
        else:
            found, beside = [SlideEntry.of(source)], []
        if not found:
            _refuse_empty(source, beside)
        entries += found
        ignored += beside
    for url in {entry.url.partition(":")[0]: entry.url for entry in entries if entry.url}.values():
        remote.check_protocol(url)
    _refuse_twice(entries)
    return SlideList(tuple(with_names(entries)), tuple(ignored))


def _refuse_empty(source: Path | str, ignored: Ignored) -> None:
    if isinstance(source, Path) and source.is_dir() and OWN in (reason for _, reason in ignored):
        raise UsageError(
            f"{source} holds results of seal-extract and no slide; type: seal-extract verify {source}, "
            "or give the folder of the slides"
        )
    at_url = isinstance(source, str)
    raise UsageError(
        f"{remote.public(source) if isinstance(source, str) else source} holds no slide"
        f"{' that can be read from there' * at_url}; "
        f"allowed: {' '.join(sorted(SLIDE_SUFFIXES.difference(SEVERAL_FILES if at_url else ())))}"
    )


# --- folders and URLs ---------------------------------------------------------------------------------


def _sort_out(files: Iterable[Path]) -> tuple[list[SlideEntry], Ignored]:
    files = list(files)
    vms = {path.parent for path in files if path.suffix.lower() in (".vms", ".vmu")}
    found: list[SlideEntry] = []
    ignored: Ignored = []
    series: dict[str, Path] = {}
    known = SLIDE_SUFFIXES.union(plugin_readers())
    for path in files:
        suffix = _suffix(path)
        if is_own(path):
            ignored.append((path, OWN))
        elif (suffix == remote.STORE or suffix not in known) and path.is_dir():
            if has_image(path):
                found.append(SlideEntry.of(path))
            else:
                ignored.append((path, "a Zarr store whose metadata describe no slide"))
        elif suffix not in known:
            ignored.append((path, f"{suffix or 'no suffix'} is no slide"))
        elif suffix in (".jpg", ".jpeg") and path.parent in vms:
            ignored.append((path, "part of the VMS slide beside it"))
        elif suffix == ".dcm" and (first := series.setdefault(_dicom_series(path), path)) != path:
            ignored.append((path, f"of the same DICOM slide as {first.name}"))
        else:
            found.append(SlideEntry.of(path))
    return found, ignored


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return next((end for end in ZIPPED if name.endswith(end)), path.suffix.lower())


def _dicom_series(path: Path) -> str:
    """The number that all files of one DICOM slide state; the path itself where it is unknown."""
    import openslide

    try:
        check_path(path)
        with openslide.OpenSlide(path) as slide:
            return str(slide.properties.get("dicom.SeriesInstanceUID", path))
    except (openslide.OpenSlideError, SlideOpenError, OSError):
        return str(path)


def _at_url(url: str) -> tuple[list[SlideEntry], Ignored]:
    suffix = _suffix(remote.place(url))
    if suffix == ".csv":
        raise UsageError(f"{remote.public(url)}: tables are read from files; download it and give the file")
    known = SLIDE_SUFFIXES.union(plugin_readers())
    if (suffix in known or is_store(url)) and not remote.has_magic(url):
        return [SlideEntry.of(url)], []
    found: list[SlideEntry] = []
    ignored: Ignored = []
    for file in remote.list_files(url):
        suffix = _suffix(remote.place(file))
        if suffix not in known:
            ignored.append((remote.public(file), f"{suffix or 'no suffix'} is no slide"))
        elif suffix in SEVERAL_FILES:
            ignored.append((remote.public(file), "slides of several files are not read from URLs"))
        else:
            found.append(SlideEntry.of(file))
    return found, ignored


def files_below(folder: Path) -> Iterator[Path]:
    """All files below, in order, through links but in no circle; not the inside of a slide of many files.

    A folder that `is_own`, and an OME-Zarr store, is yielded itself, and nothing of what is in it.
    """
    seen: set[str] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if Path(here) != Path(folder) and (
            here.lower().endswith(remote.STORE) or not {*METADATA}.isdisjoint(files)
        ):
            folders.clear()
            yield Path(here)
            continue
        parts = {beside.name for name in files if (beside := parts_folder(Path(name))) is not None}
        wanted = [name for name in sorted(folders) if not name.startswith(".") and name not in parts]
        own = [name for name in wanted if is_own(Path(here, name))]
        folders[:] = [name for name in wanted if name not in own]
        yield from (Path(here, name) for name in own)
        yield from (Path(here, name) for name in sorted(files) if not name.startswith("."))


def is_own(path: Path) -> bool:
    """Whether a run wrote this file or folder, whose pictures are no slides."""
    beside = PICTURES.get(path.name)
    if beside is not None and path.with_name(beside).exists():
        return True
    path = path.absolute()
    return any(RUN_FOLDERS.fullmatch(p.name) and _is_run(p.parent) for p in (path, *path.parents))


def _is_run(folder: Path) -> bool:
    """Whether results lie here: a status table, or overlays beside other folders of results."""
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
    """The slides of a table; CLAM's ``process``, which its patching alone needs, is not read."""
    column, rows = read_table(table, ("mpp", "case_id", "roi"))
    found: list[SlideEntry] = []
    for line, cells in rows:
        where, roi, mpp = cells.get(column), cells.get("roi"), cells.get("mpp")
        if not where:
            raise UsageError(f"{table} line {line}: no {column}; fill it in or delete the line")
        for key, text in ((column, where), ("roi", roi or "")):
            if not _can_be(remote.address(text), table):
                raise UsageError(f"{table} line {line}: {key} is {text[:80]!r}; give a path")
        try:
            mpp_l0 = float(mpp) if mpp else None
        except ValueError as exc:
            raise UsageError(f"{table} line {line}: mpp is {mpp!r}; give µm/px, for example 0.25") from exc
        entry = SlideEntry.of(_locate(where, table, slide_folder))
        case_id = cells.get("case_id") or None
        found.append(replace(entry, mpp=mpp_l0, case_id=case_id, roi=table.parent / roi if roi else None))
    if not found:
        raise UsageError(f"{table} names no slide; give one per line under {column}")
    return found


def read_rows(table: Path, delimiter: str = ",") -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The columns of a CSV in UTF-8, and the cells of each row with the number of its line.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True)
            reader.fieldnames = columns = [name.strip() for name in reader.fieldnames or ()]
            rows = [
                (reader.line_num, {key: text.strip() for key, text in row.items() if isinstance(text, str)})
                for row in reader
            ]
    except OSError as exc:
        raise UsageError(f"cannot read {table}: {exc.strerror}; check the path") from exc
    except (UnicodeDecodeError, csv.Error) as exc:
        raise UsageError(f"{table} is no CSV in UTF-8 ({exc}); save it as one") from exc
    return columns, rows


def refuse_repeated(table: Path, columns: Sequence[str], which: Sequence[str]) -> None:
    """Refuse a table in which one of the columns ``which`` stands more than once: its cells are ambiguous.

    Raises:
        UsageError: with its name.
    """
    for name in which:
        if (count := columns.count(name)) > 1:
            raise UsageError(f"{table} has {count} columns {name}; leave one of them")


def read_table(table: Path, optional: Sequence[str]) -> tuple[str, list[tuple[int, dict[str, str]]]]:
    """The column that names slides, and the cells of each row with the number of its line.

    Args:
        table: CSV in UTF-8.
        optional: other columns, for messages.

    Raises:
        UsageError: it cannot be read, or has no such column.
    """
    columns, rows = read_rows(table)
    refuse_repeated(table, columns, (*SLIDE_COLUMNS, *optional))
    column = next((name for name in SLIDE_COLUMNS if name in columns), None)
    if column is None:
        for mark, name in ((";", "';'"), ("\t", "tabs")):
            if any(mark in text for text in columns):
                raise UsageError(
                    f"{table} has its cells separated by {name}; save it with commas, and numbers with a "
                    "decimal point"
                )
        raise UsageError(
            f"{table} has the columns {', '.join(columns) or 'of nothing'}; it needs one of "
            f"{', '.join(SLIDE_COLUMNS)}, and may have {', '.join(optional)}"
        )
    return column, rows


def _locate(text: str, table: Path, slide_folder: Path | str | None) -> Path | str:
    """A slide that a table names; if it is nowhere, the likeliest path, which will be reported as missing."""
    where = remote.address(text)
    if isinstance(where, str) or where.is_absolute():
        return where
    if isinstance(slide_folder, str):
        return f"{slide_folder.rstrip('/')}/{text}"
    candidates = [*([slide_folder / text] if slide_folder else []), table.parent / text, Path(text)]
    return next((path for path in candidates if path.exists()), candidates[0])


def _can_be(where: Path | str, table: Path) -> bool:
    """Whether a file could have that name, which has no NUL and is not too long."""
    try:
        os.lstat(table if isinstance(where, str) else table.parent / where)
    except ValueError:
        return False
    except OSError as exc:
        return exc.errno != errno.ENAMETOOLONG
    return True


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
