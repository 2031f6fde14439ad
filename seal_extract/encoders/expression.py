"""The expression half of a SEAL encoder's vision file: embeddings in, predicted expression out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from seal_extract.encoders.registry import Decoder
from seal_extract.encoders.tower import Shapes
from seal_extract.errors import UsageError

# this module's layers, and what the authors' file calls them
_LAYERS = {"hidden": "decoder.decoder.0", "genes": "decoder.decoder.3"}


class ExpressionDecoder(nn.Module):
    """Linear, ReLU, Linear, ReLU (SEAL, arXiv 2602.14177); without weights until it is filled."""

    def __init__(self, dim: int, shape: Decoder) -> None:
        super().__init__()
        self.shape = shape
        self.hidden = nn.Linear(dim, shape.hidden, device="meta")
        self.genes = nn.Linear(shape.hidden, shape.genes, device="meta")

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, D] to predicted expression [B, G], 0 or above."""
        return self.genes(self.hidden(embeddings).relu()).relu()  # type: ignore[no-any-return]


def decoder_shapes(dim: int, shape: Decoder | None) -> Shapes:
    """Every tensor of a decoder, as `ExpressionDecoder` names it; none without a decoder."""
    if shape is None:
        return {}
    return {key: tuple(value.shape) for key, value in ExpressionDecoder(dim, shape).state_dict().items()}


def official_key(key: str) -> str:
    """The name that the authors' file has for a tensor of `ExpressionDecoder`."""
    layer, _, leaf = key.partition(".")
    return f"{_LAYERS[layer]}.{leaf}"


def own_key(key: str) -> str:
    """The way back from `official_key`."""
    layer, _, leaf = key.rpartition(".")
    return f"{next(own for own, theirs in _LAYERS.items() if theirs == layer)}.{leaf}"


def filled_decoder(dim: int, shape: Decoder | None, tensors: dict[str, Tensor]) -> ExpressionDecoder | None:
    """A decoder over ``tensors``, already checked against `decoder_shapes`; None without a shape."""
    if shape is None:
        return None
    decoder = ExpressionDecoder(dim, shape)
    decoder.load_state_dict(tensors, strict=True, assign=True)
    return decoder.eval().requires_grad_(False)


def as_rows(values: Any, columns: int, what: str, device: torch.device) -> Tensor:
    """Hold numbers to finite [B, columns] and bring them to a device as float32.

    Args:
        values: a tensor or NumPy array, of floats.
        columns: how many there have to be.
        what: for the message, as ``embeddings for seal-conch``.
        device: where they are needed.

    Raises:
        UsageError: another shape or dtype, NaN or infinity.
    """
    rows = torch.as_tensor(values)
    if rows.ndim != 2 or rows.shape[1] != columns or not rows.is_floating_point():
        kind = str(rows.dtype).removeprefix("torch.")
        raise UsageError(f"{what} came as {kind} {list(rows.shape)}; allowed: float [B, {columns}]")
    finite = rows.isfinite().all(1)  # bool [B]
    if not finite.all():
        raise UsageError(f"{what} hold NaN or infinity, first in row {int((~finite).nonzero()[0])}")
    return rows.to(device, torch.float32)


def applied_head(head: nn.Module, embeddings: Any, dim: int, name: str, device: torch.device) -> Tensor:
    """Embeddings float [B, D] of one half of a SEAL encoder through its projection head, float32 [B, P].

    Raises:
        UsageError: another shape or dtype, NaN or infinity.
    """
    rows = as_rows(embeddings, dim, f"embeddings for {name}", device)
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        projected: Tensor = head(rows)
    return projected.clone()
