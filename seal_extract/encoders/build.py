"""Row and weight file to `Encoder`: the authors' files in every published form, and folders of ours."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seal_extract.encoders import folder
from seal_extract.encoders.checkpoint import check_tensors, complaint, is_ignored, read_tensors
from seal_extract.encoders.encoder import Encoder
from seal_extract.encoders.files import FoundFile, WeightFile
from seal_extract.encoders.heads import (
    OFFICIAL_KEYS,
    decoder_shapes,
    filled_decoder,
    filled_head,
    head_shapes,
)
from seal_extract.encoders.locate import adapted, locate, locate_adapter, locate_base
from seal_extract.encoders.lora import Update, adapter_updates, merge, merged_layers, read_adapter_config
from seal_extract.encoders.registry import find_spec
from seal_extract.encoders.spec import HEAD, EncoderSpec, Published, Shapes, check_precision, head_layers
from seal_extract.encoders.state_dict import adapter_keys, as_row_spells, misfit, place
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

    The base of a SEAL file that holds only adapters and decoder is searched beside the checkpoint, by its
    file name (``pytorch_model.bin``) in a folder of the base's name (``conch``) or alone, and then on the
    Hub. On a CPU the weights stay mapped from their file, which must not be overwritten meanwhile.

    Args:
        name_or_path: a name of `list_encoders`; a folder or Hub repository ``owner/name`` in this package's
            own format; or ``timm:NAME``, any model of timm. Type ``./name`` for a folder that has an
            encoder's name.
        checkpoint: the authors' weight file on this disk, or its folder; only with a name. A ``config.yaml``
            of SEAL's training code beside a SEAL file must agree with it.
        adapter: a LoRA adapter to merge: a folder or Hub repository of PEFT, with ``adapter_config.json`` and
            ``adapter_model.safetensors``; ``owner/repo/folder`` if the repository holds several. The
            encoder's name becomes ``name+adapter``.
        revision: branch, tag or commit of the repository. By default a named encoder is taken at the commit
            that its row is pinned to, and must have the pinned sha256. With ``"main"`` the present file is
            taken, and of its base too; the record tells whether it is the pinned one.
        device: by default ``"cuda"`` if there is a GPU, else ``"cpu"``.
        precision: ``"float32"``, ``"tf32"`` (on a GPU), ``"bfloat16"`` or ``"float16"``; by default the
            recommended one on a GPU and float32 elsewhere.
        offline: take files from the Hub's cache only.

    Raises:
        UsageError: an unknown name, device or precision, or arguments that contradict each other.
        CheckpointError: the file does not hold exactly what is needed, or would run code.
        HubError: token, gate, missing file or network; each has an error of its own.
    """
    target, asked = pick_device(device), check_precision(precision)
    files = None if adapter is None else locate_adapter(adapter, offline)
    spec, file = locate(name_or_path, checkpoint, revision, offline)
    in_use = spec.precision_for(target.type, asked)
    fetch_base = partial(locate_base, revision=revision if revision == "main" else None, offline=offline)
    encoder = _load(spec, file, files, fetch_base)
    encoder.set_precision(in_use)
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
    """Checked tensors by the names of their modules, and the adapters that were merged into the tower."""

    tower: Tensors
    decoder: Tensors = field(default_factory=dict)
    head: Tensors = field(default_factory=dict)  # the keys begin with HEAD
    merged: tuple[dict[str, Any], ...] = ()


def _load(
    spec: EncoderSpec,
    file: FoundFile,
    adapter: tuple[FoundFile, FoundFile] | None,
    fetch_base: Callable[[EncoderSpec, Path], FoundFile],
) -> Encoder:
    """The encoder on top of the mapped files, while another thread computes their hashes."""
    spec = _with_positions_of(spec, file)
    tower = empty_tower(spec)
    shapes = tower_shapes(tower)
    own = folder.Contents(spec.dim, spec.layout.decoder)
    config = file.path.with_name(folder.CONFIG)
    with ThreadPoolExecutor(1) as pool:
        reader = _Reader(pool)
        if spec.published is None and config.is_file():
            own = folder.read_contents(config)
            parts = _own_parts(spec, shapes, own, file, reader)
        elif spec.pooling in ("map", "own"):
            parts = _timm_parts(spec, tower, file, reader)
        else:
            parts = _official_parts(spec, shapes, file, reader, fetch_base)
        if adapter is not None:
            weights, adapter_config = adapter
            numbers = read_adapter_config(adapter_config.path)
            updates = adapter_updates(numbers, reader(weights), weights.path, spec, shapes)
            reader.hash(adapter_config)  # it sets the scale, so it counts as a weight file too
            merged = merged_layers(weights.path.name, updates)
            parts = replace(parts, tower=merge(parts.tower, updates), merged=(*parts.merged, *merged))
        fill(tower, parts.tower)
        decoder = filled_decoder(spec.dim, own.decoder, parts.decoder)
        head = filled_head(parts.head, spec.dim)
        encoder = Encoder(spec, tower, reader.weights(), torch.float32, decoder, head, parts.merged)
    encoder.genes = own.genes
    return encoder


def _with_positions_of(spec: EncoderSpec, file: FoundFile) -> EncoderSpec:
    """The row with the image size that the positions in its file are for, if the row may have several.

    CONCH v1.5's are for 224 px by the code of its authors, who enlarge them in every pass; a file whose
    positions have been enlarged already is used as it is. Only the shape of that tensor is looked at here.
    """
    if not spec.architecture.position_offset or spec.published is None:
        return spec
    if file.held and file.pins:
        WeightFile.of(file)  # nothing of an unexpected file is read
    positions = read_tensors(file.path, spec.layout.inside).get(f"{spec.layout.prefix}trunk.pos_embed")
    side = math.isqrt(positions.shape[1] - 1) if positions is not None and positions.ndim == 3 else 0
    if side * spec.input.multiple_of != spec.input.side_px:
        return spec
    kwargs = {**spec.architecture.kwargs, "img_size": spec.input.side_px}
    return replace(spec, architecture=replace(spec.architecture, kwargs=kwargs))


class _Reader:
    """Reads weight files, and computes their hashes in the background."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._hashes: list[Future[WeightFile]] = []

    def __call__(self, file: FoundFile, inside: str = "") -> Tensors:
        hashed = self.hash(file)
        if file.held and file.pins:  # nothing of an unexpected file is read
            hashed.result()
        tensors = read_tensors(file.path, inside)
        if hasattr(os, "posix_fadvise"):  # read the file in large pieces; mapped pages come in small ones
            with file.path.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        if file.settings is not None:
            self.hash(FoundFile(file.settings, file.source, file.revision))
        return tensors

    def hash(self, file: FoundFile) -> Future[WeightFile]:
        """Begin to compute the hash of a file that weights depend on."""
        self._hashes.append(self._pool.submit(WeightFile.of, file))
        return self._hashes[-1]

    def weights(self) -> tuple[WeightFile, ...]:
        """All files so far, the main one first."""
        return tuple(h.result() for h in self._hashes)


def _own_parts(
    spec: EncoderSpec, shapes: Shapes, own: folder.Contents, file: FoundFile, read: _Reader
) -> _Parts:
    """A file in this package's own format."""
    tensors = read(file)
    decoder = {folder.DECODER + key: s for key, s in decoder_shapes(spec.dim, own.decoder).items()}
    head = {HEAD + key: s for key, s in own.projection.items()}
    check_tensors(tensors, shapes | decoder | head, (), file.path, spec.name)
    return _Parts(
        {key: tensors[key] for key in shapes},
        {key.removeprefix(folder.DECODER): tensors[key] for key in decoder},
        {key: tensors[key] for key in head},
        own.merged,
    )


def _timm_parts(spec: EncoderSpec, tower: nn.Module, file: FoundFile, read: _Reader) -> _Parts:
    """A published file of a timm model; its classifier is left out."""
    shapes, layout = tower_shapes(tower), spec.layout
    ignored, tensors = layout.ignored, read(file, layout.inside)
    if shapes.keys() != {key for key in tensors if not is_ignored(key, ignored)}:
        tensors = as_timm_reads(tensors, tower)
    check_tensors(tensors, shapes, ignored, file.path, spec.name)
    return _Parts({key: tensors[key] for key in shapes})


def _official_parts(
    spec: EncoderSpec,
    shapes: Shapes,
    file: FoundFile,
    read: _Reader,
    fetch_base: Callable[[EncoderSpec, Path], FoundFile],
) -> _Parts:
    """The authors' file with its adapters merged; the base is fetched if the file lacks it."""
    layout = spec.layout
    published = read(file, layout.inside)
    tensors = as_row_spells(published, layout, partial(read_tensors, file.path, layout.inside))
    tower = {layout.prefix + key: shape for key, shape in shapes.items()}
    if layout.lora is None:
        check_tensors(tensors, tower, layout.ignored, file.path, spec.name, published)
        return _Parts({key: tensors[layout.prefix + key] for key in shapes})
    decoder = {OFFICIAL_KEYS[key]: s for key, s in decoder_shapes(spec.dim, layout.decoder).items()}
    adapters, updates, complaints = read_adapters(tensors, layout, shapes)
    head = head_shapes(tensors)
    try:
        head_layers(head, spec.dim)
    except ValueError as exc:
        complaints.append(str(exc))
    without_base = all(".lora_" in key for key in tensors if key.startswith(layout.prefix))
    needed = decoder | {HEAD + key: s for key, s in head.items()} | adapters
    needed |= {} if without_base else tower
    check_tensors(tensors, needed, layout.ignored, file.path, spec.name, published, complaints)
    if without_base:
        base = find_spec(str(layout.base))
        whole = _official_parts(base, shapes, fetch_base(base, file.path), read, fetch_base).tower
    else:
        whole = {key: tensors[layout.prefix + key] for key in shapes}
    return _Parts(
        merge(whole, updates),
        {own: tensors[theirs] for own, theirs in OFFICIAL_KEYS.items() if theirs in decoder},
        {HEAD + key: tensors[HEAD + key] for key in head},
        tuple(merged_layers(file.path.name, updates)),
    )


def read_adapters(
    tensors: Mapping[str, Tensor], layout: Published, tower: Shapes
) -> tuple[Shapes, list[Update], list[str]]:
    """Find every adapter of a SEAL file, and its place in the tower.

    Args:
        tensors: from `as_row_spells`.
        layout: of the row.
        tower: shape of each of its tensors.

    Returns:
        The shapes of the adapters by the keys of the file; the updates by those that are right; complaints
        about the others, one text per kind of error.
    """
    assert layout.lora is not None
    wrong: dict[str, list[str]] = {}
    shapes: Shapes = {}
    updates: list[Update] = []
    taken: set[tuple[str, int]] = set()  # weight and first row: version 4 and 5 have two names for a layer
    pairs = adapter_keys(tensors, layout.prefix)
    for layer, keys in pairs.items():
        held = {half: tuple(tensors[key].shape) for half, key in sorted(keys.items())}
        shapes |= {keys[half]: shape for half, shape in held.items()}
        spot, kind = place(layer, tower), misfit(layer, held, layout, tower)
        if not kind and spot is not None and (spot.key, spot.rows[0]) in taken:
            kind = "adapters on a layer that has others"
        if kind or spot is None:
            listed = ", ".join(f"lora_{half} {list(shape)}" for half, shape in held.items())
            wrong.setdefault(kind, []).append(f"{layer}: {listed}")
            continue
        taken.add((spot.key, spot.rows[0]))
        a, b = tensors[keys["A"]], tensors[keys["B"]]
        updates.append(Update(spot.key, a, b, layout.lora.alpha / len(a), spot.rows[0]))
    complaints = [complaint(kind, layers) for kind, layers in wrong.items()]
    if not pairs:
        complaints.append("no adapters; the file holds no pair of lora_A and lora_B")
    return shapes, updates, complaints
