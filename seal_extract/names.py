"""Names of slides: unique in a list, stable, and printed safely.

A file name is bytes. It may hold bytes that are no text (Python keeps them as lone surrogates), control
characters that move a terminal's cursor, or a formula for a spreadsheet. Files are named with it unchanged;
everything that is printed, logged or written to a table goes through `shown` or `cell`.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SEPARATOR = "__"  # between folder and name
_LOOKS_ESCAPED = re.compile(r"\\(?=x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")
_ESCAPED = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8}))")
EXPORTED_FROM = "exported_from"  # in the provenance of a copy in another layout
_ABSOLUTE = re.compile(r"(?<![\w.:/~<])/(?=[^\s/])(?:[^\s/:;,'\"()]+/)*")  # up to the last name of a path
_FORMULA = re.compile(r"'*[=+\-@]")  # to a spreadsheet, unless an apostrophe says that it is text


def shown(text: str) -> str:
    r"""Text on one line that can be printed: ``\xe9`` for a byte that is no UTF-8, ``\x1b`` for escape."""
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(char: str) -> str:
    if char.isprintable() or unicodedata.category(char) == "Zs":
        return char
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def cell(text: str) -> str:
    """`shown` for a table: text that a spreadsheet would compute gets an apostrophe in front."""
    text = shown(_LOOKS_ESCAPED.sub(r"\\x5c", text))
    return f"'{text}" if _FORMULA.match(text) else text


def from_cell(text: str) -> str:
    """The text from which `cell` made this."""

    def char(escaped: re.Match[str]) -> str:
        code = int(next(filter(None, escaped.groups())), 16)
        return chr(code + 0xDC00 if escaped[1] and code >= 0x80 else code)

    return _ESCAPED.sub(char, text[1:] if text[:1] == "'" and _FORMULA.match(text) else text)


def without_folders(text: str, *folders: str | Path) -> str:
    """Text without the folders of this machine: each absolute path in it is cut to its last name.

    Args:
        text: a message, for example.
        folders: folders that it may name; they and those above them are found even if they contain spaces.
    """
    for folder in folders:
        text = text.replace(f"{folder}/", "")
        for above in Path(folder).parents:
            if above.is_absolute() and above.name:
                text = text.replace(f"{above}/", "")
    return _ABSOLUTE.sub("", text)


def shareable(provenance: dict[str, Any]) -> dict[str, Any]:
    """The provenance of features without the folders of this machine; files keep their names.

    The request names no folder and stays unchanged, because it identifies finished files.
    """
    path = str(provenance["slide"].get("path", ""))
    folder = path.rpartition("/")[0]

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: one if key == "request" else named(one) for key, one in value.items()}
        if isinstance(value, list):
            return [named(one) for one in value]
        if isinstance(value, str) and (value == path or value.startswith("/")):
            return Path(value).name
        return without_folders(value, folder) if isinstance(value, str) else value

    return {key: one if key == "request" else named(one) for key, one in provenance.items()}


def is_export(provenance: dict[str, Any]) -> bool:
    """Whether features are a copy in another layout."""
    return EXPORTED_FROM in provenance


def origin_of(path: Path, provenance: dict[str, Any]) -> str:
    """Slide, grid and encoder as text, which a features file and its exports have in common."""
    slide = provenance.get("request", {}).get("slide")
    return json.dumps([path.stem, provenance["encoder"]["name"], provenance["grid"], slide], sort_keys=True)


def choose_names(
    paths: Sequence[Path], names: Sequence[str] | None = None, given: Mapping[Path, str] | None = None
) -> list[str]:
    """Stems; names with suffix where one folder has two of a stem; folders in front where that clashes.

    Args:
        paths: of the slides, resolved.
        names: their names in a longer list; they stay unless they clash with those given before.
        given: names given to slides before, by their paths. These slides keep them, and no other slide gets
            one; but a slide that has moved, so that its old path is gone, counts as the same.
    """
    given = given or {}
    owners = {name: path for path, name in given.items()}
    stems = Counter(path.with_suffix("") for path in {*paths, *given})
    tails = [path.name if stems[path.with_suffix("")] > 1 else path.stem for path in paths]
    # of a slide and its copy the first keeps the name
    kept = {given[path]: path for path in reversed(paths) if path in given}
    fixed = {path: name for name, path in kept.items()}
    names = [fixed.get(path, name) for path, name in zip(paths, names or tails, strict=True)]
    depth = 0
    while True:
        counts = Counter(names)
        clashing = [
            i
            for i, path in enumerate(paths)
            if path not in fixed and (counts[names[i]] > 1 or _is_taken(names[i], path, owners))
        ]
        if not clashing:
            return names
        for i in clashing:
            folders = [part for part in paths[i].parent.parts if part != paths[i].anchor]
            if depth > len(folders):  # a__b/c and a/b__c
                tails[i] = hashlib.sha256(str(paths[i]).encode(errors="surrogateescape")).hexdigest()[:8]
            names[i] = SEPARATOR.join([*folders[max(0, len(folders) - depth) :], tails[i]])
        depth += 1


def _is_taken(name: str, path: Path, owners: Mapping[str, Path]) -> bool:
    """Whether a name is another slide's; a file of equal name and size counts as a copy of the same."""
    owner = owners.get(name)
    if owner is None:
        return False
    try:
        return owner.name != path.name or owner.stat().st_size != path.stat().st_size
    except OSError:  # it has moved, or is at a URL
        return False


def written_twice(files: Iterable[tuple[Path, dict[str, Any]]]) -> set[Path]:
    """Files of a slide that has a newer file beside it under another name; a warning names them.

    Args:
        files: features files, each with its provenance.
    """
    newest: dict[tuple[Path, Path], Path] = {}
    older: set[Path] = set()
    for path, made in sorted(files, key=lambda file: (file[1].get("written", ""), file[0])):
        slide = Path(made["slide"].get("path", ""))
        if slide.name == str(slide):  # an export does not say where its slide lies
            continue
        if not path.stem.endswith((slide.stem, slide.name)):  # as `choose_names` gives none
            continue
        before = newest.get(key := (path.parent, slide))
        if before is not None:
            older.add(before)
            warnings.warn(f"{before} is left out: {path.name} beside it is of the same slide", stacklevel=3)
        newest[key] = path
    return older
