"""What all formats of sections share: options, files found, spots matched, µm/px from the spots' pitch."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from seal_extract.errors import UsageError, how_to_install
from seal_extract.train.config import Options, Positive
from seal_extract.train.sections import Expression, Section

MPP_TOLERANCE = 0.05  # share by which a stated µm/px and that of the spots' pitch may differ
VISIUM_PITCH_UM = 100.0  # between spots
LARGEST_POSITION = 2**30  # of a spot: a slide has at most some 2**20 pixels a side
DOWNSCALED = ("tissue_hires_image", "tissue_lowres_image", "detected_tissue_image", "aligned_fiducials")
SUFFIXES = ("tif", "tiff", "ome.tif", "ome.tiff", "btf", "svs", "ndpi", "png", "jpg", "jpeg")

Lattice = Literal["auto", "hexagonal", "square", "none"]


class Source(Options, frozen=True):
    """Sections of one folder, as a table ``[[data.sections]]`` describes them.

    Attributes:
        folder: with the files.
        names: of the sections.
        mpp: µm/px of the slides, where the files do not state it; the spots' pitch has to agree with it.
        counts_are: ``"counts"``, or ``"log1p"`` of counts scaled to 10,000 per spot.
        duplicates: ``"sum"`` adds the counts of genes of one name.
        patient: of all these sections; by default what the files say, else each section is a patient.
    """

    slide_states_mpp: ClassVar[bool] = False  # trusted where nothing else does

    folder: str
    names: tuple[str, ...]
    mpp: Positive | None = None
    counts_are: Literal["counts", "log1p"] = "counts"
    duplicates: Literal["refuse", "sum"] = "refuse"
    patient: str | None = None

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder).expanduser()

    def read(self, name: str) -> Section:
        """One of the sections.

        Raises:
            UsageError: a file is missing or malformed, the µm/px is unknown or contradicts the pitch.
        """
        raise NotImplementedError

    def section(
        self,
        name: str,
        *,
        slide: Path,
        genes: Sequence[str],
        counts: Any,
        barcodes: Sequence[str],
        xy_l0: Any,
        array_rc: NDArray[np.int64] | None,
        lattice: str,
        pitch_um: float | None,
        patient: str | None = None,
        stated: tuple[float | None, str] | None = None,
        advice: str = "",
        embeddings: Expression | None = None,
        labels: tuple[str, ...] | None = None,
    ) -> Section:
        """The section of a file's counts [N, G] and positions [N, 2].

        Its µm/px is that of the spots' pitch, else the ``stated`` one, by default the option ``mpp``.
        ``advice`` completes the message about genes that occur twice.
        """
        unique, counts = self._unique_genes(name, genes, counts, advice)
        xy_l0 = checked_positions(name, xy_l0)
        by_pitch = None
        if array_rc is not None and pitch_um is not None:
            by_pitch = mpp_by_pitch(array_rc, lattice, pitch_um, xy_l0)
        mpp, mpp_source = stated or (self.mpp, "mpp")
        if mpp is not None and by_pitch is not None and abs(mpp / by_pitch - 1) > MPP_TOLERANCE:
            raise UsageError(
                f"{name}: {mpp_source} is {mpp:.4g}, but by the pitch of its spots it is {by_pitch:.4g} "
                f"µm/px; correct {mpp_source}, or leave it out"
            )
        if by_pitch is not None:
            mpp, mpp_source = by_pitch, f"{pitch_um:g} µm between spots"
        if mpp is None and not self.slide_states_mpp:
            raise UsageError(f"{name}: µm/px is unknown; type mpp = 0.5, or another value, with the sections")
        return Section(
            name=name,
            patient=self.patient or patient or name,
            slide=slide,
            mpp=mpp,
            mpp_source=mpp_source,
            genes=unique,
            counts=counts,
            scale=self.counts_are,
            xy_l0=xy_l0,
            barcodes=tuple(barcodes),
            array_rc=None if lattice == "none" else array_rc,
            lattice=lattice,
            embeddings=embeddings,
            labels=labels,
        )

    def _unique_genes(
        self, name: str, genes: Sequence[str], counts: Any, advice: str
    ) -> tuple[tuple[str, ...], Any]:
        """Genes and counts [N, G] with every gene once."""
        twice = sorted(gene for gene, count in Counter(genes).items() if count > 1)
        if not twice:
            return tuple(genes), counts
        if self.duplicates == "refuse":
            raise UsageError(
                f"{name}: {len(twice)} genes occur twice, the first is {twice[0]}; type "
                f'duplicates = "sum" to add their counts{advice}'
            )
        if self.counts_are != "counts":
            raise UsageError(f'{name}: duplicates = "sum" adds counts, but counts_are is {self.counts_are!r}')
        sparse = needed("scipy.sparse")
        column = {gene: i for i, gene in enumerate(dict.fromkeys(genes))}
        into = [column[gene] for gene in genes]
        ones = np.ones(len(genes), counts.dtype)
        gather = sparse.csr_matrix((ones, (np.arange(len(genes)), into)), shape=(len(genes), len(column)))
        return tuple(column), counts @ gather


def needed(module: str, how: str = how_to_install("train")) -> Any:
    """Import a module of the extra ``train``; a `UsageError` says how to install it."""
    try:
        return import_module(module)
    except ImportError as exc:
        raise UsageError(f"{module.split('.')[0]} is not installed; {how}") from exc


def existing(folder: Path, *names: str) -> Path:
    """The first of some files that exists; a `UsageError` if none does."""
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UsageError(f"{folder} has no {' or '.join(names)}; check folder and names of the sections")
    return found


def slide_of(folder: Path, name: str, slide: str | None) -> Path:
    """The image of a section: ``slide``, in which ``{name}`` stands for the section; else NAME.tif and so on.

    Raises:
        UsageError: there is none, or it is one of Space Ranger's downscaled copies.
    """
    if slide is None:
        return existing(folder, *(f"{name}.{suffix}" for suffix in SUFFIXES))
    path = folder / Path(slide.replace("{name}", name)).expanduser()
    if path.name.startswith(DOWNSCALED):
        raise UsageError(
            f"{name}: {path.name} is a downscaled copy; give slide = the full-resolution image that "
            "Space Ranger was given"
        )
    if not path.exists():
        raise UsageError(f"{name}: slide {path} does not exist; check slide, in which {{name}} may stand")
    return path


def matched(name: str, barcodes: Sequence[str], positions: Mapping[str, Any]) -> list[int]:
    """Rows of the counts that have a position; warns about spots with only one of both.

    Raises:
        UsageError: no spot has both.
    """
    rows = [i for i, barcode in enumerate(barcodes) if barcode in positions]
    without_position, without_counts = len(barcodes) - len(rows), len(positions.keys() - set(barcodes))
    if not rows:
        raise UsageError(
            f"{name}: no spot has both counts ({barcodes[0] if barcodes else 'none'}, ...) and a position "
            f"({next(iter(positions), 'none')}, ...); the names have to agree"
        )
    if without_position or without_counts:
        warnings.warn(
            f"{name}: {without_counts} spots without counts and {without_position} counts without a spot are "
            f"left out, {len(rows)} stay",
            stacklevel=3,
        )
    return rows


def lattice_of(name: str, lattice: Lattice, array_rc: NDArray[np.int64] | None) -> str:
    """The lattice asked for, or that of the array: on a hexagon, row and column are both even or both odd.

    Raises:
        UsageError: a lattice without rows and columns.
    """
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
    """µm/px from the spots' positions on array and slide, which may be rotated and mirrored.

    The scale of the similarity transform that fits best (Umeyama 1991, equation 42, reflections allowed): a
    single distance between spots is not accurate enough, as they are printed unevenly. None below 3 spots.
    """
    if lattice == "none" or len(np.unique(array_rc, axis=0)) < 3:
        return None
    step_um = (pitch_um * math.sqrt(3) / 2, pitch_um / 2) if lattice == "hexagonal" else (pitch_um, pitch_um)
    um, px = array_rc * np.array(step_um), xy_l0
    um, px = um - um.mean(0), px - px.mean(0)
    px_per_um = np.linalg.svd(um.T @ px, compute_uv=False).sum() / (um**2).sum()
    return float(1 / px_per_um) if px_per_um > 0 else None


def checked_positions(name: str, positions: Any) -> NDArray[np.float64]:
    """Centres of spots, or their rows and columns on the array, as float64 [N, 2].

    Raises:
        UsageError: another shape, or values that no slide or array has.
    """
    try:
        centres: NDArray[np.float64] = np.asarray(positions, np.float64)
    except (TypeError, ValueError) as exc:
        raise UsageError(f"{name}: positions of spots are no numbers: {exc}") from exc
    wrong = int((~(np.abs(centres) < LARGEST_POSITION)).sum())  # NaN is not
    if centres.ndim != 2 or centres.shape[1] != 2 or wrong:
        raise UsageError(
            f"{name}: positions of spots are {list(centres.shape)}, {wrong} of them no numbers below "
            f"{LARGEST_POSITION}; they have to be N x 2, x and y in pixels of the slide"
        )
    return centres
