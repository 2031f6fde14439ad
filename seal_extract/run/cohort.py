"""Many slides: finished slides are skipped; failed slides are reported, and tried again by the next run.

A run may be killed at any moment: features get their final names only when they are complete, so the same
command continues where it stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from seal_extract.encoders.request import EncoderRequest
from seal_extract.errors import CheckpointError, HubError, UsageError
from seal_extract.features.layouts import check_layout
from seal_extract.patches.grid import grid_name
from seal_extract.publish import sweep
from seal_extract.run.job import SlideJob
from seal_extract.run.options import ExtractOptions
from seal_extract.run.provenance import keep_names, without_finished
from seal_extract.run.status_table import (
    DONE,
    FAILED,
    IGNORED,
    Progress,
    SlideResult,
    StatusFile,
    StatusRow,
    read_status_rows,
)
from seal_extract.slides.entry import SlideEntry, refuse_uncopied
from seal_extract.slides.listing import SlideList, list_slides

if TYPE_CHECKING:
    from seal_extract.encoders import Encoder
    from seal_extract.run.workers import Engine

    EncoderLike = str | os.PathLike[str] | EncoderRequest | Encoder

STATUS = "status.csv"
SAME_FOR_EVERY_SLIDE = (UsageError, CheckpointError, HubError)


@dataclass(frozen=True)
class CohortReport:
    """The results of a cohort.

    Attributes:
        rows: one per slide of this run, and per file that was ignored.
        status: the table that holds them.
        seconds: of this run.
    """

    rows: tuple[StatusRow, ...]
    status: Path
    seconds: float

    @property
    def done(self) -> tuple[StatusRow, ...]:
        """Slides that are embedded, by this run or a former one."""
        return tuple(row for row in self.rows if row.status == DONE)

    @property
    def failed(self) -> tuple[StatusRow, ...]:
        """Slides that failed."""
        return tuple(row for row in self.rows if row.status == FAILED)

    def __repr__(self) -> str:
        done, failed = len(self.done), len(self.failed)
        ignored = len(self.rows) - done - failed
        return f"CohortReport({done} done, {failed} failed, {ignored} ignored, {self.seconds:.0f} s)"


def extract_cohort(
    slides: SlideList | str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    encoders: EncoderLike | Sequence[EncoderLike],
    out: str | os.PathLike[str],
    *,
    options: ExtractOptions = ExtractOptions(),
    engine: Engine | None = None,
    retry_failed: bool = False,
    status_name: str = STATUS,
    on_result: Callable[[SlideResult], None] | None = None,
    progress: Progress | None = None,
) -> CohortReport:
    """Embed slides with one or several encoders, each slide read once for all of them.

    Slides that were finished before are recognised without loading any encoder; those that failed before are
    tried again. ``status.csv`` in ``out`` has a row for each slide, written as soon as its result is known.

    Args:
        slides: from `list_slides`, or what it takes: files, folders, patterns, URLs, tables.
        encoders: names or folders, or encoders from `load_encoder`.
        out: folder for the results.
        options: all choices.
        engine: where the work is done, such as `DeviceEngine` or `RayEngine`; this process by default.
        retry_failed: only the slides that the table says have failed.
        status_name: of the table, for runs that share ``out``.
        on_result: called with the result of each slide, as soon as it is known.
        progress: called with (slide, patches done, patches in all) after each batch, by a thread.

    Raises:
        SealExtractError: an error that every slide would have: an encoder that cannot be loaded, options that
            contradict each other, a folder that cannot be written.
    """
    started = perf_counter()
    listed = slides if isinstance(slides, SlideList) else list_slides(_several(slides))
    asked: list[EncoderRequest | Encoder] = [
        EncoderRequest(encoder) if isinstance(encoder, str | os.PathLike) else encoder
        for encoder in _several(encoders)
    ]
    if engine is not None:
        asked = list(engine.placed(asked))
    check_layout(options.layout, [encoder.spec.name for encoder in asked])
    path = Path(out) / status_name
    grid = "" if options.coords else grid_name(options.patch_px, options.mpp, options.overlap_px)
    before = read_status_rows(path)

    def is_of_grid(row: StatusRow) -> bool:
        # rows of an older version have no grid; with --coords the grid of a slide is not known yet
        return not grid or row.grid in ("", grid)

    entries = keep_names(listed.entries, Path(out))
    if retry_failed:
        entries = _failed_before(entries, list(filter(is_of_grid, before)), path)

    ignored = [StatusRow(str(p), "", IGNORED, reason=reason) for p, reason in listed.ignored]
    now = {entry.name for entry in entries}
    others = [row for row in before if row.name and not (row.name in now and is_of_grid(row))]
    sweep(Path(out))
    table = StatusFile(path, [*others, *ignored])
    rows = list(ignored)

    def record(result: SlideResult) -> None:
        row = StatusRow.of(result, grid)
        rows.append(row)
        table.add(row)
        if on_result is not None:
            on_result(result)

    waiting: list[SlideJob] = []
    for entry in entries:
        job = _without_finished(SlideJob.of(entry, Path(out), options), asked)
        if isinstance(job, SlideJob):
            waiting.append(job)
        else:
            record(job)
    if waiting:
        if options.stage_dir is None:
            for job in waiting:
                refuse_uncopied(job.entry)
        run = _run_here if engine is None else engine.run
        for result in run(waiting, asked, options, progress):
            record(result)
    return CohortReport(tuple(rows), path, perf_counter() - started)


def _run_here(
    jobs: Sequence[SlideJob],
    encoders: Sequence[EncoderRequest | Encoder],
    options: ExtractOptions,
    progress: Progress | None,
) -> Iterator[SlideResult]:
    """One stream over all slides, on one device of this process."""
    from seal_extract.run import slide_process
    from seal_extract.run.extract import extract_jobs

    slide_process.start_ahead(options)
    loaded = [e.load() if isinstance(e, EncoderRequest) else e for e in encoders]
    yield from extract_jobs(jobs, loaded, options, progress)


def _several(value: object) -> list:  # type: ignore[type-arg]
    single = isinstance(value, str | os.PathLike | EncoderRequest) or not isinstance(value, Iterable)
    return [value] if single else list(value)  # type: ignore[call-overload]


def _failed_before(
    entries: Sequence[SlideEntry], before: list[StatusRow], path: Path
) -> tuple[SlideEntry, ...]:
    if not before:
        raise UsageError(
            f"--retry-failed: {path} with the failed slides does not exist; leave --retry-failed out"
        )
    failed = {row.name for row in before if row.status == FAILED}
    return tuple(entry for entry in entries if entry.name in failed)


def _without_finished(job: SlideJob, encoders: Sequence[EncoderRequest | Encoder]) -> SlideJob | SlideResult:
    """`without_finished`, in which a slide that cannot be used has failed."""
    started = perf_counter()
    try:
        return without_finished(job, encoders)
    except SAME_FOR_EVERY_SLIDE:
        raise
    except Exception as exc:
        return SlideResult(job.entry, (), job.entry.blame(exc), perf_counter() - started)
