"""Files of patch tokens, beside the features of the same patches: ``tokens_{encoder}/{slide}.h5``.

They hold ``tokens`` float16 [N, h, w, C], patch by patch, and the ``coords`` of the patches. Readers of
features never open them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from seal_extract.errors import OutputError
from seal_extract.features.feature_file import (
    HERE,
    FeatureWriter,
    SlideLabel,
    create_coords,
    write_rows,
)
from seal_extract.features.layouts import Layout
from seal_extract.features.store import TOKENS, read_provenance
from seal_extract.names import shown
from seal_extract.patches.grid import PatchGrid


def tokens_file(layout: Layout, slide: str, encoder: str) -> Path:
    """The tokens of a slide."""
    folder: Path = getattr(layout, "folder", layout.out)  # that of the grid, where there is one
    return folder / f"tokens_{encoder}" / f"{slide}.h5"


def has_tokens(path: Path, request: dict[str, Any]) -> bool:
    """Whether the tokens that this request makes are there.

    Raises:
        OutputError: another request made them, or the file is damaged.
    """
    if not path.exists():
        return False
    provenance = read_provenance(path, TOKENS)
    if provenance is None or provenance["request"] != json.loads(json.dumps(request)):
        raise OutputError(
            f"{path} exists, made with another request; type --overwrite to replace it, or another -o"
        )
    return True


@contextmanager
def write_tokens(
    path: Path,
    label: SlideLabel,
    grid: PatchGrid,
    encoder: str,
    shape: tuple[int, int, int],
    provenance: dict[str, Any],
    *,
    overwrite: bool,
) -> Iterator[FeatureWriter]:
    """Open the file of a slide's tokens, which appears when the block ends; see `Layout.write_features`.

    Args:
        path: from `tokens_file`.
        label: of the slide.
        grid: its patches.
        encoder: that made the tokens.
        shape: (h, w, C).
        provenance: written at the end, with the changes made until then.
        overwrite: replace a file that is there.

    Raises:
        OutputError: the file cannot be written, rows are missing, or another run has meanwhile written it.
    """

    def describe(file: h5py.File) -> None:
        file[TOKENS].attrs.update(name=shown(label.name), savetodir=HERE, encoder=encoder)
        create_coords(file, label, grid)

    def keep(there: Path) -> bool:
        try:
            return has_tokens(there, provenance["request"])
        except OutputError:
            return False

    kept = None if overwrite else keep
    with write_rows(path, TOKENS, (len(grid), *shape), np.float16, provenance, describe, kept) as writer:
        yield writer
