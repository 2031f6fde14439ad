"""One row per encoder: everything that tells it from the others, as data.

A new encoder is a new row; no code here or elsewhere asks for an encoder by name. Importing this module
imports nothing heavy, so that a table of encoders is printed at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from seal_extract.errors import UsageError

PRECISIONS = ("float32", "bfloat16", "float16")
PRECISION_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
POOLINGS = ("cls", "cls+mean", "conch")
FILTERS = ("bilinear", "bicubic")

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Architecture:
    """A timm vision transformer, as JSON could hold it.

    Attributes:
        timm: name of the model function in timm, without weights.
        kwargs: its arguments; layers by their timm names.
    """

    timm: str
    kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class InputRule:
    """What happens to a patch before it is normalised.

    Attributes:
        multiple_of: sides of what the encoder sees, in pixels, are multiples of this.
        resize_px: the shorter side becomes this many pixels and the middle square is kept;
            None leaves the patch at its own size.
        filter: antialiased filter of that resize.
    """

    multiple_of: int
    resize_px: int | None = None
    filter: str = "bicubic"

    def __str__(self) -> str:
        if self.resize_px is None:
            return f"own size, sides a multiple of {self.multiple_of} px"
        return f"resized to {self.resize_px} px, {self.filter}, middle square"


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters, merged at load: W + (alpha / r) B A (Hu et al., arXiv 2106.09685).

    Attributes:
        targets: the adapted Linear layers, as the tower names them.
        r: rank.
        alpha: numerator of the scale.
    """

    targets: tuple[str, ...]
    r: int = 8
    alpha: float = 8.0

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / self.r


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
        ignored: keys that the embedding does not need; one that ends in a dot stands for all below it.
        base: the encoder that a file holding only adapters and decoder was trained on.
        lora: the adapters in the file.
        decoder: the expression head in the file.
    """

    files: tuple[str, ...]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    base: str | None = None
    lora: Lora | None = None
    decoder: Decoder | None = None


@dataclass(frozen=True, repr=False)
class EncoderSpec:
    """Everything known of an encoder before its weights are seen.

    Attributes:
        name: what `load_encoder` is asked for.
        dim: length of an embedding.
        patch_px: side of the patches it was trained on.
        mpp: their µm/px.
        mean: per channel, of RGB in 0..1.
        std: per channel, of RGB in 0..1.
        precision: recommended for computing on a GPU.
        licence: of the weights, as far as its page states one.
        source: repository on the Hub, gated where the authors gate it.
        architecture: the tower.
        pooling: ``cls``; ``cls+mean`` (CLS beside the mean of the patch tokens, registers left out);
            ``conch`` (attentional pooler with one query, then LayerNorm).
        input: from patch to what the tower sees.
        paper: where it is described.
        published: the authors' weight file; None for an encoder in this package's own format.

    Raises:
        UsageError: a value outside what is allowed.
    """

    name: str
    dim: int
    patch_px: int
    mpp: float
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

    def __post_init__(self) -> None:
        _allow("precision", self.precision, PRECISIONS)
        _allow("pooling", self.pooling, POOLINGS)
        _allow("filter", self.input.filter, FILTERS)
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UsageError(f"mean {self.mean} and std {self.std}: three numbers each, std above 0")
        sizes = {
            "dim": self.dim,
            "patch_px": self.patch_px,
            "mpp": self.mpp,
            "multiple_of": self.input.multiple_of,
        }
        for what, value in {**sizes, "resize_px": self.input.resize_px or 1}.items():
            if value <= 0:
                raise UsageError(f"{what} is {value}; allowed: above 0")

    def __repr__(self) -> str:
        return (
            f"EncoderSpec({self.name}: {self.dim} numbers per patch of {self.patch_px} px "
            f"at {self.mpp:g} µm/px, {self.precision}, {self.source or 'local'})"
        )

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


def _seal(base: EncoderSpec, block: str, ignored: tuple[str, ...] = ()) -> EncoderSpec:
    """The SEAL row on ``base``: adapters on four Linear layers of one block, and an expression decoder."""
    prefix = "encoder.base_model.model."
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    return replace(
        base,
        name=f"seal-{base.name}",
        patch_px=224,
        mpp=0.5,
        licence="not stated; of the base: " + base.licence,
        source="MahmoodLab/SEAL",
        paper="arXiv 2602.14177",
        published=Published(
            files=(f"seal_{base.name}_vision.pth", f"{base.name}-seal-vision.pth"),
            prefix=prefix,
            ignored=tuple(prefix + key for key in ignored),
            base=base.name,
            lora=Lora(tuple(f"{block}.{layer}" for layer in layers)),
            decoder=Decoder(),
        ),
    )


# the contrastive projection and the captioning head of CONCH; the embedding stops before them
_CONCH_UNUSED = ("proj_contrast", "attn_pool_caption.", "ln_caption.")

CONCH = EncoderSpec(
    name="conch",
    dim=512,
    patch_px=448,
    mpp=0.5,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    precision="float32",
    licence="CC-BY-NC-ND-4.0",
    source="MahmoodLab/conch",
    architecture=Architecture("vit_base_patch16_224", {"img_size": 448, "dynamic_img_size": True}),
    pooling="conch",
    # as SEAL feeds it; at 448 px this is also what its authors' own transform gives
    input=InputRule(multiple_of=16),
    paper="doi 10.1038/s41591-024-02856-4",
    published=Published(
        files=("pytorch_model.bin",),
        prefix="visual.",
        ignored=(*(f"visual.{key}" for key in _CONCH_UNUSED), "text.", "logit_scale"),
    ),
)

UNIV2 = EncoderSpec(
    name="univ2",
    dim=1536,
    patch_px=224,
    mpp=0.5,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    precision="bfloat16",
    licence="CC-BY-NC-ND-4.0",
    source="MahmoodLab/UNI2-h",
    architecture=Architecture(
        "vit_giant_patch14_224",
        {
            "img_size": 224,
            "patch_size": 14,
            "depth": 24,
            "num_heads": 24,
            "init_values": 1e-5,
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "no_embed_class": True,
            "mlp_layer": "SwiGLUPacked",
            "act_layer": "silu",
            "reg_tokens": 8,
            "dynamic_img_size": True,
        },
    ),
    pooling="cls",
    input=InputRule(multiple_of=14, resize_px=224, filter="bilinear"),
    paper="doi 10.1038/s41591-024-02857-3",
    published=Published(files=("pytorch_model.bin",)),
)

ROWS: dict[str, EncoderSpec] = {
    row.name: row
    for row in (
        _seal(CONCH, "trunk.blocks.11", _CONCH_UNUSED),
        _seal(UNIV2, "blocks.23"),
        CONCH,
        UNIV2,
    )
}


def list_encoders() -> tuple[EncoderSpec, ...]:
    """All encoders that have a name, the SEAL ones first."""
    return tuple(ROWS.values())


def find_spec(name: str) -> EncoderSpec:
    """The row of a name.

    Raises:
        UsageError: no such name; the nearest ones are in the message.
    """
    if name in ROWS:
        return ROWS[name]
    near = get_close_matches(name.lower(), ROWS, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(
        f"there is no encoder {name!r}; {hint}Names: {', '.join(ROWS)}; or give a folder or Hub repository "
        "with config.json and model.safetensors"
    )
