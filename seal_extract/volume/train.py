"""Three stages in the loop of `train`: 2D pairs, pairs of other volumes, the volume of interest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from msgspec import structs, to_builtins
from torch import nn

from seal_extract.encoders import Encoder, load_encoder
from seal_extract.errors import UsageError
from seal_extract.genes.gene_lists import read_panel
from seal_extract.train.config import LoopOptions
from seal_extract.train.formats import load_sections
from seal_extract.train.loop import Row, train
from seal_extract.train.pairs import Batches, Pairs
from seal_extract.train.run import MIN_SD, Trained, begin, write_encoder
from seal_extract.train.seal import OmicsModel, new_omics
from seal_extract.train.sections import Section, choose_panel
from seal_extract.volume.config import DepthOptions, VolumeConfig
from seal_extract.volume.model import DepthAggregator, VolumeModel, write_depth
from seal_extract.volume.patches import depth_pairs, flat_pairs
from seal_extract.volume.volume import Volume

PAIRS, FLAT = "2D pairs", DepthOptions(planes=1)
Given = Mapping[str, Sequence[Section]]  # sections by the path of their volume, or ``""`` for 2D pairs


@dataclass(frozen=True)
class Stage:
    """One pass of the loop: its name, its pairs, how long, and what selects the best epoch."""

    name: str
    pairs: Pairs
    epochs: int
    validation: Pairs | None = None


def train_volume(
    config: VolumeConfig,
    *,
    log: Callable[[str], None] = lambda line: None,
    sections: Given | None = None,
    panel: tuple[str, ...] | None = None,
    again: bool = False,
) -> Trained:
    """Train the aggregation over depth, the decoder and, if asked, adapters; write the encoder's folder.

    Args:
        config: from `read_volume_config`, or made in Python.
        log: called with one line per step.
        sections: in place of those that the configuration names.
        panel: the genes, in place of those of the configuration.
        again: write a finished encoder again, from its checkpoints.

    Raises:
        UsageError: options, sections or a checkpoint that do not go together.
        OutputError: the folder holds a finished encoder, or cannot be written.
        TrainingError: the loss is NaN or infinite.
    """
    config, out = begin(config, again)
    given = sections or load_given(config)
    for data in (*config.volumes, config.voi):
        if not given.get(data.volume):
            raise UsageError(f"no section of {data.volume} is named; give one or two with expression")
    own, held_out = given[config.voi.volume], config.voi.validation
    if set(held_out) - {s.name for s in own} or len(held_out) == len(own):
        names = ", ".join(s.name for s in own)
        raise UsageError(
            f"validation is {', '.join(held_out)}; allowed: some of {names}, and not all of them"
        )
    measured = [s for some in given.values() for s in some if s.name not in held_out]
    if panel is None:
        panel = read_panel(config.panel) if config.panel else choose_panel(measured, config.genes)
    torch.manual_seed(config.loop.seed)  # of new weights, all of which are made before any is trained
    encoder = load_encoder(config.encoder, checkpoint=config.checkpoint, precision="float32")
    volume = config.voi.open()
    log(str(volume))
    stages = _stages(config, given, panel, volume, encoder)
    sd = torch.from_numpy(stages[0].pairs.expression.std(0)).clamp_min(MIN_SD)
    options, omics = config.losses, None
    if options.alignment or options.reconstruction:
        omics = OmicsModel(new_omics(encoder.spec.dim, len(panel), config.omics.hidden), sd, config.omics.kl)
        omics = omics.to(encoder.device)
    depth = DepthAggregator(encoder.spec.dim, config.depth)
    model = VolumeModel(encoder, depth, omics, sd, options).to(encoder.device)
    identity = {"config": to_builtins(config), "panel": panel, "base": encoder.identity}

    def run(stage: Stage, module: nn.Module, loop: LoopOptions) -> tuple[Row, ...]:
        log(f"{stage.name}: {stage.pairs}, {stage.epochs} epochs; validation: {stage.validation or 'none'}")
        loop = structs.replace(loop, epochs=stage.epochs, patience=loop.patience if stage.validation else 0)
        held_out = None if stage.validation is None else Batches(stage.validation, len(stage.validation))
        batches = Batches(stage.pairs, config.batch_size, loop.seed)
        rows = train(module, batches, held_out, out / stage.name.replace(" ", "_"), loop, identity=identity)
        log(f"{stage.name}: loss {rows[0]['loss']:.4g} in epoch 1, {rows[-1]['loss']:.4g} in the last")
        return tuple(rows)

    if omics is not None and config.omics.epochs:
        alone = Stage("expression encoder", stages[0].pairs, config.omics.epochs)
        run(alone, omics, structs.replace(config.loop, lr=config.omics.lr))
    for stage in stages:
        model.depth = DepthAggregator(encoder.spec.dim, FLAT) if stage.name == PAIRS else depth
        rows = run(stage, model, config.loop)
    if config.stretch and config.losses.prediction:
        model.stretch(Batches(stages[-1].pairs, config.batch_size).whole())
    write_depth(out, depth)
    write_encoder(
        out,
        config.name,
        model,
        patch_px=config.patch_px,
        mpp=config.patch_mpp,
        licence=config.licence,
        panel=panel,
        training=_summary(config, encoder.spec.name, volume, stages),
    )
    log(f"written: {out}")
    return Trained(out, panel, rows)


def load_given(config: VolumeConfig) -> dict[str, list[Section]]:
    """The sections that a configuration names, by the path of their volume, or ``""`` for 2D pairs."""
    tables = {"": config.pairs} | {data.volume: data.sections for data in (*config.volumes, config.voi)}
    return {key: load_sections(some) for key, some in tables.items() if some}


def _stages(
    config: VolumeConfig, given: Given, panel: tuple[str, ...], volume: Volume, encoder: Encoder
) -> list[Stage]:
    """The stages that have pairs and epochs.

    Raises:
        UsageError: no stage is left.
    """
    patch, own = (config.patch_px, config.patch_mpp), given[config.voi.volume]
    frozen = encoder if config.lora is None else None
    held_out = [s for s in own if s.name in config.voi.validation]

    def deep(places: list[tuple[Volume, Section]]) -> Pairs:
        return depth_pairs(places, panel, config.depth.planes, *patch, smooth=config.smooth, encoder=frozen)

    stages, (flat, others, of_interest) = [], config.epochs
    if given.get("") and flat:
        pairs = flat_pairs(given[""], panel, *patch, smooth=config.smooth, encoder=frozen)
        stages.append(Stage(PAIRS, pairs, flat))
    if config.volumes and others:
        volumes = [(data.open(), given[data.volume]) for data in config.volumes]
        places = [(other, section) for other, some in volumes for section in some]
        stages.append(Stage("other volumes", deep(places), others))
    if of_interest:
        validation = deep([(volume, s) for s in held_out]) if held_out else None
        pairs = deep([(volume, s) for s in own if s not in held_out])
        stages.append(Stage("volume of interest", pairs, of_interest, validation))
    if not stages:
        raise UsageError(f"epochs are {list(config.epochs)} and no stage is left; make one of them above 0")
    return stages


def _summary(config: VolumeConfig, base: str, volume: Volume, stages: Sequence[Stage]) -> dict[str, Any]:
    """What the encoder's folder says of its training; no folder of this machine is named."""
    done = "; ".join(f"{s.name}: {s.pairs}, {s.epochs} epochs" for s in stages)
    text = (
        f"## Training\n\nTrained through {config.depth.planes} planes, {volume.spacing_um:g} µm apart, from "
        f"{base}: {config.variant}. {done}. After the public description of VORTEX (arXiv 2502.17761), whose "
        "sizes, optimiser and epochs are not known.\n"
    )
    return {"summary": text, "config": decisive_options(config), "base": base}


def decisive_options(config: VolumeConfig) -> dict[str, Any]:
    """The options that decide a result, without names, places and data."""
    kept = ("variant", "epochs", "depth", "omics", "seal", "lora", "loop", "batch_size", "smooth", "stretch")
    options = to_builtins(config)
    return {name: options[name] for name in kept}
