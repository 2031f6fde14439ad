"""What a file beside the weights states of them: ``config.yaml`` of SEAL, ``config.json`` of timm's models.

A ``config.yaml`` states encoder, out_dim, and r and alpha of LoRA: these four are looked for at any depth.
What else it says, such as which blocks are adapted, is told by the weight file itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from seal_extract.encoders.found import FoundFile
from seal_extract.encoders.registry import ALIASES, FILTERS, ROWS, EncoderSpec, InputRule, Lora, find_spec
from seal_extract.errors import CheckpointError

MAX_BYTES, MAX_LEAVES, MAX_DEPTH = 2**16, 10_000, 12  # YAML's aliases can make a short text endless
_ENCODER = ("encoder", "backbone", "encoder_name", "model_name")


def with_settings(spec: EncoderSpec, file: FoundFile, offline: bool = False) -> tuple[EncoderSpec, FoundFile]:
    """The row of a weight file, as far as a file beside it states it otherwise.

    A SEAL file's ``config.yaml`` is held to the row, and r and alpha in it count. A base's ``config.json``
    sets the filter and crop of its input; for a SEAL file on this disk it is also looked for in a folder of
    its base's name.

    Args:
        spec: the row.
        file: its main weight file.
        offline: look in the Hub's cache only.

    Returns:
        The row; and the file, whose ``settings`` is set where they change what is merged.

    Raises:
        CheckpointError: the statement cannot be read, or contradicts the row.
        HubError: the Hub does not say whether there is one.
    """
    layout = spec.published
    if layout is None or layout.settings is None:
        return spec, file
    from seal_extract.encoders.hub import fetch_beside

    path = fetch_beside(file, layout.settings, offline)
    if layout.lora is None:
        return (spec if path is None else replace(spec, input=stated_input(path, spec))), file
    base = find_spec(str(layout.base))
    if file.revision is None and base.published is not None and base.published.settings is not None:
        beside = file.path.parent / base.name / base.published.settings
        spec = replace(spec, input=stated_input(beside, base)) if beside.is_file() else spec
    lora = layout.lora if path is None else stated_lora(path, spec, on_hub=file.revision is not None)
    if path is None or lora == layout.lora:
        return spec, file
    merged_otherwise = lora.alpha != layout.lora.alpha
    file = replace(file, settings=path) if merged_otherwise else file
    return replace(spec, published=replace(layout, lora=lora)), file


def stated_lora(path: Path, spec: EncoderSpec, on_hub: bool = False) -> Lora:
    """The adapters of a SEAL row, with r and alpha as a ``config.yaml`` states them.

    Args:
        path: the file.
        spec: the row, which has adapters.
        on_hub: it lies in a repository of several encoders: of another one's statement nothing is taken.

    Raises:
        CheckpointError: it cannot be read, or states another encoder or dimension than the row.
    """
    assert spec.published is not None
    assert spec.published.lora is not None
    stated, lora = _Statement.read(path), spec.published.lora
    base = str(spec.published.base)
    encoders = {known for name in stated.encoders if (known := _row_called(name))}
    if encoders and base not in encoders:
        if on_hub:
            return lora
        other = min(encoders)
        raise CheckpointError(
            f"{path} states encoder {other}, and {spec.name} is built on {base}; type seal-{other}, or take "
            "that file away"
        )
    if stated.dims and spec.dim not in stated.dims:
        raise CheckpointError(
            f"{path} states out_dim {_listed(stated.dims)}, and {spec.name} gives {spec.dim} numbers"
        )
    rank, alpha = _one(path, "r", stated.ranks), _one(path, "alpha", stated.alphas)
    if rank is not None and rank != int(rank):
        raise CheckpointError(f"{path} states r {rank}; allowed: a whole number")
    return Lora(alpha or lora.alpha, None if rank is None else int(rank))


def _row_called(name: str) -> str | None:
    """The base that goes by this name, by its repository's, or by another spelling of either."""
    called = {alias: row for alias, row in ALIASES.items() if row in ROWS}
    called |= {row.source.rpartition("/")[2]: row.name for row in ROWS.values() if _is_base(row)}
    called |= {row.name: row.name for row in ROWS.values() if _is_base(row)}
    return {_plain(spelling): row for spelling, row in called.items()}.get(_plain(name))


def _is_base(row: EncoderSpec) -> bool:
    return row.published is not None and row.published.base is None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("seal")


def _one(path: Path, what: str, values: tuple[float, ...]) -> float | None:
    distinct = sorted(set(values))
    if len(distinct) > 1:
        raise CheckpointError(f"{path} states {what} {_listed(distinct)}; allowed: one of them")
    return distinct[0] if distinct else None


def _listed(values: Any) -> str:
    return " and ".join(f"{v:g}" for v in sorted(set(values)))


@dataclass(frozen=True)
class _Statement:
    """All that a ``config.yaml`` says of what is looked for."""

    encoders: tuple[str, ...]
    dims: tuple[float, ...]
    ranks: tuple[float, ...]
    alphas: tuple[float, ...]

    @classmethod
    def read(cls, path: Path) -> _Statement:
        leaves = list(islice(_leaves(_yaml(path)), MAX_LEAVES))
        named = [value for where, value in leaves if _names_encoder(where) and isinstance(value, str)]
        return cls(
            tuple(named),
            _numbers(path, [leaf for leaf in leaves if leaf[0][-1] == "out_dim"]),
            _numbers(path, [leaf for leaf in leaves if _is_of_lora(leaf[0], ("r", "rank"))]),
            _numbers(path, [leaf for leaf in leaves if _is_of_lora(leaf[0], ("alpha",))]),
        )


Leaf = tuple[tuple[str, ...], Any]


def _yaml(path: Path) -> Any:
    import yaml

    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise CheckpointError(f"{path} is longer than {MAX_BYTES:,} bytes, and no settings of an encoder")
        return yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as exc:
        raise CheckpointError(f"{path} cannot be read as YAML: {' '.join(str(exc).split())[:160]}") from exc


def _leaves(value: Any, where: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Every value that is neither a mapping nor a list, with the keys that lead to it."""
    if isinstance(value, dict) and len(where) < MAX_DEPTH:
        for key, inner in value.items():
            yield from _leaves(inner, (*where, str(key).lower()))
    elif isinstance(value, list) and where and len(where) < MAX_DEPTH:
        for inner in value:
            yield from _leaves(inner, (*where, where[-1]))
    elif where:
        yield where, value


def _names_encoder(where: tuple[str, ...]) -> bool:
    return where[-1] in _ENCODER or (where[-1] == "name" and any(w in _ENCODER for w in where[-2:-1]))


def _is_of_lora(where: tuple[str, ...], names: tuple[str, ...]) -> bool:
    """``lora: {r: 8}``, ``lora_r: 8``, or a bare ``r: 8`` that stands alone."""
    above = where[-2] if len(where) > 1 else "lora"
    return where[-1] in {f"lora_{n}" for n in names} or (where[-1] in names and "lora" in above)


def _numbers(path: Path, leaves: list[Leaf]) -> tuple[float, ...]:
    for where, value in leaves:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise CheckpointError(
                f"{path} states {'.'.join(where)[:80]} {value!r:.80}; allowed: a number above 0"
            )
    return tuple(float(value) for _, value in leaves)


def stated_input(path: Path, spec: EncoderSpec) -> InputRule:
    """The input of a row, with filter and crop as the ``config.json`` of a timm model states them.

    Raises:
        CheckpointError: it cannot be read, or states what is not possible here.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} cannot be read as JSON: {exc}") from exc
    stated = config.get("pretrained_cfg") if isinstance(config, dict) else None
    side = spec.input.side_px
    if not isinstance(stated, dict) or side is None or config.get("architecture") != spec.architecture.timm:
        return spec.input  # of another tool, or another model
    kind, share = stated.get("interpolation", spec.input.filter), stated.get("crop_pct", 1.0)
    if kind not in FILTERS:
        raise CheckpointError(f"{path} states interpolation {kind!r:.80}; allowed: {', '.join(FILTERS)}")
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0.05 < share <= 1:
        raise CheckpointError(f"{path} states crop_pct {share!r:.80}; allowed: above 0.05, at most 1")
    resize_px = math.floor(side / share)  # as timm rounds it
    return replace(spec.input, resize_px=resize_px, filter=kind, crop_px=None if resize_px == side else side)
