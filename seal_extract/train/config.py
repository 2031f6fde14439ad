"""A training run as one TOML file: every option, with its default and its bounds.

An error names the option, the value that came, and what is allowed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from reprlib import repr as short
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import msgspec.toml
from msgspec import Meta
from msgspec.inspect import LiteralType, StructType, Type, UnionType, type_info
from msgspec.structs import force_setattr, replace

from seal_extract.encoders.locate import is_name, is_repository, is_timm, locate, named_spec
from seal_extract.encoders.spec import check_precision
from seal_extract.errors import UsageError
from seal_extract.genes.gene_lists import read_panel
from seal_extract.patches.grid import MAX_PATCH_PX
from seal_extract.slides.readers import PLAUSIBLE_MPP

T = TypeVar("T")
WORDS = {"Expected": "it has to be", "object": "table", "array": "list", "null": "nothing"}
TRAINING_PRECISIONS = ("float32", "bfloat16", "float16")
LARGEST = 1e9  # of a number in a configuration; infinity is none
Weight = Annotated[float, Meta(ge=0, le=LARGEST)]
Positive = Annotated[float, Meta(gt=0, le=LARGEST)]
Share = Annotated[float, Meta(ge=0, lt=1)]
Whole = Annotated[int, Meta(ge=0, le=2**31)]
Count = Annotated[int, Meta(ge=1, le=2**31)]
Width = Annotated[int, Meta(ge=1, le=2**16)]  # of a layer that is trained


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of options; its types and bounds are checked when it is read from a file."""


class DataOptions(Options, frozen=True):
    """The pairs of patch and expression that a run trains on.

    Attributes:
        sections: one table per source, as `load_sections` takes them: kind, folder, names and so on.
        validation: names of sections that are held out; their loss selects the best epoch.
        genes: size of the panel.
        panel: a file of gene names, in place of the most variable genes.
        patch_px: side of the patches.
        mpp: µm/px of the patches.
        smooth: whether half of each spot's expression is the mean of its neighbours'.
    """

    sections: tuple[dict[str, Any], ...]
    validation: tuple[str, ...] = ()
    genes: Count = 2000
    panel: str | None = None
    patch_px: Annotated[int, Meta(ge=1, le=MAX_PATCH_PX)] = 224
    mpp: Annotated[float, Meta(ge=PLAUSIBLE_MPP[0], le=PLAUSIBLE_MPP[1])] = 0.5
    smooth: bool = True


class OmicsOptions(Options, frozen=True):
    """The expression encoder, and stage 1, which trains it alone.

    Attributes:
        hidden: widths of its two hidden layers.
        kl: weight of the Kullback-Leibler divergence from N(0, 1).
        epochs: of stage 1.
        lr: learning rate of stage 1.
    """

    hidden: tuple[Width, Width] = (1024, 512)
    kl: Weight = 0.0
    epochs: Whole = 10
    lr: Positive = 5e-4


class LoopOptions(Options, frozen=True):
    """The optimiser and its schedule; the defaults are SEAL's.

    Attributes:
        epochs: at most.
        lr: highest learning rate.
        weight_decay: of AdamW.
        warmup: share of all steps in which the learning rate rises.
        accumulate: batches whose gradients are summed for one step.
        precision: ``"float32"``, ``"bfloat16"`` or ``"float16"``, in which the loss is computed.
        clip: largest norm of the gradient.
        patience: epochs without a better validation loss before training stops; 0 never stops early.
        seed: of every random number.
    """

    epochs: Count = 10
    lr: Positive = 1e-4
    weight_decay: Weight = 0.2
    warmup: Share = 0.05
    accumulate: Count = 1
    precision: str = "float32"
    clip: Positive = 1.0
    patience: Whole = 0
    seed: Annotated[int, Meta(ge=0, lt=2**46)] = 42

    def __post_init__(self) -> None:
        force_setattr(self, "precision", full_precision(self.precision))


def full_precision(name: str) -> str | None:
    """The full name of a precision; accelerate's ``no`` is float32."""
    return check_precision("float32" if name == "no" else name, TRAINING_PRECISIONS)


class LoraOptions(Options, frozen=True):
    """Which layers get a low-rank adapter, and its size.

    Attributes:
        blocks: the last so many transformer blocks of the image encoder.
        r: rank.
        alpha: numerator of the scale alpha / r.
        dropout: of the adapter's input, during training.
    """

    blocks: Count = 1
    r: Width = 8
    alpha: Positive = 8.0
    dropout: Share = 0.15


class SealOptions(Options, frozen=True):
    """Stage 2 of SEAL: the terms of its loss and what it trains; the defaults are SEAL's.

    Attributes:
        alignment: weight of the contrast between image and expression.
        reconstruction: weight of the expression reconstructed by the expression encoder.
        prediction: weight of the expression predicted from the image.
        temperature: of the contrast.
        decoder_hidden: width of the image decoder; 0 for a single Linear layer.
        lora: adapters of the image encoder; None (``false`` in TOML) keeps the encoder frozen.
        stain: standard deviation of the colour augmentation.
    """

    alignment: Weight = 1.0
    reconstruction: Weight = 1.0
    prediction: Weight = 1.0
    temperature: Positive = 0.05
    decoder_hidden: Annotated[int, Meta(ge=0, le=2**16)] = 512
    lora: LoraOptions | None = LoraOptions()
    stain: Weight = 0.05

    def __post_init__(self) -> None:
        if not self.alignment + self.reconstruction + self.prediction > 0:
            raise UsageError("alignment, reconstruction and prediction are 0; one of them has to be above 0")


class MultiScaleOptions(Options, frozen=True):
    """Multi-scale alignment: the weights of its three scales.

    Attributes:
        patch: weight of the contrast between a patch and its spot.
        region: weight of the contrast between a region and its spots.
        hierarchy: weight of the distance from each patch to its region.
        temperature: of both contrasts.
        lora: adapters of the image encoder.
        stain: standard deviation of the colour augmentation.
    """

    patch: Weight = 1.0
    region: Weight = 1.0
    hierarchy: Weight = 0.5
    temperature: Positive = 0.05
    lora: LoraOptions = LoraOptions()
    stain: Weight = 0.05

    def __post_init__(self) -> None:
        if not self.patch + self.region > 0:
            raise UsageError("patch and region are 0; one of them has to be above 0")


class BaselineOptions(Options, frozen=True):
    """The methods ``stnet``, ``bleep`` and ``pathomclip``; the defaults are those that are published.

    Attributes:
        train: ``all`` weights of the image encoder, ``lora`` adapters, or ``nothing`` of it.
        lora: the adapters.
        stain: standard deviation of the colour augmentation.
        temperature: of BLEEP's contrast.
        clip_temperature: of PathOmCLIP's contrast; the value at which CLIP begins.
        projection_dim: BLEEP's, of the space of image and expression.
        dropout: of BLEEP's projections.
        nearest: number of spots whose mean is BLEEP's prediction.
        context: of PathOmCLIP's transformer: the true ``neighbours`` of a patch, or the ``batch``, as in
            SEAL's variant.
    """

    train: Literal["all", "lora", "nothing"] = "all"
    lora: LoraOptions = LoraOptions()
    stain: Weight = 0.0
    temperature: Positive = 1.0
    clip_temperature: Positive = 0.07
    projection_dim: Width = 256
    dropout: Share = 0.1
    nearest: Count = 50
    context: Literal["neighbours", "batch"] = "neighbours"


PUBLISHED = ("stnet", "bleep", "pathomclip")  # baselines with a model of their own
BASELINES = {
    "clip": SealOptions(reconstruction=0, prediction=0),  # alignment alone
    "regression": SealOptions(alignment=0, reconstruction=0),  # after ST-Net: expression from the image alone
    "probe": SealOptions(alignment=0, reconstruction=0, lora=None, decoder_hidden=0),  # a frozen encoder
}


class RunConfig(Options, frozen=True):
    """What every training run states.

    Attributes:
        name: of the new encoder.
        encoder: the image encoder to begin with: a name or a folder.
        out: folder of the new encoder, with the checkpoints and curves in it.
        checkpoint: the encoder's official weight file, where it is on this disk.
        licence: of the new encoder.
        omics: the expression encoder.
        loop: the optimiser.
    """

    name: str
    encoder: str
    out: str
    checkpoint: str | None = None
    licence: str = "not stated"
    omics: OmicsOptions = OmicsOptions()
    loop: LoopOptions = LoopOptions()


class TrainConfig(RunConfig, frozen=True, kw_only=True):
    """A whole run; see also `RunConfig`.

    Attributes:
        method: ``seal``, ``multiscale``, or a baseline: ``clip``, ``regression``, ``probe``, ``stnet``,
            ``bleep``, ``pathomclip``.
        batch_size: pairs in a batch; regions in a batch for ``multiscale``.
        projection: heads between the embeddings and the contrast: ``none``, ``linear`` or ``mlp``, as in
            SEAL. Features are the embeddings before them.
        card: further text of its model card, in Markdown: data, citation, limits.
        data: the sections.
        seal: stage 2 of SEAL.
        multiscale: multi-scale alignment.
        baseline: the methods ``stnet``, ``bleep`` and ``pathomclip``.
    """

    data: DataOptions
    method: Literal["seal", "clip", "regression", "probe", "multiscale", "stnet", "bleep", "pathomclip"] = (
        "seal"
    )
    batch_size: Count = 384
    projection: Literal["none", "linear", "mlp"] = "none"
    card: str = ""
    seal: SealOptions = SealOptions()
    multiscale: MultiScaleOptions = MultiScaleOptions()
    baseline: BaselineOptions = BaselineOptions()


def read_config(path: Path) -> TrainConfig:
    """Read and check a TOML file; a baseline fixes the options of ``[seal]``.

    Raises:
        UsageError: as `read_toml` and `convert`; or a baseline with a table ``[seal]``.
    """
    values = read_toml(path)
    for table, option in (
        (values, "checkpoint"),
        (values.get("data"), "panel"),
        (values.get("seal"), "lora"),
    ):
        if isinstance(table, dict) and table.get(option) is False:
            table[option] = None  # which TOML has no word for
    config = convert(values, TrainConfig, str(path))
    if config.method not in BASELINES:
        return config
    if "seal" in values:
        raise UsageError(f"{path}: method {config.method!r} fixes the options of [seal]; leave [seal] out")
    return replace(config, seal=BASELINES[config.method])


def check(config: TrainConfig, names: Sequence[str]) -> None:
    """Check everything that can be checked without reading a section, opening a slide or loading an encoder.

    Args:
        config: the run; its encoder is looked for on this disk only.
        names: of its sections.

    Raises:
        UsageError: an unknown encoder or section; a file that does not exist.
        CheckpointError: a folder that holds no encoder.
    """
    unknown = [name for name in config.data.validation if name not in names]
    if unknown:
        raise UsageError(f"validation names {unknown[0]}, which is none of the sections {', '.join(names)}")
    if not set(names) - set(config.data.validation):
        raise UsageError("every section is for validation; leave some to train on")
    if config.loop.patience and not config.data.validation:
        raise UsageError(
            "patience needs a validation section; name one in [data] validation, or leave patience out"
        )
    if config.method in PUBLISHED and config.projection != "none":
        raise UsageError(
            f"projection is {config.projection!r}; {config.method} has its own way to contrast; leave it out"
        )
    if config.data.panel:
        read_panel(config.data.panel)
    if config.checkpoint is not None and not os.path.exists(Path(config.checkpoint).expanduser()):
        raise UsageError(
            f"checkpoint {config.checkpoint} does not exist; give the weight file of {config.encoder}"
        )
    if is_name(config.encoder) or is_timm(config.encoder):
        named_spec(config.encoder)
    elif os.path.exists(Path(config.encoder).expanduser()) or not is_repository(config.encoder):
        locate(config.encoder, config.checkpoint)


# --- TOML ---------------------------------------------------------------------------------------------


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        UsageError: the file cannot be read, is not TOML, or holds a NUL character.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values: dict[str, Any] = msgspec.toml.decode(text)
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}; give a TOML file") from exc
    except (ValueError, RecursionError) as exc:  # also of bytes that are no UTF-8, of numbers without end
        raise UsageError(f"{path} is not TOML: {exc}") from exc
    if re.search(r"\\u0000|\\U00000000", text):
        raise UsageError(f"{path} holds the character \\u0000; leave it out")
    return values


def convert(values: Any, kind: type[T], where: str, *, strict: bool = True) -> T:
    """Tables as a record.

    Args:
        values: as `read_toml` gives them.
        kind: the class of the record.
        where: the file or table, for messages.
        strict: whether a number has to be one; else it may be text, as in a CSV.

    Raises:
        UsageError: an option is unknown, missing, of another type or out of its bounds.
    """
    try:
        return msgspec.convert(values, kind, strict=strict)
    except msgspec.ValidationError as exc:
        own = isinstance(exc.__cause__, UsageError)  # a rule of the record itself
        message = exc.__cause__ if own else _explained(str(exc), values, type_info(kind))
        raise UsageError(f"{where}: {message}") from exc


def _explained(message: str, value: Any, kind: Type) -> str:
    """Msgspec's message with the value that came, and the names that are allowed there."""
    message, _, place = message.partition(" - at `$")
    place = place.strip(".`")
    for option, row in re.findall(r"([^.\[\]]+)|\[(\d+)\]", place):
        value = value[int(row)] if row else value[option]
        kind = _options(kind).get(option, kind)
    if "unknown field" in message:
        name, names = message.split("`")[1], list(_options(kind))
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        there = f" in {place}" if place else ""
        return f"there is no option {name!r}{there}; {hint}Allowed: {', '.join(names)}"
    if "missing required field" in message:
        return f"{place and place + '.'}{message.split('`')[1]} is missing"
    if isinstance(kind, LiteralType):
        return f"{place} is {short(value)}; allowed: {', '.join(map(str, kind.values))}"
    message = message.replace("`", "").replace(" | ", " or ")
    for word, plain in WORDS.items():
        message = message.replace(word, plain)
    return f"{place or 'the file'} is {short(value)}; {message}"


def _options(kind: Type) -> dict[str, Type]:
    """The options of a table; none of other types."""
    kinds = kind.types if isinstance(kind, UnionType) else (kind,)
    return {f.name: f.type for k in kinds if isinstance(k, StructType) for f in k.fields}
