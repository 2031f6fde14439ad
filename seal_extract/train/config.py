"""A training run as one TOML file, every option of it named and checked before the first step."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from seal_extract.encoders.locate import is_name, is_repository, is_timm, locate, named_spec
from seal_extract.encoders.spec import HEAD_KINDS, check_precision
from seal_extract.errors import UsageError
from seal_extract.genes.panel import read_panel
from seal_extract.patches.grid import MAX_PATCH_PX
from seal_extract.slides.mpp import PLAUSIBLE_MPP
from seal_extract.train.formats import checked_sources

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEMPERATURE = 0.05  # of SEAL's contrast
WIDEST = 2**16  # layer that is trained
T = TypeVar("T")


def full_precision(name: str) -> str | None:
    """The full name of a precision; what accelerate calls ``no`` is float32.

    Raises:
        UsageError: there is no such precision.
    """
    return check_precision("float32" if name == "no" else name)


@dataclass(frozen=True)
class DataOptions:
    """What is trained on.

    Attributes:
        sections: what `load_sections` takes, one table per source: kind, folder, names and so on.
        validation: names of sections that are left out and tell the best epoch.
        genes: size of the panel.
        panel: a file of gene names in place of the most variable ones.
        patch_px: side of the patches.
        mpp: their µm/px.
        smooth: half of each spot's expression is the mean of its neighbours'.
    """

    sections: tuple[dict[str, Any], ...]
    validation: tuple[str, ...] = ()
    genes: int = 2000
    panel: str | None = None
    patch_px: int = 224
    mpp: float = 0.5
    smooth: bool = True

    def __post_init__(self) -> None:
        least, most = PLAUSIBLE_MPP
        if self.genes < 1 or not 1 <= self.patch_px <= MAX_PATCH_PX or not least <= self.mpp <= most:
            raise UsageError(
                f"genes is {self.genes}, patch_px {self.patch_px}, mpp {self.mpp}; allowed: genes of 1 or "
                f"more, patch_px of 1 to {MAX_PATCH_PX}, mpp of {least} to {most}"
            )


@dataclass(frozen=True)
class OmicsOptions:
    """The expression encoder.

    Attributes:
        hidden: widths of its two hidden layers.
        kl: weight of the divergence from N(0, 1).
        epochs: of stage 1.
        lr: of stage 1.
    """

    hidden: tuple[int, ...] = (1024, 512)
    kl: float = 0.0
    epochs: int = 10
    lr: float = 5e-4

    def __post_init__(self) -> None:
        widths = len(self.hidden) == 2 and 1 <= min(self.hidden) <= max(self.hidden) <= WIDEST
        if not widths or self.epochs < 0 or self.lr <= 0 or self.kl < 0:
            raise UsageError(
                f"{self}; allowed: two widths of 1 to {WIDEST}, epochs and kl of 0 or more, lr above 0"
            )


@dataclass(frozen=True)
class LoopOptions:
    """How a model is trained; the defaults are SEAL's.

    Attributes:
        epochs: at most.
        lr: highest learning rate.
        weight_decay: of AdamW.
        warmup: share of all steps in which the rate rises.
        accumulate: batches of one step.
        precision: ``"float32"``, ``"bfloat16"`` or ``"float16"``, which the loss is computed in.
        clip: longest gradient.
        patience: epochs without a better validation loss before it stops; 0 never stops.
        seed: of everything that is drawn.
    """

    epochs: int = 10
    lr: float = 1e-4
    weight_decay: float = 0.2
    warmup: float = 0.05
    accumulate: int = 1
    precision: str = "float32"
    clip: float = 1.0
    patience: int = 0
    seed: int = 42

    def __post_init__(self) -> None:
        if min(self.epochs, self.accumulate) < 1 or min(self.lr, self.clip) <= 0:
            raise UsageError(f"{self}; allowed: epochs and accumulate of 1 or more, lr and clip above 0")
        object.__setattr__(self, "precision", full_precision(self.precision))
        if not 0 <= self.warmup < 1 or self.patience < 0:
            raise UsageError(f"warmup {self.warmup}, patience {self.patience}; allowed: 0 to 1, 0 or more")
        if self.weight_decay < 0 or not 0 <= self.seed < 2**46:
            raise UsageError(
                f"weight_decay {self.weight_decay}, seed {self.seed}; allowed: 0 or more, 0 to 2**46 - 1"
            )


@dataclass(frozen=True)
class LoraOptions:
    """Which layers are adapted, and how.

    Attributes:
        blocks: the last so many blocks of the tower.
        r: rank.
        alpha: numerator of the scale alpha / r.
        dropout: of the adapter's input, while training.
    """

    blocks: int = 1
    r: int = 8
    alpha: float = 8.0
    dropout: float = 0.15

    def __post_init__(self) -> None:
        if self.blocks < 1 or not 1 <= self.r <= WIDEST or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise UsageError(
                f"{self}; allowed: blocks of 1 or more, r of 1 to {WIDEST}, alpha above 0, dropout 0 to 1"
            )


@dataclass(frozen=True)
class SealOptions:
    """What stage 2 trains, and towards what; the defaults are SEAL's.

    Attributes:
        alignment: weight of the contrast between image and expression.
        reconstruction: weight of the expression that the expression encoder gives back.
        prediction: weight of the expression predicted from the image.
        temperature: of the contrast.
        decoder_hidden: width of the image decoder; 0 for a single Linear layer.
        lora: adapters in the image encoder; None leaves it as it is.
        stain: sd of the colour variation.
    """

    alignment: float = 1.0
    reconstruction: float = 1.0
    prediction: float = 1.0
    temperature: float = TEMPERATURE
    decoder_hidden: int = 512
    lora: LoraOptions | None = field(default_factory=LoraOptions)
    stain: float = 0.05

    def __post_init__(self) -> None:
        weights = (self.alignment, self.reconstruction, self.prediction)
        if min(weights) < 0 or not sum(weights) or self.temperature <= 0:
            raise UsageError(
                f"weights are {weights}, temperature {self.temperature}; allowed: weights of 0 or more, one "
                "of them above, and a temperature above 0"
            )
        if not 0 <= self.decoder_hidden <= WIDEST or self.stain < 0:
            raise UsageError(
                f"decoder_hidden {self.decoder_hidden}, stain {self.stain}; allowed: 0 to {WIDEST}, 0 or more"
            )


@dataclass(frozen=True)
class MultiScaleOptions:
    """Weights of the three scales.

    Attributes:
        patch: of the contrast between a patch and its spot.
        region: of that between a region and its spots.
        hierarchy: of the pull from each patch to its region.
        temperature: of both contrasts.
        lora: adapters in the image encoder.
        stain: sd of the colour variation.
    """

    patch: float = 1.0
    region: float = 1.0
    hierarchy: float = 0.5
    temperature: float = TEMPERATURE
    lora: LoraOptions = field(default_factory=LoraOptions)
    stain: float = 0.05

    def __post_init__(self) -> None:
        weights = (self.patch, self.region, self.hierarchy)
        if min(weights) < 0 or not sum(weights[:2]) or self.temperature <= 0:
            raise UsageError(
                f"weights are {weights}, temperature {self.temperature}; allowed: weights of 0 or more, "
                "patch or region above 0, and a temperature above 0"
            )
        if self.stain < 0:
            raise UsageError(f"stain is {self.stain}; allowed: 0 or more")


BASELINES = {
    "seal": SealOptions(),
    "clip": SealOptions(reconstruction=0, prediction=0),  # alignment alone
    "regression": SealOptions(alignment=0, reconstruction=0),  # after ST-Net: expression from the image alone
    "probe": SealOptions(alignment=0, reconstruction=0, lora=None, decoder_hidden=0),  # a frozen encoder
}
METHODS = (*BASELINES, "multiscale")


@dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    Attributes:
        name: of the encoder that comes out.
        encoder: the one that is finetuned: a name, or a folder.
        checkpoint: its local official weight file.
        method: ``seal``, ``multiscale``, or a baseline: ``clip``, ``regression``, ``probe``.
        out: folder of the encoder, with the checkpoints and curves in it.
        batch_size: pairs of a batch; regions for ``multiscale``.
        projection: what image and expression each go through before they are contrasted: ``none``, ``linear``
            or ``mlp``, as in SEAL; features stay those before it.
        licence: of the result.
        card: what else its card says, in Markdown: data, citation, limits.
        data: the sections.
        omics: the expression encoder.
        seal: stage 2 of SEAL, and baselines.
        multiscale: its weights.
        loop: the optimiser.
    """

    name: str
    encoder: str
    out: str
    data: DataOptions
    checkpoint: str | None = None
    method: str = "seal"
    batch_size: int = 384
    projection: str = "none"
    licence: str = "not stated"
    card: str = ""
    omics: OmicsOptions = field(default_factory=OmicsOptions)
    seal: SealOptions = field(default_factory=SealOptions)
    multiscale: MultiScaleOptions = field(default_factory=MultiScaleOptions)
    loop: LoopOptions = field(default_factory=LoopOptions)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"method is {self.method!r}; allowed: {', '.join(METHODS)}")
        if self.batch_size < 1:
            raise UsageError(f"batch_size is {self.batch_size}; allowed: 1 or more")
        if self.projection not in HEAD_KINDS:
            raise UsageError(f"projection is {self.projection!r}; allowed: {', '.join(HEAD_KINDS)}")


def read_config(path: Path) -> TrainConfig:
    """Read and check a TOML file; a baseline's terms stand in for those of SEAL.

    Raises:
        UsageError: not TOML, an option that does not exist or is of another type; the nearest name is told.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}; give a TOML file") from exc
    except (ValueError, RecursionError) as exc:  # also of bytes that are no UTF-8, of numbers without end
        raise UsageError(f"{path} is not TOML: {exc}") from exc
    method = values.get("method", "seal")
    if method in tuple(BASELINES) and method != "seal":
        if "seal" in values:
            raise UsageError(f"{path}: method {method!r} fixes what [seal] sets; leave [seal] out")
        return dataclasses.replace(_record(TrainConfig, values, str(path)), seal=BASELINES[method])
    return _record(TrainConfig, values, str(path))


def check(config: TrainConfig, names: Sequence[str] | None = None) -> None:
    """Refuse what can be refused before a section is read, a slide opened or an encoder loaded.

    Args:
        config: the run; its encoder is looked for on this disk only.
        names: of sections that are given in place of the config's.

    Raises:
        UsageError: an unknown encoder, section or option of sections; a folder or file that does not exist.
        CheckpointError: a folder that holds no encoder.
    """
    if names is None:
        names = [name for _, _, name, _ in checked_sources(config.data.sections)]
    unknown = [name for name in config.data.validation if name not in names]
    if unknown:
        raise UsageError(f"validation names {unknown[0]}, which is none of the sections {', '.join(names)}")
    if not set(names) - set(config.data.validation):
        raise UsageError("every section is for validation; leave some to train on")
    if config.loop.patience and not config.data.validation:
        raise UsageError(
            "patience needs a validation section; name one in [data] validation, or leave it out"
        )
    if config.data.panel:
        read_panel(config.data.panel)
    if config.checkpoint is not None and not Path(config.checkpoint).expanduser().exists():
        raise UsageError(
            f"checkpoint {config.checkpoint} does not exist; give the weight file of {config.encoder}"
        )
    if is_name(config.encoder) or is_timm(config.encoder):
        named_spec(config.encoder)
    elif Path(config.encoder).expanduser().exists() or not is_repository(config.encoder):
        locate(config.encoder, config.checkpoint)


def _record(kind: type[T], values: Any, where: str) -> T:
    """Fill a dataclass, its parts being tables of the file."""
    if not isinstance(values, dict):
        raise UsageError(f"{where} is {values!r}; it has to be a table")
    hints = get_type_hints(kind)
    for name in values:
        if name not in hints:
            near = get_close_matches(name, hints, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"{where}: there is no option {name!r}; {hint}Allowed: {', '.join(hints)}")
    missing = [
        f.name
        for f in dataclasses.fields(kind)  # type: ignore[arg-type]
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UsageError(f"{where}: {', '.join(missing)} missing")
    return kind(**{name: _value(hints[name], value, f"{where}: {name}") for name, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _record(hint, value, where)  # type: ignore[arg-type]
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{where} is {value}; it has to be a number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UsageError(f"{where} is a number of {value.bit_length()} bits; allowed: less than 2**63")
    if isinstance(value, str) and "\0" in value:
        raise UsageError(f"{where} is {value!r}; leave the \\u0000 out")
    options = [h for h in get_args(hint) if h is not NoneType]
    if getattr(hint, "__origin__", None) is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{where} is {value!r}; it has to be a list")
        return tuple(_value(options[0], v, where) if options[0] is not dict else v for v in value)
    if NoneType in get_args(hint):  # an optional part; false leaves it out
        return None if value is False else _value(options[0], value, where)
    origin = getattr(hint, "__origin__", hint)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, origin) or (isinstance(value, bool) and hint is not bool):
        raise UsageError(f"{where} is {value!r}; it has to be a {origin.__name__}")
    return value
