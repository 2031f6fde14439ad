"""The record that describes an encoder before its weights are loaded. Importing it imports nothing slow."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isclose
from typing import Any

from seal_extract.errors import UsageError

Shapes = dict[str, tuple[int, ...]]  # of tensors, by name
COUNTER = ".num_batches_tracked"  # of a BatchNorm; no embedding needs it

PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
FASTEST = ("float16", "bfloat16", "tf32")  # on a GPU; of the first two, equally fast, the more exact first
MOST_ERROR = 1e-3  # of an embedding in a precision that is chosen without being asked for
PRECISION_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
POOLINGS = ("cls", "cls+mean", "conch", "map", "own")
FILTERS = ("bilinear", "bicubic")
MPP_BASES = ("", "stated", "magnification", "convention")
LAYER_NAMES = ("timm", "transformers", "dinov2", "open_clip", "titan")
HEAD = "projection_head."  # in front of the projection head's tensors in weight files
MOST_MODULES = 64  # of a projection head, activations included
_HEAD_KEY = re.compile(r"(?:(?P<place>\d{1,3})\.)?(?P<leaf>weight|bias)")
MOST_PX = 2**16  # of any side or length: a larger one is a mistake and would take all memory
SAME_MPP = 0.02  # relative difference between a slide's exact µm/px and the round number it is called by


def _in_range(what: str, values: tuple[int, ...]) -> None:
    if not (0 < len(values) <= MOST_MODULES and all(0 < value <= MOST_PX for value in values)):
        raise UsageError(f"{what} are {values!s:.80}; allowed: 1 to {MOST_MODULES} from 1 to {MOST_PX}")


@dataclass(frozen=True)
class Pooler:
    """An attentional pooler behind the trunk (Yu et al., CoCa, arXiv 2205.01917, section 3.2).

    Attributes:
        heads: of its attention.
        queries: that the weight file holds; the embedding is made from what the first of them gathers.
        bias: whether its projections have biases.
        after_norm: whether it gets the tokens behind the trunk's last LayerNorm, or those before it.
    """

    heads: int = 8
    queries: int = 1
    bias: bool = True
    after_norm: bool = True

    def __post_init__(self) -> None:
        _in_range("heads and queries of a pooler", (self.heads, self.queries))


@dataclass(frozen=True)
class Head:
    """Linear layers that project what was pooled, with GELU between them.

    Attributes:
        widths: the outputs of each layer.
        bias: whether they have biases.
        unit_length: divide the result by its Euclidean norm.
    """

    widths: tuple[int, ...]
    bias: bool = True
    unit_length: bool = False

    def __post_init__(self) -> None:
        _in_range("widths of a head", self.widths)


@dataclass(frozen=True)
class Architecture:
    """A model of timm, in values that JSON can hold, and what its authors have put behind it.

    Attributes:
        timm: name of the model function in timm, without weights.
        kwargs: its arguments; layers are given by their names in timm.
        antialias: whether position embeddings are resampled with antialiasing, as timm does, when the patch
            has another size than they were trained for.
        position_offset: added to the new number of patches a side when positions are resampled without
            antialiasing; DINO's code and what was made from it adds 0.1, which moves every position a little.
        pooler: used with ``conch`` pooling.
        head: of the embedding; None for encoders whose embedding is what was pooled.
    """

    timm: str
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    antialias: bool = True
    position_offset: float = 0.0
    pooler: Pooler = Pooler()
    head: Head | None = None

    def __post_init__(self) -> None:
        if self.position_offset and (self.antialias or not 0 < self.position_offset < 1):
            raise UsageError(f"position_offset is {self.position_offset}; allowed: below 1, antialias false")


@dataclass(frozen=True)
class InputRule:
    """How a patch is resized and cropped before it is normalised.

    Attributes:
        multiple_of: the sides of the image that the encoder gets are multiples of this, in pixels.
        resize_px: the shorter side is resized to this, and the central square is kept; None: no resize.
        filter: of that resize, antialiased.
        crop_px: side of the central square; by default the whole shorter side.
        squash: both sides are resized to ``resize_px``, so that an oblong patch loses its shape and no edge.
    """

    multiple_of: int
    resize_px: int | None = None
    filter: str = "bicubic"
    crop_px: int | None = None
    squash: bool = False

    def __str__(self) -> str:  # part of the identity in every features file: keep the words
        if self.resize_px is None:
            return f"own size, sides a multiple of {self.multiple_of} px"
        if self.squash:
            return f"both sides resized to {self.resize_px} px, {self.filter}"
        square = f"middle square of {self.crop_px} px" if self.crop_px else "middle square"
        return f"resized to {self.resize_px} px, {self.filter}, {square}"

    @property
    def side_px(self) -> int | None:
        """Side of the image that the encoder gets; None: the patch's own side."""
        return self.crop_px or self.resize_px


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters, merged while loading: W + (alpha / r) B A (Hu et al., arXiv 2106.09685).

    The weight file tells which layers have adapters, and their rank r.

    Attributes:
        alpha: numerator of the scale.
        r: the rank that ``config.yaml`` beside the weights states, if there is one.
    """

    alpha: float = 8.0
    r: int | None = None


@dataclass(frozen=True)
class Decoder:
    """Sizes of the expression decoder: Linear(dim, hidden), ReLU, Linear(hidden, genes), ReLU."""

    hidden: int = 512
    genes: int = 2000


@dataclass(frozen=True)
class Published:
    """Name and layout of the authors' own weight file.

    Attributes:
        files: its names on the Hub, the current one first.
        prefix: in front of the keys of the image tower.
        other_prefixes: in front of those keys in other files of the same authors.
        layer_names: the library whose layer names the file uses; "transformers" means those of version 4 or
            5, where q, k and v are separate; "dinov2" means Meta's own code, and "titan" that of TITAN, whose
            pooler has other names.
        renamed: keys that are renamed before all else: patterns of whole keys, and their replacements as
            `re.sub` takes them; the first pattern that fits counts.
        inside: name of the dict in the file that holds the weights, for example of a teacher; by default the
            file itself, or ``state_dict`` in it.
        ignored: keys that the embedding does not need; one that ends in a dot stands for all below it.
        base: the encoder that a file with only adapters and decoder was trained on.
        lora: the adapters in the file.
        decoder: the expression decoder in the file.
        settings: a file beside it that may state the adapters' scale or the input; see `locate`.
        gated: whether the Hub asks for accepted terms before a download.
        commit: of the repository, used unless another revision is asked for. A row that is copied for
            another repository has to set its own, or None.
        sha256: of the files at that commit, by name, where known; 12 or more leading digits are enough.

    Raises:
        UsageError: ``layer_names`` or a sha256 is outside the allowed values.
    """

    files: tuple[str, ...]
    prefix: str = ""
    other_prefixes: tuple[str, ...] = ()
    layer_names: str = "timm"
    renamed: Mapping[str, str] = field(default_factory=dict, hash=False)
    inside: str = ""
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


class TrainedOn:
    """The patches that a model was trained on, by its row."""

    name: str
    patch_px: int
    mpp: float | None
    also_mpp: tuple[float, ...] = ()

    @property
    def trained_at(self) -> str:
        """Side and µm/px of these patches, as text."""
        if self.mpp is None:
            return f"{self.patch_px} px"
        return f"{self.patch_px} px at {', '.join(f'{m:g}' for m in (self.mpp, *self.also_mpp))} µm/px"

    def mismatch(self, patch_px: int, mpp: float) -> str | None:
        """A one-line warning if patches have another side, or differ by over 2 % in µm/px, else None."""
        trained = () if self.mpp is None else (self.mpp, *self.also_mpp)
        same_mpp = not trained or any(isclose(mpp, t, rel_tol=SAME_MPP) for t in trained)
        if patch_px == self.patch_px and same_mpp:
            return None
        asked = f"{patch_px} px at {mpp:g} µm/px"
        return f"{self.name} was trained on patches of {self.trained_at}; these are {asked}"


@dataclass(frozen=True, repr=False)
class EncoderSpec(TrainedOn):
    """All facts about an encoder that are known before its weights are loaded.

    Attributes:
        name: as `load_encoder` takes it.
        dim: length of an embedding.
        patch_px: side of the patches it was trained on.
        mpp: µm/px of those patches; None if nobody states it.
        mean: per channel, of RGB in 0..1.
        std: per channel, of RGB in 0..1.
        precision: recommended for computing on a GPU; see `recommended_precision`.
        licence: of the weights, as their page states it.
        source: repository on the Hub; or the URL of a page, for files that are not on the Hub.
        architecture: of the image tower.
        pooling: ``cls``; ``cls+mean`` (CLS, then the mean of the patch tokens without registers); ``conch``
            (attentional pooler with one query, then LayerNorm); ``map`` (the mean of the one feature map that
            a convolutional network is cut off at); ``own`` (the pooling of timm's model).
        input: resize and crop.
        paper: where it is described.
        published: the authors' weight file; None for an encoder in this package's own format.
        also_mpp: further µm/px that it was trained at.
        mpp_basis: source of ``mpp``: ``stated`` by the authors, derived from a stated ``magnification``, or
            ``convention``; empty if nobody states it.
        errors: of embeddings by precision: the largest |embedding - float32's| / |float32's| that was
            measured, with Euclidean norms.
        errors_basis: how they were measured.

    Raises:
        UsageError: a value is outside the allowed range.
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
    errors: Mapping[str, float] = field(default_factory=dict, hash=False)
    errors_basis: str = ""

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
            "resize_px": self.input.resize_px or 1,
        }
        for what, value in sizes.items():
            if not 0 < value <= MOST_PX:
                raise UsageError(f"{what} is {value!s:.20}; allowed: above 0, at most {MOST_PX}")
        if self.input.crop_px is not None and not 0 < self.input.crop_px <= (self.input.resize_px or 0):
            raise UsageError(f"crop_px is {self.input.crop_px}; allowed: above 0, at most resize_px")

    def __repr__(self) -> str:
        return (
            f"EncoderSpec({self.name}: {self.dim} numbers per patch of {self.trained_at}, "
            f"{self.precision}, {self.source or 'local'})"
        )

    def precision_for(self, device: str, asked: str | None = None) -> str:
        """The precision asked for, else the recommended one on a GPU and float32 on other device types.

        Raises:
            UsageError: tf32, on a device that is no NVIDIA GPU.
        """
        if asked == "tf32" and device != "cuda":
            raise UsageError(f"precision tf32 is of NVIDIA GPUs; type --precision float32 on {device}")
        return asked or (self.precision if device == "cuda" else "float32")

    def identity(self, sha256: Sequence[str], precision: str) -> dict[str, Any]:
        """Everything that decides the embedding of a patch, as JSON: equal identity, equal embeddings.

        Args:
            sha256: of the weight files.
            precision: of the computation.
        """
        return {
            "name": self.name,
            "weights": list(sha256),
            "precision": precision,
            "input": f"{self.input}; mean {list(self.mean)}, std {list(self.std)}",
            "pooling": self.pooling,
        }

    @property
    def layout(self) -> Published:
        """The layout of its weight file; by default that of this package's own format."""
        return self.published or Published(files=("model.safetensors",))

    @property
    def page(self) -> str:
        """The page with licence and terms; empty without a source."""
        return f"https://huggingface.co/{self.source}" if self.on_hub else self.source

    @property
    def on_hub(self) -> bool:
        """Whether its weight file can be fetched; else its user has to fetch it from `page`."""
        return bool(self.source) and not self.source.startswith("https://")


def check_precision(asked: str | None, allowed: tuple[str, ...] = PRECISIONS) -> str | None:
    """The full name of a precision, if it is one of ``allowed``; None stays None.

    Raises:
        UsageError: there is no such precision.
    """
    name = PRECISION_ALIASES.get(asked, asked) if asked is not None else None
    if name is not None:
        _allow("precision", name, allowed)
    return name


def recommended_precision(errors: Mapping[str, float]) -> str:
    """The fastest on a GPU whose error was measured and is at most `MOST_ERROR`; else float32."""
    return next((name for name in FASTEST if errors.get(name, 1.0) <= MOST_ERROR), "float32")


def head_layers(shapes: Mapping[str, tuple[int, ...]], dim: int) -> dict[int, tuple[int, int]]:
    """The Linear layers of a projection head: by place in its Sequential, outputs and inputs.

    Args:
        shapes: of the head's tensors, by name. A single Linear layer has no place; here it gets -1.
        dim: length of the embedding that the head takes.

    Raises:
        ValueError: they are not one Linear layer, or Linear layers with an activation between.
    """
    found: dict[int, Shapes] = {}
    for key, shape in shapes.items():
        match = _HEAD_KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{HEAD}{key} is of no Linear layer")
        found.setdefault(-1 if match["place"] is None else int(match["place"]), {})[match["leaf"]] = shape
    places, layers = sorted(found), {}
    separated = all(b - a > 1 for a, b in pairwise(places))
    if places not in ([], [-1]) and not (places[0] == 0 and separated and places[-1] < MOST_MODULES):
        raise ValueError(f"{HEAD}* has layers {places}; allowed: from 0 on, with an activation between")
    for place in places:
        rows = found[place].get("weight", ())[:1]
        if found[place] != {"weight": (*rows, dim), "bias": rows} or not rows:
            raise ValueError(f"{HEAD}{'' if place < 0 else place} has {found[place]}, not {dim} columns")
        layers[place] = (rows[0], dim)
        dim = rows[0]
    return layers


def _allow(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{what} is {value!r}; allowed: {', '.join(allowed)}")
