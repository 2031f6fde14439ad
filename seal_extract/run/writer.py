"""Embeddings to HDF5: taken in order, checked, and written slide by slide in a thread of its own.

Threads beside it draw the picture of each slide, whose result comes when both are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import BoundedSemaphore, Lock
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seal_extract.encoders import Encoder
from seal_extract.encoders.dense import unpack
from seal_extract.errors import EncoderError, ReadError
from seal_extract.features.feature_file import FeatureWriter
from seal_extract.features.store import SlideFeatures, read_features
from seal_extract.features.tokens import tokens_file, write_tokens
from seal_extract.patches.stream import PatchBatch
from seal_extract.run.embed import Embeddings, Pending
from seal_extract.run.job import OpenSlide, Output, Stopped
from seal_extract.run.overlay import Style, draw_overlay
from seal_extract.run.status_table import Progress, SlideResult
from seal_extract.slides.entry import stamp_of

_Writers = tuple[FeatureWriter | None, FeatureWriter | None]  # of features, and of tokens
PICTURES_AT_ONCE = 2
PICTURES_AHEAD = 4  # drawn, or waiting for it, while the features of their slides are written


@dataclass
class _Unfinished:
    """A slide whose features are being written, or whose picture is being drawn."""

    slide: OpenSlide
    picture: Future[None]
    files: ExitStack = field(default_factory=ExitStack)
    writers: dict[int, _Writers] = field(default_factory=dict)  # by encoder


class Writer:
    """What has to be done for a slide behind the encoders; pictures apart, one thread does it in order."""

    def __init__(
        self,
        encoders: Sequence[Encoder],
        on_result: Callable[[SlideResult], None],
        progress: Progress | None,
    ) -> None:
        self._encoders, self._on_result, self._progress = encoders, on_result, progress
        self._unfinished: dict[int, _Unfinished] = {}  # those with rows to come, by position in the stream
        self._pictures = ThreadPoolExecutor(PICTURES_AT_ONCE, "draw")
        self._room = BoundedSemaphore(PICTURES_AHEAD)
        self._ending = Lock()
        self._last_end = perf_counter()

    def run(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Do one task after the other; whatever ends that, nothing half-written is left."""
        try:
            for task in tasks:
                task()
            self._pictures.shutdown()
        finally:
            for unfinished in self._unfinished.values():  # which are in no table, and tried again
                unfinished.picture.add_done_callback(partial(self._finish, unfinished, Stopped()))
            self._pictures.shutdown(cancel_futures=True)

    @property
    def current(self) -> str:
        """The slide whose embeddings are written next."""
        return next((one.slide.job.entry.source for one in self._unfinished.values()), "a slide")

    def begin(self, index: int, slide: OpenSlide) -> None:
        """Have the picture of a slide drawn; without patches that is all of it."""
        self._room.acquire()
        picture = self._pictures.submit(_draw, slide)
        picture.add_done_callback(lambda _: self._room.release())
        self._unfinished[index] = _Unfinished(slide, picture)
        if not len(slide.grid):
            self._written(index)

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
                self._written(index, exc)
                continue
            done, total = int(batch.row[positions[-1]]) + 1, len(unfinished.slide.grid)
            if self._progress is not None:
                self._progress(unfinished.slide.job.entry.path, done, total)
            if done == total:
                self._written(index)

    def fail(self, index: int, error: Exception) -> None:
        """A slide cannot be read any further."""
        if (unfinished := self._unfinished.get(index)) is not None:
            try:
                _refuse_changed(unfinished.slide)
            except ReadError as changed:  # that explains why it cannot be read
                error = changed
        self._written(index, error)

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
            encoder = self._encoders[output.encoder]
            features = embeddings[output.encoder][positions]
            parts: tuple[NDArray[Any], ...] = (features,)
            if output.tokens:
                parts = unpack(features, encoder.spec.dim, encoder.token_grid(slide.grid.patch_px))
            for part, kind in zip(parts, ("", " as a token in float16"), strict=False):
                part[unreadable] = 0
                bad = np.flatnonzero(~np.isfinite(part).reshape(len(part), -1).all(1))
                if len(bad):
                    raise EncoderError(
                        f"{slide.job.entry.source}: {encoder.not_finite}{kind} for the patch at level-0 "
                        f"{tuple(slide.grid.xy_l0[rows[bad[0]]].tolist())}; try --precision float32"
                    )
            output.provenance["unreadable"] += [
                {
                    "row": rows[i],
                    "xy_l0": slide.grid.xy_l0[rows[i]].tolist(),
                    "reason": batch.unreadable[positions[i]],
                }
                for i in unreadable
            ]
            for writer, part in zip(self._writers(unfinished, output), parts, strict=False):
                if writer is not None:
                    writer.append(part)

    def _writers(self, unfinished: _Unfinished, output: Output) -> _Writers:
        """The file of tokens is opened last and so appears first: it is there where features are."""
        if output.encoder not in unfinished.writers:
            encoder, slide, over = self._encoders[output.encoder], unfinished.slide, output.overwrite
            spec, features, tokens = encoder.spec, None, None
            what = (slide.label, slide.grid, spec.name)
            if output.features:
                file = slide.layout.write_features(*what, spec.dim, output.provenance, overwrite=over)
                features = unfinished.files.enter_context(file)
            if output.tokens:
                path = tokens_file(slide.layout, slide.job.entry.name, spec.name)
                grid = encoder.token_grid(slide.grid.patch_px)
                file = write_tokens(path, *what, grid, output.provenance, overwrite=over)
                tokens = unfinished.files.enter_context(file)
            unfinished.writers[output.encoder] = features, tokens
        return unfinished.writers[output.encoder]

    def _written(self, index: int, error: Exception | None = None) -> None:
        """No more rows come of a slide: it is finished once its picture is."""
        if (unfinished := self._unfinished.pop(index, None)) is not None:
            unfinished.picture.add_done_callback(partial(self._finish, unfinished, error))

    def _finish(self, unfinished: _Unfinished, error: Exception | None, picture: Future[None]) -> None:
        features: tuple[SlideFeatures, ...] = ()
        try:
            if picture.cancelled():
                raise Stopped
            picture.result()
            if error is not None:
                raise error
            _refuse_changed(unfinished.slide)
            for output in unfinished.slide.outputs:
                self._writers(unfinished, output)  # a slide without patches has none yet
                output.provenance["read_errors"] = len(output.provenance["unreadable"])
            unfinished.files.close()
            features = self._features(unfinished.slide)
        except Exception as exc:
            unfinished.files.__exit__(type(exc), exc, exc.__traceback__)
            if isinstance(exc, Stopped):
                return
            error = unfinished.slide.job.entry.blame(exc)
        with self._ending:
            before, self._last_end = self._last_end, perf_counter()
            self._on_result(SlideResult(unfinished.slide.job.entry, features, error, self._last_end - before))

    def _features(self, slide: OpenSlide) -> tuple[SlideFeatures, ...]:
        """Those of all encoders, in their order; some may have been finished by a former run."""
        found = {name: read_features(path) for name, path in slide.job.finished.items()}
        names = [encoder.spec.name for encoder in self._encoders]
        for output in (output for output in slide.outputs if output.features):
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
    now = stamp_of(entry)
    if now != slide.stamp:
        what = "was changed while it was read" if any(now) else "is gone, or its disk is, while it was read"
        raise ReadError(f"{entry.source} {what}; run again")
