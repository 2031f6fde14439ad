"""This package's own format: a folder, or Hub repository, of config.json and model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from seal_extract.encoders.registry import Architecture, EncoderSpec, InputRule
from seal_extract.errors import CheckpointError, UsageError
from seal_extract.publish import publish, writing

if TYPE_CHECKING:
    from torch import nn

FORMAT, VERSION = "seal_extract", 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write(path: Path, spec: EncoderSpec, tower: nn.Module, origin: Sequence[Mapping[str, Any]]) -> None:
    """Write both files, the weights first: a folder with a config is complete.

    Args:
        path: the folder.
        spec: the row; how the authors lay out their file is left out.
        tower: filled.
        origin: the weight files it was made from; folders of this machine are left out.

    Raises:
        OutputError: it cannot be written.
    """
    from safetensors.torch import save_file

    tensors = {key: value.detach().cpu().contiguous() for key, value in tower.state_dict().items()}
    with publish(path / WEIGHTS) as part, writing(path / WEIGHTS):
        try:
            save_file(tensors, part, metadata={"format": "pt"})
        except SafetensorError as exc:  # how it reports a full disk
            raise OSError(str(exc)) from exc
    text = json.dumps(to_config(spec, origin), indent=2, ensure_ascii=False)
    with publish(path / CONFIG) as part, writing(path / CONFIG):
        part.write_text(text + "\n", encoding="utf-8")


def to_config(spec: EncoderSpec, origin: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """All of ``spec`` that a rebuild needs, as JSON."""
    fields = {key: value for key, value in asdict(spec).items() if key != "published"}
    made_from = [
        {"file": o["file"], "sha256": o["sha256"]}
        | ({"source": o["source"], "revision": o["revision"]} if o["revision"] else {})
        for o in origin
    ]
    return {"format": FORMAT, "format_version": VERSION, **fields, "made_from": made_from}


def read_config(path: Path) -> EncoderSpec:
    """Read a config.json.

    Raises:
        CheckpointError: missing, not JSON, of another tool or version, or with a field that does not fit.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise CheckpointError(f"{path.parent} has no {CONFIG}; {_ALLOWED}") from exc
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path} cannot be read as JSON: {exc}; {_ALLOWED}") from exc
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{path} is a config of another tool; {_ALLOWED}")
    if config.get("format_version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {config.get('format_version')}, this package reads {VERSION}; "
            "type: pip install -U seal-extract"
        )
    try:
        return from_config(config)
    except (KeyError, TypeError, ValueError, UsageError) as exc:
        missing = f"{exc} is missing" if isinstance(exc, KeyError) else exc
        raise CheckpointError(f"{path} does not describe an encoder: {missing}; {_ALLOWED}") from exc


_ALLOWED = f"allowed: a folder or repository with {CONFIG} and {WEIGHTS}, as save_pretrained writes them"


def from_config(config: Mapping[str, Any]) -> EncoderSpec:
    """The row that `to_config` was given, without the layout of the authors' file."""
    architecture = Architecture(_text(config["architecture"], "timm"), dict(config["architecture"]["kwargs"]))
    rule = config["input"]
    resize_px = rule["resize_px"]
    return EncoderSpec(
        name=_name(config),
        dim=int(config["dim"]),
        patch_px=int(config["patch_px"]),
        mpp=float(config["mpp"]),
        mean=tuple(float(v) for v in config["mean"]),
        std=tuple(float(v) for v in config["std"]),
        precision=_text(config, "precision"),
        licence=_text(config, "licence"),
        source=_text(config, "source"),
        architecture=architecture,
        pooling=_text(config, "pooling"),
        input=InputRule(int(rule["multiple_of"]), resize_px and int(resize_px), _text(rule, "filter")),
        paper=_text(config, "paper"),
    )


def _text(values: Mapping[str, Any], key: str) -> str:
    if not isinstance(values[key], str):
        raise TypeError(f"{key} is {values[key]!r}, not a text")
    return str(values[key])


def _name(config: Mapping[str, Any]) -> str:
    """The name becomes part of file names in results."""
    name = _text(config, "name")
    if not name or name.startswith(".") or any(c in name for c in '/\\:*?"<>|\n\t '):
        raise ValueError(f"name is {name!r}, not a plain word")
    return name
