"""Row + file -> Encoder: the authors' own files in every published form, and this package's own folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from seal_extract.encoders.checkpoint import check_tensors, read_tensors
from seal_extract.encoders.encoder import Encoder, WeightFile
from seal_extract.encoders.hub import FoundFile
from seal_extract.encoders.locate import layout_of, locate, locate_base
from seal_extract.encoders.lora import adapter_keys, adapter_shapes, merge, wrapped_key
from seal_extract.encoders.registry import Decoder, EncoderSpec, Published, check_precision, find_spec
from seal_extract.encoders.tower import Shapes, empty_tower, fill, tower_shapes
from seal_extract.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

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
            ``config.json`` and ``model.safetensors``. A folder with an encoder's name is written ``./name``.
        checkpoint: the authors' weight file on this disk, in place of the Hub's; only with a name.
        adapter: not in this version.
        revision: branch, tag or commit of the repository asked for; a base is taken from its main branch.
        device: ``"cuda"`` where there is one and ``"cpu"`` elsewhere by default.
        precision: ``"float32"``, ``"bfloat16"`` or ``"float16"``; by default the recommended one on a GPU and
            float32 elsewhere.
        offline: take files from the Hub's cache only.

    Raises:
        UsageError: an unknown name, device or precision, or arguments that contradict each other.
        CheckpointError: a file that does not hold exactly what is needed, or would run code.
        HubError: its children tell token, gate, absence and network apart.
    """
    if adapter is not None:
        raise UsageError(
            "adapter= is not supported by this version; give a checkpoint with the adapter in it"
        )
    target, asked = _device(device), check_precision(precision)
    spec, file = locate(name_or_path, checkpoint, revision, offline)
    dtype: torch.dtype = getattr(torch, spec.precision_for(target.type, asked))
    tower, weights = _filled_tower(spec, file, offline)
    return Encoder(spec, tower, weights, dtype).to(target)


def _device(device: str | torch.device | None) -> torch.device:
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


def _filled_tower(
    spec: EncoderSpec, file: FoundFile, offline: bool
) -> tuple[nn.Module, tuple[WeightFile, ...]]:
    """The tower over the mapped file; the files are hashed meanwhile, by another thread."""
    tower = empty_tower(spec)
    shapes = tower_shapes(tower)
    with _hashing_reader() as (read, hashes):
        if spec.published is None:
            tensors = read(file)
            check_tensors(tensors, shapes, (), file.path, spec.name)
        else:
            tensors = _official_tensors(spec, shapes, file, read, offline)
        fill(tower, tensors)
        return tower, tuple(h.result() for h in hashes)


@contextmanager
def _hashing_reader() -> Iterator[tuple[Callable[[FoundFile], Tensors], list[Future[WeightFile]]]]:
    """A `read_tensors` that has every file it reads hashed in the background."""
    with ThreadPoolExecutor(1) as pool:
        hashes: list[Future[WeightFile]] = []

        def read(file: FoundFile) -> Tensors:
            tensors = read_tensors(file.path)
            hashes.append(pool.submit(WeightFile.of, file))
            return tensors

        yield read, hashes


def _official_tensors(
    spec: EncoderSpec, shapes: Shapes, file: FoundFile, read: Callable[[FoundFile], Tensors], offline: bool
) -> Tensors:
    """The tower's tensors out of the authors' file: checked, adapters merged, the base fetched if need be."""
    layout = layout_of(spec)
    tensors = read(file)
    wrapped = {key: layout.prefix + (wrapped_key(key, layout.lora) if layout.lora else key) for key in shapes}
    needed = {wrapped[key]: shape for key, shape in shapes.items()}
    if layout.lora is None:
        check_tensors(tensors, needed, layout.ignored, file.path, spec.name)
        return {key: tensors[name] for key, name in wrapped.items()}

    extra = {layout.prefix + key: shape for key, shape in adapter_shapes(shapes, layout.lora).items()}
    extra |= _decoder_shapes(layout.decoder, spec.dim)
    if _holds_adapters_only(tensors, layout):
        check_tensors(tensors, extra, (), file.path, spec.name)
        base = find_spec(str(layout.base))
        tower = _official_tensors(base, shapes, locate_base(base, file.path, offline), read, offline)
    else:
        check_tensors(tensors, needed | extra, layout.ignored, file.path, spec.name)
        tower = {key: tensors[name] for key, name in wrapped.items()}
    names = [key for target in layout.lora.targets for key in adapter_keys(target)]
    return merge(tower, {key: tensors[layout.prefix + key] for key in names}, layout.lora)


def _holds_adapters_only(tensors: Tensors, layout: Published) -> bool:
    inside = [key for key in tensors if key.startswith(layout.prefix)]
    return bool(inside) and all(".lora_" in key for key in inside)


def _decoder_shapes(decoder: Decoder | None, dim: int) -> Shapes:
    if decoder is None:
        return {}
    return {
        "decoder.decoder.0.weight": (decoder.hidden, dim),
        "decoder.decoder.0.bias": (decoder.hidden,),
        "decoder.decoder.3.weight": (decoder.genes, decoder.hidden),
        "decoder.decoder.3.bias": (decoder.genes,),
    }
