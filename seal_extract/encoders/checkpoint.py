"""Reading a weight file without unpickling, and checking that it holds exactly the needed tensors."""

from __future__ import annotations

import pickle
import re
import warnings
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from seal_extract.encoders.files import check_regular
from seal_extract.encoders.spec import COUNTER, Shapes
from seal_extract.errors import CheckpointError

SHOWN = 3  # keys named per kind of complaint


def read_tensors(path: Path, inside: str = "") -> dict[str, Tensor]:
    """Read a ``.pth``, ``.bin`` or ``.safetensors`` file; its first bytes tell the format, not its name.

    Tensors are mapped from the file, not copied; only the format of torch before 1.6 is read as a whole.
    ``{'state_dict': ...}`` is unwrapped, and ``module.`` is removed if all keys begin with it.

    Args:
        path: the file.
        inside: name of a dict in it that holds the tensors, in place of ``state_dict``.

    Raises:
        CheckpointError: missing, cut short, no weight file, or with objects that only code could rebuild.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as exc:
        raise CheckpointError(
            f"cannot read the checkpoint {path}: {exc.strerror}; give the path of a file"
        ) from exc
    zipped = head.startswith(b"PK\x03\x04")
    # the length of the header comes first, and may begin like a pickle
    safetensors = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the weights; type: git lfs pull")
    if not (zipped or safetensors or head.startswith(b"\x80")):
        raise CheckpointError(f"{path} is not a weight file; allowed: .pth or .bin of torch, .safetensors")
    try:
        with warnings.catch_warnings():  # about torch's old format, and about content that is refused anyway
            warnings.simplefilter("ignore", UserWarning)
            content = load_file(path) if safetensors and not zipped else _load_torch(path, mapped=zipped)
    except MemoryError:
        raise
    except pickle.UnpicklingError as exc:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(exc))
        what = f"the object {culprit[1]}" if culprit else "something that is not a tensor"
        raise CheckpointError(
            f"{path} holds {what}; loading it could run code, so nothing was loaded. Allowed: tensors in "
            "plain dicts; ask its author for a state dict or safetensors"
        ) from exc
    except Exception as exc:  # a damaged or hostile file makes the two libraries raise anything
        size, lines = f"{path.stat().st_size:,} bytes", str(exc).strip().splitlines()
        raise CheckpointError(
            f"{path} is damaged, cut short or no state dict ({size}): "
            f"{lines[0][:160] if lines else type(exc).__name__}; fetch it again"
        ) from exc
    return _state_dict(content, path, inside or "state_dict")


def _load_torch(path: Path, mapped: bool) -> Any:
    with torch.serialization.safe_globals(
        [Namespace]
    ):  # in checkpoints of DINO; it holds options and no code
        if path.suffix == ".safetensors":  # newer torch would decide by this name
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _state_dict(content: Any, path: Path, inside: str) -> dict[str, Tensor]:
    if isinstance(content, dict) and isinstance(content.get(inside), dict):
        content = content[inside]
    if not isinstance(content, dict) or not content:
        kind = "an empty dict" if content == {} else f"a {type(content).__name__}"
        raise CheckpointError(f"{path} holds {kind}; allowed: a dict of tensors, or {{'state_dict': ...}}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} holds a {type(value).__name__} under {key!r}; allowed: names and tensors only"
            )
    wrapper = "module." if all(key.startswith("module.") for key in content) else ""
    return {key.removeprefix(wrapper): value.detach() for key, value in content.items()}


def check_tensors(
    tensors: Mapping[str, Tensor],
    needed: Shapes,
    ignored: Collection[str],
    path: Path,
    name: str,
    as_published: Mapping[str, Tensor] | None = None,
    also: Sequence[str] = (),
) -> None:
    """Check that a file holds finite float32 tensors of exactly these names and shapes.

    Args:
        tensors: from `read_tensors`.
        needed: name and shape of each.
        ignored: other names that are allowed; one that ends in a dot stands for all that begin with it.
        path: the file, for the message.
        name: the encoder, for the message.
        as_published: the tensors under the file's own names, if ``tensors`` were renamed; used to recognise
            the encoder that the file belongs to.
        also: complaints that were found before.

    Raises:
        CheckpointError: all errors in one line, with the encoder that the file looks like.
    """
    shared = sorted(needed.keys() & tensors.keys())
    extra = sorted(key for key in tensors.keys() - needed.keys() if not is_ignored(key, ignored))
    resized = [k for k in shared if tuple(tensors[k].shape) != needed[k]]
    complaints = [
        *also,
        complaint("missing", sorted(needed.keys() - tensors.keys())),
        complaint("unexpected", extra),
        complaint(
            "of another shape", [f"{k} {list(tensors[k].shape)}, not {list(needed[k])}" for k in resized]
        ),
        complaint(
            "not plain float32", [f"{k} {_dtype(tensors[k])}" for k in shared if not _is_plain(tensors[k])]
        ),
    ]
    found = "; ".join(c for c in complaints if c)
    if not found:
        bad = complaint("with NaN or infinite numbers", [k for k in shared if not is_finite(tensors[k])])
        found = bad and f"{bad}; fetch the file again"
    if found:
        from seal_extract.encoders.recognise import OMICS, looks_like  # builds towers, and imports timm

        others = looks_like(as_published or tensors)
        if others == (OMICS,):
            found += "; it is the expression half of a SEAL checkpoint: give the vision file"
        elif others and name not in others:
            found += f"; it looks like {' or '.join(others)}"
        raise CheckpointError(f"{path} is not a weight file of {name}: {found}")


def complaint(what: str, keys: list[str]) -> str:
    """How many keys are wrong in one way, and the first of them; empty without keys."""
    if not keys:
        return ""
    more = ", ..." if len(keys) > SHOWN else ""
    return f"{len(keys)} {what} ({', '.join(keys[:SHOWN])}{more})"


def is_ignored(key: str, ignored: Collection[str]) -> bool:
    """Whether a file may hold this key although no embedding needs it."""
    return key.endswith(COUNTER) or any(key.startswith(i) if i.endswith(".") else key == i for i in ignored)


def _dtype(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{tensor.layout} {kind}" if tensor.layout != torch.strided else f"{kind} on {tensor.device}"


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.layout == torch.strided and not tensor.is_meta


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; it needs no memory beside the tensor."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))
