"""This package's own format: a folder, or Hub repository, of config.json, model.safetensors and a card."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from seal_extract.encoders.card import model_card
from seal_extract.encoders.found import check_regular
from seal_extract.encoders.panel import check_panel
from seal_extract.encoders.registry import Architecture, Decoder, EncoderSpec, InputRule
from seal_extract.errors import CheckpointError, UsageError
from seal_extract.publish import publish

if TYPE_CHECKING:
    from torch import Tensor, nn

    from seal_extract.encoders.expression import ExpressionDecoder

FORMAT, VERSION = "seal_extract", 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
OMICS = "omics.safetensors"  # the expression half of an encoder that was trained here
MOST_GENES = 10**6
ALIGNMENT = 64  # bytes, of torch's own memory on a CPU
_DTYPES = {"torch.float32": "F32", "torch.int64": "I64"}  # all that a tower holds
HEAD_KINDS = ("none", "linear", "mlp")  # of projection heads
HEAD = "projection_head."  # in front of the projection head's tensors, as in the authors' files
DECODER = "expression_decoder."  # in front of its tensors in the weight file; the tower's have nothing there

T = TypeVar("T")


def write(
    path: Path,
    spec: EncoderSpec,
    tower: nn.Module,
    origin: Sequence[Mapping[str, Any]],
    decoder: ExpressionDecoder | None = None,
    genes: Sequence[str] | None = None,
    omics: Mapping[str, Tensor] | None = None,
    training: Mapping[str, Any] | None = None,
    *,
    head: nn.Module | None = None,
    merged: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write weights, model card and config, in this order: a folder with a config is complete.

    Args:
        path: the folder.
        spec: the row; how the authors lay out their file is left out.
        tower: filled.
        origin: the weight files it was made from; folders of this machine are left out.
        decoder: the expression decoder, if it has one.
        genes: the gene of each of its columns, if known.
        omics: the tensors of its expression half, if it was trained with one.
        training: how it was trained, as JSON: ``summary`` (a text in Markdown) goes onto the card.
        head: its projection head, if it has one.
        merged: the adapters that are in the tower's weights; see `merged_layers`.

    Raises:
        OutputError: it cannot be written.
    """
    projection = {} if head is None else {HEAD + key: value for key, value in head.state_dict().items()}
    tensors = {**tower.state_dict(), **_prefixed(decoder.state_dict() if decoder else {}), **projection}
    config = to_config(spec, origin) | _decoder_config(decoder, genes)
    if projection:
        config["projection"] = {key.removeprefix(HEAD): list(v.shape) for key, v in projection.items()}
    if merged:
        config["merged"] = [dict(one) for one in merged]
    if training is not None:
        config["training"] = dict(training)
    if omics is not None:
        with publish(path / OMICS) as part:
            write_weights(omics, part)
    with publish(path / WEIGHTS) as part:
        write_weights(tensors, part)
    with publish(path / CARD) as part:
        part.write_text(model_card(config), encoding="utf-8")
    with publish(path / CONFIG) as part:
        part.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write safetensors whose data, mapped, lie as they would in memory of one's own.

    The last bits of a matrix product depend on where its factors begin. The library's own writer starts the
    data at any multiple of 8 bytes; here the header is padded, and sizes that would shift others come last.
    """
    held = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    order = sorted(held, key=lambda k: (held[k].nbytes % ALIGNMENT != 0, -held[k].element_size(), k))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in order:
        begin, end = end, end + held[key].nbytes
        kind, shape = _DTYPES[str(held[key].dtype)], list(held[key].shape)
        header[key] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            file.write(held[key].numpy().tobytes())


def _prefixed(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {DECODER + key: value for key, value in tensors.items()}


def _decoder_config(decoder: ExpressionDecoder | None, genes: Sequence[str] | None) -> dict[str, Any]:
    return {
        "decoder": None if decoder is None else asdict(decoder.shape),
        "genes": None if genes is None else list(genes),
    }


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
    """The row in a config.json.

    Raises:
        CheckpointError: missing, not JSON, of another tool or version, or with a field that does not fit.
    """
    return _parse(path, from_config)


@dataclass(frozen=True)
class Contents:
    """What a weight file of ours holds beside the tower.

    Attributes:
        decoder: the expression decoder.
        genes: the gene of each of its columns.
        head: name and shape of the projection head's tensors; empty without one.
        merged: the adapters that are in the tower's weights; see `merged_layers`.
    """

    decoder: Decoder | None = None
    genes: tuple[str, ...] | None = None
    head: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    merged: tuple[dict[str, Any], ...] = ()


def read_contents(path: Path) -> Contents:
    """What a config.json says of the weight file beside it.

    Raises:
        CheckpointError: as `read_config`.
    """
    return _parse(path, _contents)


def _parse(path: Path, parse: Callable[[Mapping[str, Any]], T]) -> T:
    if not path.exists():
        raise CheckpointError(f"{path.parent} has no {CONFIG}; {_ALLOWED}")
    check_regular(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} cannot be read as JSON: {exc}; {_ALLOWED}") from exc
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{path} is a config of another tool; {_ALLOWED}")
    if config.get("format_version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {config.get('format_version')}, this package reads {VERSION}; "
            "bring your clone of seal-extract up to date and type there: pip install ."
        )
    try:
        return parse(config)
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError, UsageError) as exc:
        missing = f"{exc} is missing" if isinstance(exc, KeyError) else f"{exc}"[:300]
        raise CheckpointError(f"{path} does not describe an encoder: {missing}; {_ALLOWED}") from exc


_ALLOWED = f"allowed: a folder or repository with {CONFIG} and {WEIGHTS}, as save_pretrained writes them"


def from_config(config: Mapping[str, Any]) -> EncoderSpec:
    """The row that `to_config` was given, without the layout of the authors' file."""
    architecture = Architecture(
        _text(config["architecture"], "timm"),
        dict(config["architecture"]["kwargs"]),
        bool(config["architecture"].get("antialias", True)),
    )
    rule = config["input"]
    resize_px = rule["resize_px"]
    return EncoderSpec(
        name=plain_word(_text(config, "name")),
        dim=int(config["dim"]),
        patch_px=int(config["patch_px"]),
        mpp=None if config["mpp"] is None else float(config["mpp"]),
        mean=tuple(float(v) for v in config["mean"]),
        std=tuple(float(v) for v in config["std"]),
        precision=_text(config, "precision"),
        licence=_text(config, "licence"),
        source=_text(config, "source"),
        architecture=architecture,
        pooling=_text(config, "pooling"),
        input=InputRule(
            int(rule["multiple_of"]),
            resize_px and int(resize_px),
            _text(rule, "filter"),
            rule.get("crop_px") and int(rule["crop_px"]),
        ),
        paper=_text(config, "paper"),
        also_mpp=tuple(float(v) for v in config.get("also_mpp", ())),
        mpp_basis=str(config.get("mpp_basis", "")),
    )


def _contents(config: Mapping[str, Any]) -> Contents:
    from seal_extract.encoders.projection import empty_head  # imports torch

    shape, genes = config.get("decoder"), config.get("genes")
    decoder = None if shape is None else Decoder(int(shape["hidden"]), int(shape["genes"]))
    if decoder is None and genes is not None:
        raise ValueError("genes without a decoder")
    sizes = (1,) if decoder is None else (decoder.hidden, decoder.genes)
    if not all(1 <= size <= MOST_GENES for size in sizes):
        raise ValueError(f"decoder is {shape}; allowed: sizes of 1 to {MOST_GENES:,}")
    if decoder is not None and genes is not None:
        genes = check_panel(genes, decoder.genes, "its decoder")
    head = {str(key): tuple(map(int, size)) for key, size in (config.get("projection") or {}).items()}
    empty_head(head, int(config["dim"]))
    merged = config.get("merged") or ()
    if not all(isinstance(one, dict) for one in merged):
        raise TypeError(f"merged is {merged!r}, not a list of tables")
    return Contents(decoder, genes, head, tuple(merged))


def _text(values: Mapping[str, Any], key: str) -> str:
    if not isinstance(values[key], str):
        raise TypeError(f"{key} is {values[key]!r}, not a text")
    return str(values[key])


def plain_word(name: str) -> str:
    """A name as it may become part of file names in results.

    Raises:
        ValueError: it may not.
    """
    if not name or name.startswith(".") or any(c in name for c in '/\\:*?"<>|\n\t '):
        raise ValueError(f"name is {name!r}, not a plain word")
    return name
