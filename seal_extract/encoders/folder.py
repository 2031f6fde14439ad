"""This package's own format: a folder or repository of config.json, model.safetensors and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from seal_extract.encoders.files import check_regular
from seal_extract.encoders.spec import HEAD, Decoder, EncoderSpec, head_layers
from seal_extract.errors import CheckpointError, UsageError, first_line
from seal_extract.publish import publish

if TYPE_CHECKING:
    from torch import Tensor, nn

    from seal_extract.encoders.heads import ExpressionDecoder

FORMAT, VERSION = "seal_extract", 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
OMICS = "omics.safetensors"  # the expression encoder that was trained together with the image encoder
MOST_GENES = 10**6
ALIGNMENT = 64  # bytes; torch aligns its own memory on a CPU so
_DTYPES = {"torch.float32": "F32", "torch.int64": "I64"}  # all dtypes of a tower
DECODER = "expression_decoder."  # in front of the decoder's tensors in the weight file
# licence identifiers of the Hub that pathology encoders and timm's models carry
_HUB_LICENCES = {
    *("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0"),
    *("cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0"),
}
_ALLOWED = f"allowed: a folder or repository with {CONFIG} and {WEIGHTS}, as save_pretrained writes them"

T = TypeVar("T")


@dataclass(frozen=True)
class Contents:
    """The parts of a weight file in this format, apart from the tower.

    Attributes:
        dim: length of the embedding.
        decoder: the expression decoder.
        genes: the gene of each of its columns.
        projection: names and shapes of the projection head's tensors; empty without one.
        merged: the adapters that are merged into the tower; see `merged_layers`.

    Raises:
        ValueError: genes without a decoder or not one per column, or tensors that are no projection head.
    """

    dim: int
    decoder: Decoder | None = None
    genes: tuple[str, ...] | None = None
    projection: dict[str, tuple[int, ...]] = field(default_factory=dict)
    merged: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.decoder is None and self.genes is not None:
            raise ValueError("genes without a decoder")
        if self.decoder is not None:
            if not all(1 <= n <= MOST_GENES for n in (self.decoder.hidden, self.decoder.genes)):
                raise ValueError(f"decoder is {self.decoder}; allowed: sizes of 1 to {MOST_GENES:,}")
            if self.genes is not None:
                check_panel(self.genes, self.decoder.genes, "its decoder")
        head_layers(self.projection, self.dim)


# --- writing ------------------------------------------------------------------------------------------------


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
    """Write an encoder. The config is written last, so a folder with a config is complete.

    Args:
        path: the folder.
        spec: the row; ``published`` is not written.
        tower: the filled image tower.
        origin: the weight files it was made from; local folders are not written.
        decoder: the expression decoder.
        genes: the gene of each of its columns, if known.
        omics: the tensors of the expression encoder, if one was trained too.
        training: how it was trained, as JSON; its ``summary``, in Markdown, goes onto the card.
        head: the projection head.
        merged: the adapters that are merged into the tower; see `merged_layers`.

    Raises:
        OutputError: it cannot be written.
    """
    head_tensors = {} if head is None else head.state_dict()
    decoder_tensors = {} if decoder is None else decoder.state_dict()
    tensors = {
        **tower.state_dict(),
        **{DECODER + key: value for key, value in decoder_tensors.items()},
        **{HEAD + key: value for key, value in head_tensors.items()},
    }
    config = to_config(spec, origin)
    config["decoder"] = None if decoder is None else asdict(decoder.shape)
    config["genes"] = None if genes is None else list(genes)
    if head_tensors:
        config["projection"] = {key: list(value.shape) for key, value in head_tensors.items()}
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
    """Write safetensors whose data, mapped into memory, are aligned like torch's own tensors.

    The last bits of a matrix product depend on the alignment of its factors. The safetensors library aligns
    to 8 bytes only; here the header is padded, and tensors whose size would shift others come last.
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


def to_config(spec: EncoderSpec, origin: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """All of ``spec`` that is needed to build it again, as JSON."""
    fields = {key: value for key, value in asdict(spec).items() if key != "published"}
    made_from = [
        {"file": o["file"], "sha256": o["sha256"]}
        | ({"source": o["source"], "revision": o["revision"]} if o["revision"] else {})
        for o in origin
    ]
    return {"format": FORMAT, "format_version": VERSION, **fields, "made_from": made_from}


def model_card(config: Mapping[str, Any]) -> str:
    """The README.md for a folder with this config.json, as the Hub displays it."""
    from huggingface_hub import ModelCardData  # slow to import, and reading a config does not need it

    licence = config["licence"].lower()
    head = ModelCardData(
        license=licence if licence in _HUB_LICENCES else "other",
        library_name="seal_extract",
        pipeline_tag="image-feature-extraction",
        tags=["pathology", "histology", "whole-slide-image"],
        base_model=config["source"] or None,
    ).to_yaml()
    decoder, genes = config["decoder"], config["genes"]
    named = "named in config.json" if genes else "their names are not known"
    mpp = "not stated" if config["mpp"] is None else f"{config['mpp']:g} µm/px"
    facts = {
        "embedding": f"{config['dim']} numbers per patch",
        "trained on patches of": f"{config['patch_px']} px, {mpp}",
        "architecture": f"timm {config['architecture']['timm']}, {config['pooling']} pooling",
        "recommended precision": config["precision"],
        "expression decoder": f"{decoder['genes']} genes, {named}" if decoder else "",
        "licence of the weights": config["licence"],
        "source": f"https://huggingface.co/{config['source']}" if config["source"] else "",
        "paper": config["paper"],
    }
    table = "".join(f"| {what} | {value} |\n" for what, value in facts.items() if value)
    summary = config.get("training", {}).get("summary")
    origin = "".join(f"| {o['file']} | {_origin(o)} | `{o['sha256']}` |\n" for o in config["made_from"])
    predict = "encoder.predict_expression(embeddings)  # float32 (B, genes)\n" if decoder else ""
    return (
        f"---\n{head}\n---\n\n# {config['name']}\n\nA patch encoder for histology.\n\n"
        f"| | |\n|---|---|\n{table}"
        + (f"\n{summary.strip()}\n" if summary else "")
        + (f"\n## Made from\n\n| file | source | sha256 |\n|---|---|---|\n{origin}" if origin else "")
        + "\n## Use\n\n```python\nfrom seal_extract import load_encoder\n\n"
        'encoder = load_encoder("folder or Hub repository of this card")\n'
        f"embeddings = encoder.encode(patches)  # uint8 (B, 3, H, W) to float32 (B, {config['dim']})\n"
        f"{predict}```\n"
    )


def _origin(file: Mapping[str, Any]) -> str:
    return f"{file['source']} at {file['revision']}" if file.get("revision") else "a local file"


# --- reading ------------------------------------------------------------------------------------------------


def read_config(path: Path) -> EncoderSpec:
    """The row in a config.json.

    Raises:
        CheckpointError: missing, not JSON, of another tool or version, or with a value that is not allowed.
    """
    spec = as_record(_own_config(path), EncoderSpec, path, "an encoder", _ALLOWED)
    try:
        plain_word(spec.name)
    except ValueError as exc:
        raise CheckpointError(f"{path} does not describe an encoder: {exc}; {_ALLOWED}") from exc
    return spec


def read_contents(path: Path) -> Contents:
    """The parts of the weight file beside a config.json; raises as `read_config` does."""
    return as_record(_own_config(path), Contents, path, "an encoder", _ALLOWED)


def _own_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise CheckpointError(f"{path.parent} has no {CONFIG}; {_ALLOWED}")
    config = read_json(path, _ALLOWED)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{path} is a config of another tool; {_ALLOWED}")
    if config.get("format_version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {config.get('format_version')}, this package reads {VERSION}; "
            "bring your clone of seal-extract up to date and type there: pip install ."
        )
    return {key: value for key, value in config.items() if key != "published"}


def read_json(path: Path, allowed: str) -> Any:
    """The content of a JSON file.

    Raises:
        CheckpointError: it is no regular file, or not JSON; the message ends with ``allowed``.
    """
    check_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} cannot be read as JSON: {exc}; {allowed}") from exc


def as_record(content: Any, kind: type[T], path: Path, what: str, allowed: str) -> T:
    """Values from a file as a dataclass, with the types that it states.

    Args:
        content: of the file.
        kind: the dataclass; other keys are ignored.
        path: of the file, for the message.
        what: the file describes, for the message.
        allowed: end of the message.

    Raises:
        CheckpointError: a value is missing, of another type, or refused by the dataclass.
    """
    try:
        return msgspec.convert(content, kind)
    except (msgspec.ValidationError, UnicodeError, RecursionError) as exc:  # JSON spells half characters too
        raise CheckpointError(f"{path} does not describe {what}: {first_line(exc)}; {allowed}") from exc


def plain_word(name: str) -> str:
    """A name that may become part of the names of result files.

    Raises:
        ValueError: it is empty, begins with a dot, or holds a character that file names may not have.
    """
    if not name or name.startswith(".") or any(c in name for c in '/\\:*?"<>|\n\t '):
        raise ValueError(f"name is {name!r}, not a plain word")
    return name


def check_panel(names: Sequence[str], genes: int, what: str) -> tuple[str, ...]:
    """A gene panel, checked to hold one name per column.

    Args:
        names: in the order of the columns.
        genes: the number of columns.
        what: the owner of the columns, for the message.

    Raises:
        UsageError: another number of names, a repeated name, or a value that is no text.
    """
    panel = tuple(names) if not isinstance(names, str) else (names,)
    bad = [name for name in panel if not isinstance(name, str) or not name.strip()]
    if bad:
        raise UsageError(f"the gene panel holds {bad[0]!r}; allowed: one name per column, as text")
    if len(panel) != genes:
        raise UsageError(f"the gene panel has {len(panel)} names; {what} has {genes} columns, one name each")
    seen: set[str] = set()
    for name in panel:
        if name in seen:
            raise UsageError(f"the gene panel names {name} twice; allowed: one column per gene")
        seen.add(name)
    return panel
