"""Which files an encoder and its adapter lie in: beside the user, in a folder of ours, or on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from seal_extract.encoders import folder
from seal_extract.encoders.bundled import bundled
from seal_extract.encoders.found import FoundFile
from seal_extract.encoders.registry import ALIASES, ROWS, EncoderSpec, Published, find_spec
from seal_extract.encoders.settings import with_settings
from seal_extract.errors import CheckpointError, HubError, MissingOnHubError, NetworkError, UsageError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


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
    if is_name(name_or_path) and str(name_or_path) in bundled():
        name_or_path = bundled()[str(name_or_path)]
    if is_name(name_or_path) or is_timm(name_or_path):
        spec = named_spec(str(name_or_path))
        return with_settings(spec, _official_file(spec, checkpoint, revision, offline), offline)
    if checkpoint is not None:
        raise UsageError(
            f"checkpoint= goes with the name of an encoder, not with {name_or_path}; leave it out"
        )
    return _own_file(name_or_path, revision, offline)


def named_spec(name: str) -> EncoderSpec:
    """The row of a name of `list_encoders`, or of ``timm:NAME``.

    Raises:
        UsageError: no such name.
    """
    if not is_timm(name):
        return find_spec(name)
    from seal_extract.encoders.custom import timm_spec  # imports torch and timm

    return timm_spec(name)


def is_timm(asked: str | os.PathLike[str]) -> bool:
    """A model of timm."""
    return isinstance(asked, str) and asked.startswith("timm:")


def is_name(asked: str | os.PathLike[str]) -> bool:
    """A name of an encoder, or what was meant to be one, and not a path."""
    if not isinstance(asked, str) or is_timm(asked):
        return False
    return asked in ROWS or asked in ALIASES or (Path(asked).name == asked and not Path(asked).exists())


def _official_file(
    spec: EncoderSpec, checkpoint: str | os.PathLike[str] | None, revision: str | None, offline: bool
) -> FoundFile:
    if checkpoint is None:
        if not spec.source:
            raise UsageError(f"nobody says where the weights of {spec.name} are; give them as checkpoint=")
        return fetch_published(spec, layout_of(spec).files, revision, offline)
    if revision is not None:
        raise UsageError("revision= names a revision on the Hub, checkpoint= a file here; leave one out")
    path = Path(checkpoint).expanduser()
    file = _local(_in_folder(path, spec) if path.is_dir() else path)
    return replace(file, pins=tuple(layout_of(spec).sha256.values()))


def _in_folder(path: Path, spec: EncoderSpec) -> Path:
    """The weight file in a folder, under any name that the authors gave it."""
    names = layout_of(spec).files
    for name in names:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path} is a folder without a weight file of {spec.name}; allowed: a file, or a folder with one of "
        + ", ".join(names)
    )


def _local(path: Path) -> FoundFile:
    return FoundFile(path, str(path.absolute().parent))


def fetch_published(
    spec: EncoderSpec, names: Sequence[str], revision: str | None, offline: bool
) -> FoundFile:
    """A file of a row's repository, at the commit that the row is pinned to unless a revision is asked for.

    Without a network a copy in the cache that is of another commit will do, if it has the pinned content.

    Raises:
        HubError: the Hub does not give the file.
    """
    layout = layout_of(spec)
    try:
        file = _fetch(spec.source, names, revision or layout.commit, offline)
    except NetworkError as exc:
        if revision is not None or layout.commit is None:
            raise
        try:
            file = _fetch(spec.source, names, None, True)
        except HubError:
            raise exc from exc.__cause__
    except MissingOnHubError as exc:
        if revision is not None or str(layout.commit) not in str(exc):
            raise
        raise MissingOnHubError(f"{exc}, or type --revision main") from exc
    pin = layout.sha256.get(file.path.name)
    return replace(file, pins=(pin,) if pin else (), held=revision is None)


def locate_base(
    base: EncoderSpec, beside: Path, *, revision: str | None = None, offline: bool = False
) -> FoundFile:
    """The base of an adapter-only checkpoint: beside it, or from the Hub."""
    names = layout_of(base).files
    for name in names:
        for candidate in (beside.parent / base.name / name, beside.parent / name):
            if candidate.is_file():
                return replace(_local(candidate), pins=tuple(layout_of(base).sha256.values()))
    try:
        return fetch_published(base, names, revision, offline)
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
    if is_repository(name_or_path):
        return _own_repository(name, revision, offline)
    raise CheckpointError(f"there is no folder {name}; give one with {folder.CONFIG} and {folder.WEIGHTS}")


def _own_repository(repo_id: str, revision: str | None, offline: bool) -> tuple[EncoderSpec, FoundFile]:
    names = [row.name for row in ROWS.values() if row.source.lower() == repo_id.lower()]
    if names:
        raise UsageError(
            f"{repo_id} holds its authors' files, which are loaded by name; type {' or '.join(names)}"
        )
    try:
        config = _fetch(repo_id, [folder.CONFIG], revision, offline)
    except HubError as exc:
        raise type(exc)(f"there is no folder {repo_id} here, and as a Hub repository: {exc}") from exc
    return folder.read_config(config.path), _fetch(repo_id, [folder.WEIGHTS], config.revision, offline)


def layout_of(spec: EncoderSpec) -> Published:
    """How the authors lay out their file; as in our own folders where the row does not say."""
    return spec.published or Published(files=(folder.WEIGHTS,))


def locate_adapter(adapter: str | os.PathLike[str], offline: bool = False) -> tuple[FoundFile, FoundFile]:
    """Weights and config of an adapter: of a folder, or of a Hub repository at one and the same commit.

    Args:
        adapter: the folder; or ``owner/repo``, or ``owner/repo/folder`` where the repository holds several.
        offline: take files from the Hub's cache only.

    Raises:
        CheckpointError: there is no such folder, or it holds no adapter.
        HubError: the Hub does not give the files.
    """
    path, name = Path(adapter).expanduser(), str(adapter)
    if path.is_dir():
        weights = [path / f for f in ADAPTER_WEIGHTS if (path / f).is_file()]
        if not weights or not (path / ADAPTER_CONFIG).is_file():
            inside = sorted(p.parent.name for p in path.glob(f"*/{ADAPTER_CONFIG}"))
            some = f"; it holds {', '.join(inside[:5])}: type {path / inside[0]}" if inside else ""
            raise CheckpointError(f"{path} holds no adapter itself{some}; {_ADAPTER_ALLOWED}")
        return _local(weights[0]), _local(path / ADAPTER_CONFIG)
    match = None if path.exists() else _IN_REPOSITORY.fullmatch(name)
    if match is None:
        what = "is a file, no folder" if path.exists() else "does not exist"
        raise CheckpointError(f"the adapter {name} {what}; {_ADAPTER_ALLOWED}")
    below = f"{match['below']}/" if match["below"] else ""
    try:
        config = _fetch(match["repo"], [below + ADAPTER_CONFIG], None, offline)
    except MissingOnHubError as exc:
        hint = "" if below else f"; an adapter in a folder of it is typed {name}/FOLDER"
        raise MissingOnHubError(f"{exc}{hint}") from exc
    return _fetch(match["repo"], [below + file for file in ADAPTER_WEIGHTS], config.revision, offline), config


_ADAPTER_ALLOWED = f"allowed: a folder of PEFT with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS[0]}"
_IN_REPOSITORY = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<below>\w[\w.-]*(?:/\w[\w.-]*)*))?/?")


def adapted(spec: EncoderSpec, adapter: str | os.PathLike[str]) -> EncoderSpec:
    """The row once an adapter is merged: its results must not pass for those of the base."""
    path = Path(adapter).expanduser()
    below = _IN_REPOSITORY.fullmatch(str(adapter))
    if below and below["below"] and not path.exists():  # seed0 of one repository is not that of another
        path = Path("-".join(str(adapter).strip("/").split("/")[1:]))
    word = re.sub(r"[^\w.-]+", "-", path.absolute().name).strip("-.")
    return replace(spec, name=f"{spec.name}+{word or 'adapter'}")


def is_repository(asked: str | os.PathLike[str]) -> bool:
    """A text of the form ``owner/name``."""
    return isinstance(asked, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", asked) is not None


def _fetch(repo_id: str, names: Sequence[str], revision: str | None, offline: bool) -> FoundFile:
    from seal_extract.encoders.hub import fetch  # its imports are slow, and encoders on this disk need none

    return fetch(repo_id, names, revision, offline)
