"""The expression decoder of an encoder: it predicts genes from embeddings.

SEAL's decoder has two layers (arXiv 2602.14177). It is loaded without the image tower of the same file, which
may have 2 GB and is not needed once the features are written.
"""

from __future__ import annotations

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
    OFFICIAL_KEYS,
    ExpressionDecoder,
    decoder_shapes,
    filled_decoder,
    filled_head,
)
from seal_extract.encoders.locate import AnyPath, locate
from seal_extract.encoders.registry import bundled, has_no, list_encoders
from seal_extract.encoders.spec import HEAD
from seal_extract.encoders.state_dict import as_row_spells
from seal_extract.errors import EncoderError, UsageError


@dataclass(frozen=True)
class GeneDecoder:
    """Predicts expression from embeddings; made by `load_decoder` or `decoder_of`.

    Attributes:
        name: name of the encoder that the decoder belongs to.
        dim: length of an embedding.
        n_genes: number of predicted genes.
        genes: the gene of each column; None for SEAL's own files, whose gene panel is not published.
        weights: the weight file.
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
            columns: columns of the wanted genes, in the wanted order; all by default.

        Raises:
            UsageError: rows of another width, or rows that are not finite.
        """
        return self.predict_each(features, [columns])[0]

    def predict_each(
        self, features: NDArray[Any], selections: Sequence[Sequence[int] | None]
    ) -> list[NDArray[np.float32]]:
        """Predict several selections of columns from the same rows; see `predict`."""
        rows = np.asarray(features, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise UsageError(
                f"features are {list(rows.shape)}; the decoder of {self.name} takes [N, {self.dim}]"
            )
        if not np.isfinite(rows).all():
            raise UsageError("features hold NaN or infinity; extract the slide again with --overwrite")
        last, predicted = self._layers.genes, []
        with torch.inference_mode():
            hidden = self._layers.hidden(torch.from_numpy(rows)).relu_()
            for columns in selections:
                chosen = slice(None) if columns is None else torch.as_tensor(list(columns), dtype=torch.int64)
                expression = torch.nn.functional.linear(hidden, last.weight[chosen], last.bias[chosen])
                predicted.append(expression.relu_().numpy())
        return predicted

    def columns(self, names: Sequence[str]) -> list[int]:
        """The column of each gene.

        Raises:
            UsageError: the columns have no names, or a name is unknown; the message has the nearest names.
        """
        column_of = {gene: i for i, gene in enumerate(self.named())}
        for name in names:
            if name not in column_of:
                lower = {gene.lower(): gene for gene in column_of}
                near = [lower[match] for match in get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]
                others = f"it has {self.n_genes} others, such as {next(iter(column_of))}"
                hint = f"the nearest are {', '.join(near)}" if near else others
                raise UsageError(f"{name} is not among the genes of {self.name}; {hint}")
        return [column_of[name] for name in names]

    def named(self) -> tuple[str, ...]:
        """The gene of each column.

        Raises:
            UsageError: the columns have no names.
        """
        return named_genes(self.genes, self.n_genes, self.name)


def named_genes(genes: tuple[str, ...] | None, n_genes: int, name: str) -> tuple[str, ...]:
    """The gene names of a decoder or an expression encoder.

    Raises:
        UsageError: they are not known.
    """
    if genes is None:
        raise UsageError(
            f"the gene names of the {n_genes} columns of {name} are not published; give "
            "--panel genes.txt, one name per line in the order of its training"
        )
    return genes


def column_names(decoder: GeneDecoder) -> tuple[str, ...]:
    """The gene of each column; ``column 0``, ``column 1``, ... if the columns have no names."""
    return decoder.genes or tuple(f"column {i}" for i in range(decoder.n_genes))


def load_decoder(
    name_or_path: AnyPath,
    *,
    checkpoint: AnyPath | None = None,
    panel: Sequence[str] | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> GeneDecoder:
    """Read only the expression decoder from an encoder's weight file.

    Args:
        name_or_path: as `load_encoder` takes it.
        checkpoint: a file on this disk instead of the Hub's; only with a name.
        panel: gene names in the order of the columns, as `read_panel` gives them; replaces the file's own.
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
    contents = folder.read_contents(config) if own else folder.Contents(spec.dim, spec.layout.decoder)
    shape, genes = contents.decoder, contents.genes
    if shape is None:
        raise EncoderError(has_no(spec.name, "expression decoder"))
    weights = WeightFile.of(file)
    tensors = read_tensors(file.path)
    if own:
        keys = {folder.DECODER + key: key for key in decoder_shapes(spec.dim, shape)}
    else:
        tensors = as_row_spells(tensors, spec.layout)
        keys = {theirs: key for key, theirs in OFFICIAL_KEYS.items()}
    needed = {theirs: decoder_shapes(spec.dim, shape)[key] for theirs, key in keys.items()}
    head = {key: tensor for key, tensor in tensors.items() if key in keys}
    check_tensors(head, needed, (), file.path, f"the decoder of {spec.name}")
    layers = filled_decoder(spec.dim, shape, {key: head[theirs].clone() for theirs, key in keys.items()})
    assert layers is not None
    named = genes if panel is None else check_panel(panel, shape.genes, spec.name)
    return GeneDecoder(spec.name, spec.dim, shape.genes, named, weights, layers)


def recorded_source(
    provenance: dict[str, Any], encoder: AnyPath | None = None, file: AnyPath | None = None
) -> tuple[AnyPath, str | None]:
    """The encoder that made features, by name, folder or repository, and its commit if another one is pinned.

    Args:
        provenance: provenance of the features.
        encoder: the encoder as the user typed it, instead of the recorded one.
        file: its weight file on this disk, which needs no commit.

    Raises:
        UsageError: the provenance does not say where the encoder is.
    """
    made_by = provenance["encoder"]
    files, rows = made_by["weights"], {row.name: row for row in list_encoders()}
    if encoder is None and made_by["name"] in rows.keys() | set(bundled()):
        encoder = str(made_by["name"])
    elif encoder is None:
        encoder = str(files[0]["source"]) if files else ""
        if "/" not in encoder:  # exports record a folder by its name only
            raise UsageError(
                f"the features do not say where the encoder {made_by['name']} is; give its folder as "
                "--encoder"
            )
    row = rows.get(str(encoder))
    pins = tuple(row.published.sha256.values()) if row and row.published else ()
    if file is not None or not files or not pins or files[0]["sha256"].startswith(pins):
        return encoder, None
    return encoder, files[0]["revision"]


def decoder_of(
    provenance: dict[str, Any],
    *,
    encoder: AnyPath | None = None,
    checkpoint: AnyPath | None = None,
    panel: Sequence[str] | None = None,
    offline: bool = False,
) -> GeneDecoder:
    """Load the decoder of the encoder that made a features file; the hash of its weights must be the same.

    Args:
        provenance: provenance of the features.
        encoder: name, folder or repository of the encoder, if it is not where it was.
        checkpoint: its file on this disk, if the encoder has a name.
        panel: see `load_decoder`.
        offline: see `load_decoder`.

    Raises:
        UsageError: other weights made the features.
        SealExtractError: see `load_decoder`.
    """
    source, revision = recorded_source(provenance, encoder, checkpoint)
    decoder = load_decoder(source, checkpoint=checkpoint, panel=panel, revision=revision, offline=offline)
    _check_made_by(provenance, source, decoder.weights.sha256)
    return decoder


def image_head(
    provenance: dict[str, Any],
    *,
    encoder: AnyPath | None = None,
    checkpoint: AnyPath | None = None,
    offline: bool = False,
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Load the projection head of the encoder that made a features file; see `decoder_of`.

    Returns:
        A function from float32 [B, D] to float32 [B, P]; it keeps rows that are not finite.

    Raises:
        UsageError: other weights made the features.
        SealExtractError: see `load_decoder`.
    """
    source, revision = recorded_source(provenance, encoder, checkpoint)
    spec, file = locate(source, checkpoint, revision, offline)
    _check_made_by(provenance, source, WeightFile.of(file).sha256)
    tensors = {k: v.clone() for k, v in read_tensors(file.path).items() if k.startswith(HEAD)}
    head = filled_head(tensors, spec.dim)
    assert head is not None, "the provenance of the same weights says that they have one"

    def project(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            projected: NDArray[np.float32] = head(torch.from_numpy(rows)).numpy()
        return projected

    return project


def _check_made_by(provenance: dict[str, Any], source: AnyPath, sha256: str) -> None:
    made_by = provenance["encoder"]
    if sha256 not in [w["sha256"] for w in made_by["weights"]]:
        raise UsageError(
            f"the features were made by {made_by['name']} with weights "
            f"{made_by['weights'][0]['sha256'][:12]}, and {source} has {sha256[:12]}; give the encoder that "
            "made them as --encoder"
        )
