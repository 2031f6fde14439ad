"""Ready-cut patches -> encoder -> store: `extract` for patches that others have cut."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seal_extract.encoders import Encoder
from seal_extract.errors import EncoderError, OutputError, embedding
from seal_extract.features.feature_file import SlideLabel
from seal_extract.features.layouts import check_layout, layout_of_grid
from seal_extract.features.store import SlideFeatures, find_features, read_features
from seal_extract.patches.grid import PatchGrid
from seal_extract.run.embed import open_embedder
from seal_extract.run.provenance import PIPELINE, describe_rest, first_difference
from seal_extract.slides.patch_files import PatchFile, open_patches


def extract_patches(
    path: str | os.PathLike[str],
    encoder: Encoder,
    out: str | os.PathLike[str],
    *,
    mpp: float | None = None,
    slide_mpp: float | None = None,
    layout: str = "trident",
    batch_size: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SlideFeatures:
    """Embed ready-cut patches as they are; a row keeps its barcode, or the name of its picture.

    The file lies where the layout has that of a slide, and is found again by the next run with the same
    patches and weights.

    Args:
        path: see `open_patches`.
        encoder: from `load_encoder`.
        out: folder for the results.
        mpp: µm/px of the patches, where the file does not state it.
        slide_mpp: µm/px of the slide that the file's coordinates count in, where it does not state it.
        layout: as ``--layout`` takes it.
        batch_size: patches per forward pass; found by trying on a GPU by default.
        workers: threads that encode on a CPU; all cores by default.
        overwrite: replace a file that was made of something else.
        progress: called with (patches done, patches in all) after each batch.

    Raises:
        SealExtractError: one of its children; nothing half-written is left.
    """
    check_layout(layout, [encoder.spec.name])
    file = open_patches(path, mpp=mpp, slide_mpp=slide_mpp)
    size = file.patch_size_l0
    origin = "ready-cut patches" if file.places_known else "ready-cut patches, laid in their order"
    grid = PatchGrid(file.xy_l0, file.patch_px, file.mpp, size, 0, 0, size, origin)
    name = file.path.resolve().name if file.path.is_dir() else file.path.stem
    place = layout_of_grid(layout, Path(out), grid)
    target = place.features(name, encoder.spec.name)
    content = {"reader": "patches", "sha256": file.sha256(), "mpp": file.slide_mpp, "patch_mpp": file.mpp}
    request = {"pipeline": PIPELINE, "slide": content, "options": {}, "encoder": encoder.identity}
    if not overwrite and target.exists():
        there = find_features(target, place.dataset)
        difference = "not ours" if there is None else first_difference(there.provenance["request"], request)
        if there is None or difference is not None:
            raise OutputError(
                f"{target} exists, made of something else ({difference}); type --overwrite to replace it, or "
                "another -o"
            )
        place.complete(name, encoder.spec.name)
        return there
    mismatch = encoder.spec.mismatch(file.patch_px, file.mpp)
    if mismatch:
        warnings.warn(mismatch, stacklevel=2)
    provenance = _provenance(file, grid, request, encoder.description | {"mismatch": mismatch})
    label = SlideLabel(name, file.size_l0, file.slide_mpp, file.barcodes)
    forward = open_embedder(encoder, file.patch_px, batch_size, workers)
    try:
        with (
            embedding(str(file.path)),
            place.write_features(
                label, grid, encoder.spec.name, encoder.spec.dim, provenance, overwrite=overwrite
            ) as writer,
        ):
            for patches in file.read(forward.batch_size):
                batch = torch.from_numpy(np.array(patches)).permute(0, 3, 1, 2)  # uint8 [B, 3, S, S]
                rows = forward.submit(batch.contiguous().to(encoder.device))()
                bad = np.flatnonzero(~np.isfinite(rows).all(1))
                if len(bad):
                    raise EncoderError(
                        f"{file.path}: {encoder.not_finite} for patch {writer.rows + bad[0]}; "
                        "try --precision float32"
                    )
                writer.append(rows)
                progress(writer.rows, len(file))
    finally:
        forward.close()
    place.write_coords(label, grid, provenance, overwrite=overwrite)
    return read_features(target)


def _provenance(
    file: PatchFile, grid: PatchGrid, request: dict[str, Any], encoder: dict[str, Any]
) -> dict[str, Any]:
    """As `provenance.describe` gives it for a slide."""
    return {
        "request": request,
        "slide": {
            "path": str(file.path.resolve()),
            "mtime_ns": file.path.stat().st_mtime_ns,
            "size_l0": list(file.size_l0),
            "mpp": file.slide_mpp,
            "mpp_source": file.mpp_source,
            "reader": "patches",
            "decoder": "ready-cut patches",
        },
        "tissue": None,
        **describe_rest(grid, encoder),
    }
