"""The heads of a SEAL encoder (arXiv 2602.14177): the expression decoder and the projection heads.

The decoder predicts gene expression from an embedding. Image and expression embeddings are comparable only
behind the projection heads of both halves; features for slides are the embeddings before the head. A head is
one Linear layer, or Linear layers with ReLU between them; the names of its tensors tell which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from seal_extract.encoders.spec import HEAD, Decoder, Shapes, head_layers
from seal_extract.errors import UsageError

HEAD_KINDS = ("none", "linear", "mlp")
# the tensors of `ExpressionDecoder`, and their names in the authors' file
OFFICIAL_KEYS = {
    "hidden.weight": "decoder.decoder.0.weight",
    "hidden.bias": "decoder.decoder.0.bias",
    "genes.weight": "decoder.decoder.3.weight",
    "genes.bias": "decoder.decoder.3.bias",
}


class ExpressionDecoder(nn.Module):
    """Linear, ReLU, Linear, ReLU; on the meta device until it is filled."""

    def __init__(self, dim: int, shape: Decoder) -> None:
        super().__init__()
        self.shape = shape
        self.hidden = nn.Linear(dim, shape.hidden, device="meta")
        self.genes = nn.Linear(shape.hidden, shape.genes, device="meta")

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, D] to predicted expression [B, G], 0 or above."""
        return self.genes(self.hidden(embeddings).relu()).relu()  # type: ignore[no-any-return]


def decoder_shapes(dim: int, shape: Decoder | None) -> Shapes:
    """Every tensor of an `ExpressionDecoder`, by its name there; empty without a decoder."""
    if shape is None:
        return {}
    return {key: tuple(value.shape) for key, value in ExpressionDecoder(dim, shape).state_dict().items()}


def filled_decoder(dim: int, shape: Decoder | None, tensors: dict[str, Tensor]) -> ExpressionDecoder | None:
    """A decoder that uses ``tensors``, which were checked against `decoder_shapes`; None without a shape."""
    if shape is None:
        return None
    decoder = ExpressionDecoder(dim, shape)
    decoder.load_state_dict(tensors, strict=True, assign=True)
    return decoder.eval().requires_grad_(False)


def head_shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    """Names, without `HEAD`, and shapes of a file's projection head; empty if it has none."""
    return {k.removeprefix(HEAD): tuple(v.shape) for k, v in tensors.items() if k.startswith(HEAD)}


def empty_head(shapes: Mapping[str, tuple[int, ...]], dim: int) -> nn.Module | None:
    """The projection head with tensors of these shapes, on the meta device; None without shapes.

    Raises:
        ValueError: `head_layers` does not accept the shapes.
    """
    modules: list[nn.Module] = []
    for place, (outputs, inputs) in head_layers(shapes, dim).items():
        if modules:
            modules += [nn.ReLU(), *(nn.Identity() for _ in range(place - len(modules) - 1))]
        modules.append(nn.Linear(inputs, outputs, device="meta"))
    if not modules:
        return None
    return modules[0] if "weight" in shapes else nn.Sequential(*modules)


def filled_head(tensors: Mapping[str, Tensor], dim: int) -> nn.Module | None:
    """The projection head of a file that was checked; None if it has none."""
    head = empty_head(head_shapes(tensors), dim)
    if head is not None:
        own = {k.removeprefix(HEAD): v for k, v in tensors.items() if k.startswith(HEAD)}
        head.load_state_dict(own, strict=True, assign=True)
        head.eval().requires_grad_(False)
    return head


def new_head(kind: str, dim: int) -> nn.Module | None:
    """A projection head with new weights, from ``dim`` to ``dim`` numbers; None for the kind "none".

    Raises:
        UsageError: ``kind`` is not one of `HEAD_KINDS`.
    """
    if kind not in HEAD_KINDS:
        raise UsageError(f"projection is {kind!r}; allowed: {', '.join(HEAD_KINDS)}")
    if kind == "mlp":
        return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
    return nn.Linear(dim, dim) if kind == "linear" else None


def as_rows(values: Any, columns: int, what: str, device: torch.device) -> Tensor:
    """Rows of numbers as finite float32 [B, columns] on a device.

    Args:
        values: a tensor or NumPy array of floats.
        columns: the number of columns that is needed.
        what: for the message, for example ``embeddings for seal-conch``.
        device: of the result.

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
