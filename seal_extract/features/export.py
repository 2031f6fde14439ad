"""Convert a finished run to another layout without encoding again; the same values are copied in pieces.

A file to which the same features were exported before is recognised. Any other file is left alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from seal_extract.errors import OutputError, SealExtractError, SlideError, UsageError
from seal_extract.features.feature_file import MICROMETRES, SlideLabel
from seal_extract.features.layouts import LAYOUTS, Layout, layout_of_grid
from seal_extract.features.scverse import SCVERSE, origin_overview
from seal_extract.features.store import (
    SlideFeatures,
    find_features,
    read_features,
    read_pieces,
    read_provenance,
    scan_features,
)
from seal_extract.names import EXPORTED_FROM, is_export, shareable, written_twice

EXPORTS = (*LAYOUTS, *SCVERSE)


@dataclass(frozen=True)
class Exported:
    """The outcome of one feature file.

    Attributes:
        source: the file of the finished run.
        path: the new file.
        patches: the number of patches.
        state: ``"written"``, ``"finished before"``, ``"failed"``, or ``"left out"`` if the layout has no
            place for a slide without patches.
        error: the error if it failed; None otherwise.
        note: a remark, such as that the picture of the slide is missing.
    """

    source: Path
    path: Path
    patches: int
    state: Literal["written", "finished before", "left out", "failed"] = "written"
    error: SealExtractError | None = None
    note: str = ""

    def __str__(self) -> str:
        if self.error is not None:
            return f"FAILED {self.error}"
        if self.state == "left out":
            return f"{self.source.name}: no patches, left out"
        state = "" if self.state == "written" else f", {self.state}"
        return f"{self.source.name}: {self.patches} patches{state} -> {self.path}{self.note}"


def export(
    folder: str | os.PathLike[str],
    layout: str,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    slides: Path | None = None,
) -> Iterator[Exported]:
    """Convert every finished feature file under ``folder`` to another layout under ``out``.

    Values stay equal in float32, and are rounded to float16 in STAMP's layout. The provenance is kept; the
    path of the source in ``folder`` is added as ``exported_from``. Slides and weights are named without their
    folders, so that no folder of this machine is given away. Pictures and contours are not copied.

    Args:
        folder: the folder of a finished run or a part of it, such as that of one encoder.
        layout: ``"trident"``, ``"clam"``, ``"stamp"``, ``"flat"``, ``"anndata"`` or ``"spatialdata"``.
        out: folder for the results.
        overwrite: replace files that were made from other features.
        slides: folder of the slides, if they have moved; AnnData and SpatialData hold a picture of the slide.

    Yields:
        The outcome of each file; a failure does not stop the others.

    Raises:
        UsageError: the layout is unknown, ``folder`` holds nothing finished, or two files would get one name.
    """
    if layout not in EXPORTS:
        raise UsageError(f"--layout is {layout!r}; allowed: {', '.join(EXPORTS)}")
    if layout in SCVERSE:
        SCVERSE[layout].check_installed()
    jobs, damaged = _jobs(Path(folder), layout, Path(out))
    failed = (Exported(file, file, 0, "failed", error) for file, error in damaged.items())
    done = (
        _export_one(file, path, Path(folder), layout, Path(out), overwrite, slides)
        for path, file in jobs.items()
    )
    return chain(failed, done)


def _jobs(folder: Path, layout: str, out: Path) -> tuple[dict[Path, Path], dict[Path, OutputError]]:
    """The sources by the file that each becomes, and the damaged sources.

    If a run was exported into its own folder, originals are preferred to exports.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; give the -o of a finished run")

    def job(file: Path) -> tuple[Path, dict[str, Any]] | None:
        features = find_features(file)
        return None if features is None else (_place(features, layout, out), features.provenance)

    jobs: dict[Path, Path] = {}
    found, damaged = scan_features(folder, job)
    for file in written_twice((file, provenance) for file, (_, provenance) in found.items()):
        del found[file]
    exports = {file for file, (_, provenance) in found.items() if is_export(provenance)}
    for file, (path, _) in found.items():
        other = jobs.get(path, file)
        if path.resolve() == file.resolve() or (other != file and file in exports):
            continue
        if other != file and other not in exports:
            raise UsageError(
                f"{other} and {file} would both become {path}; "
                f"give the folder of one of them in place of {folder}, and each its own -o"
            )
        jobs[path] = file
    if not jobs and not damaged:
        raise UsageError(
            f"{folder} holds no finished feature file of seal_extract that is not in this layout already "
            f"(searched *.h5 in it and below); give the -o of a finished run"
        )
    return jobs, damaged


def _place(source: SlideFeatures, layout: str, out: Path) -> Path:
    name, encoder = source.path.stem, source.provenance["encoder"]["name"]
    if layout in SCVERSE:
        return out / f"{name}{SCVERSE[layout].suffix}"
    return layout_of_grid(layout, out, source.grid).place(name, encoder, source.grid)


def _export_one(
    file: Path, path: Path, folder: Path, layout: str, out: Path, overwrite: bool, slides: Path | None
) -> Exported:
    result = Exported(file, path, 0)
    try:
        source = read_features(file)
        result = replace(result, patches=len(source.grid))
        if layout != "stamp" and read_provenance(file, MICROMETRES) is not None:
            raise OutputError(
                f"{source.path} holds float16 (STAMP's layout), but {layout} needs float32; "
                f"export from a float32 layout, or encode again"
            )
        if layout in SCVERSE and not len(source.grid) and not SCVERSE[layout].takes_empty:
            return replace(result, state="left out")
        provenance = shareable(source.provenance) | {EXPORTED_FROM: str(file.relative_to(folder))}
        name, encoder = file.stem, provenance["encoder"]["name"]
        target = None if layout in SCVERSE else layout_of_grid(layout, out, source.grid)
        if not overwrite and _is_done(path, layout, provenance):
            if target is not None:
                target.complete(name, encoder)
            return replace(result, state="finished before")
        if target is not None:
            _copy(source, provenance, target, overwrite)
            is_hidden = path != target.features(name, encoder)  # it lies where readers do not look
            return replace(result, state="left out") if is_hidden else result
        overview = None
        try:
            overview = origin_overview(source, slides)
        except SlideError as exc:  # the features are complete without a picture
            result = replace(result, note=f"; without the slide's picture: {exc}")
        SCVERSE[layout].write(replace(source, provenance=provenance), path, overview)
        return result
    except SealExtractError as exc:
        return replace(result, state="failed", error=exc)


def _is_done(path: Path, layout: str, provenance: dict[str, Any]) -> bool:
    """Whether the file holds these features already, from an earlier export or the same run.

    Raises:
        OutputError: the file holds something else.
    """
    if not path.exists():
        return False
    read = SCVERSE[layout].read_provenance if layout in SCVERSE else read_provenance
    there = read(path)
    if there is None or _without_origin(there) != _without_origin(provenance):
        what = "is of another tool" if there is None else "was made from other features"
        raise OutputError(f"{path} exists and {what}; type --overwrite to replace it, or another -o")
    return True


def _without_origin(provenance: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in provenance.items() if key != EXPORTED_FROM}
    return shareable(kept)  # an older version wrote paths


def _copy(source: SlideFeatures, provenance: dict[str, Any], target: Layout, overwrite: bool) -> None:
    slide, encoder = provenance["slide"], provenance["encoder"]["name"]
    label = SlideLabel(source.path.stem, tuple(slide["size_l0"]), slide["mpp"], source.barcodes)
    target.write_coords(label, source.grid, provenance, overwrite=overwrite)
    with target.write_features(
        label, source.grid, encoder, source.dim, provenance, overwrite=overwrite
    ) as writer:
        for piece in read_pieces(source.path):
            writer.append(piece)
