"""A run, from its configuration to an encoder that `load_encoder` takes: sections, panel, stages, folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from seal_extract.encoders import Encoder, folder, load_encoder
from seal_extract.encoders.heads import ExpressionDecoder
from seal_extract.encoders.hub import upload
from seal_extract.encoders.spec import Decoder
from seal_extract.errors import OutputError
from seal_extract.genes.omics import OmicsEncoder
from seal_extract.genes.panel import read_panel
from seal_extract.train.batches import Batches
from seal_extract.train.config import TrainConfig, check
from seal_extract.train.formats import load_sections
from seal_extract.train.loop import Row, train
from seal_extract.train.lora import merge_adapters
from seal_extract.train.multiscale import MultiScaleModel
from seal_extract.train.pairs import Pairs, make_pairs
from seal_extract.train.seal import OmicsModel, SealModel
from seal_extract.train.sections import Section, choose_panel

MIN_SD = 0.05  # of log1p; a gene that hardly varies would weigh without end in the standardised error
Told = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """What a run has made.

    Attributes:
        path: the encoder's folder.
        panel: the genes that it predicts.
        rows: of the last stage, one per epoch.
    """

    path: Path
    panel: tuple[str, ...]
    rows: tuple[Row, ...]

    def push_to_hub(self, repo_id: str, *, private: bool = True) -> str:
        """Put the encoder with its expression half and its card into a Hub repository.

        Args:
            repo_id: ``owner/name``; made if need be.
            private: of a new repository. Most licences of pathology encoders forbid to publish them again.

        Returns:
            The page of the commit.

        Raises:
            TokenError: no token, or one that may not write there.
            HubError: the Hub is out of reach.
        """
        names = (folder.CONFIG, folder.WEIGHTS, folder.CARD, folder.OMICS)
        with TemporaryDirectory() as place:  # without checkpoints and curves
            for name in names:
                if (self.path / name).is_file():
                    shutil.copy(self.path / name, place)
            return upload(
                Path(place),
                repo_id,
                private=private,
                revision=None,
                message=f"Upload {self.path.name}",
                create_pr=False,
            )


def run(
    config: TrainConfig, *, sections: list[Section] | None = None, tell: Told = lambda line: None
) -> Trained:
    """Train an encoder and write it.

    Args:
        config: from `read_config`, or made by hand.
        sections: in place of those that it names.
        tell: told one line for each thing that happens.

    Raises:
        UsageError: options, sections or a checkpoint that do not go together.
        OutputError: the folder holds a finished encoder, or cannot be written.
        TrainingError: the loss is no number any more.
    """
    out = Path(config.out)
    if (out / folder.CONFIG).exists():
        raise OutputError(f"{out} holds a finished encoder; choose another out, or delete it")
    check(config, [s.name for s in sections] if sections else None)
    sections = sections or load_sections(config.data.sections)
    training = [s for s in sections if s.name not in config.data.validation]
    validation = [s for s in sections if s.name in config.data.validation]
    panel = read_panel(config.data.panel) if config.data.panel else choose_panel(training, config.data.genes)
    pairs = _pairs(training, panel, config)
    held_out = _pairs(validation, panel, config) if validation else None
    tell(f"{pairs}; validation: {held_out or 'none'}")
    torch.manual_seed(config.loop.seed)  # of new weights
    encoder = load_encoder(config.encoder, checkpoint=config.checkpoint, precision="float32")
    sd = torch.from_numpy(pairs.expression.std(0)).clamp_min(MIN_SD)
    options = asdict(config)
    if config.projection == "none":  # as checkpoints were written before there was a choice
        del options["projection"]
    identity = {"config": options, "panel": panel, "base": encoder.identity}

    omics = None
    if _needs_omics(config, pairs):
        omics = OmicsModel(new_omics(encoder.spec.dim, len(panel), config.omics.hidden), sd, config.omics.kl)
        omics = omics.to(encoder.device)
        if config.omics.epochs:
            tell(f"stage 1: the expression encoder, {config.omics.epochs} epochs")
            loop = replace(config.loop, epochs=config.omics.epochs, lr=config.omics.lr)
            batches, others = _both(pairs, held_out, config, regions=False)
            train(omics, batches, others, out / "stage_1", loop, identity=identity, on_epoch=_teller(tell))
    tell(f"stage 2: {config.method}, at most {config.loop.epochs} epochs")
    model = _model(config, encoder, omics, sd, pairs).to(encoder.device)
    regions = config.method == "multiscale"
    batches, others = _both(pairs, held_out, config, regions)
    rows = train(
        model, batches, others, out / "stage_2", config.loop, identity=identity, on_epoch=_teller(tell)
    )
    _write(model, config, pairs, rows)
    tell(f"written: {out}")
    return Trained(out, panel, tuple(rows))


def new_omics(dim: int, genes: int, hidden: tuple[int, ...]) -> OmicsEncoder:
    """An expression encoder with new weights; its flows begin close to the identity."""
    wide, narrow = hidden
    omics = OmicsEncoder("new", dim, genes, hidden=(wide, narrow))
    for name, parameter in omics.flows.named_parameters():
        nn.init.normal_(parameter, std=0.01) if not name.endswith("b") else nn.init.zeros_(parameter)
    return omics


def _pairs(sections: list[Section], panel: tuple[str, ...], config: TrainConfig) -> Pairs:
    data = config.data
    return make_pairs(sections, panel, data.patch_px, data.mpp, smooth=data.smooth)


def _both(
    pairs: Pairs, held_out: Pairs | None, config: TrainConfig, regions: bool
) -> tuple[Batches, Batches | None]:
    batches = Batches(pairs, config.batch_size, config.loop.seed, regions=regions)
    return batches, None if held_out is None else Batches(held_out, len(held_out), regions=regions)


def _needs_omics(config: TrainConfig, pairs: Pairs) -> bool:
    if config.method == "multiscale":
        return pairs.embeddings is None
    return bool(config.seal.alignment or config.seal.reconstruction)


def _model(
    config: TrainConfig, encoder: Encoder, omics: OmicsModel | None, sd: Tensor, pairs: Pairs
) -> SealModel | MultiScaleModel:
    if config.method == "multiscale":
        table_dim = 0 if pairs.embeddings is None else pairs.embeddings.shape[1]
        return MultiScaleModel(encoder, omics, config.multiscale, table_dim, config.projection)
    return SealModel(encoder, omics, sd, config.seal, config.projection)


def _teller(tell: Told) -> Callable[[Row], None]:
    def told(row: Row) -> None:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
        tell(f"epoch {row['epoch']:.0f}: {numbers}")

    return told


def _write(model: SealModel | MultiScaleModel, config: TrainConfig, pairs: Pairs, rows: list[Row]) -> None:
    encoder = model.encoder
    merge_adapters(encoder.tower)
    base = encoder.spec
    spec = replace(
        base,
        name=folder.plain_word(config.name),
        patch_px=config.data.patch_px,
        mpp=config.data.mpp,
        also_mpp=(),
        mpp_basis="stated",
        licence=config.licence,
        source="",
        published=None,
    )
    decoder, genes = None, None
    if isinstance(model, SealModel) and config.seal.prediction:
        decoder, genes = as_expression_decoder(model.decoder), pairs.panel
    omics = model.omics.omics.state_dict() if model.omics is not None else None
    folder.write(
        Path(config.out),
        spec,
        encoder.tower,
        [asdict(w) for w in encoder.weights],
        decoder,
        genes,
        omics,
        _summary(config, base.name, pairs, rows),
        head=encoder.projection,
        merged=encoder.merged,
    )


def as_expression_decoder(decoder: nn.Module) -> ExpressionDecoder:
    """The decoder as an encoder's folder holds it; a Linear layer as relu(W relu(x) - W relu(-x) + b)."""
    if isinstance(decoder, ExpressionDecoder):
        return decoder
    assert isinstance(decoder, nn.Linear)
    genes, dim = decoder.weight.shape
    both = ExpressionDecoder(dim, Decoder(2 * dim, genes))
    eye, weight = torch.eye(dim), decoder.weight.detach().cpu()
    tensors = {
        "hidden.weight": torch.cat([eye, -eye]),
        "hidden.bias": torch.zeros(2 * dim),
        "genes.weight": torch.cat([weight, -weight], dim=1),
        "genes.bias": decoder.bias.detach().cpu(),
    }
    both.load_state_dict(tensors, strict=True, assign=True)
    return both


def _summary(config: TrainConfig, base: str, pairs: Pairs, rows: list[Row]) -> dict[str, Any]:
    last = {k: round(v, 5) for k, v in rows[-1].items()} if rows else {}
    best = min(rows, key=lambda r: r.get("validation", -r["epoch"]), default={})
    text = (
        f"## Training\n\nFinetuned from {base} by `{config.method}` on {len(pairs)} pairs of patch and spot "
        f"of {', '.join(pairs.names)} ({len(set(pairs.patients))} patients), {len(pairs.panel)} genes, "
        f"{pairs.patches.shape[-1]} px at {config.data.mpp:g} µm/px. Epoch {best.get('epoch', 0):.0f} of "
        f"{len(rows)} was kept.\n"
    )
    kept = asdict(config)
    kept["data"].pop("sections")  # folders of this machine
    return {
        "summary": f"{text}\n{config.card}" if config.card else text,
        "config": {k: v for k, v in kept.items() if k not in ("out", "encoder", "checkpoint", "card")},
        "base": base,
        "sections": list(pairs.names),
        "pairs": len(pairs),
        "last_epoch": last,
    }
