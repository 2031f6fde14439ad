"""SEAL's expression encoder: a variational autoencoder of genes whose latents lie in the image space.

Source: SEAL (arXiv 2602.14177); planar flows after Rezende and Mohamed (arXiv 1505.05770, equation 10).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seal_extract.encoders.build import pick_device
from seal_extract.encoders.checkpoint import check_tensors, read_tensors
from seal_extract.encoders.files import FoundFile, WeightFile
from seal_extract.encoders.folder import CONFIG, OMICS, check_panel, read_config, read_contents
from seal_extract.encoders.heads import as_rows, empty_head, head_shapes
from seal_extract.encoders.hub import fetch
from seal_extract.encoders.locate import fetch_published, is_repository, local_file
from seal_extract.encoders.registry import bundled, find_spec, has_no
from seal_extract.errors import CheckpointError, UsageError
from seal_extract.genes.decoder import named_genes

HIDDEN = (1024, 512)
FLOWS = 3
_COUNTERS = tuple(f"encoder.{i}.num_batches_tracked" for i in (1, 5))  # used in training only


class PlanarFlow(nn.Module):
    """The map z + u tanh(w . z + b)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.u, self.w = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))
        self.b = nn.Parameter(torch.empty(1))

    def forward(self, z: Tensor) -> Tensor:
        """[B, D] to [B, D]."""
        return z + self.u * torch.tanh(z @ self.w + self.b)[:, None]

    def log_det(self, z: Tensor) -> Tensor:
        """Log determinant of the Jacobian, log |1 + u . w (1 - tanh^2(w . z + b))|: [B, D] to [B]."""
        slope = 1 - torch.tanh(z @ self.w + self.b).square()
        return (1 + slope * (self.u @ self.w)).abs().clamp_min(1e-6).log()


class OmicsEncoder(nn.Module):
    """Maps expression to embeddings and back; made by `load_omics`. Its modules have the names of the file.

    Attributes:
        name: name of the SEAL encoder that it is the expression half of, or of the file.
        dim: length of an embedding.
        n_genes: number of genes.
        weights: the weight file; None before training.
        hidden: widths of the two hidden layers, the outer one first.
        projection_head: the head that ``encode(project=True)`` applies; None if the file has none.
    """

    def __init__(
        self,
        name: str,
        dim: int,
        n_genes: int,
        weights: WeightFile | None = None,
        hidden: tuple[int, int] = HIDDEN,
        projection_head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.name, self.dim, self.n_genes, self.weights, self.hidden = name, dim, n_genes, weights, hidden
        self._genes: tuple[str, ...] | None = None
        wide, narrow = hidden
        self.encoder = nn.Sequential(
            *(nn.Linear(n_genes, wide), nn.BatchNorm1d(wide), nn.ReLU(), nn.Identity()),
            *(nn.Linear(wide, narrow), nn.BatchNorm1d(narrow), nn.ReLU()),
        )
        self.fc_mu, self.fc_logvar = nn.Linear(narrow, dim), nn.Linear(narrow, dim)
        self.flows = nn.Sequential(*(PlanarFlow(dim) for _ in range(FLOWS)))
        self.decoder = nn.Sequential(
            *(nn.Linear(dim, narrow), nn.ReLU()),
            *(nn.Linear(narrow, wide), nn.ReLU(), nn.Identity()),
            nn.Linear(wide, n_genes),
        )
        self.projection_head = projection_head
        self.eval().requires_grad_(False)

    def __repr__(self) -> str:
        return f"OmicsEncoder({self.name}: {self.n_genes} genes to {self.dim} numbers, on {self.device})"

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.fc_mu.weight.device

    @property
    def genes(self) -> tuple[str, ...] | None:
        """The gene of each column; None until a panel is set, because SEAL's panel is not published.

        Setting it raises a `UsageError` unless there is one name per column.
        """
        return self._genes

    @genes.setter
    def genes(self, names: Sequence[str] | None) -> None:
        self._genes = None if names is None else check_panel(names, self.n_genes, self.name)

    def named(self) -> tuple[str, ...]:
        """The gene of each column.

        Raises:
            UsageError: no panel is set.
        """
        return named_genes(self._genes, self.n_genes, self.name)

    def latent(self, expression: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent, with gradients: float32 [B, G] to two [B, D]."""
        hidden = self.encoder(expression)
        return self.fc_mu(hidden), self.fc_logvar(hidden)

    def flow(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the flows; also returns the sum of their log determinants: [B, D] to [B, D] and [B]."""
        log_det = z.new_zeros(len(z))
        for flow in self.flows:
            assert isinstance(flow, PlanarFlow)
            log_det = log_det + flow.log_det(z)
            z = flow(z)
        return z, log_det

    def distribution(self, expression: Any) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent, before the flows; see `encode`.

        Returns:
            Two float32 [B, D].
        """
        rows = as_rows(expression, self.n_genes, f"expression for {self.name}", self.device)
        if len(rows) and rows.min() < 0:
            raise UsageError(f"expression for {self.name} holds {rows.min():g}; allowed: log1p, 0 and above")
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            mu, logvar = self.latent(rows)
        return mu.clone(), logvar.clone()

    def encode(self, expression: Any, *, project: bool = False) -> Tensor:
        """Embed expression by applying the flows to the mean of the latent, which is deterministic.

        The authors' code adds random noise to the mean, also in evaluation mode; this is its result without
        noise.

        Args:
            expression: float [B, G], tensor or array: log1p of counts scaled to 10,000 per spot or cell, the
                genes in the order of training.
            project: apply the projection head too, for comparison with `Encoder.project`.

        Returns:
            float32 [B, D] on the encoder's device; with ``project``, the width of the head.

        Raises:
            UsageError: another shape or dtype, NaN, numbers below 0, or no projection head to apply.
        """
        if project and self.projection_head is None:
            raise UsageError(f"{self.name} has no projection head; leave project=True out")
        mu, _ = self.distribution(expression)
        with torch.autocast(self.device.type, enabled=False):
            embeddings: Tensor = self.flows(mu)
            if project and self.projection_head is not None:
                embeddings = self.projection_head(embeddings)
        return embeddings

    def decode(self, embeddings: Any) -> Tensor:
        """Reconstruct expression.

        Args:
            embeddings: float [B, D], as `encode` gives them.

        Returns:
            float32 [B, G] on the encoder's device: log1p, which may be below 0 here.

        Raises:
            UsageError: another shape or dtype, or NaN.
        """
        rows = as_rows(embeddings, self.dim, f"embeddings for {self.name}", self.device)
        with torch.autocast(self.device.type, enabled=False):
            expression: Tensor = self.decoder(rows)
        return expression


def load_omics(
    name_or_path: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    device: str | torch.device | None = "cpu",
    offline: bool = False,
) -> OmicsEncoder:
    """Load SEAL's expression encoder with exactly the weights of its file.

    Args:
        name_or_path: a SEAL encoder of `list_encoders`, an omics file, or the folder or Hub repository
            ``owner/name`` of an encoder that was trained with an expression encoder.
        checkpoint: a file on this disk instead of the Hub's; only with a name.
        revision: branch, tag or commit on the Hub; see `load_encoder`.
        device: device of the weights; the network is small enough for a CPU.
        offline: take the file from the Hub's cache only.

    Raises:
        UsageError: not a SEAL encoder, or arguments that contradict each other.
        CheckpointError: a file with missing or other weights, a damaged file, or one that would run code.
        HubError: the Hub does not deliver the file; see its subclasses.
    """
    named = bundled().get(os.fspath(name_or_path), name_or_path)
    target, path = pick_device(device), Path(named).expanduser()
    if path.is_dir():  # the folder of a trained encoder
        path = path / OMICS
        if not path.is_file():
            raise CheckpointError(f"{path.parent} holds no {path.name}, the expression half of its encoder")
    if path.is_file():
        if checkpoint is not None or revision is not None:
            raise UsageError(f"{path} is a file; leave checkpoint= and revision= out")
        file = local_file(path)
        return _named(_load(path.stem, file, None), path.with_name(CONFIG)).to(target)
    if is_repository(name_or_path):
        repo_id = os.fspath(name_or_path)
        file = fetch(repo_id, [OMICS], revision, offline)
        config = fetch(repo_id, [CONFIG], file.revision, offline)
        return _named(_load(repo_id, file, None), config.path).to(target)
    spec = find_spec(os.fspath(name_or_path))
    layout = spec.published
    if layout is None or layout.decoder is None:
        raise UsageError(has_no(spec.name, "expression half"))
    if checkpoint is not None and revision is not None:
        raise UsageError("revision= names a revision on the Hub, checkpoint= a file here; leave one out")
    if checkpoint is not None:
        file = local_file(Path(checkpoint).expanduser())
    else:
        files = [name.replace("vision", "omics") for name in layout.files]
        file = fetch_published(spec, files, revision, offline)
    return _load(spec.name, file, (spec.dim, layout.decoder.genes)).to(target)


def compared_behind_heads(omics: OmicsEncoder, name: str, image_has_one: bool) -> bool:
    """Whether both halves have a projection head, so that their embeddings are compared behind the heads.

    Args:
        omics: the expression half.
        name: name of the image half.
        image_has_one: whether the image half has a head.

    Raises:
        UsageError: only one of the two has a head.
    """
    expression_has_one = omics.projection_head is not None
    if expression_has_one != image_has_one:
        halves = [f"the image half of {name}", f"the expression half of {omics.name}"]
        lacks, has = halves if expression_has_one else halves[::-1]
        raise UsageError(
            f"{has} has a projection head and {lacks} has none, so they cannot be compared; give the two "
            "halves of one training"
        )
    return expression_has_one


def _named(omics: OmicsEncoder, config: Path) -> OmicsEncoder:
    """The same with the name and genes of its encoder, if the encoder's config lies beside it."""
    if omics.weights is not None and omics.weights.file == OMICS and config.is_file():
        omics.name, omics.genes = read_config(config).name, read_contents(config).genes
    return omics


def _load(name: str, file: FoundFile, sizes: tuple[int, int] | None) -> OmicsEncoder:
    weights = WeightFile.of(file)
    tensors = read_tensors(file.path)
    dim, n_genes, hidden = (*sizes, HIDDEN) if sizes else _sizes(tensors, file.path)
    try:
        head = empty_head(head_shapes(tensors), dim)
    except ValueError as exc:
        raise CheckpointError(f"{file.path} is not the expression half of {name}: {exc}") from exc
    with torch.device("meta"):
        omics = OmicsEncoder(name, dim, n_genes, weights, hidden, head)
    needed = {key: tuple(v.shape) for key, v in omics.state_dict().items() if key not in _COUNTERS}
    check_tensors(tensors, needed, _COUNTERS, file.path, f"the expression half of {name}")
    counters = dict.fromkeys(_COUNTERS, torch.tensor(0))
    omics.load_state_dict({key: tensors[key] for key in needed} | counters, strict=True, assign=True)
    return omics.requires_grad_(False)


def _sizes(tensors: dict[str, Tensor], path: Path) -> tuple[int, int, tuple[int, int]]:
    """Embedding length, number of genes and hidden widths, from the shapes in the file."""
    first, last = tensors.get("encoder.0.weight"), tensors.get("fc_mu.weight")
    if first is None or last is None or first.ndim != 2 or last.ndim != 2:
        from seal_extract.encoders.recognise import looks_like  # imports timm

        others = looks_like(tensors)
        hint = f"; it looks like {' or '.join(others)}" if others else ""
        raise CheckpointError(f"{path} is not the expression half of a SEAL checkpoint{hint}")
    return last.shape[0], first.shape[1], (first.shape[0], last.shape[1])
