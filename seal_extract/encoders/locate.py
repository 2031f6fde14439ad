"""Which file the weights of an encoder lie in: beside the user, in a folder of ours, or on the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from seal_extract.encoders import folder
from seal_extract.encoders.hub import FoundFile, fetch
from seal_extract.encoders.registry import ROWS, EncoderSpec, Published, find_spec
from seal_extract.errors import CheckpointError, HubError, UsageError


def locate(
    name_or_path: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> tuple[EncoderSpec, FoundFile]:
    """The row and the main weight file of what `load_encoder` was asked for, fetched if need be.

    Raises:
        UsageError: an unknown name, or arguments that contradict each other.
        CheckpointError: a folder that holds no encoder.
        HubError: the Hub does not give the file.
    """
    if is_name(name_or_path):
        spec = find_spec(str(name_or_path))
        return spec, _official_file(spec, checkpoint, revision, offline)
    if checkpoint is not None:
        raise UsageError(
            f"checkpoint= goes with the name of an encoder, not with {name_or_path}; leave it out"
        )
    return _own_file(name_or_path, revision, offline)


def is_name(asked: str | os.PathLike[str]) -> bool:
    """A name of an encoder, or what was meant to be one, and not a path."""
    if not isinstance(asked, str):
        return False
    return asked in ROWS or (Path(asked).name == asked and not Path(asked).exists())


def _official_file(
    spec: EncoderSpec, checkpoint: str | os.PathLike[str] | None, revision: str | None, offline: bool
) -> FoundFile:
    if checkpoint is None:
        return fetch(spec.source, layout_of(spec).files, revision, offline)
    if revision is not None:
        raise UsageError("revision= names a revision on the Hub, checkpoint= a file here; leave one out")
    return _local(Path(checkpoint).expanduser())


def _local(path: Path) -> FoundFile:
    return FoundFile(path, str(path.absolute().parent))


def locate_base(base: EncoderSpec, beside: Path, offline: bool) -> FoundFile:
    """The base of an adapter-only checkpoint: beside it, or from the Hub."""
    names = layout_of(base).files
    for name in names:
        for candidate in (beside.parent / base.name / name, beside.parent / name):
            if candidate.is_file():
                return _local(candidate)
    try:
        return fetch(base.source, names, None, offline)
    except HubError as exc:
        raise type(exc)(
            f"{beside.name} holds adapters only and needs its base {base.name}: {exc}; "
            f"or lay {names[0]} of {base.source} beside it"
        ) from exc


def _own_file(
    name_or_path: str | os.PathLike[str], revision: str | None, offline: bool
) -> tuple[EncoderSpec, FoundFile]:
    """Config and weights of a folder, or of a repository at one and the same commit."""
    path, name = Path(name_or_path).expanduser(), str(name_or_path)
    if path.is_dir():
        if revision is not None:
            raise UsageError(
                f"revision= names a revision on the Hub, and {name} is a folder here; leave it out"
            )
        return folder.read_config(path / folder.CONFIG), _local(path / folder.WEIGHTS)
    if path.is_file():
        raise UsageError(f"{name} is a file; give the encoder's name and this file as checkpoint=")
    if isinstance(name_or_path, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return _own_repository(name, revision, offline)
    raise CheckpointError(f"there is no folder {name}; give one with {folder.CONFIG} and {folder.WEIGHTS}")


def _own_repository(repo_id: str, revision: str | None, offline: bool) -> tuple[EncoderSpec, FoundFile]:
    names = [row.name for row in ROWS.values() if row.source.lower() == repo_id.lower()]
    if names:
        raise UsageError(
            f"{repo_id} holds its authors' files, which are loaded by name; type {' or '.join(names)}"
        )
    try:
        config = fetch(repo_id, [folder.CONFIG], revision, offline)
    except HubError as exc:
        raise type(exc)(f"there is no folder {repo_id} here, and as a Hub repository: {exc}") from exc
    return folder.read_config(config.path), fetch(repo_id, [folder.WEIGHTS], config.revision, offline)


def layout_of(spec: EncoderSpec) -> Published:
    """How the authors lay out their file; only for rows that have one."""
    assert spec.published is not None, f"{spec.name} is in this package's own format"
    return spec.published
