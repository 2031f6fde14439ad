"""All named encoders: those of ``encoders.toml``, the bundled ones, and those of installed packages.

An encoder that comes with the package is a folder ``weights/NAME`` in this package's own format. A third
party adds rows by an entry point of the group ``seal_extract.encoders``, which loads to an `EncoderSpec`, to
an iterable of them, or to a function that returns either; in its ``pyproject.toml``::

    [project.entry-points."seal_extract.encoders"]
    ours = "our_package.rows:ROWS"

A row with `Published` states how its weight file is laid out. A row without it stands for a file
``model.safetensors`` in the repository ``source``, as `Encoder.save_pretrained` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from seal_extract.encoders.folder import CONFIG, read_config, read_contents
from seal_extract.encoders.spec import Decoder, EncoderSpec, Lora, Published, recommended_precision
from seal_extract.errors import UsageError
from seal_extract.plugins import load_plugins

DEFAULT = "seal-tiny"
GROUP = "seal_extract.encoders"
# a wheel has the weights inside the package, a checkout has them beside it
_PLACES = tuple(place / "weights" for place in Path(__file__).resolve().parents[1:3])


# --- the table ----------------------------------------------------------------------------------------------

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
STATISTICS = {
    "imagenet": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    "clip": {"mean": CLIP_MEAN, "std": CLIP_STD},
}
# in front of the tower's keys in a SEAL file: the attribute of the authors' model, then PEFT's own names
_PEFT = "encoder.base_model.model."
# two independent public programs load the files of this commit by these hashes
_SEAL_COMMIT = "c20762e7a04551e21e62c083a9c443bdbc48cb89"


def _seal(
    base: EncoderSpec,
    *,
    also_called: Sequence[str] = (),
    wrapped: bool = False,
    ignored: Sequence[str] = (),
    sha256: str | None = None,
    errors: Mapping[str, float],
) -> EncoderSpec:
    """The SEAL row on ``base``: adapters on the Linear layers that the file names, and an expression decoder.

    Args:
        base: the encoder that was finetuned.
        also_called: further names of the base in the names of files.
        wrapped: the authors' code keeps the tower under one more name.
        ignored: keys of the base's file that the embedding does not need.
        sha256: of the vision file at `_SEAL_COMMIT`; None for a file that was not there yet.
        errors: of its embeddings by precision.
    """
    prefix = _PEFT + ("model." if wrapped else "")
    return replace(
        base,
        name=f"seal-{base.name}",
        patch_px=224,
        mpp=0.5,
        also_mpp=(),
        mpp_basis="stated",
        errors=errors,
        precision=recommended_precision(errors),
        licence="CC-BY-NC-ND-4.0",
        source="MahmoodLab/SEAL",
        paper="arXiv 2602.14177",
        published=Published(
            files=tuple(
                file
                for word in (base.name, *also_called)
                for file in (f"seal_{word}_vision.pth", f"{word}-seal-vision.pth")
            ),
            prefix=prefix,
            other_prefixes=(_PEFT + "encoder.",) if wrapped else (),
            layer_names=base.layout.layer_names,
            ignored=tuple(prefix + key for key in ignored),
            base=base.name,
            lora=Lora(),
            decoder=Decoder(),
            settings="config.yaml",
            gated=True,
            commit=_SEAL_COMMIT if sha256 else None,
            sha256={f"seal_{base.name}_vision.pth": sha256} if sha256 else {},
        ),
    )


def _read_table() -> tuple[dict[str, EncoderSpec], dict[str, str], dict[str, str]]:
    """The rows of ``encoders.toml``, SEAL's first; the name of each alias; and the group of each base."""
    tables: dict[str, Any] = msgspec.toml.decode(Path(__file__).with_name("encoders.toml").read_bytes())
    bases: dict[str, EncoderSpec] = {}
    seals: dict[str, EncoderSpec] = {}
    aliases: dict[str, str] = {}
    groups: dict[str, str] = {}
    group = ""
    for name, table in tables.items():
        groups[name] = group = table.get("group", group)
        if "like" in table:
            table = tables[name] = _merged(_inherited(tables[table["like"]]), table)
        if "statistics" in table:
            table |= STATISTICS[table.pop("statistics")]
        defaults = {"mpp": None, "precision": recommended_precision(table.get("errors", {}))}
        bases[name] = msgspec.convert({"name": name, **defaults, **table}, EncoderSpec)
        aliases |= dict.fromkeys(table.get("also_called", []), name)
        if "seal" in table:
            seal = _seal(bases[name], **table["seal"])
            seals[seal.name] = seal
            aliases |= {f"seal-{other}": seal.name for other in table["seal"].get("also_called", [])}
    return seals | bases, aliases, groups


def _inherited(table: dict[str, Any]) -> dict[str, Any]:
    """What a row that is ``like`` this one takes from it: nothing that belongs to these very weights."""
    own = {"also_called", "group", "seal", "errors", "errors_basis"}
    published = {k: v for k, v in table["published"].items() if k not in ("commit", "sha256")}
    return {k: v for k, v in table.items() if k not in own} | {"published": published}


def _merged(table: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """``table`` with the values of ``other``, table by table."""
    both = {k: _merged(v, other[k]) for k, v in table.items() if isinstance(v, dict) and k in other}
    return {**table, **other, **both}


ROWS, ALIASES, _GROUPS = _read_table()


# --- all of them --------------------------------------------------------------------------------------------


def list_encoders() -> tuple[EncoderSpec, ...]:
    """All encoders that have a name: SEAL's first, then the bundled ones, and those of plugins last."""
    return tuple(_all_rows().values())


def group_of(name: str) -> str:
    """The heading that an encoder stands under in a list of all."""
    if name in ROWS and ROWS[name].layout.lora is not None:
        return "finetuned with spatial transcriptomics"
    return _GROUPS.get(name, "bundled" if name in bundled() else "of installed packages")


def find_spec(name: str) -> EncoderSpec:
    """The row of a name, or of an alias of it.

    Raises:
        UsageError: there is no such name; the message holds the nearest ones.
    """
    name = ALIASES.get(name, name)
    if name in ROWS:
        return ROWS[name]
    rows = _all_rows()
    if name in rows:
        return rows[name]
    near = get_close_matches(name.lower(), rows, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(
        f"there is no encoder {name!r}; {hint}For all {len(rows)} names type: seal-extract encoders; or give "
        "a folder or Hub repository with config.json and model.safetensors"
    )


def _all_rows() -> dict[str, EncoderSpec]:
    bundled_rows = {name: read_config(path / CONFIG) for name, path in bundled().items()}
    return {**ROWS, **bundled_rows, **plugin_rows()}


@lru_cache(maxsize=1)
def bundled() -> dict[str, Path]:
    """The folder of each bundled encoder, by name."""
    found = [path.parent for place in _PLACES for path in sorted(place.glob(f"*/{CONFIG}"))]
    return {path.name: path for path in reversed(found)}


def has_no(name: str, what: str) -> str:
    """The message that an encoder has no expression decoder or half, with the names of those that have."""
    names = [row.name for row in list_encoders() if row.published and row.published.decoder]
    names += [name for name, path in bundled().items() if read_contents(path / CONFIG).decoder]
    return f"{name} has no {what}; those that have: {', '.join(names)}"


@lru_cache(maxsize=1)
def plugin_rows() -> dict[str, EncoderSpec]:
    """The rows of all installed plugins, by name; the plugins are asked once per process.

    A plugin that fails, an object that is no row, and a name that is taken cause one warning each; the other
    rows stay usable.
    """
    rows: dict[str, EncoderSpec] = {}
    for row, warn in load_plugins(GROUP, _rows_in):
        if not isinstance(row, EncoderSpec):
            warn(f"a {type(row).__name__} in it is left out: allowed: EncoderSpec")
        elif not re.fullmatch(r"\w[\w.+-]*", row.name):
            warn(f"its encoder {row.name!r} is left out: allowed: letters, digits, . _ + -")
        elif row.name in {*ROWS, *ALIASES, *bundled(), *rows}:
            warn(f"its encoder {row.name} is left out: the name is taken")
        else:
            rows[row.name] = row
    return rows


def _rows_in(loaded: object) -> Iterable[object]:
    loaded = loaded() if callable(loaded) else loaded
    if isinstance(loaded, EncoderSpec):
        return [loaded]
    if isinstance(loaded, (str, bytes)) or not isinstance(loaded, Iterable):
        raise UsageError(
            f"{loaded!r} is neither an EncoderSpec, an iterable of them, nor a function for either"
        )
    return loaded
