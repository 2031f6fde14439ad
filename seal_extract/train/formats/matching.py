"""Shared by readers: files found, counts matched with places, genes named once, µm/px held to the pitch."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError, how_to_install
from seal_extract.train.sections import LATTICES

MPP_TOLERANCE = 0.05  # share by which a µm/px and the pitch of the spots may differ
MOST_PLACE = 2**30  # of a spot: a slide has at most some 2**20 pixels a side
SHRUNK = ("tissue_hires_image", "tissue_lowres_image", "detected_tissue_image", "aligned_fiducials")
SUFFIXES = ("tif", "tiff", "ome.tif", "ome.tiff", "btf", "svs", "ndpi", "png", "jpg", "jpeg")
PLACES = ("in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")  # Space Ranger's


def needed(module: str, how: str = how_to_install("train")) -> Any:
    """Import what is not among the package's own dependencies.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as exc:
        raise UsageError(f"{module.split('.')[0]} is not installed; {how}") from exc


def there(folder: Path, *names: str) -> Path:
    """The first of some files that exists.

    Raises:
        UsageError: none does.
    """
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UsageError(f"{folder} has no {' or '.join(names)}; check folder and names of the sections")
    return found


def slide_of(folder: Path, name: str, slide: str | None) -> Path:
    """The image of a section.

    Args:
        folder: of the section's files.
        name: stands where ``slide`` says ``{name}``.
        slide: a path, taken from the folder if relative; None looks for NAME.tif and the like there.

    Raises:
        UsageError: there is none, or it is one of Space Ranger's small copies, which the places are not in.
    """
    if slide is None:
        return there(folder, *(f"{name}.{suffix}" for suffix in SUFFIXES))
    path = folder / Path(slide.replace("{name}", name)).expanduser()
    if path.name.startswith(SHRUNK):
        raise UsageError(
            f"{name}: {path.name} is Space Ranger's small copy; give slide = the full-resolution image that "
            "Space Ranger was given"
        )
    if not path.exists():
        raise UsageError(f"{name}: slide {path} does not exist; check slide, in which {{name}} may stand")
    return path


def matched(name: str, barcodes: Sequence[str], places: Mapping[str, Any]) -> list[int]:
    """Rows of the counts that have a place; what has only one of both is left out, and said once.

    Raises:
        UsageError: none has.
    """
    rows = [i for i, barcode in enumerate(barcodes) if barcode in places]
    without_place, without_counts = len(barcodes) - len(rows), len(places.keys() - set(barcodes))
    if not rows:
        raise UsageError(
            f"{name}: no spot has both counts ({barcodes[0] if barcodes else 'none'}, ...) and a place "
            f"({next(iter(places), 'none')}, ...); the names have to agree"
        )
    if without_place or without_counts:
        warnings.warn(
            f"{name}: {without_counts} spots without counts and {without_place} counts without a spot are "
            f"left out, {len(rows)} stay",
            stacklevel=3,
        )
    return rows


def named_once(
    name: str, genes: Sequence[str], counts: Any, duplicates: str, counts_are: str, advice: str = ""
) -> tuple[tuple[str, ...], Any]:
    """Genes and counts [N, G] with every gene once; of genes of one name the counts are summed.

    Raises:
        UsageError: a gene stands twice and ``duplicates`` is ``"refuse"``; another word.
    """
    if duplicates not in ("refuse", "sum"):
        raise UsageError(f"duplicates is {duplicates!r}; allowed: refuse, sum")
    twice = sorted(gene for gene, count in Counter(genes).items() if count > 1)
    if not twice:
        return tuple(genes), counts
    if duplicates == "refuse":
        raise UsageError(
            f'{name}: {len(twice)} genes stand twice, the first {twice[0]}; type duplicates = "sum" to add '
            f"their counts{advice}"
        )
    if counts_are != "counts":
        raise UsageError(f'{name}: duplicates = "sum" adds counts, but counts_are is {counts_are!r}')
    sparse = needed("scipy.sparse")
    column = {gene: i for i, gene in enumerate(dict.fromkeys(genes))}
    into = [column[gene] for gene in genes]
    ones = np.ones(len(genes), counts.dtype)
    gather = sparse.csr_matrix((ones, (np.arange(len(genes)), into)), shape=(len(genes), len(column)))
    return tuple(column), counts @ gather


def lattice_of(name: str, lattice: str, array_rc: NDArray[np.int64] | None) -> str:
    """The lattice asked for, or the one of the array: on a hexagon row and column are both even or both odd.

    Raises:
        UsageError: another word; a lattice without rows and columns.
    """
    if lattice not in (*LATTICES, "auto"):
        raise UsageError(f"lattice is {lattice!r}; allowed: auto, {', '.join(LATTICES)}")
    if array_rc is None:
        if lattice not in ("auto", "none"):
            raise UsageError(
                f"{name}: lattice is {lattice!r}, but there are no array_row and array_col; "
                'leave lattice out, or type lattice = "none"'
            )
        return "none"
    if len(np.unique(array_rc, axis=0)) < len(array_rc):
        if lattice != "none":
            warnings.warn(f"{name}: spots share a row and column, so none has neighbours", stacklevel=3)
        return "none"
    if lattice != "auto":
        return lattice
    return "hexagonal" if len(np.unique(array_rc.sum(1) % 2)) == 1 else "square"


def mpp_by_pitch(
    array_rc: NDArray[np.int64], lattice: str, pitch_um: float, xy_l0: NDArray[np.float64]
) -> float | None:
    """µm/px by the spots' places on array and slide, which may be turned and mirrored; None for too few.

    The scale of the similarity that fits best (Umeyama 1991, equation 42, reflections allowed): one step
    alone says little, as spots lie unevenly.
    """
    if lattice == "none" or len(np.unique(array_rc, axis=0)) < 3:
        return None
    step_um = (pitch_um * math.sqrt(3) / 2, pitch_um / 2) if lattice == "hexagonal" else (pitch_um, pitch_um)
    um, px = array_rc * np.array(step_um), xy_l0
    um, px = um - um.mean(0), px - px.mean(0)
    px_per_um = np.linalg.svd(um.T @ px, compute_uv=False).sum() / (um**2).sum()
    return float(1 / px_per_um) if px_per_um > 0 else None


def held_to_pitch(name: str, mpp: float | None, by_pitch: float | None, source: str = "mpp") -> float | None:
    """The µm/px given, which must be that of the spots' pitch; or that.

    Raises:
        UsageError: they differ by more than 5 %, or there is neither.
    """
    if mpp is None and by_pitch is None:
        raise UsageError(f"{name}: µm/px is unknown; type mpp = 0.5, or whatever it is, with the sections")
    if mpp is not None and by_pitch is not None and abs(mpp / by_pitch - 1) > MPP_TOLERANCE:
        raise UsageError(
            f"{name}: {source} is {mpp:.4g}, but by the pitch of its spots it is {by_pitch:.4g} µm/px; "
            f"correct {source}, or leave it out"
        )
    return mpp if by_pitch is None else by_pitch


def checked_places(name: str, xy_l0: Any) -> NDArray[np.float64]:
    """Centres, or rows and columns on the array, as float64 [N, 2].

    Raises:
        UsageError: another shape, a place that is no number, or one that no slide or array has.
    """
    try:
        centres: NDArray[np.float64] = np.asarray(xy_l0, np.float64)
    except (TypeError, ValueError) as exc:
        raise UsageError(f"{name}: places of spots are no numbers: {exc}") from exc
    wrong = int((~(np.abs(centres) < MOST_PLACE)).sum())  # NaN is not
    if centres.ndim != 2 or centres.shape[1] != 2 or wrong:
        raise UsageError(
            f"{name}: places of spots are {list(centres.shape)}, {wrong} of them no numbers below "
            f"{MOST_PLACE}; they have to be N x 2, x and y in pixels of the slide"
        )
    return centres
