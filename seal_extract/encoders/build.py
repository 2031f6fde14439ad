"""Row + file -> Encoder: the authors' own files in every published form, and this package's own folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seal_extract.encoders import folder
from seal_extract.encoders.adapter import read_adapter, read_adapter_config
from seal_extract.encoders.checkpoint import check_tensors, read_tensors
from seal_extract.encoders.encoder import Encoder
from seal_extract.encoders.files import FoundFile, WeightFile
from seal_extract.encoders.heads import (
    decoder_shapes,
    filled_decoder,
    filled_head,
    head_shapes,
    official_key,
    own_key,
)
from seal_extract.encoders.locate import adapted, layout_of, locate, locate_adapter, locate_base
from seal_extract.encoders.lora import Update, merge, merged_layers, read_adapters
from seal_extract.encoders.registry import find_spec
from seal_extract.encoders.spec import HEAD, EncoderSpec, Published, Shapes, check_precision, head_layers
from seal_extract.encoders.state_dict import as_row_spells
from seal_extract.encoders.tower import as_timm_reads, empty_tower, fill, tower_shapes
from seal_extract.errors import UsageError

Tensors = dict[str, Tensor]


def load_encoder(
    name_or_path: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    precision: str | None = None,
    offline: bool = False,
) -> Encoder:
    """Build an encoder and fill it with exactly the weights of its file.

    A SEAL file that holds only adapters and decoder needs its base. It is looked for beside the checkpoint,
    in a folder of the base's name (``conch/pytorch_model.bin``) or under its file name alone
    (``pytorch_model.bin``), and then on the Hub. A file that holds the base too needs nothing else, and its
    base wins. On a CPU the weights stay mapped from their file, which must not be overwritten meanwhile.

    Args:
        name_or_path: a name of `list_encoders`; or a folder or Hub repository ``owner/name`` with
            ``config.json`` and ``model.safetensors``; or ``timm:NAME``, any model of timm. A folder with an
            encoder's name is written ``./name``.
        checkpoint: the authors' weight file on this disk, or the folder it lies in under a published name, in
            place of the Hub's; only with a name. A ``config.yaml`` beside a SEAL file is held to it.
        adapter: a LoRA adapter to merge: a folder or Hub repository of PEFT, with ``adapter_config.json`` and
            ``adapter_model.safetensors``; ``owner/repo/folder`` where the repository holds several. The
            encoder's name becomes ``name+adapter``.
        revision: branch, tag or commit of the repository asked for. By default a named encoder is taken at
            the commit that its row is pinned to, and held to the sha256 there; with ``"main"`` the file is
            taken as it is now, its base too, and recorded as the pinned one or not. Files on this disk are
            recorded likewise.
        device: ``"cuda"`` where there is one and ``"cpu"`` elsewhere by default.
        precision: ``"float32"``, ``"bfloat16"`` or ``"float16"``; by default the recommended one on a GPU and
            float32 elsewhere.
        offline: take files from the Hub's cache only.

    Raises:
        UsageError: an unknown name, device or precision, or arguments that contradict each other.
        CheckpointError: a file that does not hold exactly what is needed, or would run code.
        HubError: its children tell token, gate, absence and network apart.
    """
    target, asked = pick_device(device), check_precision(precision)
    files = None if adapter is None else locate_adapter(adapter, offline)
    spec, file = locate(name_or_path, checkpoint, revision, offline)
    dtype: torch.dtype = getattr(torch, spec.precision_for(target.type, asked))
    fetch_base = partial(locate_base, revision=revision if revision == "main" else None, offline=offline)
    encoder = _load(spec, file, files, fetch_base, dtype)
    if adapter is not None:
        encoder.spec = adapted(spec, adapter)
    return encoder.to(target)


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the GPU where there is one.

    Raises:
        UsageError: there is no such device.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return torch.device("cuda" if gpus else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as exc:
        raise UsageError(f"device is {device!r}; allowed: cpu, cuda, cuda:0, ...") from exc
    if wanted.type == "cuda" and (wanted.index or 0) >= gpus:
        raise UsageError(
            f"device is {device}, but this machine has {gpus} CUDA devices; type cpu, or leave it out"
        )
    return wanted


@dataclass(frozen=True)
class _Parts:
    """The tensors of an encoder's parts, each by the names of its own module, and what was merged into them.

    Attributes:
        tower: of the image tower.
        decoder: of the expression decoder; empty without one.
        head: of the projection head, behind `HEAD`; empty without one.
        merged: see `merged_layers`.
    """

    tower: Tensors
    decoder: Tensors
    head: Tensors
    merged: tuple[dict[str, Any], ...] = ()


def _load(
    spec: EncoderSpec,
    file: FoundFile,
    adapter: tuple[FoundFile, FoundFile] | None,
    fetch_base: Callable[[EncoderSpec, Path], FoundFile],
    precision: torch.dtype,
) -> Encoder:
    """The encoder over the mapped files, which another thread hashes meanwhile."""
    tower = empty_tower(spec)
    shapes = tower_shapes(tower)
    decoder, genes = layout_of(spec).decoder, None
    with ThreadPoolExecutor(1) as pool:
        reader = _Reader(pool)
        config = file.path.with_name(folder.CONFIG)
        if spec.published is None and config.is_file():
            own = folder.read_contents(config)
            decoder, genes = own.decoder, own.genes
            parts = _own_parts(spec, shapes, own, file, reader)
        elif spec.pooling == "own":
            parts = _Parts(_timm_tensors(spec, tower, file, reader), {}, {})
        else:
            parts = _official_parts(spec, shapes, file, reader, fetch_base)
        if adapter is not None:
            updates = _updates(spec, shapes, adapter, reader)
            merged = merged_layers(adapter[0].path.name, updates)
            parts = replace(parts, tower=merge(parts.tower, updates), merged=(*parts.merged, *merged))
        fill(tower, parts.tower)
        encoder = Encoder(
            spec,
            tower,
            reader.weights(),
            precision,
            filled_decoder(spec.dim, decoder, parts.decoder),
            filled_head(parts.head, spec.dim),
            parts.merged,
        )
    encoder.genes = genes
    return encoder


class _Reader:
    """Reads weight files, and has each of them hashed in the background."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._hashes: list[Future[WeightFile]] = []

    def __call__(self, file: FoundFile) -> Tensors:
        first = bool(file.held and file.pins)  # what is pinned is checked before anything of it is read
        if first:
            self.note(file)
            self._hashes[-1].result()
        tensors = read_tensors(file.path)
        _read_ahead(file.path)
        if not first:
            self.note(file)
        if file.settings is not None:
            self.note(FoundFile(file.settings, file.source, file.revision))
        return tensors

    def note(self, file: FoundFile) -> None:
        """Count a file that was read otherwise."""
        self._hashes.append(self._pool.submit(WeightFile.of, file))

    def weights(self) -> tuple[WeightFile, ...]:
        """All files so far, the main one first."""
        return tuple(h.result() for h in self._hashes)


def _read_ahead(path: Path) -> None:
    """Have the system fetch the whole file in large pieces; mapped pages alone come in small ones."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _own_parts(
    spec: EncoderSpec, shapes: Shapes, own: folder.Contents, file: FoundFile, read: _Reader
) -> _Parts:
    """A file in this package's own format, checked."""
    tensors = read(file)
    decoder = {folder.DECODER + key: s for key, s in decoder_shapes(spec.dim, own.decoder).items()}
    head = {HEAD + key: s for key, s in own.head.items()}
    counters = [key for key in shapes if _counts(key)]
    check_tensors(tensors, _without_counters(shapes) | decoder | head, counters, file.path, spec.name)
    tower = _with_counters({key: tensors[key] for key in shapes if not _counts(key)}, shapes)
    named = {key.removeprefix(folder.DECODER): tensors[key] for key in decoder}
    return _Parts(tower, named, {key: tensors[key] for key in head}, own.merged)


def _timm_tensors(spec: EncoderSpec, tower: nn.Module, file: FoundFile, read: _Reader) -> Tensors:
    """A timm model's tensors out of its published file: checked, its classes left out."""
    shapes, layout, tensors = tower_shapes(tower), layout_of(spec), read(file)
    needed = _without_counters(shapes)
    if needed.keys() != {key for key in tensors if not (key.startswith(layout.ignored) or _counts(key))}:
        tensors = as_timm_reads(tensors, tower)
    counters = [key for key in tensors if _counts(key)]
    check_tensors(tensors, needed, (*layout.ignored, *counters), file.path, spec.name)
    return _with_counters({key: tensors[key] for key in needed}, shapes)


def _counts(key: str) -> bool:
    """A BatchNorm's count of training steps: int64, and no embedding needs it."""
    return key.endswith(".num_batches_tracked")


def _without_counters(shapes: Shapes) -> Shapes:
    return {key: shape for key, shape in shapes.items() if not _counts(key)}


def _with_counters(tensors: Tensors, shapes: Shapes) -> Tensors:
    return tensors | {key: torch.zeros((), dtype=torch.int64) for key in shapes if _counts(key)}


def _official_parts(
    spec: EncoderSpec,
    shapes: Shapes,
    file: FoundFile,
    read: _Reader,
    fetch_base: Callable[[EncoderSpec, Path], FoundFile],
) -> _Parts:
    """The authors' file, checked: its adapters are merged, and the base is fetched if need be."""
    layout = layout_of(spec)
    published = read(file)
    tensors = as_row_spells(published, layout, partial(read_tensors, file.path))
    tower = {layout.prefix + key: shape for key, shape in shapes.items()}
    decoder = {official_key(key): s for key, s in decoder_shapes(spec.dim, layout.decoder).items()}
    if layout.lora is None:
        check_tensors(tensors, tower | decoder, layout.ignored, file.path, spec.name, published)
        return _Parts({key: tensors[layout.prefix + key] for key in shapes}, {}, {})
    adapters = read_adapters(tensors, layout, shapes)
    head = {HEAD + key: shape for key, shape in head_shapes(tensors).items()}
    complaints = [*adapters.complaints, *_wrong_head(head, spec.dim)]
    alone = _is_alone(tensors, layout)
    needed = ({} if alone else tower) | decoder | head | adapters.shapes
    check_tensors(tensors, needed, layout.ignored, file.path, spec.name, published, complaints)
    if alone:
        base = find_spec(str(layout.base))
        whole = _official_parts(base, shapes, fetch_base(base, file.path), read, fetch_base).tower
    else:
        whole = {key: tensors[layout.prefix + key] for key in shapes}
    return _Parts(
        merge(whole, adapters.updates),
        {own_key(name): tensors[name] for name in decoder},
        {name: tensors[name] for name in head},
        tuple(merged_layers(file.path.name, adapters.updates)),
    )


def _is_alone(tensors: Tensors, layout: Published) -> bool:
    """Whether a file holds adapters without their base."""
    return all(".lora_" in key for key in tensors if key.startswith(layout.prefix))


def _wrong_head(shapes: Shapes, dim: int) -> list[str]:
    try:
        head_layers({key.removeprefix(HEAD): shape for key, shape in shapes.items()}, dim)
    except ValueError as exc:
        return [str(exc)]
    return []


def _updates(
    spec: EncoderSpec, shapes: Shapes, adapter: tuple[FoundFile, FoundFile], read: _Reader
) -> list[Update]:
    """What an adapter adds to the tower; its config, which sets the scale, counts as a weight file too."""
    weights, config = adapter
    settings = read_adapter_config(config.path)
    updates = read_adapter(settings, read(weights), weights.path).updates(spec, shapes)
    read.note(config)
    return updates
