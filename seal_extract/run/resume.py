"""What a former run finished: recognised by slide, options and weights, without tissue, patches or torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seal_extract.encoders.request import EncoderRequest
from seal_extract.errors import OutputError
from seal_extract.features.layout import Layout
from seal_extract.features.layouts import layout_of_grid, open_layout
from seal_extract.features.store import SlideFeatures, find_features, read_provenance
from seal_extract.names import SEPARATOR
from seal_extract.patches.grid import read_grid
from seal_extract.publish import writing
from seal_extract.run.options import ExtractOptions, coords_file
from seal_extract.run.provenance import PIPELINE, describe_options, describe_request, first_difference
from seal_extract.run.slide_process import open_within
from seal_extract.run.status_table import read_status_rows
from seal_extract.slides.entry import SlideEntry
from seal_extract.slides.identity import content, sizes_and_times
from seal_extract.slides.listing import with_names
from seal_extract.slides.mpp import same_mpp
from seal_extract.slides.remote import address, look, place
from seal_extract.slides.slide import Slide

if TYPE_CHECKING:
    from seal_extract.encoders import Encoder

GIVEN = ("given", "table", "--slide-mpp", "--override-mpp")  # sources of a µm/px that the file lacks


def find_finished(
    slide: Slide,
    encoder: dict[str, Any],
    out: str | os.PathLike[str],
    options: ExtractOptions,
    name: str | None = None,
    entry: SlideEntry | None = None,
) -> SlideFeatures | None:
    """The features that the same request wrote before, if they are there.

    Args:
        slide: the open slide.
        encoder: `Encoder.identity`.
        out: folder of the results.
        options: all choices.
        name: of the slide's results; that of its file by default.
        entry: where the slide lies, if ``slide`` is a copy of it.

    Raises:
        OutputError: a file of that name is there, made by something else, and ``overwrite`` is not set.
    """
    layout, name = layout_for(slide, Path(out), options, name), name or slide.path.stem
    found = _find(layout, name, encoder["name"], options)
    if found is None:
        return None
    request = describe_request(slide, encoder, options, name)
    before = found.provenance["request"]["slide"]
    if "content" not in before and _is_same_file(entry or SlideEntry.of(slide.path), found.provenance):
        del request["slide"]["content"]  # an older version did not write it down
    return _accept(found, request, layout, name, options)


def resume(
    slide: str | os.PathLike[str] | SlideEntry,
    encoder: EncoderRequest | Encoder,
    out: str | os.PathLike[str],
    options: ExtractOptions,
) -> SlideFeatures | None:
    """`find_finished` for a slide that is not open and an encoder that is not loaded.

    The slide is opened, and weights are read, only where they may have changed. A slide at a URL that may
    have changed is not finished until its copy has been looked at.

    Raises:
        OutputError: a file of that name is there, made by something else, and ``overwrite`` is not set.
        SlideOpenError: the slide's storage cannot be asked.
    """
    entry = slide if isinstance(slide, SlideEntry) else SlideEntry.of(slide)
    options = options.for_entry(entry)
    if options.coords is not None and entry.url is not None:
        return None
    if options.coords is not None:  # the layout depends on the grid that the file gives
        with open_within(entry, options) as opened:
            layout = layout_for(opened, Path(out), options, entry.name)
    else:
        layout = open_layout(options.layout, Path(out), options.patch_px, options.mpp, options.overlap_px)
    found = _find(layout, entry.name, encoder.spec.name, options)
    if found is None:
        return None
    provenance = found.provenance
    identity = _identity(encoder, provenance["encoder"]["weights"])
    if _is_unchanged(entry, options, provenance):
        request = provenance["request"] | {
            "pipeline": PIPELINE,
            "options": describe_options(entry.path, options, entry.name),
            "encoder": identity,
        }
        return _accept(found, request, layout, entry.name, options)
    if entry.url is not None:
        return None
    with open_within(entry, options) as opened:
        return find_finished(opened, identity, out, options, entry.name, entry)


def keep_names(entries: Sequence[SlideEntry], out: Path) -> tuple[SlideEntry, ...]:
    """The slides, under the names that the results in ``out`` gave them in whatever company before."""
    given: dict[Path, str] = {}
    for table in sorted(out.glob("status*.csv")):
        for row in read_status_rows(table):
            if row.name:
                given.setdefault(_resolved(row.slide), row.name)
    new = {entry.path.stem for entry in entries if entry.resolved().path not in given}
    for file in sorted(out.rglob("*.h5")) if new else ():  # where a table is missing, or was moved with them
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


def _find(layout: Layout, name: str, encoder: str, options: ExtractOptions) -> SlideFeatures | None:
    """The features of that name; None if there are none, or they shall be replaced."""
    with writing(layout.features(name, encoder)):  # a name may be too long to be looked for
        path = layout.find(name, encoder)
    if options.overwrite or path is None:
        return None
    found = find_features(path, layout.dataset)
    if found is None:
        raise OutputError(f"{path} exists and is not ours; type --overwrite to replace it, or another -o")
    return found


def _accept(
    found: SlideFeatures,
    request: dict[str, Any],
    layout: Layout,
    name: str,
    options: ExtractOptions,
) -> SlideFeatures | None:
    before, source = found.provenance["request"], found.provenance["slide"]["mpp_source"]
    slide = before["slide"]
    if source.startswith("given (file: ") and same_mpp(slide["mpp"], request["slide"]["mpp"]):
        # an older version took --slide-mpp although the file says as much
        request = request | {"slide": request["slide"] | {"mpp": slide["mpp"], "reader": slide["reader"]}}
    if slide.get("content") != request["slide"].get("content"):
        why = "a slide with other content" if "content" in slide else "by an older version"
        raise OutputError(
            f"{found.path} exists, made of {found.provenance['slide']['path']} ({why}); "
            f"type --overwrite to replace it, or another -o"
        )
    difference = first_difference(before, request)
    if difference is not None:
        raise OutputError(
            f"{found.path} exists, made with another request ({difference}); "
            f"type --overwrite to replace it, or another -o"
        )
    if found.provenance["read_errors"] > options.max_read_errors:
        return None
    layout.complete(name, request["encoder"]["name"])
    return found


def _identity(encoder: EncoderRequest | Encoder, recorded: list[dict[str, Any]]) -> dict[str, Any]:
    if isinstance(encoder, EncoderRequest):
        return encoder.identity_if_unchanged(recorded) or encoder.load().identity
    return encoder.identity


def _is_unchanged(entry: SlideEntry, options: ExtractOptions, provenance: dict[str, Any]) -> bool:
    """Whether what was read of the slide still holds."""
    mpp, source = provenance["request"]["slide"]["mpp"], provenance["slide"]["mpp_source"]
    return _is_same_file(entry, provenance) and _has_same_mpp(entry, options, mpp, source)


def _is_same_file(entry: SlideEntry, provenance: dict[str, Any]) -> bool:
    """Whether it is the slide that features were made of: in its place as it was, or by its content.

    An older version recorded no content: the same path, size and time are needed.
    """
    before, slide = provenance["request"]["slide"], provenance["slide"]
    if entry.path.name != before["file"]:
        return False
    if entry.url is not None:
        size, version = _remote_state(entry)
        return (size, version) == (before["bytes"], slide.get("version"))
    try:
        there = entry.path.resolve()
        if slide["path"] in (str(there), there.name):  # an export names the file alone
            stat = entry.path.stat()
            if "stamp" not in slide:
                return (stat.st_size, stat.st_mtime_ns) == (before["bytes"], slide["mtime_ns"])
            if sizes_and_times(entry.path) == slide["stamp"]:
                return True
        return "content" in before and entry.path.is_file() and content(entry.path) == before["content"]
    except OSError:
        return False


def _remote_state(entry: SlideEntry) -> tuple[int, str]:
    """Size and version of what is at a URL, or was when it was copied."""
    if entry.copy is not None:
        return entry.copy.stat().st_size, entry.version
    assert entry.url is not None
    there = look(entry.url)
    return there.size, there.version


def _has_same_mpp(entry: SlideEntry, options: ExtractOptions, before: float, source: str) -> bool:
    """Whether `open_entry` would find the same µm/px, without a word; False where it must be asked."""
    given = [mpp for mpp in (options.override_mpp, entry.mpp, options.slide_mpp) if mpp is not None]
    if source in GIVEN:  # by the file alone it is unknown
        return given[:1] == [before] and all(same_mpp(mpp, before) for mpp in given)
    overruled = options.override_mpp is not None or " (file: " in source
    return not overruled and all(same_mpp(mpp, before) for mpp in given)


def layout_for(slide: Slide, out: Path, options: ExtractOptions, name: str | None = None) -> Layout:
    """Where the results of a slide go: patch size and magnification are the grid's own if a file gave it."""
    if options.coords is None:
        return open_layout(options.layout, out, options.patch_px, options.mpp, options.overlap_px)
    grid = read_grid(coords_file(slide.path, options.coords, name), slide)
    return layout_of_grid(options.layout, out, grid)
