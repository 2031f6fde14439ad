"""The projection heads of a SEAL encoder (arXiv 2602.14177): image and expression are compared behind them.

Features are the backbone's; each half has a head of its own or none. A head is one Linear layer, or a
multi-layer perceptron: Linear layers with ReLU between them. Its tensors say which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

from torch import Tensor, nn

from seal_extract.encoders.folder import HEAD, HEAD_KINDS
from seal_extract.encoders.tower import Shapes
from seal_extract.errors import UsageError

MOST_MODULES = 64  # of a perceptron, activations included
_KEY = re.compile(r"(?:(?P<place>\d{1,3})\.)?(?P<leaf>weight|bias)")


def head_shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    """Name, without `HEAD`, and shape of each tensor of a file's head; empty where it has none."""
    return {k.removeprefix(HEAD): tuple(v.shape) for k, v in tensors.items() if k.startswith(HEAD)}


def empty_head(shapes: Shapes, dim: int) -> nn.Module | None:
    """The head with tensors of these names and shapes, on the meta device; None where there are none.

    Args:
        shapes: from `head_shapes`.
        dim: length of the embedding that it takes.

    Raises:
        ValueError: they are not those of a Linear layer, or of Linear layers with one activation between.
    """
    if not shapes:
        return None
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{HEAD}{key} is of no Linear layer")
        layers.setdefault(-1 if match["place"] is None else int(match["place"]), {})[match["leaf"]] = shape
    places, width = sorted(layers), dim
    modules: list[nn.Module] = []
    apart = all(b - a > 1 for a, b in pairwise(places))
    if places != [-1] and not (places[0] == 0 and apart and places[-1] < MOST_MODULES):
        raise ValueError(f"{HEAD}* has layers {places}; allowed: from 0 on, with an activation between")
    for place in places:
        rows = layers[place].get("weight", ())[:1]
        if layers[place] != {"weight": (*rows, width), "bias": rows} or not rows:
            raise ValueError(f"{HEAD}{'' if place < 0 else place} has {layers[place]}, not {width} columns")
        activation = [nn.ReLU(), *(nn.Identity() for _ in range(place - len(modules) - 1))] if modules else []
        modules += [*activation, nn.Linear(width, rows[0], device="meta")]
        width = rows[0]
    return modules[0] if places == [-1] else nn.Sequential(*modules)


def filled_head(tensors: Mapping[str, Tensor], dim: int) -> nn.Module | None:
    """The head of a file, whose tensors have been checked, over those tensors; None where it has none."""
    head = empty_head(head_shapes(tensors), dim)
    if head is not None:
        own = {k.removeprefix(HEAD): v for k, v in tensors.items() if k.startswith(HEAD)}
        head.load_state_dict(own, strict=True, assign=True)
        head.eval().requires_grad_(False)
    return head


def new_head(kind: str, dim: int) -> nn.Module | None:
    """A head with new weights, of one of `HEAD_KINDS`, from and to ``dim`` numbers.

    Raises:
        UsageError: there is no such kind.
    """
    if kind not in HEAD_KINDS:
        raise UsageError(f"projection is {kind!r}; allowed: {', '.join(HEAD_KINDS)}")
    if kind == "mlp":
        return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
    return nn.Linear(dim, dim) if kind == "linear" else None
