"""A training run through a volume as one TOML file.

VORTEX's stages, losses and variants are known (arXiv 2502.17761); its sizes, optimiser and epochs are not.
Every default here is this package's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta
from msgspec.structs import replace

from seal_extract.errors import UsageError
from seal_extract.patches.grid import MAX_PATCH_PX
from seal_extract.slides.readers import PLAUSIBLE_MPP
from seal_extract.train.config import (
    Count,
    LoraOptions,
    Options,
    Positive,
    RunConfig,
    SealOptions,
    Share,
    Whole,
    Width,
    convert,
    read_toml,
)
from seal_extract.volume.volume import Volume, open_volume


class DepthOptions(Options, frozen=True):
    """Aggregation over depth.

    Attributes:
        planes: neighbouring planes of a patch, itself in the middle; odd. With 1 there is no aggregation.
        width: of the transformer.
        layers: of the transformer.
        heads: of its attention and of the poolers'.
        queries: of the pooler for reconstruction; the one for contrast has one.
        dropout: of the transformer.
    """

    planes: Annotated[int, Meta(ge=1, le=101)] = 3
    width: Width = 128
    layers: Annotated[int, Meta(ge=1, le=32)] = 2
    heads: Count = 4
    queries: Annotated[int, Meta(ge=1, le=256)] = 4
    dropout: Share = 0.1

    def __post_init__(self) -> None:
        if self.planes % 2 == 0:
            raise UsageError(f"planes is {self.planes}; allowed: odd numbers, a plane with its neighbours")
        if self.width % self.heads:
            raise UsageError(f"width is {self.width}; it has to be a multiple of heads, {self.heads}")


class VolumeData(Options, frozen=True):
    """A volume and the sections of it whose expression was measured.

    Attributes:
        volume: as `open_volume` takes it.
        sections: tables as in the configuration of a training run; each name is a plane of the volume.
        validation: names of sections that are held out; their loss selects the best epoch.
        spacing_um: µm between planes, where nothing states it.
        mpp: µm/px, where nothing states it.
        window: of a grey stack.
    """

    volume: str
    sections: tuple[dict[str, Any], ...]
    validation: tuple[str, ...] = ()
    spacing_um: Positive | None = None
    mpp: Positive | None = None
    window: tuple[float, float] | None = None

    def open(self) -> Volume:
        """Open the volume."""
        path = Path(self.volume)
        return open_volume(path, spacing_um=self.spacing_um, mpp=self.mpp, window=self.window)


class VolumeConfig(RunConfig, frozen=True, kw_only=True):
    """A whole run: 2D pairs, pairs of other volumes, then the volume of interest; see also `RunConfig`.

    Attributes:
        voi: the volume of interest with its one or two sections; stage 3.
        pairs: sections of stage 1, as tables; the stage is left out without them.
        volumes: other volumes, of stage 2; likewise.
        variant: ``alignment`` contrasts image and expression and reconstructs the panel; ``regression`` only
            predicts expression.
        genes: size of the panel: the most variable genes that all sections have.
        panel: a file of gene names, in place of those.
        smooth: whether half of each spot's expression is the mean of its neighbours'.
        stretch: whether each gene's prediction gets the spread of the expression that it was trained on.
        patch_px: side of the patches.
        patch_mpp: µm/px of the patches.
        batch_size: pairs in a batch.
        epochs: of the three stages, in place of the loop's; 0 leaves a stage out.
        depth: aggregation over depth.
        seal: the terms of the loss, as in SEAL.
        lora: adapters of the image encoder; without them it stays frozen, and patches are embedded once.
    """

    voi: VolumeData
    pairs: tuple[dict[str, Any], ...] = ()
    volumes: tuple[VolumeData, ...] = ()
    variant: Literal["alignment", "regression"] = "alignment"
    genes: Count = 2000
    panel: str | None = None
    smooth: bool = True
    stretch: bool = True
    patch_px: Annotated[int, Meta(ge=1, le=MAX_PATCH_PX)] = 224
    patch_mpp: Annotated[float, Meta(ge=PLAUSIBLE_MPP[0], le=PLAUSIBLE_MPP[1])] = 0.5
    batch_size: Count = 128
    epochs: tuple[Whole, Whole, Whole] = (10, 10, 10)
    depth: DepthOptions = DepthOptions()
    seal: SealOptions = SealOptions(lora=None)
    lora: LoraOptions | None = None

    @property
    def losses(self) -> SealOptions:
        """The terms of the loss, with the adapters."""
        weights = {"alignment": 0.0, "reconstruction": 0.0} if self.variant == "regression" else {}
        return replace(self.seal, lora=self.lora, **weights)


def read_volume_config(path: Path) -> VolumeConfig:
    """Read and check a TOML file.

    Raises:
        UsageError: as `read_toml` and `convert`.
    """
    values = read_toml(path)
    if isinstance(seal := values.get("seal"), dict) and "lora" in seal:
        raise UsageError(
            f"{path}: adapters are a table of their own here; type [lora] in place of [seal.lora]"
        )
    return convert(values, VolumeConfig, str(path))
