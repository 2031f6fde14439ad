"""Reading a weight file without unpickling, and checking that it holds exactly the needed tensors."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from seal_extract.encoders.files import check_regular
from seal_extract.encoders.spec import Shapes
from seal_extract.errors import CheckpointError

SHOWN = 3  # keys named per kind of complaint
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a ``.pth``, ``.bin`` or ``.safetensors`` file; its first bytes decide which, not its name.

    Tensors are mapped from the file, not copied, so that pages are read as they are used; only the format
    of torch before 1.6 is read whole. ``{'state_dict': ...}`` is opened, and ``module.``, where it stands in
    front of all keys, is taken off.

    Raises:
        CheckpointError: missing, cut short, no weight file, or holding objects that only code could rebuild.
    """
    read = _reader(path)
    try:
        with warnings.catch_warnings():  # of what is refused below anyway, and of torch's own old format
            warnings.simplefilter("ignore", UserWarning)
            content = read(path)
    except MemoryError:
        raise
    except pickle.UnpicklingError as exc:
        raise CheckpointError(_unsafe(path, exc)) from exc
    except Exception as exc:  # whatever a damaged or hostile file makes the two libraries raise
        size = f"{path.stat().st_size:,} bytes"
        raise CheckpointError(
            f"{path} is damaged, cut short or no state dict ({size}): {_first_line(exc)}; fetch it again"
        ) from exc
    return _unwrap(content, path)


def _reader(path: Path) -> Any:
    check_regular(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as exc:
        raise CheckpointError(
            f"cannot read the checkpoint {path}: {exc.strerror}; give the path of a file"
        ) from exc
    if head.startswith(_ZIP):
        return lambda p: _load_torch(p, mapped=True)
    # after the length of the header, whose first byte may well be that of a pickle
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return load_file
    if head.startswith(_PICKLE):
        return lambda p: _load_torch(p, mapped=False)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the weights; type: git lfs pull")
    raise CheckpointError(f"{path} is not a weight file; allowed: .pth or .bin of torch, .safetensors")


def _load_torch(path: Path, mapped: bool) -> Any:
    if path.suffix == ".safetensors":  # newer torch would go by this name
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _unsafe(path: Path, exc: Exception) -> str:
    culprit = re.search(r"GLOBAL ([\w.]+)", str(exc))
    what = f"the object {culprit[1]}" if culprit else "something that is not a tensor"
    return (
        f"{path} holds {what}; loading it could run code, so nothing was loaded. Allowed: tensors in plain "
        "dicts; ask its author for a state dict or safetensors"
    )


def _first_line(exc: Exception) -> str:
    lines = str(exc).strip().splitlines() or [type(exc).__name__]
    return lines[0][:160]


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f"{path} holds {_kind(content)}; allowed: a dict of tensors, or {{'state_dict': ...}}"
        )
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} holds {_kind(value)} under {key!r}; allowed: names and tensors only"
            )
    bare = "module." if all(key.startswith("module.") for key in content) else ""
    return {key.removeprefix(bare): value.detach() for key, value in content.items()}


def _kind(value: object) -> str:
    return "an empty dict" if value == {} else f"a {type(value).__name__}"


def check_tensors(
    tensors: Mapping[str, Tensor],
    needed: Shapes,
    ignored: Collection[str],
    path: Path,
    name: str,
    as_published: Mapping[str, Tensor] | None = None,
    also: Sequence[str] = (),
) -> None:
    """Hold a file to float32 tensors of exactly these names and shapes, all finite.

    Args:
        tensors: from `read_tensors`.
        needed: name and shape of each.
        ignored: further names that may be there; one that ends in a dot stands for all that begin with it.
        path: the file, for the message.
        name: the encoder, for the message.
        as_published: the same under the file's own names, where ``tensors`` have others; they tell best which
            encoder it is of.
        also: complaints that were found otherwise.

    Raises:
        CheckpointError: everything that is wrong, in one line, with the encoder that the file looks like.
    """
    shared = needed.keys() & tensors.keys()
    complaints = [
        *also,
        complaint("missing", sorted(needed.keys() - tensors.keys())),
        complaint(
            "unexpected", sorted(k for k in tensors.keys() - needed.keys() if not _is_ignored(k, ignored))
        ),
        complaint(
            "of another shape",
            [
                f"{k} {list(tensors[k].shape)}, not {list(needed[k])}"
                for k in sorted(shared)
                if tuple(tensors[k].shape) != needed[k]
            ],
        ),
        complaint(
            "not plain float32",
            [f"{k} {_dtype(tensors[k])}" for k in sorted(shared) if not _is_plain_float32(tensors[k])],
        ),
    ]
    found = "; ".join(c for c in complaints if c)
    if not found:
        bad = complaint(
            "with NaN or infinite numbers", sorted(k for k in shared if not is_finite(tensors[k]))
        )
        found = bad and f"{bad}; fetch the file again"
    if found:
        raise CheckpointError(
            f"{path} is not a weight file of {name}: {found}{_advice(as_published or tensors, name)}"
        )


def complaint(what: str, keys: list[str]) -> str:
    """How many keys are wrong in one way, and the first of them; empty if none is."""
    if not keys:
        return ""
    more = ", ..." if len(keys) > SHOWN else ""
    return f"{len(keys)} {what} ({', '.join(keys[:SHOWN])}{more})"


def _is_ignored(key: str, ignored: Collection[str]) -> bool:
    return any(key.startswith(i) if i.endswith(".") else key == i for i in ignored)


def _dtype(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{tensor.layout} {kind}" if tensor.layout != torch.strided else f"{kind} on {tensor.device}"


def _is_plain_float32(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.layout == torch.strided and not tensor.is_meta


def is_finite(tensor: Tensor) -> bool:
    """No NaN, no infinity: by its extremes, which takes no memory beside the tensor."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


# shape of the patch embedding, a word in its key -> backbone
_PATCH_EMBEDDINGS = {
    ((768, 3, 16, 16), "trunk."): "conch",
    ((1024, 3, 16, 16), "patch_embeddings."): "phikon2",
    ((1024, 3, 16, 16), "patch_embed."): "uni",
    ((1536, 3, 14, 14), "patch_embed."): "univ2",
    ((1280, 3, 14, 14), "patch_embed."): "virchow2",
    ((768, 3, 14, 14), "patch_embed."): "h0mini",
}
# embedding length, last adapted block -> backbone
_ADAPTERS = {
    (512, 11): "conch",
    (1536, 23): "univ2",
    (2560, 31): "virchow2",
    (1536, 11): "h0mini",
    (1024, 23): "phikon2",
}


def looks_like(tensors: Mapping[str, Tensor]) -> str | None:
    """The encoder that a file seems to belong to, by its patch embedding or its adapters; None if none.

    ``"SEAL omics"`` stands for the other half of a SEAL checkpoint.
    """
    if "fc_mu.weight" in tensors and "flows.0.u" in tensors:
        return "SEAL omics"
    seal = "seal-" if any(".lora_" in key for key in tensors) else ""
    for key, value in tensors.items():
        for (shape, word), name in _PATCH_EMBEDDINGS.items():
            if tuple(value.shape) == shape and word in key:
                return seal + name
    blocks = [int(i) for key in tensors if ".lora_" in key for i in re.findall(r"\.(\d+)\.", key)]
    head = tensors.get("decoder.decoder.0.weight")
    if not blocks or head is None or head.ndim != 2:
        return None
    backbone = _ADAPTERS.get((head.shape[1], max(blocks)))
    return backbone and seal + backbone


def _advice(tensors: Mapping[str, Tensor], name: str) -> str:
    other = looks_like(tensors)
    if other == "SEAL omics":
        return "; it is the expression half of a SEAL checkpoint: give the vision file"
    return f"; it looks like {other}" if other and other != name else ""
