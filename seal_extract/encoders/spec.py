"""What is known of an encoder before its weights are seen: the record that a row of the registry fills.

Importing this module imports nothing heavy, so that a table of encoders is printed at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isclose
from typing import Any

from seal_extract.errors import UsageError

PRECISIONS = ("float32", "bfloat16", "float16")
PRECISION_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
POOLINGS = ("cls", "cls+mean", "conch", "own")
FILTERS = ("bilinear", "bicubic")
MPP_BASES = ("", "stated", "magnification", "convention")
LAYER_NAMES = ("timm", "transformers")
MOST_PX = 2**16  # of any side or length; what is larger was not meant and would take all memory
SAME_MPP = 0.02  # relative; what a slide's own µm/px is off from the round number it is called by


@dataclass(frozen=True)
class Architecture:
    """A timm vision transformer, as JSON could hold it.

    Attributes:
        timm: name of the model function in timm, without weights.
        kwargs: its arguments; layers by their timm names.
        antialias: whether position embeddings are resampled with an antialiased bicubic filter, as timm does,
            or with a plain one, when the patch has another size than they were trained for.
    """

    timm: str
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    antialias: bool = True


@dataclass(frozen=True)
class InputRule:
    """What happens to a patch before it is normalised.

    Attributes:
        multiple_of: sides of what the encoder sees, in pixels, are multiples of this.
        resize_px: the shorter side becomes this many pixels and the middle square is kept;
            None leaves the patch at its own size.
        filter: antialiased filter of that resize.
        crop_px: side of that middle square; by default all of the shorter side.
    """

    multiple_of: int
    resize_px: int | None = None
    filter: str = "bicubic"
    crop_px: int | None = None

    def __str__(self) -> str:
        if self.resize_px is None:
            return f"own size, sides a multiple of {self.multiple_of} px"
        square = f"middle square of {self.crop_px} px" if self.crop_px else "middle square"
        return f"resized to {self.resize_px} px, {self.filter}, {square}"

    @property
    def side_px(self) -> int | None:
        """Side of what the encoder sees; None where that is the patch's own."""
        return self.crop_px or self.resize_px


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters, merged at load: W + (alpha / r) B A (Hu et al., arXiv 2106.09685).

    Which layers are adapted, and with which rank r, is told by the weight file.

    Attributes:
        alpha: numerator of the scale.
        r: the rank that a file beside the weights states; None where none does.
    """

    alpha: float = 8.0
    r: int | None = None


@dataclass(frozen=True)
class Decoder:
    """The head that predicts expression: Linear(dim, hidden), ReLU, Linear(hidden, genes), ReLU."""

    hidden: int = 512
    genes: int = 2000


@dataclass(frozen=True)
class Published:
    """How the authors' own weight file is named and laid out.

    Attributes:
        files: its names on the Hub, the current spelling first.
        prefix: what stands in front of the tower's keys.
        other_prefixes: what stands there in other files of theirs.
        layer_names: whose names the layers have: ``timm``, or ``transformers`` (those of version 4 or of
            version 5, with q, k and v apart).
        ignored: keys that the embedding does not need; one that ends in a dot stands for all below it.
        base: the encoder that a file holding only adapters and decoder was trained on.
        lora: the adapters in the file.
        decoder: the expression head in the file.
        settings: a file beside it that may state something of adapters or input; see `settings`.
        gated: whether the Hub hands it only to accounts that accepted the terms on its page.
        commit: of the repository, at which its files are taken unless another revision is asked for. A row
            that is copied for another repository has to set its own, or None.
        sha256: of the files there, by name, as far as they are known; the beginning of a hash will do.
    """

    files: tuple[str, ...]
    prefix: str = ""
    other_prefixes: tuple[str, ...] = ()
    layer_names: str = "timm"
    ignored: tuple[str, ...] = ()
    base: str | None = None
    lora: Lora | None = None
    decoder: Decoder | None = None
    settings: str | None = None
    gated: bool = False
    commit: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _allow("layer_names", self.layer_names, LAYER_NAMES)
        for file, sha256 in self.sha256.items():
            if not re.fullmatch("[0-9a-f]{12,64}", sha256):
                raise UsageError(f"sha256 of {file} is {sha256!r}; allowed: 12 to 64 hex digits")


@dataclass(frozen=True, repr=False)
class EncoderSpec:
    """Everything known of an encoder before its weights are seen.

    Attributes:
        name: what `load_encoder` is asked for.
        dim: length of an embedding.
        patch_px: side of the patches it was trained on.
        mpp: their µm/px; None where nobody says.
        mean: per channel, of RGB in 0..1.
        std: per channel, of RGB in 0..1.
        precision: recommended for computing on a GPU.
        licence: of the weights, as far as its page states one.
        source: repository on the Hub, gated where the authors gate it.
        architecture: the tower.
        pooling: ``cls``; ``cls+mean`` (CLS beside the mean of the patch tokens, registers left out);
            ``conch`` (attentional pooler with one query, then LayerNorm); ``own`` (timm's model does it).
        input: from patch to what the tower sees.
        paper: where it is described.
        published: the authors' weight file; None for an encoder in this package's own format.
        also_mpp: further µm/px that it was trained at.
        mpp_basis: what ``mpp`` rests on: ``stated`` by the authors, derived from a ``magnification`` that
            they state, or ``convention``; empty where nobody says.

    Raises:
        UsageError: a value outside what is allowed.
    """

    name: str
    dim: int
    patch_px: int
    mpp: float | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: str
    licence: str
    source: str
    architecture: Architecture
    pooling: str
    input: InputRule
    paper: str = ""
    published: Published | None = None
    also_mpp: tuple[float, ...] = ()
    mpp_basis: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", check_precision(self.precision))
        _allow("pooling", self.pooling, POOLINGS)
        _allow("filter", self.input.filter, FILTERS)
        _allow("mpp_basis", self.mpp_basis, MPP_BASES)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UsageError(f"mean {self.mean} and std {self.std}: three numbers each, std above 0")
        sizes = {
            "dim": self.dim,
            "patch_px": self.patch_px,
            "mpp": 1.0 if self.mpp is None else self.mpp,
            "multiple_of": self.input.multiple_of,
        }
        for what, value in {**sizes, "resize_px": self.input.resize_px or 1}.items():
            if not 0 < value <= MOST_PX:
                raise UsageError(f"{what} is {value!s:.20}; allowed: above 0, at most {MOST_PX}")
        if self.input.crop_px is not None and not 0 < self.input.crop_px <= (self.input.resize_px or 0):
            raise UsageError(f"crop_px is {self.input.crop_px}; allowed: above 0, at most resize_px")

    def __repr__(self) -> str:
        return (
            f"EncoderSpec({self.name}: {self.dim} numbers per patch of {self.trained_at}, "
            f"{self.precision}, {self.source or 'local'})"
        )

    @property
    def trained_at(self) -> str:
        """Side and µm/px of the patches it was trained on, in words."""
        if self.mpp is None:
            return f"{self.patch_px} px"
        return f"{self.patch_px} px at {', '.join(f'{m:g}' for m in (self.mpp, *self.also_mpp))} µm/px"

    def mismatch(self, patch_px: int, mpp: float) -> str | None:
        """How patches differ from those it was trained on, as one line to warn with; None where they do not.

        Args:
            patch_px: side of the patches, in pixels.
            mpp: their µm/px; within 2 % counts as the same.
        """
        trained = () if self.mpp is None else (self.mpp, *self.also_mpp)
        same_mpp = not trained or any(isclose(mpp, t, rel_tol=SAME_MPP) for t in trained)
        if patch_px == self.patch_px and same_mpp:
            return None
        asked = f"{patch_px} px at {mpp:g} µm/px"
        return f"{self.name} was trained on patches of {self.trained_at}; these are {asked}"

    def precision_for(self, device: str, asked: str | None = None) -> str:
        """What to compute in on a device type: as asked, or as recommended on a GPU and float32 elsewhere."""
        return asked or (self.precision if device == "cuda" else "float32")

    def identity(self, sha256: Sequence[str], precision: str) -> dict[str, Any]:
        """What decides the embedding of a patch, as JSON: encoders of equal identity give equal ones.

        Args:
            sha256: of the weight files.
            precision: computed in.
        """
        return {
            "name": self.name,
            "weights": list(sha256),
            "precision": precision,
            "input": f"{self.input}; mean {list(self.mean)}, std {list(self.std)}",
            "pooling": self.pooling,
        }

    @property
    def page(self) -> str:
        """The page with the licence, and the gate if there is one; empty without a source."""
        return f"https://huggingface.co/{self.source}" if self.source else ""


def check_precision(asked: str | None) -> str | None:
    """The full name of a precision, or None for none.

    Raises:
        UsageError: there is no such precision.
    """
    name = PRECISION_ALIASES.get(asked, asked) if asked is not None else None
    if name is not None:
        _allow("precision", name, PRECISIONS)
    return name


def _allow(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{what} is {value!r}; allowed: {', '.join(allowed)}")
