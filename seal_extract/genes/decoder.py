"""The expression decoder of an encoder alone: embeddings in, genes out.

SEAL's decoder is two layers (arXiv 2602.14177). The tower beside it in the file may have 2 GB, and is not
needed once the features are written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seal_extract.encoders import folder
from seal_extract.encoders.checkpoint import check_tensors, read_tensors
from seal_extract.encoders.files import WeightFile
from seal_extract.encoders.folder import check_panel
from seal_extract.encoders.heads import (
    ExpressionDecoder,
    decoder_shapes,
    filled_decoder,
    filled_head,
    official_key,
)
from seal_extract.encoders.locate import layout_of, locate
from seal_extract.encoders.registry import bundled, list_encoders, names_with_decoder
from seal_extract.encoders.spec import HEAD
from seal_extract.encoders.state_dict import as_row_spells
from seal_extract.errors import EncoderError, UsageError


@dataclass(frozen=True)
class GeneDecoder:
    """Predicts expression from embeddings; made by `load_decoder` or `decoder_of`.

    Attributes:
        name: of the encoder whose decoder it is.
        dim: columns of the embeddings that it takes.
        n_genes: columns of what it predicts.
        genes: the gene of each, or None: nobody has published SEAL's panel.
        weights: the file that it came from.
    """

    name: str
    dim: int
    n_genes: int
    genes: tuple[str, ...] | None
    weights: WeightFile
    _layers: ExpressionDecoder = field(repr=False)

    def __repr__(self) -> str:
        named = "named" if self.genes else "without names"
        return f"GeneDecoder({self.name}: {self.dim} numbers to {self.n_genes} genes, {named})"

    def predict(self, features: NDArray[Any], columns: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Predict expression: float [B, D] to float32 [B, G], 0 or above, in log1p of counts per 10,000.

        Args:
            features: rows of a features file of this encoder.
            columns: of the genes wanted, in the order wanted; all by default.

        Raises:
            UsageError: rows of another width, or not finite.
        """
        rows = np.asarray(features, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise UsageError(
                f"features are {list(rows.shape)}; the decoder of {self.name} takes [N, {self.dim}]"
            )
        if not np.isfinite(rows).all():
            raise UsageError("features hold NaN or infinity; extract the slide again with --overwrite")
        last = self._layers.genes
        weight, bias = (last.weight, last.bias) if columns is None else self._of(columns)
        with torch.inference_mode():
            hidden = self._layers.hidden(torch.from_numpy(rows)).relu_()
            predicted: NDArray[np.float32] = torch.nn.functional.linear(hidden, weight, bias).relu_().numpy()
        return predicted

    def _of(self, columns: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.as_tensor(list(columns), dtype=torch.int64)
        return self._layers.genes.weight[chosen], self._layers.genes.bias[chosen]

    def columns(self, names: Sequence[str]) -> list[int]:
        """The column of each gene.

        Raises:
            UsageError: the columns have no names, or a name is not among them; the nearest are told.
        """
        where = {gene: i for i, gene in enumerate(self.named())}
        for name in names:
            if name not in where:
                raise UsageError(unknown_gene(name, list(where), self.name))
        return [where[name] for name in names]

    def named(self) -> tuple[str, ...]:
        """The genes.

        Raises:
            UsageError: nobody has said which gene each column is.
        """
        if self.genes is None:
            raise UsageError(
                f"nobody has published which gene each of the {self.n_genes} columns of {self.name} is; give "
                "--panel genes.txt, one name per line in the order of its training"
            )
        return self.genes


def column_names(decoder: GeneDecoder) -> tuple[str, ...]:
    """The gene of each column; ``column 0``, ``column 1``, ... where nobody has named them."""
    return decoder.genes or tuple(f"column {i}" for i in range(decoder.n_genes))


def unknown_gene(name: str, known: Sequence[str], of: str) -> str:
    """The message about a gene that is not in the panel, with the nearest names."""
    lower = {gene.lower(): gene for gene in known}
    near = [lower[match] for match in get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]
    hint = f"the nearest are {', '.join(near)}" if near else f"it has {len(known)} others, such as {known[0]}"
    return f"{name} is not among the genes of {of}; {hint}"


def load_decoder(
    name_or_path: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    panel: Sequence[str] | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> GeneDecoder:
    """Read the decoder out of an encoder's weight file, and nothing else of it.

    Args:
        name_or_path: as `load_encoder` takes it.
        checkpoint: a file on this disk, in place of the Hub's; only with a name.
        panel: gene names in the order of the columns, as `read_panel` gives them; counts over the file's own.
        revision: branch, tag or commit on the Hub.
        offline: take the file from the Hub's cache only.

    Raises:
        EncoderError: the encoder has no decoder.
        CheckpointError: the file does not hold the decoder's weights, or was damaged.
        UsageError: an unknown name, or a panel of another length.
        HubError: the Hub does not give the file.
    """
    spec, file = locate(name_or_path, checkpoint, revision, offline)
    config = file.path.with_name(folder.CONFIG)
    own = spec.published is None and config.is_file()
    contents = folder.read_contents(config) if own else folder.Contents(layout_of(spec).decoder)
    shape, genes = contents.decoder, contents.genes
    if shape is None:
        names = ", ".join(names_with_decoder())
        raise EncoderError(f"{spec.name} has no expression decoder; those that have: {names}")
    weights = WeightFile.of(file)
    tensors = read_tensors(file.path)
    if own:
        keys = {folder.DECODER + key: key for key in decoder_shapes(spec.dim, shape)}
    else:
        tensors = as_row_spells(tensors, layout_of(spec))
        keys = {official_key(key): key for key in decoder_shapes(spec.dim, shape)}
    needed = {theirs: decoder_shapes(spec.dim, shape)[key] for theirs, key in keys.items()}
    head = {key: tensor for key, tensor in tensors.items() if key in keys}
    check_tensors(head, needed, (), file.path, f"the decoder of {spec.name}")
    layers = filled_decoder(spec.dim, shape, {key: head[theirs].clone() for theirs, key in keys.items()})
    assert layers is not None
    named = genes if panel is None else check_panel(panel, shape.genes, spec.name)
    return GeneDecoder(spec.name, spec.dim, shape.genes, named, weights, layers)


def whereabouts(provenance: dict[str, Any]) -> str:
    """Where the encoder is that made features: its name, if all know it, else its folder or repository.

    Raises:
        UsageError: nothing says so.
    """
    made_by = provenance["encoder"]
    if made_by["name"] in {row.name for row in list_encoders()} | set(bundled()):
        return str(made_by["name"])
    source = made_by["weights"][0]["source"] if made_by["weights"] else ""
    if "/" not in source:  # of a folder an export says the name alone
        raise UsageError(f"nothing says where the encoder {made_by['name']} is; give its folder as --encoder")
    return str(source)


def decoder_of(
    provenance: dict[str, Any],
    *,
    encoder: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    panel: Sequence[str] | None = None,
    offline: bool = False,
) -> GeneDecoder:
    """The decoder of the very encoder that made a features file, by the hash of its weights.

    Args:
        provenance: of the features.
        encoder: where the encoder is, if not where it was.
        checkpoint: its file on this disk, if it has a name.
        panel: see `load_decoder`.
        offline: see `load_decoder`.

    Raises:
        UsageError: the weights are not those that made the features.
        SealExtractError: as `load_decoder`.
    """
    asked = whereabouts(provenance) if encoder is None else encoder
    revision = None if checkpoint else recorded_revision(provenance, asked)
    decoder = load_decoder(asked, checkpoint=checkpoint, panel=panel, revision=revision, offline=offline)
    _check_made_by(provenance, asked, decoder.weights.sha256)
    return decoder


def recorded_revision(provenance: dict[str, Any], asked: str | os.PathLike[str]) -> str | None:
    """The commit that features were made from, where a named encoder is pinned to other weights."""
    files = provenance["encoder"]["weights"]
    row = next((row for row in list_encoders() if row.name == asked and row.published), None)
    pins = tuple(row.published.sha256.values()) if row and row.published else ()
    if not files or not pins or files[0]["sha256"].startswith(pins):
        return None
    return files[0]["revision"]  # type: ignore[no-any-return]


def _check_made_by(provenance: dict[str, Any], asked: str | os.PathLike[str], sha256: str) -> None:
    made_by = provenance["encoder"]
    if sha256 not in [w["sha256"] for w in made_by["weights"]]:
        raise UsageError(
            f"the features were made by {made_by['name']} of weights {made_by['weights'][0]['sha256'][:12]}, "
            f"and {asked} has {sha256[:12]}; give the encoder that made them as --encoder"
        )


def image_head(
    provenance: dict[str, Any],
    *,
    encoder: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    offline: bool = False,
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """The projection head of the very encoder that made a features file, for rows of it.

    Args:
        provenance: of the features, which says that the encoder has one.
        encoder: see `decoder_of`.
        checkpoint: see `decoder_of`.
        offline: see `load_decoder`.

    Returns:
        float32 [B, D] to float32 [B, P]; rows that are not finite stay so.

    Raises:
        UsageError: the weights are not those that made the features.
        SealExtractError: as `load_decoder`.
    """
    asked = whereabouts(provenance) if encoder is None else encoder
    revision = None if checkpoint else recorded_revision(provenance, asked)
    spec, file = locate(asked, checkpoint, revision, offline)
    _check_made_by(provenance, asked, WeightFile.of(file).sha256)
    tensors = {k: v.clone() for k, v in read_tensors(file.path).items() if k.startswith(HEAD)}
    head = filled_head(tensors, spec.dim)
    assert head is not None, "the hash says that it is the file that has one"

    def project(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            projected: NDArray[np.float32] = head(torch.from_numpy(rows)).numpy()
        return projected

    return project
