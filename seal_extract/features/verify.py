"""Verify a folder of features for a tool (TRIDENT, Patho-Bench, CLAM, STAMP, MIL-Lab) or a slide encoder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from seal_extract.encoders.registry import list_encoders
from seal_extract.encoders.slide_encoders import SLIDE_ENCODERS, SlideEncoder
from seal_extract.errors import UsageError
from seal_extract.features.checks import (
    POOLED,
    Check,
    CheckedFile,
    Problem,
    check_tensor,
    clam_coords,
    clam_features,
    in_hdf5,
    look,
    mil_lab,
    patch_tokens,
    patho_bench,
    stamp,
    trident_coords,
    trident_features,
)
from seal_extract.features.fit import fits, rows_for
from seal_extract.features.store import TOKENS


def verify(folder: str | os.PathLike[str], consumer: str) -> tuple[Problem, ...]:
    """All problems and warnings of the files that ``consumer`` would read.

    Args:
        folder: the folder that you would give to that tool.
        consumer: ``"trident"``, ``"patho-bench"``, ``"clam"``, ``"stamp"`` or ``"mil-lab"``; or a name or
            family of `SLIDE_ENCODERS`, such as ``"titan"`` or ``"feather"``.

    Raises:
        UsageError: there is no such tool, or it would read no file of the folder.
    """
    files = files_for(folder, consumer)
    seen = [look(path, check) for path, check in files.items()]
    problems = [problem for one in seen for problem in one.problems]
    if consumer == "clam":
        problems += [*_unpaired(seen), *_resized(seen)]
    return (*problems, *_compare(seen, consumer))


def files_for(folder: str | os.PathLike[str], consumer: str) -> dict[Path, Check]:
    """The files that ``consumer`` would read, and tokens beside them, each with its check.

    Raises:
        UsageError: see `verify`.
    """
    folder = Path(folder)
    if folder.name in ("", ".."):  # the check depends on folder names
        folder = folder.resolve()
    slide_encoders = () if consumer in CONSUMERS else rows_for(consumer)
    if consumer not in CONSUMERS and not slide_encoders:
        allowed = ", ".join([*CONSUMERS, *SLIDE_ENCODERS])
        raise UsageError(f"--for is {consumer!r}; allowed: {allowed}")
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; give the one that {consumer} would read")
    files = _bags(folder, slide_encoders) if slide_encoders else CONSUMERS[consumer](folder)
    if not files:
        layout = "trident" if slide_encoders else LAYOUT_FOR.get(consumer, consumer)
        raise UsageError(
            f"{folder} holds nothing that {consumer} reads: looked for {LOOKED_FOR.get(consumer, BAGS)}; "
            f"convert a finished run with: seal-extract export {folder} --layout {layout} -o {layout}"
        )
    tokens = [path for path in _below(folder, "*.h5") if path.parent.name.startswith(f"{TOKENS}_")]
    return files | dict.fromkeys(tokens, in_hdf5(patch_tokens))


# --- which files ------------------------------------------------------------------------------------


def _trident_files(folder: Path) -> dict[Path, Check]:
    files = _below(folder, "*.h5")
    coords = [p for p in files if p.parent.name == "patches" and p.name.endswith("_patches.h5")]
    features = [p for p in files if p.parent.name.startswith("features_")]
    return dict.fromkeys(coords, in_hdf5(trident_coords)) | dict.fromkeys(features, in_hdf5(trident_features))


def _clam_files(folder: Path) -> dict[Path, Check]:
    places = {"h5_files": in_hdf5(clam_features), "patches": in_hdf5(clam_coords), "pt_files": check_tensor}
    files = [*_below(folder, "*.h5"), *_below(folder, "*.pt")]
    return {
        p: places[p.parent.name]
        for p in files
        if p.parent.name in places and not p.name.endswith("_patches.h5")
    }


def _stamp_files(folder: Path) -> dict[Path, Check]:
    below = (p for p in folder.glob("*/*.h5") if not p.parent.name.startswith((*POOLED, f"{TOKENS}_")))
    return dict.fromkeys(sorted(folder.glob("*.h5")) or sorted(below), in_hdf5(stamp))


def _bench_files(folder: Path) -> dict[Path, Check]:
    below = (p for p in _below(folder, "*.h5") if p.parent.name.startswith(("features_", *POOLED)))
    files = sorted(folder.glob("*.h5")) or list(below)
    return dict.fromkeys(files, in_hdf5(patho_bench))


def _mil_files(folder: Path) -> dict[Path, Check]:
    tensors: dict[Path, Check] = dict.fromkeys(sorted(folder.glob("*.pt")), check_tensor)
    return dict.fromkeys(sorted(folder.glob("*.h5")), in_hdf5(mil_lab)) | tensors


def _bags(folder: Path, slide_encoders: Sequence[SlideEncoder]) -> dict[Path, Check]:
    places = ("features_", "h5_files")
    below = (p for p in _below(folder, "*.h5") if p.parent.name.startswith(places))
    return dict.fromkeys(sorted(folder.glob("*.h5")) or list(below), fits(slide_encoders))


def _below(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.rglob(pattern))


CONSUMERS: dict[str, Callable[[Path], dict[Path, Check]]] = {
    "clam": _clam_files,
    "trident": _trident_files,
    "patho-bench": _bench_files,
    "stamp": _stamp_files,
    "mil-lab": _mil_files,
}
LAYOUT_FOR = {"patho-bench": "trident", "mil-lab": "flat"}  # the other tools have the names of their layouts
LOOKED_FOR = {
    "clam": "h5_files/*.h5, pt_files/*.pt and patches/*.h5",
    "trident": "patches/*_patches.h5 and features_*/*.h5",
    "patho-bench": "*.h5 in the folder itself, or in features_NAME, slide_features_NAME and "
    "patient_features_NAME below",
    "stamp": "*.h5 in the folder or one below",
    "mil-lab": "*.h5 and *.pt in the folder itself",
}
BAGS = "*.h5 in the folder itself, or in features_NAME and h5_files below"  # for slide encoders


# --- between files ----------------------------------------------------------------------------------


def _compare(seen: Sequence[CheckedFile], consumer: str) -> Iterator[Problem]:
    """Find files that differ from most files of their folder."""
    if consumer not in CONSUMERS:  # each file was compared with what the slide encoder takes
        return
    for folder in dict.fromkeys(s.path.parent for s in seen):
        together = [s for s in seen if s.path.parent == folder]
        for one, usual in _unlike(together, lambda s: s.dim):
            yield Problem(
                one.path,
                f"features of {one.dim} columns, most files have {usual}; one model takes one width",
            )
        if consumer in ("trident", "patho-bench"):
            for one, usual in _unlike(together, lambda s: s.patch_size_l0):
                yield Problem(
                    one.path,
                    f"patch_size_level0 is {one.patch_size_l0}, most files have {usual}; "
                    f"Patho-Bench fuses slides of one patient only if it is the same",
                    is_warning=True,
                )


def _unlike(
    seen: Sequence[CheckedFile], of: Callable[[CheckedFile], int | None]
) -> Iterator[tuple[CheckedFile, int]]:
    counts = Counter(value for s in seen if (value := of(s)) is not None)
    if len(counts) > 1:
        usual = counts.most_common(1)[0][0]
        yield from ((s, usual) for s in seen if of(s) not in (None, usual))


def _unpaired(seen: Sequence[CheckedFile]) -> Iterator[Problem]:
    """Find files of ``h5_files`` without a file of ``pt_files`` with as many rows, on which CLAM trains."""
    rows = {s.path: s.rows for s in seen}
    for path in [p for p in rows if p.parent.name == "h5_files"]:
        tensor = path.parent.parent / "pt_files" / f"{path.stem}.pt"
        if tensor not in rows:
            yield Problem(tensor, f"missing, though h5_files/{path.name} is there; CLAM trains on it")
        elif None not in (rows[tensor], rows[path]) and rows[tensor] != rows[path]:
            yield Problem(tensor, f"{rows[tensor]} rows, but h5_files/{path.name} has {rows[path]}")


def _resized(seen: Sequence[CheckedFile]) -> Iterator[Problem]:
    """Warn once per folder where CLAM would see another scale unless its transform resizes."""
    own_size = ", ".join(spec.name for spec in list_encoders() if spec.input.resize_px is None)
    for (folder, said), files in Counter((s.path.parent, s.clam_resize) for s in seen).items():
        if said is not None:
            yield Problem(
                folder,
                f"in {files} files {said}. Otherwise encoders that do not resize ({own_size}) silently "
                f"see a wrong scale, and the others see another resampling filter",
                is_warning=True,
            )
