"""A training run as one TOML file, every option of it named and checked before the first step."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from seal_extract.encoders.projection import KINDS
from seal_extract.errors import UsageError
from seal_extract.train.loop import LoopOptions
from seal_extract.train.multiscale import MultiScaleOptions
from seal_extract.train.seal import BASELINES, SealOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

METHODS = (*BASELINES, "multiscale")
T = TypeVar("T")


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
        if len(self.hidden) != 2 or min(self.hidden) < 1 or self.epochs < 0 or self.lr <= 0 or self.kl < 0:
            raise UsageError(f"{self}; allowed: two widths, epochs and kl of 0 or more, lr above 0")


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
        if self.projection not in KINDS:
            raise UsageError(f"projection is {self.projection!r}; allowed: {', '.join(KINDS)}")


def read_config(path: Path) -> TrainConfig:
    """Read and check a TOML file; a baseline's terms stand in for those of SEAL.

    Raises:
        UsageError: not TOML, an option that does not exist or is of another type; the nearest name is told.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}; give a TOML file") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} is not TOML: {exc}") from exc
    method = values.get("method", "seal")
    if method in BASELINES and method != "seal":
        if "seal" in values:
            raise UsageError(f"{path}: method {method!r} fixes what [seal] sets; leave [seal] out")
        return dataclasses.replace(_record(TrainConfig, values, str(path)), seal=BASELINES[method])
    return _record(TrainConfig, values, str(path))


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
