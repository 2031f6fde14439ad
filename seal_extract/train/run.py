"""A training run: from its configuration to an encoder's folder, which `load_encoder` takes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from msgspec import structs, to_builtins
from torch import Tensor

from seal_extract.encoders import Encoder, folder, load_encoder
from seal_extract.encoders.hub import upload
from seal_extract.errors import OutputError
from seal_extract.genes.gene_lists import read_panel
from seal_extract.train.baselines import BleepModel, PathOmClipModel, StNetModel
from seal_extract.train.config import PUBLISHED, RunConfig, TrainConfig, check, convert
from seal_extract.train.finetune import merge_adapters
from seal_extract.train.formats import load_sections, names_of
from seal_extract.train.loop import Row, train
from seal_extract.train.multiscale import MultiScaleModel
from seal_extract.train.pairs import Batches, Pairs, make_pairs
from seal_extract.train.seal import OmicsModel, SealModel, as_expression_decoder, new_omics
from seal_extract.train.sections import Section, choose_panel

Model = SealModel | MultiScaleModel | StNetModel | BleepModel | PathOmClipModel
Config = TypeVar("Config", bound=RunConfig)
MIN_SD = 0.05  # of log1p; bounds the weight of genes that hardly vary in the standardised error


@dataclass(frozen=True)
class Trained:
    """The result of a run.

    Attributes:
        path: the encoder's folder.
        panel: the genes that it predicts.
        rows: of the last stage, one per epoch.
    """

    path: Path
    panel: tuple[str, ...]
    rows: tuple[Row, ...]

    def push_to_hub(self, repo_id: str, *, private: bool = True) -> str:
        """Upload the encoder with its expression encoder and its card to a Hub repository.

        Args:
            repo_id: ``owner/name``; created if it does not exist.
            private: whether a new repository is private. Most licences of pathology encoders forbid
                republication.

        Returns:
            The page of the commit.

        Raises:
            TokenError: no token, or one without permission to write there.
            HubError: the Hub cannot be reached.
        """
        names = (folder.CONFIG, folder.WEIGHTS, folder.CARD, folder.OMICS)
        with TemporaryDirectory() as place:  # without checkpoints and curves
            for name in names:
                if (self.path / name).is_file():
                    shutil.copy(self.path / name, place)
            message = f"Upload {self.path.name}"
            return upload(
                Path(place), repo_id, private=private, revision=None, message=message, create_pr=False
            )


def run(
    config: TrainConfig,
    *,
    sections: Sequence[Section] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Train an encoder and write its folder.

    Args:
        config: from `read_config`, or made in Python.
        sections: in place of those that the configuration names.
        log: called with one line per step.

    Raises:
        UsageError: options, sections or a checkpoint that do not go together.
        OutputError: the folder holds a finished encoder, or cannot be written.
        TrainingError: the loss is NaN or infinite.
    """
    config, out = begin(config)
    check(config, [s.name for s in sections] if sections else names_of(config.data.sections))
    sections = sections or load_sections(config.data.sections)
    training = [s for s in sections if s.name not in config.data.validation]
    panel = read_panel(config.data.panel) if config.data.panel else choose_panel(training, config.data.genes)
    pairs = _pairs(training, panel, config)
    held_out = [s for s in sections if s.name in config.data.validation]
    validation = _pairs(held_out, panel, config) if held_out else None
    log(f"{pairs}; validation: {validation or 'none'}")

    torch.manual_seed(config.loop.seed)  # of new weights
    encoder = load_encoder(config.encoder, checkpoint=config.checkpoint, precision="float32")
    sd = torch.from_numpy(pairs.expression.std(0)).clamp_min(MIN_SD)
    options = _options(config)
    if config.projection == "none":  # as checkpoints were written before there was a choice
        del options["projection"]
    identity = {"config": options, "panel": panel, "base": encoder.identity}

    def log_epoch(row: Row) -> None:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
        log(f"epoch {row['epoch']:.0f}: {numbers}")

    omics = None
    if _needs_omics(config, pairs):
        omics = OmicsModel(new_omics(encoder.spec.dim, len(panel), config.omics.hidden), sd, config.omics.kl)
        omics = omics.to(encoder.device)
        if config.omics.epochs:
            log(f"stage 1: the expression encoder, {config.omics.epochs} epochs")
            loop = structs.replace(config.loop, epochs=config.omics.epochs, lr=config.omics.lr)
            both = _batches(pairs, validation, config)
            train(omics, *both, out / "stage_1", loop, identity=identity, on_epoch=log_epoch)

    log(f"stage 2: {config.method}, at most {config.loop.epochs} epochs")
    model = _new_model(config, encoder, omics, sd, pairs).to(encoder.device)
    local = config.method == "pathomclip" and config.baseline.context == "neighbours"
    both = _batches(pairs, validation, config, regions=config.method == "multiscale" or local)
    rows = train(model, *both, out / "stage_2", config.loop, identity=identity, on_epoch=log_epoch)
    if isinstance(model, BleepModel) and both[1] is not None:
        log(f"validation, mean of the nearest spots: r {_nearest_r(model, both[1], both[0]):.3f}")
    predicts = isinstance(model, StNetModel) or (isinstance(model, SealModel) and config.seal.prediction)
    write_encoder(
        out,
        config.name,
        model,
        patch_px=config.data.patch_px,
        mpp=config.data.mpp,
        licence=config.licence,
        panel=pairs.panel if predicts else None,
        training=_summary(config, encoder.spec.name, pairs, rows),
    )
    log(f"written: {out}")
    return Trained(out, panel, tuple(rows))


def begin(config: Config, again: bool = False) -> tuple[Config, Path]:
    """The configuration, checked as one that is read from a file, and the folder of the new encoder.

    Raises:
        UsageError: as `convert`.
        OutputError: the folder holds a finished encoder, and it is not to be made ``again``.
    """
    config = convert(to_builtins(config), type(config), "the configuration")
    out = Path(config.out)
    if (out / folder.CONFIG).exists() and not again:
        raise OutputError(f"{out} holds a finished encoder; choose another out, or delete it")
    return config, out


def _pairs(sections: list[Section], panel: tuple[str, ...], config: TrainConfig) -> Pairs:
    data = config.data
    return make_pairs(sections, panel, data.patch_px, data.mpp, smooth=data.smooth)


def _batches(
    pairs: Pairs, validation: Pairs | None, config: TrainConfig, regions: bool = False
) -> tuple[Batches, Batches | None]:
    batches = Batches(pairs, config.batch_size, config.loop.seed, regions=regions)
    return batches, None if validation is None else Batches(validation, len(validation), regions=regions)


def _options(config: TrainConfig) -> dict[str, Any]:
    """The options as JSON, without the table of methods that were not there when older runs began."""
    options: dict[str, Any] = to_builtins(config)
    if config.method not in PUBLISHED:
        del options["baseline"]
    return options


def _needs_omics(config: TrainConfig, pairs: Pairs) -> bool:
    """Whether an expression encoder is trained."""
    if config.method in ("multiscale", "pathomclip"):
        return pairs.embeddings is None
    if config.method in PUBLISHED:
        return False
    return bool(config.seal.alignment or config.seal.reconstruction)


def _nearest_r(model: BleepModel, validation: Batches, training: Batches) -> float:
    """Mean over genes of Pearson's r of BLEEP's prediction on the validation sections; NaN if none varies."""
    predicted = model.predict(validation, training).cpu()
    both = [rows - rows.mean(0) for rows in (predicted, torch.from_numpy(validation.pairs.expression))]
    r = (both[0] * both[1]).sum(0) / (both[0].norm(dim=0) * both[1].norm(dim=0))
    return float(r[r.isfinite()].mean())


def _new_model(
    config: TrainConfig, encoder: Encoder, omics: OmicsModel | None, sd: Tensor, pairs: Pairs
) -> Model:
    """The model of stage 2."""
    genes, dim = len(pairs.panel), 0 if pairs.embeddings is None else pairs.embeddings.shape[1]
    if config.method == "stnet":
        return StNetModel(encoder, config.baseline, torch.from_numpy(pairs.expression.mean(0)))
    if config.method == "bleep":
        return BleepModel(encoder, config.baseline, genes)
    if config.method == "pathomclip":
        return PathOmClipModel(encoder, omics, config.baseline, genes, dim)
    if config.method == "multiscale":
        return MultiScaleModel(encoder, omics, config.multiscale, dim, config.projection)
    return SealModel(encoder, omics, sd, config.seal, config.projection)


def write_encoder(
    out: Path,
    name: str,
    model: Model,
    *,
    patch_px: int,
    mpp: float,
    licence: str,
    panel: tuple[str, ...] | None,
    training: dict[str, Any],
) -> None:
    """Write an encoder's folder: adapters merged, the decoder with its genes, expression encoder and card.

    Args:
        out: the folder.
        name: of the encoder, a plain word.
        model: trained.
        patch_px: side of the patches it was trained on.
        mpp: µm/px of these patches.
        licence: of the encoder.
        panel: the genes of its decoder; None if that was not trained.
        training: see `folder.write`.
    """
    encoder = model.encoder
    merge_adapters(encoder.tower)
    spec = replace(
        encoder.spec,
        name=folder.plain_word(name),
        patch_px=patch_px,
        mpp=mpp,
        also_mpp=(),
        mpp_basis="stated",
        licence=licence,
        source="",
        published=None,
    )
    decoder, omics = None, None
    if panel is not None and isinstance(model, SealModel | StNetModel):
        decoder = as_expression_decoder(model.decoder)
    # SEAL's variant of PathOmCLIP aligns expression with what leaves its transformer, which no folder holds
    aligned = not isinstance(model, PathOmClipModel) or model.options.context == "neighbours"
    if model.omics is not None and aligned:
        omics = model.omics.omics.state_dict()
    folder.write(
        out,
        spec,
        encoder.tower,
        [asdict(w) for w in encoder.weights],
        decoder,
        panel,
        omics,
        training,
        head=encoder.projection,
        merged=encoder.merged,
    )


def _summary(config: TrainConfig, base: str, pairs: Pairs, rows: list[Row]) -> dict[str, Any]:
    """What the encoder's folder says of its training; no folder of this machine is named."""
    best = min(rows, key=lambda row: row.get("validation", -row["epoch"]))
    text = (
        f"## Training\n\nFinetuned from {base} by `{config.method}` on {len(pairs)} pairs of patch and spot "
        f"of {', '.join(pairs.names)} ({len(set(pairs.patients))} patients), {len(pairs.panel)} genes, "
        f"{pairs.patches.shape[-1]} px at {config.data.mpp:g} µm/px. Epoch {best['epoch']:.0f} of "
        f"{len(rows)} was kept.\n"
    )
    options = _options(config)
    del options["data"]["sections"]
    return {
        "summary": f"{text}\n{config.card}" if config.card else text,
        "config": {k: v for k, v in options.items() if k not in ("out", "encoder", "checkpoint", "card")},
        "base": base,
        "sections": list(pairs.names),
        "pairs": len(pairs),
        "last_epoch": {name: round(value, 5) for name, value in rows[-1].items()},
    }
