"""A slide of a run: its place, the name of its results, and its µm/px by its table, its file or an option."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

from seal_extract.errors import ResolutionError, SealExtractError, UsageError, as_ours
from seal_extract.slides import remote
from seal_extract.slides.mpp import check_mpp, same_mpp
from seal_extract.slides.slide import Slide, absolute, open_slide

SEVERAL_FILES = (".mrxs", ".vms", ".vmu", ".dcm")


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
        url: of a slide that is no file; only a copy of it can be read.
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
        if self.copy is not None:
            ours.args = (str(ours).replace(str(self.copy), self.source),)
        return ours


def refuse_uncopied(entry: SlideEntry) -> None:
    """Refuse a slide at a URL that has no copy.

    Raises:
        UsageError: the slide is at a URL.
    """
    if entry.url is not None and entry.copy is None:
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
    claims = {"--override-mpp": override_mpp, "table": entry.mpp, "file": None, "--slide-mpp": slide_mpp}
    given = [(source, mpp) for source, mpp in claims.items() if mpp is not None]
    for source, mpp in given:
        check_mpp(mpp, source, entry.file)
    try:
        slide = open_slide(entry.file, origin=entry.path)
    except ResolutionError:  # the file does not know it
        if not given:
            raise
        slide = open_slide(entry.file, mpp=given[0][1])
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
