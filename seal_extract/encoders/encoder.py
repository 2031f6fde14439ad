"""The encoder: patches in, embeddings out, and everything one may ask about where it came from."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seal_extract.encoders import folder
from seal_extract.encoders.hub import FoundFile
from seal_extract.encoders.registry import EncoderSpec
from seal_extract.encoders.tower import embed
from seal_extract.encoders.transform import PatchTransform, check_patches, check_sides, fit
from seal_extract.errors import CheckpointError, EncoderError, UsageError


@dataclass(frozen=True)
class WeightFile:
    """A file that weights were read from.

    Attributes:
        source: repository on the Hub, or folder.
        revision: commit of that repository.
        file: its name.
        size: in bytes.
        mtime_ns: when it was last written, in nanoseconds since 1970.
        sha256: of its content, in hex.
    """

    source: str
    revision: str | None
    file: str
    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, found: FoundFile) -> WeightFile:
        """Read the whole file once for its hash.

        Raises:
            CheckpointError: the Hub promised another content.
        """
        digest = hashlib.sha256()
        with found.path.open("rb") as file:
            stat = os.fstat(file.fileno())
            while piece := file.read(2**22):
                digest.update(piece)
        sha256 = digest.hexdigest()
        if found.sha256 not in (None, sha256):
            raise CheckpointError(
                f"{found.path} is damaged: its sha256 begins with {sha256[:12]}, the Hub's with "
                f"{str(found.sha256)[:12]}; delete {found.path.resolve()} and fetch it again"
            )
        return cls(found.source, found.revision, found.path.name, stat.st_size, stat.st_mtime_ns, sha256)


class Encoder(nn.Module):
    """A drop-in patch encoder; made by `load_encoder`.

    TRIDENT reads ``enc_name``, ``precision``, ``eval_transforms`` and ``embedding_dim`` off it; CLAM takes
    ``(encoder, encoder.transform)``.

    Attributes:
        spec: the row.
        weights: the files that the weights came from.
        precision: what `encode` computes in; the weights stay float32.
        transform: PIL image to normalised tensor.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, spec: EncoderSpec, tower: nn.Module, weights: tuple[WeightFile, ...], precision: torch.dtype
    ) -> None:
        super().__init__()
        self.spec, self.weights, self.precision = spec, weights, precision
        self.transform = PatchTransform.of(spec)
        self.tower = tower
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def __repr__(self) -> str:
        files = ", ".join(w.file for w in self.weights) or "no weight file"
        return (
            f"Encoder({self.spec.name}: {self.spec.dim} numbers per patch of {self.spec.patch_px} px at "
            f"{self.spec.mpp:g} µm/px, {self._precision_name} on {self.device}, {files})"
        )

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.mean.device

    @property
    def enc_name(self) -> str:
        """The name, as TRIDENT asks for it."""
        return self.spec.name

    @property
    def embedding_dim(self) -> int:
        """The length of an embedding, as TRIDENT asks for it."""
        return self.spec.dim

    @property
    def eval_transforms(self) -> PatchTransform:
        """The transform, as TRIDENT asks for it."""
        return self.transform

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the embedding of a patch, as JSON: two encoders of equal identity give equal ones."""
        return self.spec.identity([w.sha256 for w in self.weights], self._precision_name)

    @property
    def description(self) -> dict[str, Any]:
        """What is worth recording beside the embeddings, as JSON."""
        return {
            **self.identity,
            "dim": self.spec.dim,
            "trained_patch_px": self.spec.patch_px,
            "trained_mpp": self.spec.mpp,
            "input": str(self.spec.input),
            "licence": self.spec.licence,
            "source": self.spec.source,
            "weights": [asdict(w) for w in self.weights],
            "device": str(self.device),
        }

    @property
    def _precision_name(self) -> str:
        return str(self.precision).removeprefix("torch.")

    def forward(self, images: Tensor) -> Tensor:
        """Embed images that `transform` has made.

        Args:
            images: normalised [B, 3, H, W], on the encoder's device.

        Returns:
            [B, D].

        Raises:
            UsageError: sides that the tower cannot cut into its patches.
        """
        check_sides(images.shape[-2], images.shape[-1], self.spec.input.multiple_of, self.spec.name)
        return embed(self.tower, self.spec.pooling, images)

    def encode(self, patches: Tensor) -> Tensor:
        """Embed patches as they come from a slide: resize, normalise and compute on the encoder's device.

        Args:
            patches: uint8 [B, 3, H, W], RGB, on any device.

        Returns:
            float32 [B, D] on the encoder's device.

        Raises:
            UsageError: another dtype or shape, or sides that the encoder cannot take.
            EncoderError: an embedding holds NaN or infinity; the message names its row in the batch.
        """
        check_patches(patches, self.spec.name)
        if not len(patches):
            return torch.empty(0, self.spec.dim, device=self.device)
        with torch.inference_mode():
            images = fit(patches.to(self.device, non_blocking=True), self.spec.input)
            images = images.float().div(255).sub(self.mean).div(self.std)  # float32 [B, 3, S, S]
            with self._autocast():
                embeddings: Tensor = self(images).float()
        self._check_finite(embeddings)
        return embeddings.clone()  # out of inference mode: one may train on it

    def _autocast(self) -> torch.autocast:
        if self.precision == torch.float32:
            return torch.autocast(self.device.type, enabled=False)
        return torch.autocast(self.device.type, dtype=self.precision)

    def _check_finite(self, embeddings: Tensor) -> None:
        finite = embeddings.isfinite().all(1)  # bool [B]
        if not finite.all():
            rows = (~finite).nonzero()[:, 0].tolist()
            raise EncoderError(
                f"{self.spec.name} in {self._precision_name} gave NaN or infinity for {len(rows)} of "
                f"{len(embeddings)} patches, the first in row {rows[0]} of the batch; try precision='float32'"
            )

    def save_pretrained(self, folder_path: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors``, from which `load_encoder` makes the same encoder.

        Loading that folder is quicker than loading the authors' file: adapters are merged, what the embedding
        does not need is gone, and the weights are mapped from the file. The expression decoder is not kept.

        Args:
            folder_path: made if need be; these two files in it are replaced.

        Raises:
            OutputError: it cannot be written.
            UsageError: it is a file.
        """
        path = Path(folder_path)
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; give a folder")
        folder.write(path, self.spec, self.tower, [asdict(w) for w in self.weights])
