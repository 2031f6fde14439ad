"""A slide of a run: its place and name, its µm/px by its table, its file or an option, and its identity."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from seal_extract.errors import ResolutionError, SealExtractError, SlideError, UsageError, as_ours
from seal_extract.publish import file_state
from seal_extract.slides import remote
from seal_extract.slides.ngff import is_store
from seal_extract.slides.ome_zarr import OmeZarrReader
from seal_extract.slides.readers import check_mpp, same_mpp
from seal_extract.slides.slide import Slide, absolute, open_slide, parts_folder

SEVERAL_FILES = (".mrxs", ".vsi", ".vms", ".vmu", ".dcm")
WHOLE_BYTES = 2**23  # a file up to this size is read whole
SAMPLES, SAMPLE_BYTES = 64, 2**14  # read of a larger one: its head, its tail, and as much between
LEAST_SAMPLES = 4  # of each file of a slide that has very many
DICOM_HEAD_BYTES = 2**14  # the number of the series stands before the pixels and the optical paths

ANY_MPP = 1.0  # for opening a store whose µm/px does not matter

FileStamp = tuple[int, ...]


@dataclass(frozen=True)
class SlideEntry:
    """A slide to embed.

    Attributes:
        path: of the slide; for a URL a path that looks like it, for names only.
        name: of its results; unique in its list.
        mpp: µm/px at level 0 that a table gives; it overrides the file's.
        case_id: the patient, if a table names one.
        roi: GeoJSON of its tissue, if a table names one.
        copy: a copy of the slide on faster storage, which is read in its place.
        url: of a slide that is no file; only a copy of it can be read, or it is an OME-Zarr store.
        version: of the file at the URL, as its storage stated it when it was copied.
    """

    path: Path
    name: str
    mpp: float | None = None
    case_id: str | None = None
    roi: Path | None = None
    copy: Path | None = None
    url: str | None = field(default=None, repr=False)  # with all its secrets
    version: str = ""

    @property
    def file(self) -> Path:
        """The file to read."""
        return self.copy or self.path

    @property
    def is_streamed(self) -> bool:
        """Whether the slide is read at its URL, without a copy."""
        return self.url is not None and self.copy is None and is_store(self.url)

    @property
    def source(self) -> str:
        """Where the slide is, as tables and messages show it."""
        return str(self.path) if self.url is None else remote.public(self.url)

    @classmethod
    def of(cls, source: str | os.PathLike[str]) -> SlideEntry:
        """A slide by itself, a file or a URL, named as its file.

        Raises:
            UsageError: the URL of a slide of several files.
        """
        where = remote.address(source)
        if isinstance(where, Path):
            return cls(where, where.stem)
        path = remote.place(where)
        if path.suffix.lower() in SEVERAL_FILES:
            raise UsageError(
                f"{remote.public(where)}: slides of several files are not read from URLs; copy it with all "
                "that belongs to it to a folder, and give that"
            )
        return cls(path, path.stem, url=where)

    def resolved(self) -> SlideEntry:
        """The same, independent of the working folder."""
        path = self.path if self.url is not None else absolute(self.path)
        return replace(self, path=path, roi=self.roi and absolute(self.roi))

    def blame(self, error: Exception) -> SealExtractError:
        """Any error that stopped this slide, as one of our errors that names the slide."""
        ours = as_ours(error, self.source)
        if self.url is not None or self.copy is not None:
            ours.args = (str(ours).replace(str(self.file), self.source),)
        return ours


def refuse_uncopied(entry: SlideEntry) -> None:
    """Refuse a slide at a URL that has no copy and needs one.

    Raises:
        UsageError: there is such a slide.
    """
    if entry.url is not None and entry.copy is None and not entry.is_streamed:
        raise UsageError(
            f"{entry.source} is a URL, which is copied before it is read; type --stage-dir FOLDER, "
            "and --stage-gb GB for what copies may fill"
        )


def open_entry(entry: SlideEntry, slide_mpp: float | None = None, override_mpp: float | None = None) -> Slide:
    """Open a slide and settle its µm/px: by its table, else by its file, else by ``slide_mpp``.

    A table that agrees with the file within 5 % leaves the file's number as it is. A larger contradiction is
    reported by a warning, and by the slide's ``mpp_conflict``.

    Args:
        entry: the slide.
        slide_mpp: µm/px at level 0 where neither table nor file has one.
        override_mpp: µm/px at level 0 that overrides everything else.

    Raises:
        SlideError: see `open_slide`.
        UsageError: the slide is at a URL, and there is no copy.
    """
    refuse_uncopied(entry)
    where = entry.url if entry.url is not None and entry.copy is None else entry.file
    claims = {"--override-mpp": override_mpp, "table": entry.mpp, "file": None, "--slide-mpp": slide_mpp}
    given = [(source, mpp) for source, mpp in claims.items() if mpp is not None]
    for source, mpp in given:
        check_mpp(mpp, source, entry.file)
    try:
        slide = open_slide(where, origin=entry.path)
    except ResolutionError:  # the file does not know it
        if not given:
            raise
        slide = open_slide(where, mpp=given[0][1])
        slide.mpp_source = given[0][0]
    else:
        claims["file"] = slide.mpp
        if override_mpp is not None or (entry.mpp is not None and not same_mpp(entry.mpp, slide.mpp)):
            source, mpp = given[0]
            slide.mpp_source = f"{source} (file: {slide.mpp:.4g}, {slide.mpp_source})"
            slide.mpp = mpp
    others = [f"{name} {mpp:.4g}" for name, mpp in claims.items() if mpp and not same_mpp(mpp, slide.mpp)]
    if others:
        slide.mpp_conflict = f"{slide.mpp:.4g} µm/px by {slide.mpp_source}, against {' and '.join(others)}"
        hint = f"; type --override-mpp {slide_mpp:.4g} if the file is wrong" if slide_mpp is not None else ""
        warnings.warn(f"{entry.source}: {slide.mpp_conflict}{hint}", stacklevel=1)
    return slide


# --- identity: name and size do not tell uncompressed scans of one width and height apart ---------------


def slide_files(path: Path) -> list[Path]:
    """The file and those that are read with it: images of VMS and VMU, parts of MRXS, VSI and DICOM.

    Of an OME-Zarr store in a folder these are all files in it.
    """
    if path.is_dir():
        return sorted(Path(here, name) for here, _, names in os.walk(path) for name in names)
    kind = path.suffix.lower() if path.is_file() else ""  # opening a FIFO would wait for ever
    if (parts := parts_folder(path)) is not None:
        return [path, *sorted(p for p in parts.rglob("*") if p.is_file())]
    if kind in (".vms", ".vmu"):
        named = (path.parent / name for name in _values(path) if name == os.path.basename(name))
        return [path, *sorted({p for p in named if p.is_file() and p != path})]
    if kind == ".dcm" and (series := _series(path, file_stamp_of([path]))):
        beside = (p for p in sorted(path.parent.glob("*.[dD][cC][mM]")) if p != path and p.is_file())
        return [path, *(p for p in beside if _series(p, file_stamp_of([p])) == series)]
    return [path]


def file_stamp(path: Path) -> FileStamp:
    """Inode, size and time in ns of each file of a slide, zeros for a missing one.

    They change when a file is replaced or written to.
    """
    return file_stamp_of(slide_files(path))


def stamp_of(entry: SlideEntry) -> FileStamp:
    """What changes when a slide does, zeros where it is gone; `file_stamp` of one that is a file."""
    if not entry.is_streamed:
        return file_stamp(entry.file)
    try:
        return tuple(bytes.fromhex(look(entry).version))
    except SlideError:
        return (0,)


def look(entry: SlideEntry) -> remote.RemoteFile:
    """Size and version of a slide at a URL, as it is now, or as it was when it was copied.

    Raises:
        SlideError: the slide is missing.
    """
    assert entry.url is not None
    if entry.copy is not None:
        return remote.RemoteFile(entry.copy.stat().st_size, entry.version)
    if not entry.is_streamed:
        return remote.look(entry.url)
    with closing(OmeZarrReader(entry.url, ANY_MPP)) as slide:
        return remote.RemoteFile(slide.size_bytes, slide.content)


def file_stamp_of(files: list[Path]) -> FileStamp:
    """`file_stamp` of these files."""
    stamp: list[int] = []
    for file in files:
        try:
            stamp += (file.stat().st_ino, *file_state(file))
        except OSError:
            stamp += (0, 0, 0)
    return tuple(stamp)


def sizes_and_times(path: Path) -> str:
    """A digest of name, size and time in ns of each file of a slide; equal for a copy that keeps the times.

    Raises:
        OSError: a file is missing.
    """
    stamps = [(str(file.relative_to(path.parent)), *file_state(file)) for file in slide_files(path)]
    return hashlib.sha256(repr(stamps).encode("utf-8", "surrogateescape")).hexdigest()


def content(path: Path) -> str:
    """A digest of name, size, head, tail and samples of each file of a slide; equal for every copy of it.

    That of an OME-Zarr store is `OmeZarrReader.content`.

    Raises:
        OSError: a file cannot be read.
        SlideOpenError: a store cannot be.
    """
    if is_store(path):
        with closing(OmeZarrReader(path, ANY_MPP)) as slide:
            return slide.content
    return _content(path, file_stamp(path))


@lru_cache(maxsize=64)
def _content(path: Path, stamp: FileStamp) -> str:
    files = slide_files(path)
    samples = max(LEAST_SAMPLES, SAMPLES // len(files))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        relative = "" if file == path else str(file.relative_to(path.parent))
        digest.update(f"{relative} {size}\n".encode("utf-8", "surrogateescape"))
        with file.open("rb") as opened:
            if size <= WHOLE_BYTES:
                digest.update(opened.read())
                continue
            for i in range(samples):
                opened.seek((size - SAMPLE_BYTES) * i // (samples - 1))
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _values(path: Path) -> list[str]:
    """The values of a key file: ``ImageFile(1,0)=slide_1_0.jpg``."""
    try:
        text = path.read_bytes()[:WHOLE_BYTES].decode(errors="surrogateescape")
    except OSError:
        return []
    return re.findall(r"^[^=\n]+=[ \t]*([^\r\n]+?)[ \t]*\r?$", text, re.MULTILINE)


@lru_cache(maxsize=2**16)
def _series(path: Path, stamp: FileStamp) -> bytes:
    """SeriesInstanceUID, (0020,000E), which all files of one DICOM slide state; empty if unknown."""
    try:
        with path.open("rb") as file:
            head = file.read(DICOM_HEAD_BYTES)
    except OSError:
        return b""
    found = re.search(rb"\x20\x00\x0e\x00(?:UI..|..\x00\x00)([0-9.]+)", head, re.DOTALL)
    return found[1] if found else b""
