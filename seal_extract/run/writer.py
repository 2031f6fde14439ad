"""What stands behind the encoders: embeddings are taken in order, checked, and written slide by slide."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from seal_extract.encoders import Encoder
from seal_extract.errors import EncoderError, ReadError
from seal_extract.features.feature_file import FeatureWriter
from seal_extract.features.store import SlideFeatures
from seal_extract.patches.stream import PatchBatch
from seal_extract.run.embed import Embeddings, Pending
from seal_extract.run.job import Output, PlannedSlide, draw
from seal_extract.run.status_table import Progress, SlideResult
from seal_extract.slides.identity import file_stamp

BATCHES_AHEAD = 3  # given to the encoders, or pictures to be drawn, before the first of them has been written


@dataclass
class _Open:
    """A slide whose features are being written."""

    planned: PlannedSlide
    files: ExitStack = field(default_factory=ExitStack)
    writers: dict[int, FeatureWriter] = field(default_factory=dict)  # by encoder


class Writer:
    """Writes in a thread of its own; all that it knows of a slide is changed there alone."""

    def __init__(self, encoders: Sequence[Encoder], progress: Progress | None) -> None:
        self._encoders, self._progress = encoders, progress
        self._thread = ThreadPoolExecutor(1, "write")
        self._open: dict[int, _Open] = {}  # by position in the stream; gone when they have ended
        self._tasks: deque[Future[None]] = deque()
        self._results: deque[SlideResult] = deque()
        self._last_end = perf_counter()

    def begin(self, index: int, planned: PlannedSlide) -> None:
        """A slide has its turn: its picture is drawn meanwhile; without patches that is all of it.

        Waits while too much is waiting to be done: slides that fail at once are open until they are drawn.
        """
        self._catch_up()
        self._open[index] = _Open(planned)
        self._do(self._draw, index)
        if not len(planned.plan.grid):
            self._do(self._finish, index)

    def close_slide(self, close: Callable[[], None]) -> None:
        """Nothing more will be read from a slide but its picture: close it after that."""
        self._do(close)

    def write(self, batch: PatchBatch, pending: dict[int, Pending]) -> None:
        """Write the embeddings of a batch, by encoder, once they are there.

        Waits while too many batches are on their way.
        """
        self._do(self._write, batch, pending)
        self._catch_up()

    def fail(self, index: int, error: Exception) -> None:
        """A slide cannot be read any further."""
        self._do(self._fail, index, error)

    def add(self, result: SlideResult) -> None:
        """What became of a slide that never came to the encoders."""
        self._results.append(result)

    def results(self) -> Iterator[SlideResult]:
        """What has become known since the last call."""
        while self._results:
            yield self._results.popleft()

    def wait(self) -> None:
        """Until all is written."""
        while self._tasks:
            self._tasks.popleft().result()

    def close(self) -> None:
        """Leave nothing half-written, whatever stopped the run."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        for index in list(self._open):
            self._end(index, ReadError("the run was stopped"))

    def _catch_up(self) -> None:
        while len(self._tasks) > BATCHES_AHEAD:
            self._tasks.popleft().result()

    def _do(self, task: Callable[..., None], *args: object) -> None:
        self._tasks.append(self._thread.submit(task, *args))

    # --- in the thread ------------------------------------------------------------------------------

    def _draw(self, index: int) -> None:
        try:
            draw(self._open[index].planned)
        except Exception as exc:
            self._fail(index, exc)

    def _write(self, batch: PatchBatch, pending: dict[int, Pending]) -> None:
        embeddings = {encoder: wait() for encoder, wait in pending.items()}
        for index in sorted(set(batch.slide.tolist())):
            if index not in self._open:  # it has failed meanwhile
                continue
            which = (batch.slide == index).nonzero()[:, 0].tolist()
            try:
                self._append(self._open[index], batch, which, embeddings)
            except Exception as exc:
                self._end(index, exc)
                continue
            self._tell_progress(self._open[index].planned, int(batch.row[which[-1]]) + 1)
            if int(batch.row[which[-1]]) == len(self._open[index].planned.plan.grid) - 1:
                self._finish(index)

    def _append(
        self, slide: _Open, batch: PatchBatch, which: list[int], embeddings: dict[int, Embeddings]
    ) -> None:
        """The rows of one slide, at positions ``which`` of the batch."""
        rows = batch.row[which].tolist()
        unreadable = [i for i, at in enumerate(which) if at in batch.unreadable]
        for output in slide.planned.outputs:
            features = embeddings[output.encoder][which]
            features[unreadable] = 0
            self._check_finite(slide.planned, output, features, rows)
            for i in unreadable:
                xy_l0 = slide.planned.plan.grid.xy_l0[rows[i]].tolist()
                output.provenance["unreadable"].append(
                    {"row": rows[i], "xy_l0": xy_l0, "reason": batch.unreadable[which[i]]}
                )
            self._writer(slide, output).append(features)

    def _tell_progress(self, planned: PlannedSlide, done: int) -> None:
        if self._progress is not None:
            self._progress(planned.entry.path, done, len(planned.plan.grid))

    def _check_finite(
        self, planned: PlannedSlide, output: Output, features: Embeddings, rows: list[int]
    ) -> None:
        bad = np.flatnonzero(~np.isfinite(features).all(1))
        if len(bad):
            xy_l0 = tuple(planned.plan.grid.xy_l0[rows[bad[0]]].tolist())
            raise EncoderError(
                f"{planned.entry.source}: {self._encoders[output.encoder].not_finite} for the patch "
                f"at level-0 {xy_l0}; try --precision float32"
            )

    def _writer(self, slide: _Open, output: Output) -> FeatureWriter:
        if output.encoder not in slide.writers:
            spec, planned = self._encoders[output.encoder].spec, slide.planned
            slide.writers[output.encoder] = slide.files.enter_context(
                planned.layout.write_features(
                    planned.label,
                    planned.plan.grid,
                    spec.name,
                    spec.dim,
                    output.provenance,
                    overwrite=output.overwrite,
                )
            )
        return slide.writers[output.encoder]

    def _finish(self, index: int) -> None:
        slide = self._open.get(index)
        if slide is None:  # it has failed meanwhile
            return
        try:
            _refuse_changed(slide.planned)
            for output in slide.planned.outputs:
                self._writer(slide, output)
                output.provenance["read_errors"] = len(output.provenance["unreadable"])
            slide.files.close()
        except Exception as exc:
            self._end(index, exc)
        else:
            self._end(index)

    def _fail(self, index: int, error: Exception) -> None:
        if index in self._open:
            try:
                _refuse_changed(self._open[index].planned)
            except ReadError as changed:  # no wonder that it cannot be read
                error = changed
        self._end(index, error)

    def _end(self, index: int, error: Exception | None = None) -> None:
        slide = self._open.pop(index, None)
        if slide is None:
            return
        if error is not None:
            slide.files.__exit__(type(error), error, error.__traceback__)
        now, before = perf_counter(), self._last_end
        self._last_end = now
        planned = slide.planned
        features = () if error else self._in_order([*planned.finished, *self._written(planned)])
        ours = None if error is None else planned.entry.blame(error)
        self._results.append(SlideResult(planned.entry, features, ours, now - before))

    def _written(self, planned: PlannedSlide) -> list[SlideFeatures]:
        grid = planned.plan.grid
        names = [self._encoders[output.encoder].spec.name for output in planned.outputs]
        paths = [planned.layout.place(planned.entry.name, name, grid) for name in names]
        return [
            SlideFeatures(path, grid, output.provenance)
            for path, output in zip(paths, planned.outputs, strict=True)
        ]

    def _in_order(self, features: list[SlideFeatures]) -> tuple[SlideFeatures, ...]:
        names = [encoder.spec.name for encoder in self._encoders]
        return tuple(sorted(features, key=lambda f: names.index(f.provenance["encoder"]["name"])))


def _refuse_changed(planned: PlannedSlide) -> None:
    """Refuse a slide whose file is another than when it was opened."""
    if planned.entry.copy is not None:  # which nobody else has
        return
    now = file_stamp(planned.entry.path)
    if now != planned.stamp:
        what = "was changed while it was read" if any(now) else "is gone, or its disk is, while it was read"
        raise ReadError(f"{planned.entry.path} {what}; run again")
