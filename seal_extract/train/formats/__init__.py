"""Tissue sections from the files of other tools, in the formats that ``kind`` names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from seal_extract.errors import UsageError
from seal_extract.train.config import convert, read_config
from seal_extract.train.formats.anndata import AnnData, Hest
from seal_extract.train.formats.arrays import MATRIX, StTables, Visium, VisiumHD
from seal_extract.train.formats.source import Source
from seal_extract.train.sections import Section

KINDS: dict[str, type[Source]] = {
    "st-tables": StTables,
    "anndata": AnnData,
    "hest": Hest,
    "visium": Visium,
    "visium-hd": VisiumHD,
}


def load_sections(sources: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Read all sections of a configuration.

    Args:
        sources: tables with ``kind``, a key of `KINDS`, and the options of its class.

    Raises:
        UsageError: as `read_sources` and `Source.read`; or two names for the same spots.
    """
    sections = [source.read(name) for source in read_sources(sources) for name in source.names]
    for one, other in combinations(sections, 2):
        if one.slide == other.slide and np.array_equal(one.xy_l0, other.xy_l0):
            raise UsageError(
                f"{one.name} and {other.name} are the same spots of {one.slide.name}; "
                "give each its own folder"
            )
    return sections


def names_of(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of all sections of a configuration, checked as by `read_sources`."""
    return [name for source in read_sources(sources) for name in source.names]


def read_sources(sources: Sequence[Mapping[str, Any]]) -> list[Source]:
    """Check the tables of a configuration before any section is read.

    Raises:
        UsageError: an unknown kind or option, a folder that does not exist, a section named twice, or none.
    """
    found = []
    for table in sources:
        options = dict(table)
        kind = options.pop("kind", None)
        if not isinstance(kind, str) or kind not in KINDS:
            raise UsageError(f"kind of sections is {kind!r}; allowed: {', '.join(KINDS)}")
        source = convert(options, KINDS[kind], f"sections of kind {kind}")
        if not os.path.isdir(source.path):  # False too for a name that no disk can hold
            raise UsageError(
                f"there is no folder {source.folder} for sections of kind {kind}; give one that exists"
            )
        found.append(source)
    names = [name for source in found for name in source.names]
    if len(set(names)) < len(names):
        raise UsageError(f"sections {', '.join(names)}: one is named twice; name each once")
    if not names:
        raise UsageError("no sections are named; give names = [...] in [[data.sections]]")
    return found


def sections_of(
    source: Path,
    names: Sequence[str] | None = None,
    *,
    slide: str | None = None,
    mpp: float | None = None,
    **columns: str | None,
) -> list[Section]:
    """The sections that the configuration of a training run names, or those of a folder, as `find_sections`.

    Raises:
        UsageError: options that only a folder takes; and the errors of the readers.
    """
    if source.suffix != ".toml":
        return find_sections(source, names, slide=slide, mpp=mpp, **columns)
    given = [column for column, value in columns.items() if value]
    if given:
        raise UsageError(f'with a configuration, type {given[0]} = "..." in its [[data.sections]]')
    if slide or mpp or names:
        raise UsageError("--slide, --slide-mpp and --names are for folders; the configuration has its own")
    return load_sections(read_config(source).data.sections)


def find_sections(
    folder: Path,
    names: Sequence[str] | None = None,
    *,
    slide: str | None = None,
    mpp: float | None = None,
    **columns: str | None,
) -> list[Section]:
    """Sections of a folder, whose kind is recognised by its files.

    Args:
        folder: HEST's (``st/NAME.h5ad``), Space Ranger's (or one that holds several of them), her2st's
            (``images``, ``counts``, ``spots``), or with NAME.h5ad and the slide beside it.
        names: of the sections; all by default.
        slide: the full-resolution image that Space Ranger was given.
        mpp: µm/px of the slides, where no file states it.
        columns: ``label_column`` and ``patient_column``, for AnnData.

    Raises:
        UsageError: it is no such folder; and what `Source.read` raises.
    """
    for kind, found in _kinds(folder):
        if found:
            options = {"slide": slide and str(Path(slide).absolute()), "mpp": mpp, **columns}
            given = {option: value for option, value in options.items() if value is not None}
            return load_sections(
                [{"kind": kind, "folder": str(folder), "names": list(names or found), **given}]
            )
    raise UsageError(
        f"{folder} holds no section; allowed: the configuration of a training, NAME.toml, or a folder with "
        f"HEST's st/NAME.h5ad and wsis/NAME.tif or patches/NAME.h5, Space Ranger's {MATRIX} and spatial/, "
        "NAME.h5ad and NAME.tif, or images/, counts/ and spots/"
    )


def _kinds(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Each kind with the names of its sections in the folder."""
    yield "hest", sorted(path.stem for path in (folder / "st").glob("*.h5ad"))
    for kind, file in (("visium", MATRIX), ("visium-hd", f"binned_outputs/square_008um/{MATRIX}")):
        own = any((outs / file).is_file() for outs in (folder, folder / "outs"))
        name = folder.resolve()
        below = {p for outs in ("", "outs/") for p in folder.glob(f"*/{outs}{file}")}
        several = {path.relative_to(folder).parts[0] for path in below} - {"outs"}
        yield kind, [(name.parent if name.name == "outs" else name).name] if own else sorted(several)
    images = sorted({path.stem for path in (folder / "images").glob("*.*")})
    yield "st-tables", [name for name in images if list((folder / "counts").glob(f"{name}.tsv*"))]
    yield "anndata", sorted(path.stem for path in folder.glob("*.h5ad"))
