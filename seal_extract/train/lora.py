"""Low-rank adapters while they are trained; `encoders.lora` merges them afterwards.

Source: Hu et al., arXiv 2106.09685.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from seal_extract.encoders.lora import Update, merge
from seal_extract.errors import UsageError
from seal_extract.train.config import LoraOptions

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_BLOCK = re.compile(r"(.*\bblocks)\.(\d+)\.")


class LoraLinear(nn.Module):
    """base(x) + alpha / r * B A dropout(x); B begins at zero, so that training begins at the base."""

    def __init__(self, base: nn.Linear, options: LoraOptions) -> None:
        super().__init__()
        self.base_layer = base
        self.scale = options.alpha / options.r
        self.dropout = nn.Dropout(options.dropout)
        self.lora_A = nn.Parameter(torch.empty(options.r, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, options.r, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    @property
    def weight(self) -> Tensor:
        """Of the base, for code that looks at a layer's dtype or device."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        low: Tensor = self.dropout(x) @ self.lora_A.T @ self.lora_B.T
        out: Tensor = self.base_layer(x) + self.scale * low
        return out


def add_adapters(tower: nn.Module, options: LoraOptions) -> tuple[str, ...]:
    """Wrap the attention and MLP layers of the last blocks; everything else stays frozen.

    Returns:
        The names of the wrapped layers.

    Raises:
        UsageError: a tower without such blocks.
    """
    found: dict[tuple[str, int], list[str]] = {}
    for name, module in tower.named_modules():
        block = _BLOCK.match(name)
        if block and isinstance(module, nn.Linear) and name.endswith(LAYERS):
            found.setdefault((block[1], int(block[2])), []).append(name)
    last = sorted(found)[-options.blocks :]
    if len(last) < options.blocks:
        raise UsageError(
            f"lora.blocks is {options.blocks}, but the encoder has {len(found)} blocks of {LAYERS}"
        )
    names = tuple(name for block in last for name in found[block])
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(tower.get_submodule(parent), leaf, LoraLinear(_linear(tower, name), options))
    return names


def merge_adapters(tower: nn.Module) -> None:
    """Put plain Linear layers, with the adapters merged into them, back in place."""
    for name, module in list(tower.named_modules()):
        if not isinstance(module, LoraLinear):
            continue
        base = module.base_layer
        update = Update("weight", module.lora_A.detach(), module.lora_B.detach(), module.scale)
        merged = merge({"weight": base.weight.detach()}, [update])["weight"]
        base.weight = nn.Parameter(merged, requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(tower.get_submodule(parent), leaf, base)


def _linear(tower: nn.Module, name: str) -> nn.Linear:
    module = tower.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
