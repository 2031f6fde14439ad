"""Which files an encoder and its adapter are loaded from: on this disk, in a folder of ours, or on the Hub.

Two kinds of settings files beside the weights are read: the ``config.yaml`` of SEAL's training code
(``encoder``, ``out_dim``, and ``r`` and ``lora_alpha`` under ``lora``) beside a SEAL file on this disk, and
the ``config.json`` of timm beside the weights of a base.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from seal_extract.encoders import folder
from seal_extract.encoders.files import FoundFile
from seal_extract.encoders.registry import ALIASES, ROWS, bundled, find_spec
from seal_extract.encoders.slide_encoders import SlideEncoder
from seal_extract.encoders.spec import EncoderSpec, InputRule, Lora
from seal_extract.errors import CheckpointError, HubError, MissingOnHubError, NetworkError, UsageError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_ADAPTER_ALLOWED = f"allowed: a folder of PEFT with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS[0]}"
_IN_REPOSITORY = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<below>\w[\w.-]*(?:/\w[\w.-]*)*))?/?")
MAX_YAML_BYTES = 2**16

AnyPath = str | os.PathLike[str]


# --- encoders -----------------------------------------------------------------------------------------------


def locate(
    name_or_path: AnyPath,
    checkpoint: AnyPath | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> tuple[EncoderSpec, FoundFile]:
    """The row and the main weight file for the arguments of `load_encoder`, downloaded if needed.

    Raises:
        UsageError: an unknown name, or arguments that contradict each other.
        CheckpointError: a folder without an encoder, or a settings file that contradicts the row.
        HubError: the Hub does not deliver the file.
    """
    if is_name(name_or_path) and str(name_or_path) in bundled():
        name_or_path = bundled()[str(name_or_path)]
    if is_name(name_or_path) or is_timm(name_or_path):
        spec = named_spec(str(name_or_path))
        return _with_settings(spec, _official_file(spec, checkpoint, revision, offline), offline)
    if checkpoint is not None:
        raise UsageError(
            f"checkpoint= goes with the name of an encoder, not with {name_or_path}; leave it out"
        )
    return _own_file(name_or_path, revision, offline)


def named_spec(name: str) -> EncoderSpec:
    """The row of a name of `list_encoders`, or of ``timm:NAME``.

    Raises:
        UsageError: there is no such name.
    """
    if not is_timm(name):
        return find_spec(name)
    from seal_extract.encoders.tower import timm_spec  # imports torch and timm

    return timm_spec(name)


def is_timm(asked: AnyPath) -> bool:
    """Whether this is ``timm:NAME``."""
    return isinstance(asked, str) and asked.startswith("timm:")


def is_name(asked: AnyPath) -> bool:
    """Whether this is, or was meant as, the name of an encoder and not a path."""
    if not isinstance(asked, str) or is_timm(asked):
        return False
    return asked in ROWS or asked in ALIASES or (Path(asked).name == asked and not Path(asked).exists())


def is_repository(asked: AnyPath) -> bool:
    """Whether this has the form ``owner/name``."""
    return isinstance(asked, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", asked) is not None


def _official_file(
    spec: EncoderSpec, checkpoint: AnyPath | None, revision: str | None, offline: bool
) -> FoundFile:
    names = spec.layout.files
    if checkpoint is None:
        if not spec.source:
            raise UsageError(f"nobody says where the weights of {spec.name} are; give them as checkpoint=")
        if not spec.on_hub:
            raise UsageError(
                f"the weights of {spec.name} are not on the Hub; fetch {names[0]} from {spec.page} and give "
                "it as checkpoint="
            )
        return fetch_published(spec, names, revision, offline)
    if revision is not None:
        raise UsageError("revision= names a revision on the Hub, checkpoint= a file here; leave one out")
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        inside = [path / name for name in names if (path / name).is_file()]
        if not inside:
            raise CheckpointError(
                f"{path} is a folder without a weight file of {spec.name}; allowed: a file, or a folder with "
                f"one of {', '.join(names)}"
            )
        path = inside[0]
    return local_file(path, spec)


def local_file(path: Path, row: EncoderSpec | SlideEncoder | None = None) -> FoundFile:
    """A weight file on this disk; with the row that it is to be of, the hashes that the row is pinned to."""
    pins = () if row is None else tuple(row.layout.sha256.values())
    return FoundFile(path, str(path.absolute().parent), pins=pins)


def fetch_published(
    spec: EncoderSpec | SlideEncoder, names: Sequence[str], revision: str | None, offline: bool
) -> FoundFile:
    """A file of a row's repository, at the commit that the row is pinned to unless a revision is asked for.

    Without a network, a cached copy of another commit is accepted if it has the pinned content.

    Raises:
        HubError: the Hub does not deliver the file.
    """
    layout = spec.layout
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
    """The base for a checkpoint that holds adapters only: beside it, or from the Hub.

    Raises:
        HubError: it is not beside it, and the Hub does not deliver it.
    """
    names = base.layout.files
    for name in names:
        for candidate in (beside.parent / base.name / name, beside.parent / name):
            if candidate.is_file():
                return local_file(candidate, base)
    try:
        return fetch_published(base, names, revision, offline)
    except HubError as exc:
        raise type(exc)(
            f"{beside.name} holds adapters only and needs its base {base.name}: {exc}; "
            f"or lay {names[0]} of {base.source} beside it"
        ) from exc


def _own_file(name_or_path: AnyPath, revision: str | None, offline: bool) -> tuple[EncoderSpec, FoundFile]:
    """Config and weights of a folder, or of one commit of a repository."""
    path, name = Path(name_or_path).expanduser(), str(name_or_path)
    if path.is_dir():
        if revision is not None:
            raise UsageError(
                f"revision= names a revision on the Hub, and {name} is a folder here; leave it out"
            )
        return folder.read_config(path / folder.CONFIG), local_file(path / folder.WEIGHTS)
    if path.is_file():
        raise UsageError(f"{name} is a file; give the encoder's name and this file as checkpoint=")
    if not is_repository(name_or_path):
        raise CheckpointError(
            f"there is no folder {name}; give one with {folder.CONFIG} and {folder.WEIGHTS}"
        )
    names = [row.name for row in ROWS.values() if row.source.lower() == name.lower()]
    if names:
        raise UsageError(
            f"{name} holds its authors' files, which are loaded by name; type {' or '.join(names)}"
        )
    try:
        config = _fetch(name, [folder.CONFIG], revision, offline)
    except HubError as exc:
        raise type(exc)(f"there is no folder {name} here, and as a Hub repository: {exc}") from exc
    return folder.read_config(config.path), _fetch(name, [folder.WEIGHTS], config.revision, offline)


def _fetch(repo_id: str, names: Sequence[str], revision: str | None, offline: bool) -> FoundFile:
    from seal_extract.encoders.hub import fetch  # slow to import, and files on this disk do not need it

    return fetch(repo_id, names, revision, offline)


# --- settings beside the weights ----------------------------------------------------------------------------


def _with_settings(spec: EncoderSpec, file: FoundFile, offline: bool) -> tuple[EncoderSpec, FoundFile]:
    """The row as a settings file states it; the file's ``settings`` is set where that changes the merge."""
    layout = spec.published
    if layout is None or layout.settings is None:
        return spec, file
    if layout.lora is None:
        from seal_extract.encoders.hub import fetch_beside

        config = fetch_beside(file, layout.settings, offline)
        return (spec if config is None else replace(spec, input=_stated_input(config, spec))), file
    if file.revision is not None:  # the Hub's repository of several encoders has no such file
        return spec, file
    base = find_spec(str(layout.base))
    if base.published is not None and base.published.settings is not None:
        config = file.path.parent / base.name / base.published.settings
        spec = replace(spec, input=_stated_input(config, base)) if config.is_file() else spec
    path = file.path.with_name(layout.settings)
    if not path.is_file():
        return spec, file
    lora = _stated_lora(path, spec, layout.lora)
    file = file if lora.alpha == layout.lora.alpha else replace(file, settings=path)
    return replace(spec, published=replace(layout, lora=lora)), file


@dataclass(frozen=True)
class _SealLora:
    r: Annotated[int, Meta(gt=0)] | None = None
    lora_alpha: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    use_rslora: bool = False


@dataclass(frozen=True)
class _SealConfig:
    encoder: str | None = None
    out_dim: int | None = None
    lora: _SealLora | None = None


def _stated_lora(path: Path, spec: EncoderSpec, default: Lora) -> Lora:
    """The adapters' r and alpha in a config.yaml of SEAL's training code, which must be of the same base."""
    import yaml

    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ValueError(f"it is longer than {MAX_YAML_BYTES:,} bytes")
        content = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as exc:
        raise CheckpointError(f"{path} cannot be read as YAML: {' '.join(str(exc).split())[:160]}") from exc
    if not isinstance(content, dict):
        return default
    stated = folder.as_record(
        content, _SealConfig, path, "a SEAL encoder", "allowed: the config of its training"
    )
    base, lora = str(spec.layout.base), stated.lora or _SealLora()
    if ALIASES.get(str(stated.encoder), stated.encoder) not in (None, base):
        raise CheckpointError(
            f"{path} states encoder {stated.encoder!s:.80}, and {spec.name} is built on {base}; type "
            f"seal-{stated.encoder!s:.80}, or take that file away"
        )
    if stated.out_dim not in (None, spec.dim):
        raise CheckpointError(
            f"{path} states out_dim {stated.out_dim}, and {spec.name} gives {spec.dim} numbers"
        )
    if lora.use_rslora:
        raise CheckpointError(f"{path} states use_rslora true, which is not merged; allowed: false")
    return Lora(lora.lora_alpha or default.alpha, lora.r)


@dataclass(frozen=True)
class _TimmInput:
    interpolation: Literal["bilinear", "bicubic"] | None = None
    crop_pct: Annotated[float, Meta(gt=0.05, le=1)] = 1.0


def _stated_input(path: Path, spec: EncoderSpec) -> InputRule:
    """The input of a row, with filter and crop as the config.json of a timm model states them."""
    allowed = "allowed: a config.json of timm"
    config, side = folder.read_json(path, allowed), spec.input.side_px
    if not isinstance(config, dict) or side is None or config.get("architecture") != spec.architecture.timm:
        return spec.input  # of another tool, or another model
    stated = folder.as_record(config.get("pretrained_cfg", {}), _TimmInput, path, "an input", allowed)
    resize_px = math.floor(side / stated.crop_pct)  # as timm rounds it
    return replace(
        spec.input,
        resize_px=resize_px,
        filter=stated.interpolation or spec.input.filter,
        crop_px=None if resize_px == side else side,
    )


# --- adapters of PEFT ---------------------------------------------------------------------------------------


def locate_adapter(adapter: AnyPath, offline: bool = False) -> tuple[FoundFile, FoundFile]:
    """Weights and config of an adapter: of a folder, or of one commit of a Hub repository.

    Args:
        adapter: a folder; or ``owner/repo``, or ``owner/repo/folder`` if the repository holds several.
        offline: take files from the Hub's cache only.

    Raises:
        CheckpointError: there is no such folder, or it holds no adapter.
        HubError: the Hub does not deliver the files.
    """
    path, name = Path(adapter).expanduser(), str(adapter)
    if path.is_dir():
        weights = [path / f for f in ADAPTER_WEIGHTS if (path / f).is_file()]
        if not weights or not (path / ADAPTER_CONFIG).is_file():
            inside = sorted(p.parent.name for p in path.glob(f"*/{ADAPTER_CONFIG}"))
            some = f"; it holds {', '.join(inside[:5])}: type {path / inside[0]}" if inside else ""
            raise CheckpointError(f"{path} holds no adapter itself{some}; {_ADAPTER_ALLOWED}")
        return local_file(weights[0]), local_file(path / ADAPTER_CONFIG)
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


def adapted(spec: EncoderSpec, adapter: AnyPath) -> EncoderSpec:
    """The row under another name once an adapter is merged, so that results are not taken for the base's."""
    path = Path(adapter).expanduser()
    match = _IN_REPOSITORY.fullmatch(str(adapter))
    if match and match["below"] and not path.exists():  # many repositories have a folder seed0
        path = Path("-".join(str(adapter).strip("/").split("/")[1:]))
    word = re.sub(r"[^\w.-]+", "-", path.absolute().name).strip("-.")
    return replace(spec, name=f"{spec.name}+{word or 'adapter'}")
