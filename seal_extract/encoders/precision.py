"""The precision of a computation: of the matrices of a tower's layers, and of float32 products on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

# the arithmetic of float32 on NVIDIA GPUs: by default cuDNN's convolutions round their factors to TF32
_cudnn: Any = torch.backends.cudnn
FLOAT32_OF: tuple[Any, ...] = (torch.backends.cuda.matmul, _cudnn.conv, _cudnn.rnn)


@contextmanager
def arithmetic(device: str, precision: torch.dtype, tf32: bool) -> Iterator[None]:
    """Lower precision where autocast has it; and float32 as ``tf32`` says, whatever the process has set."""
    lower = precision != torch.float32
    with torch.autocast(device, dtype=precision if lower else None, enabled=lower):
        if device != "cuda":
            yield
            return
        before = [backend.fp32_precision for backend in FLOAT32_OF]
        try:
            for backend in FLOAT32_OF:
                backend.fp32_precision = "tf32" if tf32 else "ieee"
            yield
        finally:
            for backend, value in zip(FLOAT32_OF, before, strict=True):
                backend.fp32_precision = value


# of other classes the weights are computed with before they are multiplied, so they stay as they are
_MATRICES = (nn.Linear, nn.Conv2d, nn.MultiheadAttention, NonDynamicallyQuantizableLinear)


def in_precision(tower: nn.Module, precision: torch.dtype) -> nn.Module:
    """A copy of a tower whose layers hold the matrices that they multiply by in a lower precision.

    All else (class token, positions, LayerNorm, LayerScale) is shared with ``tower``. Under autocast the copy
    gives the same bits as ``tower``, which would convert its matrices in every forward pass.
    """
    held: dict[int, Any] = {id(tensor): tensor for tensor in (*tower.parameters(), *tower.buffers())}
    for matrix in _matrices(tower):
        held[id(matrix)] = nn.Parameter(matrix.to(precision), requires_grad=False)
    return deepcopy(tower, held)


class LowCopy:
    """The copy of a tower in a lower precision, which a GPU holds instead of the tower's own matrices."""

    def __init__(self) -> None:
        self.held: tuple[object, nn.Module] | None = None

    def computing(self, tower: nn.Module, precision: torch.dtype, device: torch.device) -> nn.Module:
        """The tower, or on a GPU its copy in a lower precision; the matrices then wait on the host."""
        if precision == torch.float32 or device.type == "cpu":  # where the copy is not faster
            return self.float32(tower, device)
        if self.held is None or self.held[0] != (precision, device):
            self.held = ((precision, device), in_precision(self.float32(tower, device), precision))
            move_matrices(tower, torch.device("cpu"))
        return self.held[1]

    def float32(self, tower: nn.Module, device: torch.device) -> nn.Module:
        """The tower, on its device again."""
        if self.held is not None:
            self.held = None  # frees its memory first
            move_matrices(tower, device)
        return tower


def move_matrices(tower: nn.Module, device: torch.device) -> None:
    """Move the matrices of which `in_precision` makes copies."""
    with torch.inference_mode(False):  # in which tensors would be made that cannot be trained
        for matrix in _matrices(tower):
            matrix.data = matrix.data.to(device)


def _matrices(tower: nn.Module) -> Iterator[nn.Parameter]:
    for module in tower.modules():
        if type(module) in _MATRICES:
            yield from module.parameters(recurse=False)
