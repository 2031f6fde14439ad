"""TOML tables as checked records; an error names the option, the value that came, and what is allowed."""

from __future__ import annotations

import re
import sys
from difflib import get_close_matches
from pathlib import Path
from reprlib import repr as short
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec.inspect import LiteralType, StructType, Type, UnionType, type_info

from seal_extract.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
WORDS = {"Expected": "it has to be", "object": "table", "array": "list", "null": "nothing"}
LARGEST = 1e9  # of a number in a configuration; infinity is none
Weight = Annotated[float, msgspec.Meta(ge=0, le=LARGEST)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=LARGEST)]
Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Whole = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**31)]


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of options; its types and bounds are checked when it is read from a file."""


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        UsageError: the file cannot be read, is not TOML, or holds a NUL character.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values: dict[str, Any] = tomllib.loads(text)
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}; give a TOML file") from exc
    except (ValueError, RecursionError) as exc:  # also of bytes that are no UTF-8, of numbers without end
        raise UsageError(f"{path} is not TOML: {exc}") from exc
    if re.search(r"\\u0000|\\U00000000", text):
        raise UsageError(f"{path} holds the character \\u0000; leave it out")
    return values


def convert(values: Any, kind: type[T], where: str) -> T:
    """Tables as a record.

    Args:
        values: as `read_toml` gives them.
        kind: the class of the record.
        where: the file or table, for messages.

    Raises:
        UsageError: an option is unknown, missing, of another type or out of its bounds.
    """
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as exc:
        own = isinstance(exc.__cause__, UsageError)  # a rule of the record itself
        message = exc.__cause__ if own else _explained(str(exc), values, type_info(kind))
        raise UsageError(f"{where}: {message}") from exc


def _explained(message: str, value: Any, kind: Type) -> str:
    """Msgspec's message with the value that came, and the names that are allowed there."""
    message, _, place = message.partition(" - at `$")
    place = place.strip(".`")
    for option, row in re.findall(r"([^.\[\]]+)|\[(\d+)\]", place):
        value = value[int(row)] if row else value[option]
        kind = _options(kind).get(option, kind)
    if "unknown field" in message:
        name, names = message.split("`")[1], list(_options(kind))
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        there = f" in {place}" if place else ""
        return f"there is no option {name!r}{there}; {hint}Allowed: {', '.join(names)}"
    if "missing required field" in message:
        return f"{place and place + '.'}{message.split('`')[1]} is missing"
    if isinstance(kind, LiteralType):
        return f"{place} is {short(value)}; allowed: {', '.join(map(str, kind.values))}"
    message = message.replace("`", "").replace(" | ", " or ")
    for word, plain in WORDS.items():
        message = message.replace(word, plain)
    return f"{place or 'the file'} is {short(value)}; {message}"


def _options(kind: Type) -> dict[str, Type]:
    """The options of a table; none of other types."""
    kinds = kind.types if isinstance(kind, UnionType) else (kind,)
    return {f.name: f.type for k in kinds if isinstance(k, StructType) for f in k.fields}
