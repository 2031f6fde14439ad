"""What made a file: the fingerprint, which decides its numbers, the whole provenance, and resuming by them.

Features of a former run are recognised by slide, options and weights, without torch or tissue.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from seal_extract.encoders.request import EncoderRequest
from seal_extract.errors import OutputError
from seal_extract.features.layouts import Layout
from seal_extract.features.store import (
    SlideFeatures,
    find_features,
    grid_fields,
    read_features,
    read_provenance,
)
from seal_extract.features.tokens import has_tokens, tokens_file
from seal_extract.names import SEPARATOR
from seal_extract.patches.grid import PatchGrid
from seal_extract.publish import file_state, writing
from seal_extract.run.job import SlideJob
from seal_extract.run.options import FINGERPRINT_OPTIONS, ExtractOptions
from seal_extract.run.slide_process import open_tried
from seal_extract.run.status_table import SlideResult, read_status_rows
from seal_extract.slides.entry import SlideEntry, content, look, sizes_and_times
from seal_extract.slides.listing import with_names
from seal_extract.slides.ngff import is_store
from seal_extract.slides.ome_zarr import OmeZarrReader
from seal_extract.slides.readers import same_mpp
from seal_extract.slides.remote import RemoteFile, address, place
from seal_extract.slides.slide import Slide

if TYPE_CHECKING:
    from seal_extract.encoders import Encoder
    from seal_extract.tissue.mask import TissueMask

PIPELINE = 1  # raised whenever the same request gives other numbers than before
FINGERPRINT_VERSION = 1  # raised when entries change their meaning; a file without "version" has version 1
OPTIONS = {field.name for field in fields(ExtractOptions)}
LIBRARIES = (
    "seal-extract",
    "torch",
    "timm",
    "numpy",
    "opencv-python-headless",
    "simplejpeg",
    "imagecodecs",
    "openslide-python",
    "tiffslide",
)
GIVEN = ("given", "table", "--slide-mpp", "--override-mpp")  # sources of a µm/px that the file lacks


def fingerprint(slide: Slide, options: dict[str, Any], encoder: dict[str, Any]) -> dict[str, Any]:
    """All that decides the numbers in a features file, as JSON; equal fingerprints give equal files.

    Args:
        slide: the open slide; its name, content and geometry count, not its folder.
        options: from `PatchOptions.fingerprint`.
        encoder: `Encoder.identity`.
    """
    if isinstance(slide, OmeZarrReader):
        size, digest = slide.size_bytes, slide.content
    else:
        size, digest = slide.path.stat().st_size, content(slide.path)
    return {
        "pipeline": PIPELINE,
        "slide": {
            "file": slide.path.name,
            "bytes": size,
            "content": digest,
            "size_l0": list(slide.size_l0),
            "mpp": slide.mpp,
            "reader": slide.reader.split()[0],
        },
        "options": options,
        "encoder": encoder,
    }


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first entry in which two fingerprints differ, in words; None if they are equal.

    An option that one of them lacks, because its version did not know it, counts as its default.
    """
    if old.get("version", 1) > FINGERPRINT_VERSION:
        return f"version {old['version']} of the fingerprint, of a newer seal-extract"
    return _first_difference(old, new)


def _first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            if key == "options":
                before, after = _all_options(before), _all_options(after)
            if deeper := _first_difference(before, after):
                return f"{key} {deeper}"
        elif before != after:
            return f"{key} {_short(before)}, now {_short(after)}"
    return None


def _all_options(recorded: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of those not recorded, without those that leave the numbers as they are."""
    decisive = {k: v for k, v in recorded.items() if k in FINGERPRINT_OPTIONS or k not in OPTIONS}
    return FINGERPRINT_OPTIONS | decisive


def describe(
    entry: SlideEntry,
    slide: Slide,
    mask: TissueMask | None,
    grid: PatchGrid,
    fingerprint: dict[str, Any],
    encoder: dict[str, Any],
    decoder: str,
) -> dict[str, Any]:
    """The whole provenance of a features file, as JSON.

    Args:
        entry: the slide; the path of its copy is not recorded.
        slide: the open slide.
        mask: its tissue, if it was found or drawn.
        grid: its patches.
        fingerprint: from `fingerprint`.
        encoder: what is worth knowing of the encoder beside its identity.
        decoder: how the patches were decoded.
    """
    tissue = mask and {
        "mpp": mask.mpp,
        "area_mm2": mask.area_mm2,
        "uncovered": mask.uncovered(grid.xy_l0, grid.patch_size_l0),
    }
    # a store that is read at its URL has the digest of its pixels in place of a version
    version_at_url = fingerprint["slide"]["content"] if entry.is_streamed else entry.version
    return {
        "request": fingerprint,
        "slide": {
            # Absolute, so that the slide is found wherever the results are moved to, and told from another of
            # its name. `names.shareable` takes the folders out of all that is made to be given away.
            "path": str(entry.path.resolve()) if entry.url is None else entry.source,
            "mtime_ns": slide.path.stat().st_mtime_ns if entry.url is None else None,
            "stamp": sizes_and_times(slide.path) if entry.url is None else None,
            "size_l0": list(slide.size_l0),
            "mpp": slide.mpp,
            "mpp_source": slide.mpp_source,
            "mpp_conflict": slide.mpp_conflict,
            "reader": slide.reader,
            "decoder": decoder,
            **({} if entry.url is None else {"version": version_at_url}),
        },
        "tissue": tissue,
        "padding": float(grid.padding.mean()) if len(grid) else 0.0,  # share beyond the slide
        **describe_rest(grid, encoder),
    }


def describe_rest(grid: PatchGrid, encoder: dict[str, Any]) -> dict[str, Any]:
    """The part of a provenance that is the same for patches of a slide and for ready-cut patches."""
    return {
        "grid": grid_fields(grid),
        "encoder": encoder,
        "read_errors": 0,
        "unreadable": [],  # row, xy_l0 and reason of each patch whose features are zeros
        "versions": dict(library_versions()),
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


@lru_cache(maxsize=1)
def library_versions() -> tuple[tuple[str, str], ...]:
    """The libraries that decide the numbers, with their versions."""
    return tuple((name, version(name)) for name in LIBRARIES)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."


# --- resuming -----------------------------------------------------------------------------------------


def without_finished(
    job: SlideJob, encoders: Sequence[EncoderRequest | Encoder], layout: Layout | None = None
) -> SlideJob | SlideResult:
    """The result of a slide that needs no work; otherwise the job, which then knows what is finished.

    The slide is opened, and weights are read, only where they may have changed.

    Args:
        job: the slide.
        encoders: all that are to see it.
        layout: where the features lie. Without it, features of other coordinates than those asked for are
            passed over, since the folder of these is unknown until they are read.

    Raises:
        SealExtractError: the slide cannot be used, or a file made with other options is in the way.
    """
    started = perf_counter()
    if job.error is not None:
        raise job.error
    found = [find_finished(job, encoder, layout) for encoder in encoders]
    finished = tuple(features for features in found if features is not None)
    paths = {f.provenance["encoder"]["name"]: f.path for f in finished}
    complete = frozenset(paths)
    if job.options.tokens:
        complete = frozenset(name for f, name in zip(finished, paths, strict=True) if _has_tokens(job, f))
    if len(complete) == len(encoders):
        return SlideResult(job.entry, finished, None, perf_counter() - started, finished_before=True)
    return replace(job, finished=paths, complete=complete)


def _has_tokens(job: SlideJob, features: SlideFeatures) -> bool:
    name, layout = features.provenance["encoder"]["name"], job.layout_of(features.grid)
    return has_tokens(tokens_file(layout, job.entry.name, name), features.provenance["request"])


def find_finished(
    job: SlideJob, encoder: EncoderRequest | Encoder, layout: Layout | None = None
) -> SlideFeatures | None:
    """The features that the same request wrote before, if they are there; see `without_finished`.

    Raises:
        OutputError: a file of that name is there, made by something else, and ``overwrite`` is not set.
        SlideOpenError: the storage of the slide does not answer.
    """
    if (path := job.finished.get(encoder.spec.name)) is not None:
        return read_features(path)
    for candidate in job.layouts if layout is None else (layout,):
        found = _find(job, encoder.spec.name, candidate)
        if found is None or (layout is None and not _has_same_coords(job, found)):
            continue
        request = _request(job, encoder, found)
        return None if request is None else _accepted(job, found, request, candidate)
    return None


def _has_same_coords(job: SlideJob, found: SlideFeatures) -> bool:
    coords = found.provenance["request"]["options"].get("coords")
    return job.options.coords is None or coords == job.fingerprint["coords"]


def _find(job: SlideJob, encoder: str, layout: Layout) -> SlideFeatures | None:
    """The features of that name; None if there are none, or they are to be replaced."""
    with writing(layout.features(job.entry.name, encoder)):  # a name may be too long to be looked for
        path = layout.find(job.entry.name, encoder)
    if job.options.overwrite or path is None:
        return None
    found = find_features(path, layout.dataset)
    if found is None:
        raise OutputError(f"{path} exists and is not ours; type --overwrite to replace it, or another -o")
    return found


def _request(job: SlideJob, encoder: EncoderRequest | Encoder, found: SlideFeatures) -> dict[str, Any] | None:
    """The fingerprint of features that would be made now; None if a URL may have changed and has no copy."""
    entry, recorded = job.entry, found.provenance["request"]
    if isinstance(encoder, EncoderRequest):
        weights = found.provenance["encoder"]["weights"]
        identity = encoder.identity_if_unchanged(weights) or encoder.load().identity
    else:
        identity = encoder.identity
    is_same = _is_same_file(entry, found.provenance)
    if is_same and _has_same_mpp(entry, job.options, found.provenance):
        return {**recorded, "pipeline": PIPELINE, "options": job.fingerprint, "encoder": identity}
    if entry.url is not None and entry.copy is None and not entry.is_streamed:
        return None
    with open_tried(job) as slide:
        request = fingerprint(slide, job.fingerprint, identity)
    if is_same and "content" not in recorded["slide"]:
        del request["slide"]["content"]  # an older version did not record it
    return request


def _accepted(
    job: SlideJob, found: SlideFeatures, request: dict[str, Any], layout: Layout
) -> SlideFeatures | None:
    """The features, if the same request made them; None if they have more unreadable patches than allowed.

    Raises:
        OutputError: another request made them.
    """
    recorded, source = found.provenance["request"], found.provenance["slide"]["mpp_source"]
    slide = recorded["slide"]
    if source.startswith("given (file: ") and same_mpp(slide["mpp"], request["slide"]["mpp"]):
        # an older version took --slide-mpp although the file says as much
        request = request | {"slide": request["slide"] | {"mpp": slide["mpp"], "reader": slide["reader"]}}
    if slide.get("content") != request["slide"].get("content"):
        why = "a slide with other content" if "content" in slide else "by an older version"
        raise OutputError(
            f"{found.path} exists, made of {found.provenance['slide']['path']} ({why}); "
            f"type --overwrite to replace it, or another -o"
        )
    difference = first_difference(recorded, request)
    if difference is not None:
        raise OutputError(
            f"{found.path} exists, made with another request ({difference}); "
            f"type --overwrite to replace it, or another -o"
        )
    if found.provenance["read_errors"] > job.options.max_read_errors:
        return None
    layout.complete(job.entry.name, request["encoder"]["name"])
    return found


def _is_same_file(entry: SlideEntry, provenance: dict[str, Any]) -> bool:
    """Whether it is the slide that features were made of: in its place as it was, or by its content.

    An older version recorded no content: the same path, size and time are needed.
    """
    recorded, slide = provenance["request"]["slide"], provenance["slide"]
    if entry.path.name != recorded.get("file"):
        return False
    if entry.url is not None:
        return look(entry) == RemoteFile(recorded["bytes"], slide.get("version"))
    try:
        path = entry.path.resolve()
        if slide["path"] in (str(path), path.name):  # an export names the file alone
            if "stamp" not in slide:
                return file_state(entry.path) == (recorded["bytes"], slide["mtime_ns"])
            if sizes_and_times(entry.path) == slide["stamp"]:
                return True
        is_there = entry.path.is_file() or is_store(entry.path)
        return "content" in recorded and is_there and content(entry.path) == recorded["content"]
    except OSError:
        return False


def _has_same_mpp(entry: SlideEntry, options: ExtractOptions, provenance: dict[str, Any]) -> bool:
    """Whether `open_entry` would find the same µm/px, without a warning; False where it must be asked."""
    before, source = provenance["request"]["slide"]["mpp"], provenance["slide"]["mpp_source"]
    given = [mpp for mpp in (options.override_mpp, entry.mpp, options.slide_mpp) if mpp is not None]
    if source in GIVEN:  # by the file alone it is unknown
        return given[:1] == [before] and all(same_mpp(mpp, before) for mpp in given)
    overruled = options.override_mpp is not None or " (file: " in source
    return not overruled and all(same_mpp(mpp, before) for mpp in given)


def keep_names(entries: Sequence[SlideEntry], out: Path) -> tuple[SlideEntry, ...]:
    """The slides, under the names that former runs into ``out`` gave them."""
    given: dict[Path, str] = {}
    for table in sorted(out.glob("status*.csv")):
        for row in read_status_rows(table):
            if row.name:
                given.setdefault(_resolved(row.slide), row.name)
    new = {entry.path.stem for entry in entries if entry.resolved().path not in given}
    for file in sorted(out.rglob("*.h5")) if new else ():  # the table may be missing or moved
        parts = file.stem.split(SEPARATOR)
        tails = (Path(SEPARATOR.join(parts[i:])) for i in range(len(parts)))
        if any(tail.name in new or tail.stem in new for tail in tails):
            provenance = None
            with suppress(OutputError):  # a damaged one says nothing
                provenance = read_provenance(file)
            path = provenance["slide"].get("path", "") if provenance is not None else ""
            if "/" in path:  # an export names the file alone
                given.setdefault(_resolved(path), file.stem)
    return tuple(with_names(entries, given))


def _resolved(source: str) -> Path:
    where = address(source)
    try:
        return where.resolve() if isinstance(where, Path) else place(where)
    except (OSError, RuntimeError, ValueError):  # nothing that can be a path on this machine
        return Path(source)
