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
    for module in tower.modules():
        if type(module) in _MATRICES:
            for parameter in module.parameters(recurse=False):
                held[id(parameter)] = nn.Parameter(parameter.to(precision), requires_grad=False)
    return deepcopy(tower, held)
