"""The spots of a section with embeddings of their patch and of their expression, in one AnnData file.

The embeddings are joined by barcode: a row is one spot.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from seal_extract.encoders import Encoder
from seal_extract.errors import OutputError, UsageError
from seal_extract.evaluate.run import embed, training_of
from seal_extract.genes.omics import OmicsEncoder, compared_behind_heads
from seal_extract.hdf5 import new_hdf5
from seal_extract.train.formats.source import needed
from seal_extract.train.pairs import make_pairs
from seal_extract.train.sections import Section

IMAGE, EXPRESSION, ALIGNED = "X_image", "X_expression", "_aligned"  # keys of obsm
LEAST_KNOWN = 0.5  # share of the expression encoder's genes that a section has to have
PROVENANCE = "seal_extract"  # in uns: what determined the numbers, as JSON


def embed_spots(
    section: Section,
    encoder: Encoder,
    out: str | os.PathLike[str],
    omics: OmicsEncoder | None = None,
    *,
    patch_px: int = 224,
    mpp: float = 0.5,
    smooth: bool = True,
    batch_size: int = 64,
    overwrite: bool = False,
) -> Path:
    """Write ``OUT/NAME.h5ad``: the spots of a section, their counts, and their embeddings in ``obsm``.

    ``X`` holds the counts of all genes; ``obsm`` has ``spatial`` (centres in level-0 pixels), ``X_image``
    float32 [N, D], ``X_expression`` float32 [N, D], and where both encoders have a projection head also
    ``X_image_aligned`` and ``X_expression_aligned`` after it: compare those with each other.

    Args:
        section: from `load_sections` or `find_sections`.
        encoder: embeds the patch around each spot.
        out: folder of the file.
        omics: embeds the expression of each spot, by the names of its genes; None leaves that out.
        patch_px: side of the patches.
        mpp: µm/px of the patches.
        smooth: whether half of each spot's expression is the mean of its neighbours', as in SEAL's training.
        batch_size: patches per forward pass.
        overwrite: replace a file that has another provenance.

    Returns:
        The file. A file that the same request made before is kept.

    Raises:
        UsageError: the expression encoder's genes have no names, or the section lacks more than half of them;
            only one of the encoders has a projection head.
        OutputError: a file with another provenance exists.
        SlideError: patches cannot be read.
    """
    path = Path(out) / f"{section.name}.h5ad"
    has_heads = False
    if omics is not None:
        has_heads = compared_behind_heads(omics, encoder.spec.name, encoder.projection is not None)
    known = _known_genes(section, omics)
    provenance = _provenance(section, encoder, omics, patch_px, mpp, smooth and omics is not None)
    if path.exists() and not overwrite:
        if _read_provenance(path) != provenance:
            raise OutputError(
                f"{path} exists and was made of something else; type --overwrite to replace it, or another -o"
            )
        return path
    pairs = make_pairs([section], known, patch_px, mpp, smooth=smooth)
    obsm = {IMAGE: embed(encoder, pairs.patches, batch_size)}
    if omics is not None and omics.genes is not None:
        values = np.zeros((len(pairs), omics.n_genes), np.float32)
        column = {gene: i for i, gene in enumerate(omics.genes)}
        values[:, [column[gene] for gene in known]] = pairs.expression
        obsm[EXPRESSION] = omics.encode(values).cpu().numpy()
        if has_heads:
            obsm[IMAGE + ALIGNED] = encoder.project(obsm[IMAGE]).cpu().numpy()
            obsm[EXPRESSION + ALIGNED] = omics.encode(values, project=True).cpu().numpy()
    _write(path, section.take(pairs.row), obsm, provenance | {"genes known": len(known)})
    return path


def was_smoothed(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether an encoder was trained on smoothed expression, as the official ones were."""
    data = training_of(name_or_path).get("config", {}).get("data", {})
    return bool(data.get("smooth", True))


def _known_genes(section: Section, omics: OmicsEncoder | None) -> tuple[str, ...]:
    """The genes of the expression encoder that the section has."""
    if omics is None:
        return ()
    if omics.genes is None:
        raise UsageError(
            f"nobody has published which gene each of the {omics.n_genes} columns of {omics.name} is; give "
            "--panel genes.txt, one name per line in the order of its training, or --image-only"
        )
    measured = set(section.genes)
    known = tuple(gene for gene in omics.genes if gene in measured)
    if len(known) < LEAST_KNOWN * omics.n_genes:
        raise UsageError(
            f"{section.name} has {len(known)} of the {omics.n_genes} genes of {omics.name}, such as "
            f"{omics.genes[0]}; allowed: half of them or more. Its own are named as {section.genes[0]}"
        )
    if len(known) < omics.n_genes:
        warnings.warn(
            f"{section.name} has {len(known)} of the {omics.n_genes} genes of {omics.name}; the others count "
            "as 0",
            stacklevel=3,
        )
    return known


def _provenance(
    section: Section, encoder: Encoder, omics: OmicsEncoder | None, patch_px: int, mpp: float, smooth: bool
) -> dict[str, Any]:
    """Everything that determines the numbers, as JSON."""
    counts = section.counts.tocsr() if hasattr(section.counts, "tocsr") else section.counts
    parts = [counts.data, counts.indices, counts.indptr] if hasattr(counts, "indptr") else [counts]
    digest = hashlib.sha256("\n".join((*section.genes, *section.barcodes)).encode())
    for part in (*parts, section.xy_l0):
        digest.update(np.ascontiguousarray(part).tobytes())
    return {
        "section": {"name": section.name, "slide": section.slide.name, "mpp": section.mpp},
        "spots": {"sha256": digest.hexdigest(), "slide_bytes": section.slide.stat().st_size},
        "encoder": encoder.identity,
        "omics": None if omics is None else [omics.weights and omics.weights.sha256, list(omics.genes or ())],
        "options": {"patch_px": patch_px, "mpp": mpp, "smooth": smooth},
    }


def _read_provenance(path: Path) -> dict[str, Any] | None:
    try:
        with h5py.File(path, "r") as file:
            provenance: dict[str, Any] = json.loads(file["uns"][PROVENANCE].asstr()[()])
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        return None
    provenance.pop("genes known", None)
    return provenance


def _write(
    path: Path, section: Section, obsm: dict[str, NDArray[np.float32]], provenance: dict[str, Any]
) -> None:
    anndata, pandas = needed("anndata"), needed("pandas")
    obs = pandas.DataFrame(index=list(section.barcodes))
    if section.array_rc is not None:
        obs["array_row"], obs["array_col"] = section.array_rc.T
    uns = {
        "encoder": provenance["encoder"]["name"],
        "counts_are": section.scale,
        "patch_um": provenance["options"]["patch_px"] * provenance["options"]["mpp"],
        "smoothed": provenance["options"]["smooth"],
        PROVENANCE: json.dumps(provenance),
    }
    var = pandas.DataFrame(index=list(section.genes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the next releases of these libraries
        data = anndata.AnnData(
            section.counts, obs=obs, var=var, obsm={"spatial": section.xy_l0, **obsm}, uns=uns
        )
        with new_hdf5(path) as (file, _):
            anndata.io.write_elem(file, "/", data)
