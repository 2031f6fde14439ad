"""Embeddings to HDF5: taken in order, checked, and written slide by slide in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np

from seal_extract.encoders import Encoder
from seal_extract.errors import EncoderError, ReadError
from seal_extract.features.feature_file import FeatureWriter
from seal_extract.features.store import SlideFeatures, read_features
from seal_extract.patches.stream import PatchBatch
from seal_extract.run.embed import Embeddings, Pending
from seal_extract.run.job import OpenSlide, Output
from seal_extract.run.overlay import Style, draw_overlay
from seal_extract.run.status_table import Progress, SlideResult
from seal_extract.slides.entry import file_stamp


@dataclass
class _Unfinished:
    """A slide whose features are being written."""

    slide: OpenSlide
    files: ExitStack = field(default_factory=ExitStack)
    writers: dict[int, FeatureWriter] = field(default_factory=dict)  # by encoder


class Writer:
    """What has to be done for a slide behind the encoders; all of it is done by one thread, in order."""

    def __init__(
        self,
        encoders: Sequence[Encoder],
        on_result: Callable[[SlideResult], None],
        progress: Progress | None,
    ) -> None:
        self._encoders, self._on_result, self._progress = encoders, on_result, progress
        self._unfinished: dict[int, _Unfinished] = {}  # by position in the stream
        self._last_end = perf_counter()

    def run(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Do one task after the other; whatever ends that, nothing half-written is left."""
        try:
            for task in tasks:
                task()
        finally:
            for index in list(self._unfinished):
                self._end(index, ReadError("the run was stopped"))

    def begin(self, index: int, slide: OpenSlide) -> None:
        """Draw the picture of a slide; without patches that is all of it."""
        self._unfinished[index] = _Unfinished(slide)
        try:
            _draw(slide)
        except Exception as exc:
            return self.fail(index, exc)
        if not len(slide.grid):
            self._finish(index)

    def write(self, batch: PatchBatch, pending: dict[int, Pending]) -> None:
        """Write the embeddings of a batch, by encoder, once they are there."""
        embeddings = {encoder: wait() for encoder, wait in pending.items()}
        for index in sorted(set(batch.slide.tolist())):
            if (unfinished := self._unfinished.get(index)) is None:  # it has failed meanwhile
                continue
            positions = (batch.slide == index).nonzero()[:, 0].tolist()
            try:
                self._append(unfinished, batch, positions, embeddings)
            except Exception as exc:
                self._end(index, exc)
                continue
            done, total = int(batch.row[positions[-1]]) + 1, len(unfinished.slide.grid)
            if self._progress is not None:
                self._progress(unfinished.slide.job.entry.path, done, total)
            if done == total:
                self._finish(index)

    def fail(self, index: int, error: Exception) -> None:
        """A slide cannot be read any further."""
        if (unfinished := self._unfinished.get(index)) is not None:
            try:
                _refuse_changed(unfinished.slide)
            except ReadError as changed:  # that explains why it cannot be read
                error = changed
        self._end(index, error)

    def _append(
        self,
        unfinished: _Unfinished,
        batch: PatchBatch,
        positions: list[int],
        embeddings: dict[int, Embeddings],
    ) -> None:
        """Append the rows of one slide, which lie at ``positions`` of the batch."""
        slide, rows = unfinished.slide, batch.row[positions].tolist()
        unreadable = [i for i, position in enumerate(positions) if position in batch.unreadable]
        for output in slide.outputs:
            features = embeddings[output.encoder][positions]
            features[unreadable] = 0
            bad = np.flatnonzero(~np.isfinite(features).all(1))
            if len(bad):
                raise EncoderError(
                    f"{slide.job.entry.source}: {self._encoders[output.encoder].not_finite} for the patch at "
                    f"level-0 {tuple(slide.grid.xy_l0[rows[bad[0]]].tolist())}; try --precision float32"
                )
            output.provenance["unreadable"] += [
                {
                    "row": rows[i],
                    "xy_l0": slide.grid.xy_l0[rows[i]].tolist(),
                    "reason": batch.unreadable[positions[i]],
                }
                for i in unreadable
            ]
            self._writer(unfinished, output).append(features)

    def _writer(self, unfinished: _Unfinished, output: Output) -> FeatureWriter:
        if output.encoder not in unfinished.writers:
            spec, slide = self._encoders[output.encoder].spec, unfinished.slide
            file = slide.layout.write_features(
                slide.label, slide.grid, spec.name, spec.dim, output.provenance, overwrite=output.overwrite
            )
            unfinished.writers[output.encoder] = unfinished.files.enter_context(file)
        return unfinished.writers[output.encoder]

    def _finish(self, index: int) -> None:
        unfinished = self._unfinished[index]
        try:
            _refuse_changed(unfinished.slide)
            for output in unfinished.slide.outputs:
                self._writer(unfinished, output)  # a slide without patches has none yet
                output.provenance["read_errors"] = len(output.provenance["unreadable"])
            unfinished.files.close()
            features = self._features(unfinished.slide)
        except Exception as exc:
            self._end(index, exc)
        else:
            self._end(index, None, features)

    def _end(self, index: int, error: Exception | None, features: tuple[SlideFeatures, ...] = ()) -> None:
        unfinished = self._unfinished.pop(index, None)
        if unfinished is None:
            return
        entry, before = unfinished.slide.job.entry, self._last_end
        if error is not None:
            unfinished.files.__exit__(type(error), error, error.__traceback__)
            error = entry.blame(error)
        self._last_end = perf_counter()
        self._on_result(SlideResult(entry, features, error, self._last_end - before))

    def _features(self, slide: OpenSlide) -> tuple[SlideFeatures, ...]:
        """Those of all encoders, in their order; some may have been finished by a former run."""
        found = {name: read_features(path) for name, path in slide.job.finished.items()}
        names = [encoder.spec.name for encoder in self._encoders]
        for output in slide.outputs:
            name = names[output.encoder]
            path = slide.layout.place(slide.job.entry.name, name, slide.grid)
            found[name] = SlideFeatures(path, slide.grid, output.provenance)
        return tuple(found[name] for name in names)


def _draw(slide: OpenSlide) -> None:
    """Write the tissue and the picture of a slide that is open."""
    layout, name, grid, options = slide.layout, slide.job.entry.name, slide.grid, slide.job.options
    also: dict[Path, Style] = {}
    if slide.mask is not None:
        own = layout.tissue(name, grid.name)
        shared = layout.shared_tissue(name, grid.name, overwrite=options.overwrite)
        for path in filter(None, (own, shared)):
            slide.mask.to_geojson(path)
        if shared is not None and (picture := layout.contours(name)):
            also[picture] = "outline"
    overlay = layout.overlay(name, grid.name)
    draw_overlay(slide.slide, slide.picture, slide.mask, grid, overlay, style=options.overlay, also=also)


def _refuse_changed(slide: OpenSlide) -> None:
    """Refuse a slide whose file is another than when it was opened."""
    entry = slide.job.entry
    if entry.copy is not None:  # which nobody else has
        return
    now = file_stamp(entry.path)
    if now != slide.stamp:
        what = "was changed while it was read" if any(now) else "is gone, or its disk is, while it was read"
        raise ReadError(f"{entry.path} {what}; run again")
