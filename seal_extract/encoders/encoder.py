"""The encoder: patches in, embeddings out, with the record of the weight files it was made from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from seal_extract.encoders import folder
from seal_extract.encoders.dense import Grid, attention_of, embed_densely, pack, token_grid
from seal_extract.encoders.files import WeightFile
from seal_extract.encoders.heads import ExpressionDecoder, as_rows
from seal_extract.encoders.precision import LowCopy, arithmetic
from seal_extract.encoders.registry import has_no
from seal_extract.encoders.spec import EncoderSpec
from seal_extract.encoders.tower import embed
from seal_extract.encoders.transform import PatchTransform, check_patches, check_sides, fit, normalise
from seal_extract.errors import EncoderError, UsageError


class Encoder(nn.Module):
    """A drop-in patch encoder, frozen and in evaluation mode; made by `load_encoder`.

    TRIDENT reads ``enc_name``, ``precision``, ``eval_transforms`` and ``embedding_dim`` off it; CLAM takes
    ``(encoder, encoder.transform_for(patch_px))``.

    Attributes:
        spec: the row.
        weights: the files that the weights came from.
        precision: of the computation in `encode`; `set_precision` changes it. The tower stays float32; on a
            GPU `encode` takes the matrices of its layers from a copy in this precision, and those of the
            tower wait on the host until `forward` needs them.
        tf32: whether float32 products round their factors to TF32, on a GPU.
        transform: PIL image to normalised tensor.
        mean: [3, 1, 1], of RGB in 0..1, on the encoder's device.
        std: likewise.
        decoder: predicts expression from embeddings; None if the weight file has no decoder.
        projection: maps embeddings to where they are compared with expression; None if there is no such head.
        merged: the adapters in the weights: ``file``, ``rank``, ``scale`` and ``layers`` of each kind.
    """

    mean: Tensor
    std: Tensor
    decoder: ExpressionDecoder | None
    projection: nn.Module | None

    def __init__(
        self,
        spec: EncoderSpec,
        tower: nn.Module,
        weights: tuple[WeightFile, ...],
        precision: torch.dtype,
        decoder: ExpressionDecoder | None = None,
        projection: nn.Module | None = None,
        merged: Sequence[dict[str, Any]] = (),
    ) -> None:
        super().__init__()
        self.spec, self.weights, self.precision, self.tf32 = spec, weights, precision, False
        self._copy = LowCopy()
        self.transform = PatchTransform.of(spec)
        self.tower = tower
        self.decoder, self.projection = decoder, projection
        self.merged = tuple(merged)
        self._genes: tuple[str, ...] | None = None
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def __repr__(self) -> str:
        files = ", ".join(w.file for w in self.weights) or "no weight file"
        return (
            f"Encoder({self.spec.name}: {self.spec.dim} numbers per patch of {self.spec.trained_at}, "
            f"{self._precision_name} on {self.device}, {files})"
        )

    @property
    def device(self) -> torch.device:
        """The device of the computation."""
        return self.mean.device

    @property
    def enc_name(self) -> str:
        """The name, for TRIDENT."""
        return self.spec.name

    @property
    def embedding_dim(self) -> int:
        """The length of an embedding, for TRIDENT."""
        return self.spec.dim

    @property
    def eval_transforms(self) -> PatchTransform:
        """`transform`, for TRIDENT."""
        return self.transform

    def transform_for(self, patch_px: int) -> PatchTransform:
        """The transform for a tool that passes patches in another pixel size than the encoder shall get.

        For example CLAM: it reads a patch of 224 px at 0.5 µm/px from a slide of 0.25 µm/px as 448 px.

        Args:
            patch_px: side of the patch that the encoder shall get; the ``--patch-px`` of its coordinates.

        Returns:
            `transform`, after the bicubic resize to ``patch_px`` that `extract` makes its patches by.

        Raises:
            UsageError: a side below 1.
        """
        if patch_px < 1:
            raise UsageError(f"patch_px is {patch_px}; allowed: 1 or more, for example {self.spec.patch_px}")
        return replace(self.transform, patch_px=patch_px)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the embedding of a patch, as JSON: equal identity, equal embeddings."""
        return self.spec.identity([w.sha256 for w in self.weights], self._precision_name)

    @property
    def description(self) -> dict[str, Any]:
        """What is recorded beside the embeddings, as JSON."""
        error = self.spec.errors.get(self._precision_name)  # nothing is stated of float32
        stated = {"precision_error": error, "errors_basis": self.spec.errors_basis}
        return {
            **self.identity,
            "dim": self.spec.dim,
            "trained_patch_px": self.spec.patch_px,
            "trained_mpp": self.spec.mpp,
            "input": str(self.spec.input),
            "licence": self.spec.licence,
            **({} if error is None else stated),
            "source": self.spec.source,
            "weights": [asdict(w) for w in self.weights],
            "merged": list(self.merged),
            "projection_head": self.projection is not None,
            "device": str(self.device),
        }

    @property
    def _precision_name(self) -> str:
        return "tf32" if self.tf32 else str(self.precision).removeprefix("torch.")

    def set_precision(self, name: str) -> None:
        """Compute in another precision from now on: one of `PRECISIONS`."""
        self.tf32 = name == "tf32"
        self.precision = torch.float32 if self.tf32 else getattr(torch, name)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images that `transform` has made.

        Args:
            images: normalised [B, 3, H, W], on the encoder's device.

        Returns:
            [B, D].

        Raises:
            UsageError: the tower cannot cut these sides into its patches.
        """
        check_sides(images.shape[-2], images.shape[-1], self.spec.input.multiple_of, self.spec.name)
        return embed(self._copy.float32(self.tower, self.device), self.spec.pooling, images)

    def encode(self, patches: Tensor) -> Tensor:
        """Embed patches of a slide: resize, normalise and compute on the encoder's device.

        Args:
            patches: uint8 [B, 3, H, W], RGB, on any device.

        Returns:
            float32 [B, D] on the encoder's device.

        Raises:
            UsageError: another dtype or shape, or sides that the encoder cannot take.
            EncoderError: an embedding holds NaN or infinity; the message names its row in the batch.
        """
        embeddings = self.encode_unchecked(patches)
        bad = (~embeddings.isfinite().all(1)).nonzero()[:, 0].tolist()
        if bad:
            raise EncoderError(
                f"{self.not_finite} for {len(bad)} of {len(embeddings)} patches, the first in row {bad[0]} "
                "of the batch; try precision='float32'"
            )
        return embeddings.clone()  # out of inference mode, so that one can train on it

    def encode_unchecked(self, patches: Tensor, compute: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """`encode` without waiting for the device: embeddings may hold NaN and must not be changed.

        Args:
            patches: as `encode` takes them.
            compute: does what the method `compute` does, in its place.
        """
        check_patches(patches, self.spec.name)
        with torch.inference_mode():
            if not len(patches):
                return torch.empty(0, self.spec.dim, device=self.device)
            images = fit(patches.to(self.device, non_blocking=True), self.spec.input)
            return (compute or self.compute)(images)

    def compute(self, images: Tensor) -> Tensor:
        """Normalise images and embed them, all on their device.

        Args:
            images: uint8 [B, 3, S, S], as the tower sees them.

        Returns:
            float32 [B, D].
        """
        with self._normalised(images) as normalised:
            return embed(self._computing_tower(), self.spec.pooling, normalised).float()

    def compute_packed(self, images: Tensor) -> Tensor:
        """As `compute`, with the tokens of `encode_tokens` behind each embedding; see `pack`."""
        with self._normalised(images) as normalised:
            embeddings, tokens = embed_densely(self._computing_tower(), self.spec, normalised)
            return pack(embeddings.float(), tokens)

    @contextmanager
    def _normalised(self, images: Tensor) -> Iterator[Tensor]:
        """Images as `normalise` gives them, while the arithmetic is that of `precision`."""
        check_sides(images.shape[-2], images.shape[-1], self.spec.input.multiple_of, self.spec.name)
        with torch.inference_mode(), arithmetic(self.device.type, self.precision, self.tf32):
            yield normalise(images, self.mean, self.std, self.precision)

    def token_grid(self, patch_px: int) -> Grid:
        """Rows, columns and numbers of the tokens of patches of ``patch_px``; see `encode_tokens`."""
        side = self.spec.input.side_px or patch_px
        return token_grid(self.tower, self.spec, side, side)

    def encode_tokens(self, patches: Tensor) -> Tensor:
        """Dense features of patches uint8 [B, 3, H, W], for example for segmentation or registration.

        Returns:
            float32 [B, h, w, C] on the encoder's device: the tokens of the trunk, behind its last norm where
            it has one, in reading order, without class and register tokens; of a CNN or a Swin transformer
            the last feature map. C is the width of the trunk, which may differ from the embedding's.

        Raises:
            UsageError: the encoder has no grid of tokens, or the patches are none that `encode` takes.
            EncoderError: a token holds NaN or infinity.
        """
        return self._dense(patches, lambda *given: embed_densely(*given)[1])

    def attention_maps(self, patches: Tensor) -> Tensor:
        """How much the embedding of patches uint8 [B, 3, H, W] attends to each of their parts.

        Returns:
            float32 [B, heads, h, w] on the encoder's device, with the grid of `encode_tokens`: the attention
            of the class token in the last block, or that of the attentional pooler. With the prefix tokens,
            which are left out, a head sums to 1.

        Raises:
            UsageError: the encoder has neither, or the patches are none that `encode` takes.
            EncoderError: a map holds NaN or infinity.
        """
        return self._dense(patches, attention_of)

    def _dense(self, patches: Tensor, compute: Callable[[nn.Module, EncoderSpec, Tensor], Tensor]) -> Tensor:
        check_patches(patches, self.spec.name)
        with self._normalised(fit(patches.to(self.device), self.spec.input)) as images:
            found = compute(self._computing_tower(), self.spec, images).float()
        if not found.isfinite().all():
            raise EncoderError(f"{self.not_finite}; try precision='float32'")
        return found.clone()

    def _computing_tower(self) -> nn.Module:
        return self._copy.computing(self.tower, self.precision, self.device)

    @property
    def not_finite(self) -> str:
        """The first words of an error message about NaN."""
        return f"{self.spec.name} in {self._precision_name} gave NaN or infinity"

    @property
    def genes(self) -> tuple[str, ...] | None:
        """The gene of each column of `predict_expression`; None until a panel is assigned.

        No gene list of SEAL is published. ``encoder.genes = names`` takes one name per column, raises
        `UsageError` for anything else, and is kept by `save_pretrained`.
        """
        return self._genes

    @genes.setter
    def genes(self, names: Sequence[str] | None) -> None:
        columns = 0 if names is None else self._needed_decoder().shape.genes
        self._genes = None if names is None else folder.check_panel(names, columns, self.spec.name)

    def predict_expression(self, embeddings: Any) -> Tensor:
        """Predict gene expression from embeddings (SEAL, arXiv 2602.14177).

        Args:
            embeddings: float [B, D], tensor or array, from `encode`.

        Returns:
            float32 [B, G], 0 or above, on the encoder's device; `genes` names the columns.

        Raises:
            EncoderError: this encoder has no expression decoder.
            UsageError: another shape or dtype, or NaN.
        """
        return self._through(self._needed_decoder(), embeddings)

    def project(self, embeddings: Any) -> Tensor:
        """Map embeddings to the space where image and expression are compared (SEAL, arXiv 2602.14177).

        Features for slides are the embeddings themselves. Only for a comparison with
        ``omics.encode(expression, project=True)`` both go through their heads.

        Args:
            embeddings: float [B, D], tensor or array, from `encode`.

        Returns:
            float32 [B, P] on the encoder's device.

        Raises:
            EncoderError: this encoder has no projection head.
            UsageError: another shape or dtype, or NaN.
        """
        if self.projection is None:
            raise EncoderError(f"{self.spec.name} has no projection head; compare its embeddings as they are")
        return self._through(self.projection, embeddings)

    def _through(self, head: nn.Module, embeddings: Any) -> Tensor:
        rows = as_rows(embeddings, self.spec.dim, f"embeddings for {self.spec.name}", self.device)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            out: Tensor = head(rows)
        return out.clone()

    def _needed_decoder(self) -> ExpressionDecoder:
        if self.decoder is None:
            raise EncoderError(has_no(self.spec.name, "expression decoder"))
        return self.decoder

    def save_pretrained(self, folder_path: str | os.PathLike[str]) -> None:
        """Write ``config.json``, ``model.safetensors`` and a model card ``README.md``.

        `load_encoder` makes the same encoder from that folder, and faster than from the authors' file:
        adapters are merged, and only the needed weights are in it.

        Args:
            folder_path: created if needed; these three files in it are replaced.

        Raises:
            OutputError: it cannot be written.
            UsageError: it is a file.
        """
        path = Path(folder_path)
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; give a folder")
        origin = [asdict(w) for w in self.weights]
        parts = (self.decoder, self.genes)
        folder.write(path, self.spec, self.tower, origin, *parts, head=self.projection, merged=self.merged)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes to a Hub repository that `load_encoder` can load.

        Args:
            repo_id: ``owner/name``; created if needed.
            private: of a new repository. Most licences of pathology encoders forbid publishing them again.
            revision: branch to commit to; the main branch by default.
            commit_message: names the encoder by default.
            create_pr: open a pull request instead of committing.

        Returns:
            The page of the commit or pull request.

        Raises:
            TokenError: no token, or one that may not write there.
            HubError: the Hub is out of reach.
            OutputError: the files cannot be written to a temporary folder first.
        """
        from seal_extract.encoders.hub import upload

        message = commit_message or f"Add {self.spec.name}"
        with TemporaryDirectory(prefix="seal_extract_") as made:
            self.save_pretrained(made)
            return upload(
                Path(made), repo_id, private=private, revision=revision, message=message, create_pr=create_pr
            )
