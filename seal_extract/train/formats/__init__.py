"""Sections out of the files of others: one function for each kind, chosen by ``kind`` in a configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

from seal_extract.errors import UsageError
from seal_extract.train.formats.anndata import read_anndata
from seal_extract.train.formats.hest import read_hest
from seal_extract.train.formats.st_tables import read_st_tables
from seal_extract.train.formats.visium import MATRIX, read_visium, read_visium_hd
from seal_extract.train.sections import Section

__all__ = [
    "READERS",
    "find_sections",
    "load_sections",
    "read_anndata",
    "read_hest",
    "read_st_tables",
    "read_visium",
    "read_visium_hd",
]

READERS: dict[str, Callable[..., Section]] = {
    "st-tables": read_st_tables,
    "anndata": read_anndata,
    "hest": read_hest,
    "visium": read_visium,
    "visium-hd": read_visium_hd,
}


def load_sections(sources: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Sections of a configuration: each source has ``kind``, ``folder``, ``names``, options of its reader.

    Raises:
        UsageError: as `checked_sources`, the same spots twice; and what the readers raise.
    """
    sections = [
        READERS[kind](folder, name, **options) for kind, folder, name, options in checked_sources(sources)
    ]
    for one, other in combinations(sections, 2):
        if one.slide == other.slide and np.array_equal(one.xy_l0, other.xy_l0):
            raise UsageError(
                f"{one.name} and {other.name} are the same spots of {one.slide.name}; "
                "give each its own folder"
            )
    return sections


def checked_sources(sources: Sequence[Mapping[str, Any]]) -> list[tuple[str, Path, str, dict[str, Any]]]:
    """Kind, folder, name and options of each section that a configuration names, before any is read.

    Raises:
        UsageError: an unknown kind or option, a folder that does not exist, a section twice, or none.
    """
    found: list[tuple[str, Path, str, dict[str, Any]]] = []
    for source in sources:
        if not isinstance(source, Mapping):
            raise UsageError(f"sections are {source!r}; each has to be a table with kind, folder and names")
        options = dict(source)
        kind, names = options.pop("kind", None), options.pop("names", None)
        folder = options.pop("folder", None)
        if not isinstance(kind, str) or kind not in READERS:
            raise UsageError(f"kind of sections is {kind!r}; allowed: {', '.join(READERS)}")
        if (
            not isinstance(folder, str | Path)
            or not isinstance(names, list)
            or not all(isinstance(name, str) for name in names)
        ):
            raise UsageError(f'sections of kind {kind} need folder = "..." and names = ["..."]')
        _check_options(kind, options)
        place = Path(folder).expanduser()
        if not place.is_dir():
            raise UsageError(f"there is no folder {folder} for sections of kind {kind}; give one that exists")
        found += [(kind, place, name, options) for name in names]
    names_all = [name for _, _, name, _ in found]
    if len(set(names_all)) < len(names_all):
        raise UsageError(f"sections {', '.join(names_all)}: one stands twice; name each once")
    if not found:
        raise UsageError("no sections are named")
    return found


def find_sections(
    folder: Path, names: Sequence[str] | None = None, *, slide: str | None = None, mpp: float | None = None
) -> list[Section]:
    """Sections of a folder whose kind is told by what lies in it.

    Args:
        folder: as HEST's (``st/NAME.h5ad``), Space Ranger's (or several by their names), her2st's
            (``images``, ``counts``, ``spots``), or with NAME.h5ad and the slide beside it.
        names: of the sections; all by default.
        slide: the full-resolution image that Space Ranger was given.
        mpp: µm/px of the slides, where nothing states it.

    Raises:
        UsageError: it is no such folder; and what the readers raise.
    """
    for kind, found in _kinds(folder):
        if found:
            options = {"slide": slide and str(Path(slide).absolute()), "mpp": mpp}
            given = {option: value for option, value in options.items() if value is not None}
            return load_sections([{"kind": kind, "folder": folder, "names": list(names or found), **given}])
    raise UsageError(
        f"{folder} holds no section; allowed: the config of a training, NAME.toml, or a folder with HEST's "
        f"st/NAME.h5ad and wsis/NAME.tif or patches/NAME.h5, Space Ranger's {MATRIX} and spatial/, NAME.h5ad "
        f"and NAME.tif, or images/, counts/ and spots/"
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


def _check_options(kind: str, options: Mapping[str, Any]) -> None:
    """Hold options to the keywords of the reader, and to their types."""
    reader = READERS[kind]
    allowed = [n for n, p in inspect.signature(reader).parameters.items() if p.kind is p.KEYWORD_ONLY]
    hints = get_type_hints(reader)
    for option, value in options.items():
        if option not in allowed:
            raise UsageError(
                f"sections of kind {kind} have no option {option!r}; allowed: {', '.join(allowed)}"
            )
        types = get_args(hints[option]) or (hints[option],)
        if float in types:
            types = (*types, int)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join(t.__name__ for t in types if t is not type(None))
            raise UsageError(f"sections of kind {kind}: {option} is {value!r}; it has to be {wanted}")
