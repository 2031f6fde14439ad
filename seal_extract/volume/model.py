"""Aggregation over depth, and the model that trains it: a patch is what k neighbouring planes show there.

A small transformer sees the embeddings of the planes with their positions in depth. Two attentional poolers
follow, as in CoCa (arXiv 2205.01917) and by the public description of VORTEX (arXiv 2502.17761): one query
gives the embedding that is contrasted with expression, several give the one that expression is decoded from.
Both are added to the embedding of the middle plane and begin at zero, so that training begins at the 2D path;
that is this package's own choice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from msgspec import to_builtins
from torch import Tensor, nn

from seal_extract.encoders import Encoder, load_encoder
from seal_extract.encoders.checkpoint import check_tensors, read_tensors
from seal_extract.encoders.files import FoundFile, WeightFile
from seal_extract.encoders.folder import as_record, read_json, write_weights
from seal_extract.encoders.heads import ExpressionDecoder
from seal_extract.genes.decoder import GeneDecoder, load_decoder
from seal_extract.publish import publish
from seal_extract.train.config import SealOptions
from seal_extract.train.finetune import embed_patches
from seal_extract.train.pairs import Pairs, TrainBatch
from seal_extract.train.seal import Losses, OmicsModel, SealModel
from seal_extract.train.sections import Expression
from seal_extract.volume.config import DepthOptions

DEPTH, SETTINGS = "depth.safetensors", "depth.json"
ALLOWED = "allowed: a folder that seal-extract volume train wrote"
MOST_STRETCH = 10.0  # of a gene whose prediction hardly varies
ROWS = 256  # patches of one pass, always: another number gives other last bits on a CPU


class DepthAggregator(nn.Module):
    """From the embeddings of k planes to two embeddings of one patch."""

    def __init__(self, dim: int, options: DepthOptions) -> None:
        """Make new weights.

        Args:
            dim: length of an embedding.
            options: with one plane there is nothing to aggregate and no weight.
        """
        super().__init__()
        self.options, self.dim, width = options, dim, options.width
        if options.planes == 1:
            return
        self.enter = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        # positions as large as the embeddings beside them, or attention takes long to tell planes apart
        self.position = nn.Parameter(torch.randn(options.planes, width))
        layer = nn.TransformerEncoderLayer(
            width, options.heads, 2 * width, options.dropout, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, options.layers, nn.LayerNorm(width), False)
        self.queries = nn.Parameter(torch.randn(1 + options.queries, width))
        self.poolers = nn.ModuleList(
            nn.MultiheadAttention(width, options.heads, batch_first=True) for _ in range(2)
        )
        self.contrast = nn.Linear(width, dim)
        self.reconstruction = nn.Linear(options.queries * width, dim)
        for last in (self.contrast, self.reconstruction):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, planes: Tensor) -> tuple[Tensor, Tensor]:
        """[B, k, D] to the embedding to contrast and the one to decode, [B, D] each."""
        middle = planes[:, planes.shape[1] // 2]
        if self.options.planes == 1:
            return middle, middle
        tokens = self.layers(self.enter(planes) + self.position)  # [B, k, W]
        queries = self.queries.expand(len(tokens), -1, -1)
        pooled = [
            pooler(asked, tokens, tokens, need_weights=False)[0].flatten(1)
            for pooler, asked in zip(self.poolers, (queries[:, :1], queries[:, 1:]), strict=True)
        ]
        return middle + self.contrast(pooled[0]), middle + self.reconstruction(pooled[1])

    def decoded_embedding(self, planes: Tensor) -> Tensor:
        """The embedding that expression is decoded from, without gradients, in passes of `ROWS` patches.

        Args:
            planes: float32 [B, k, D].

        Returns:
            float32 [B, D]; with one plane the same bits as it came.
        """
        if self.options.planes == 1:
            return planes[:, 0]
        parts = []
        with torch.inference_mode():
            for part in torch.split(planes, ROWS):
                padded = torch.cat([part, part[-1:].expand(ROWS - len(part), -1, -1)])
                parts.append(self(padded)[1][: len(part)])
        return torch.cat(parts) if parts else planes[:, 0]


class VolumeModel(SealModel):
    """`SealModel` of patches through depth; with one plane the same, bit for bit."""

    def __init__(
        self,
        encoder: Encoder,
        depth: DepthAggregator,
        omics: OmicsModel | None,
        sd: Tensor,
        options: SealOptions,
    ) -> None:
        super().__init__(encoder, omics, sd, options)
        self.depth = depth

    def forward(self, batch: TrainBatch, seed: int | None = None) -> Losses:
        """The weighted terms of the loss.

        Args:
            batch: ``patches`` uint8 [B, k, 3, S, S]; or ``embedding`` float32 [B, k, D], of a frozen encoder.
            seed: of the augmentation of patches, each plane for itself.
        """
        contrasted, decoded = self.depth(self.embed_planes(batch, seed))
        return self.terms(contrasted, decoded, batch)

    def embed_planes(self, batch: TrainBatch, seed: int | None = None) -> Tensor:
        """Embeddings of every plane, [B, k, D]; see `forward`."""
        if batch.embedding is not None:
            return batch.embedding
        flat = embed_patches(self.encoder, batch.patches.flatten(0, 1), self.options.stain, seed)
        return flat.reshape(*batch.patches.shape[:2], -1)

    @torch.no_grad()
    def stretch(self, batches: Iterable[TrainBatch]) -> None:
        """Give predictions, gene by gene, the mean and the spread of the expression in some batches.

        A fit by squared error spreads less than what it is fitted to, which makes its maps flat.
        """
        self.eval()
        decoder = self.decoder
        first, last = (
            (decoder.hidden, decoder.genes) if isinstance(decoder, ExpressionDecoder) else (None, decoder)
        )
        assert isinstance(last, nn.Linear)
        both = []
        for batch in batches:
            rows = self.depth.decoded_embedding(self.embed_planes(batch.to(self.encoder.device)))
            predicted = last(first(rows).relu() if first else rows)
            both.append(torch.stack([predicted, batch.expression.to(predicted.device)]))
        values = torch.cat(both, dim=1)  # float32 [2, N, G]
        (mean, wanted), (sd, wanted_sd) = values.mean(1), values.std(1)
        scale = (wanted_sd / sd.clamp_min(1e-6)).clamp_max(MOST_STRETCH)
        last.weight.mul_(scale[:, None])
        last.bias.sub_(mean).mul_(scale).add_(wanted)


@dataclass(frozen=True)
class VolumeEncoder:
    """What a training through a volume gave: `load_volume_encoder`.

    Attributes:
        encoder: of the single planes.
        depth: aggregates them.
        decoder: predicts expression.
        weights: the file of ``depth``; None with one plane.
    """

    encoder: Encoder
    depth: DepthAggregator
    decoder: GeneDecoder
    weights: WeightFile | None

    @property
    def name(self) -> str:
        """Of the features: that of the image encoder, with the number of planes."""
        return f"{self.encoder.spec.name}-depth{self.depth.options.planes}"

    def predict(self, pairs: Pairs) -> Expression:
        """Expression of pairs with embeddings of this encoder: float32 [N, G], the decoder's genes."""
        assert pairs.embeddings is not None
        planes = torch.from_numpy(pairs.embeddings).to(self.encoder.device)
        return self.decoder.predict(self.depth.decoded_embedding(planes).cpu().numpy())

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides an embedding, as `Encoder.identity`."""
        own = [] if self.weights is None else [self.weights.sha256]
        both = self.encoder.identity["weights"] + own
        return self.encoder.identity | {"name": self.name, "weights": both}

    @property
    def description(self) -> dict[str, Any]:
        """What is recorded beside embeddings, as `Encoder.description`."""
        own = [] if self.weights is None else [asdict(self.weights)]
        both = self.encoder.description["weights"] + own
        return self.encoder.description | {"name": self.name, "weights": both}


def write_depth(path: Path, depth: DepthAggregator) -> None:
    """Write the aggregation into the folder of its encoder.

    Raises:
        OutputError: it cannot be written.
    """
    if depth.options.planes > 1:
        with publish(path / DEPTH) as part:
            write_weights(depth.state_dict(), part)
    with publish(path / SETTINGS) as part:
        part.write_text(json.dumps(to_builtins(depth.options)), encoding="utf-8")


def load_volume_encoder(path: Path, device: str | None = None) -> VolumeEncoder:
    """Load what a training through a volume wrote.

    Raises:
        CheckpointError: the folder is of something else, or damaged.
    """
    options = as_record(
        read_json(path / SETTINGS, ALLOWED), DepthOptions, path / SETTINGS, "a depth", ALLOWED
    )
    encoder = load_encoder(path, device=device, precision="float32")
    depth, file = DepthAggregator(encoder.spec.dim, options), None
    if options.planes > 1:
        tensors = read_tensors(path / DEPTH)
        needed = {key: tuple(value.shape) for key, value in depth.state_dict().items()}
        check_tensors(tensors, needed, (), path / DEPTH, "the aggregation over depth")
        depth.load_state_dict(tensors, strict=True)
        file = WeightFile.of(FoundFile(path / DEPTH, str(path.absolute())))
    depth = depth.to(encoder.device).eval().requires_grad_(False)
    return VolumeEncoder(encoder, depth, load_decoder(path), file)
