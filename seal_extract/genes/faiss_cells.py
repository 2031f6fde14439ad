"""The cells of a FAISS index: centres found on a sample, rows kept in 8 bits a number beside their centre.

Source: Douze et al., The Faiss library, arXiv 2401.08281 (inverted files, scalar quantiser).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seal_extract.errors import OutputError, UsageError, how_to_install
from seal_extract.features.store import SlideFeatures
from seal_extract.genes.index import Rows, unit_pieces
from seal_extract.publish import publish

SAMPLE_PER_CELL = 40
CELLS = (16, 4096)
MARGIN = 0.5  # of the range of each number, on both sides: slides that come later may go beyond it
SEED = 0


def cells_for(rows: int) -> int:
    """How many cells so many rows are put into: about four times their root, a power of two."""
    if rows < SAMPLE_PER_CELL * CELLS[0]:
        return max(1, rows // SAMPLE_PER_CELL)
    return int(2 ** int(np.log2(np.clip(4 * rows**0.5, *CELLS))))


def train(slides: Sequence[SlideFeatures]) -> Any:
    """An empty index whose cells are known.

    Raises:
        UsageError: FAISS is not installed.
        OutputError: no row of the slides is finite and other than 0.
    """
    faiss = import_faiss()
    total = sum(len(slide.grid) for slide in slides)
    sample = sample_rows(slides, min(total, SAMPLE_PER_CELL * cells_for(total)))
    if not len(sample):
        raise OutputError(
            f"all features sampled from {slides[0].path} on are 0 or not finite; encode these slides again"
        )
    dim, cells = sample.shape[1], min(cells_for(total), len(sample))
    kmeans = faiss.Kmeans(
        dim, cells, niter=10, seed=SEED, spherical=True, min_points_per_centroid=1,
        max_points_per_centroid=SAMPLE_PER_CELL,
    )  # fmt: skip
    kmeans.train(sample)
    coarse = faiss.IndexFlatIP(dim)
    coarse.add(kmeans.centroids)
    index = faiss.IndexIVFScalarQuantizer(
        coarse, dim, cells, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.sq.rangestat_arg = MARGIN
    index.train(sample)  # of the 8 bits; the cells are there
    index.own_fields = True
    coarse.this.disown()
    return index


def sample_rows(slides: Sequence[SlideFeatures], wanted: int) -> Rows:
    """Rows of all slides at length 1, each as likely as any other, float32 [wanted or fewer, D].

    Rows that are 0 or not finite are left out: they say nothing of where embeddings lie.
    """
    rng = np.random.default_rng(SEED)
    total = sum(len(slide.grid) for slide in slides)
    chosen = np.sort(rng.choice(total, wanted, replace=False))
    parts, start = [], 0
    for slide in slides:
        for rows in unit_pieces(slide):
            first, last = np.searchsorted(chosen, (start, start + len(rows)))
            some = rows[chosen[first:last] - start]
            parts.append(some[some.any(1)])
            start += len(rows)
    return np.ascontiguousarray(np.concatenate(parts))


def write_cells(index: Any, path: Path) -> int:
    """Write an index; its bytes.

    Raises:
        OutputError: it cannot be written.
    """
    with publish(path) as part:
        try:
            import_faiss().write_index(index, str(part))
        except RuntimeError as exc:
            raise OutputError(f"cannot write {path}: {exc}") from exc
        return part.stat().st_size


def read_cells(path: Path, bytes_: int, *, mapped: bool = True) -> Any | None:
    """An index of a file, or None where it is damaged or gone.

    Args:
        path: the file.
        bytes_: its size when it was written.
        mapped: leave the rows on the disk until they are looked at.
    """
    faiss = import_faiss()
    if not path.is_file() or path.stat().st_size != bytes_:
        return None
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP if mapped else 0)
    except RuntimeError:
        return None


def import_faiss() -> Any:
    """The library.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import faiss
    except ImportError as exc:
        raise UsageError(f"FAISS is not installed; {how_to_install('search')}") from exc
    return faiss
