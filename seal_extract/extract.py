"""The story, told once: slide -> tissue -> grid -> batches -> encoder -> store.

Its stages work at the same time, on different slides: one thread opens the next slides and finds their
tissue, some read patches, the caller's feeds the encoder, one writes. Each hands over in order.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from seal_extract.batches import PatchBatch, stream_batches
from seal_extract.decode import Decoder, open_decoder
from seal_extract.encoders import Encoder
from seal_extract.errors import EncoderError, ReadError, SealExtractError, UsageError
from seal_extract.finished import find_finished, layout_for
from seal_extract.forward import Embeddings, Pending, open_forward
from seal_extract.plan import ExtractOptions, SlidePlan, plan_slide
from seal_extract.provenance import describe, describe_request
from seal_extract.slide import Slide, open_slide
from seal_extract.store import FeatureWriter, SlideFeatures, write_coords, write_features
from seal_extract.view.overlay import draw_overlay

SLIDES_AHEAD = 2  # opened, and their tissue found, before their turn
BATCHES_AHEAD = 3  # given to the encoder before the first of them has to be written

Progress = Callable[[Path, int, int], None]


@dataclass(frozen=True)
class SlideResult:
    """What became of a slide: its features, or the error that stopped it.

    Attributes:
        path: of the slide.
        features: None if it failed.
        error: None if it went well.
        seconds: from the end of the slide before it to its own.
    """

    path: Path
    features: SlideFeatures | None
    error: SealExtractError | None
    seconds: float


def extract(
    slide: str | os.PathLike[str],
    encoder: Encoder,
    out: str | os.PathLike[str],
    *,
    options: ExtractOptions = ExtractOptions(),
    progress: Callable[[int, int], None] | None = None,
) -> SlideFeatures:
    """Embed the tissue of one slide into ``out``, in TRIDENT's layout.

    Beside the features it writes the coordinates, the tissue as GeoJSON and a picture of both. A file that
    the same request finished before is returned as it is.

    Args:
        slide: the slide file.
        encoder: from `load_encoder`.
        out: folder for the results.
        options: all choices.
        progress: called with (patches done, patches in all) after each batch.

    Raises:
        SealExtractError: one of its children; nothing half-written is left.
    """

    def tell(_: Path, done: int, total: int) -> None:
        if progress is not None:
            progress(done, total)

    (result,) = extract_many([slide], encoder, out, options=options, progress=tell)
    if result.features is None:
        raise result.error or AssertionError("a slide ends with features or an error")
    return result.features


def extract_many(
    slides: Iterable[str | os.PathLike[str]],
    encoder: Encoder,
    out: str | os.PathLike[str],
    *,
    options: ExtractOptions = ExtractOptions(),
    progress: Progress | None = None,
) -> Iterator[SlideResult]:
    """`extract` for slide after slide without a pause between them; a slide that fails stops no other.

    Args:
        slides: slide files, of different names; taken as their turn comes near.
        encoder: from `load_encoder`.
        out: folder for the results.
        options: all choices.
        progress: called with (slide, patches done, patches in all) after each batch, by a thread.

    Yields:
        What became of each slide, as soon as it is known.

    Raises:
        SealExtractError: what would be the same for every slide, such as a patch size that the encoder
            cannot take.
    """
    with _Run(encoder, Path(out), options, progress) as run:
        forward = run.forward
        for batch in stream_batches(
            run.decoders(Path(slide) for slide in slides),
            forward.batch_size,
            device=encoder.device,
            workers=options.workers,
            max_read_errors=options.max_read_errors,
            on_failure=run.fail,
            on_read=run.close_slide,
        ):
            run.write(batch, forward.submit(batch.patches))
            yield from run.results()
        run.wait()
        yield from run.results()


@dataclass
class _Work:
    """A slide on its way."""

    plan: SlidePlan
    decoder: Decoder
    path: Path  # of the features
    provenance: dict[str, Any]
    written_as: tuple[int, int, int]  # the slide file's identity when it was opened
    open_file: ExitStack = field(default_factory=ExitStack)
    writer: FeatureWriter | None = None
    ended: bool = False

    @property
    def slide(self) -> Slide:
        return self.plan.slide


class _Run:
    """The stages around the encoder: planning ahead of it, writing behind it."""

    def __init__(
        self, encoder: Encoder, out: Path, options: ExtractOptions, progress: Progress | None
    ) -> None:
        self._encoder, self._out, self._options, self._progress = encoder, out, options, progress
        self.forward = open_forward(encoder, options.patch_px, options.batch_size)
        self._planning = ThreadPoolExecutor(1, "plan")
        self._writing = ThreadPoolExecutor(1, "write")  # all that changes a _Work happens here
        self._works: list[_Work] = []
        self._written: deque[Future[None]] = deque()
        self._results: deque[SlideResult] = deque()
        self._last_end = perf_counter()

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing half-written, whatever stopped the run."""
        self._planning.shutdown(wait=True, cancel_futures=True)
        self.forward.close()
        self._writing.shutdown(wait=True, cancel_futures=True)
        for work in self._works:
            if not work.ended:
                self._end(work, error=ReadError(f"{work.slide.path}: the run was stopped"))

    def results(self) -> Iterator[SlideResult]:
        """What has become known since the last call."""
        while self._results:
            yield self._results.popleft()

    # --- ahead of the encoder -----------------------------------------------------------------------

    def decoders(self, slides: Iterator[Path]) -> Iterator[Decoder | None]:
        """The slides to encode, opened and planned before their turn; None while the next is not ready."""
        planned: deque[Future[_Work | SlideResult]] = deque()
        while True:
            while len(planned) <= SLIDES_AHEAD and (path := next(slides, None)) is not None:
                planned.append(self._planning.submit(self._plan, path))
            if not planned:
                return
            if not planned[0].done():
                yield None
                continue
            work = planned.popleft().result()
            if isinstance(work, SlideResult):
                self._results.append(work)
                continue
            self._works.append(work)
            if mismatch := self._encoder.spec.mismatch(work.plan.grid.patch_px, work.plan.grid.mpp):
                warnings.warn(mismatch, stacklevel=4)
            yield work.decoder
            if not len(work.plan.grid):
                self._do(self._finish, work)

    def _plan(self, path: Path) -> _Work | SlideResult:
        started = perf_counter()
        try:
            slide = open_slide(path, mpp=self._options.slide_mpp)
            with ExitStack() as closing:
                closing.callback(slide.close)
                finished = find_finished(slide, self._encoder.identity, self._out, self._options)
                if finished is not None:
                    return SlideResult(path, finished, None, perf_counter() - started)
                work = self._prepare(plan_slide(slide, self._options))
                closing.pop_all()
            return work
        except UsageError:
            raise
        except SealExtractError as exc:
            return SlideResult(path, None, exc, perf_counter() - started)

    def _prepare(self, plan: SlidePlan) -> _Work:
        """Write all that belongs to the slide but its features."""
        slide, grid, name, spec = plan.slide, plan.grid, plan.slide.path.stem, self._encoder.spec
        layout = layout_for(slide, self._out, self._options)
        decoder = open_decoder(
            slide,
            grid,
            self._encoder.device,
            filter=self._options.resample,
            fast=self._options.fast_decode,
        )
        request = describe_request(slide, self._encoder.identity, self._options)
        encoder = self._encoder.description | {"mismatch": spec.mismatch(grid.patch_px, grid.mpp)}
        provenance = describe(plan, request, encoder, decoder.name)
        if plan.mask is not None:
            plan.mask.to_geojson(layout.tissue(name))
        draw_overlay(slide, plan.mask, grid, layout.overlay(name))
        write_coords(layout.coords(name), slide, grid, provenance)
        return _Work(plan, decoder, layout.features(name, spec.name), provenance, _identity(slide.path))

    # --- behind the encoder -------------------------------------------------------------------------

    def write(self, batch: PatchBatch, pending: Pending) -> None:
        """Write the embeddings of a batch once they are there; waits while too many are on their way."""
        self._do(self._write, batch, pending)
        while len(self._written) > BATCHES_AHEAD:
            self._written.popleft().result()

    def wait(self) -> None:
        """Until all is written."""
        while self._written:
            self._written.popleft().result()

    def fail(self, index: int, error: SealExtractError) -> None:
        """A slide cannot be read any further."""
        self._do(self._end, self._works[index], error)

    def close_slide(self, index: int) -> None:
        """No thread reads from a slide any more."""
        self._works[index].slide.close()

    def _do(self, task: Callable[..., None], *args: object) -> None:
        self._written.append(self._writing.submit(task, *args))

    def _write(self, batch: PatchBatch, pending: Pending) -> None:
        embeddings = pending()
        for index in sorted(set(batch.slide.tolist())):
            work = self._works[index]
            if not work.ended:
                which = (batch.slide == index).nonzero()[:, 0]
                try:
                    self._append(work, batch, which.tolist(), embeddings)
                except SealExtractError as exc:
                    self._end(work, exc)

    def _append(self, work: _Work, batch: PatchBatch, which: list[int], embeddings: Embeddings) -> None:
        """The rows of one slide, at positions ``which`` of the batch."""
        rows, features = batch.row[which].tolist(), embeddings[which]
        for i, at in enumerate(which):
            if at in batch.unreadable:
                features[i] = 0
                xy = work.plan.grid.xy_l0[rows[i]].tolist()
                work.provenance["unreadable"].append(
                    {"row": rows[i], "xy_l0": xy, "reason": batch.unreadable[at]}
                )
        bad = np.flatnonzero(~np.isfinite(features).all(1))
        if len(bad):
            xy = tuple(work.plan.grid.xy_l0[rows[bad[0]]].tolist())
            raise EncoderError(
                f"{work.slide.path}: {self._encoder.not_finite} for the patch at level-0 {xy}; "
                "try --precision float32"
            )
        writer = self._writer(work)
        writer.append(features)
        if self._progress is not None:
            self._progress(work.slide.path, writer.rows, len(work.plan.grid))
        if writer.rows == len(work.plan.grid):
            self._finish(work)

    def _writer(self, work: _Work) -> FeatureWriter:
        if work.writer is None:
            spec, grid = self._encoder.spec, work.plan.grid
            work.writer = work.open_file.enter_context(
                write_features(work.path, work.slide, grid, spec.name, spec.dim, work.provenance)
            )
        return work.writer

    def _finish(self, work: _Work) -> None:
        try:
            self._writer(work)
            if _identity(work.slide.path) != work.written_as:
                raise ReadError(f"{work.slide.path} was changed while it was read; run again")
            work.provenance["read_errors"] = len(work.provenance["unreadable"])
            work.open_file.close()
        except SealExtractError as exc:
            self._end(work, exc)
        else:
            self._end(work)

    def _end(self, work: _Work, error: SealExtractError | None = None) -> None:
        work.ended = True
        if error is not None:
            work.open_file.__exit__(type(error), error, error.__traceback__)
        now, before = perf_counter(), self._last_end
        self._last_end = now
        features = None if error else SlideFeatures(work.path, work.plan.grid, work.provenance)
        self._results.append(SlideResult(work.slide.path, features, error, now - before))


def _identity(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced or written to."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
