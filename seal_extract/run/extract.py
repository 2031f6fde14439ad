"""The story, told once: slide -> tissue -> grid -> batches -> encoders -> store.

Its stages work at the same time, on different slides: one thread opens the next slides and finds their
tissue, some read patches, the caller's feeds the encoders, one writes. Each hands over in order.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

from seal_extract.encoders import Encoder
from seal_extract.encoders.request import EncoderRequest
from seal_extract.errors import UsageError
from seal_extract.features.layouts import check_layout
from seal_extract.features.store import SlideFeatures
from seal_extract.patches.regions import PatchReader
from seal_extract.patches.stream import PatchBatch, stream_ready
from seal_extract.run import slide_process
from seal_extract.run.embed import Embedder, Pending, open_embedder
from seal_extract.run.job import PlannedSlide, prepare
from seal_extract.run.options import ExtractOptions
from seal_extract.run.resume import keep_names, resume
from seal_extract.run.staging import Stage
from seal_extract.run.status_table import Progress, SlideResult
from seal_extract.run.writer import Writer
from seal_extract.slides.entry import SlideEntry

SLIDES_AHEAD = 2  # opened, and their tissue found, before their turn

Planned = PlannedSlide | SlideResult
SlideLike = str | os.PathLike[str] | SlideEntry


def extract(
    slide: str | os.PathLike[str],
    encoder: str | os.PathLike[str] | EncoderRequest | Encoder,
    out: str | os.PathLike[str],
    *,
    options: ExtractOptions = ExtractOptions(),
    progress: Callable[[int, int], None] | None = None,
) -> SlideFeatures:
    """Embed the tissue of one slide into ``out``, in the layout of ``options``.

    Beside the features it writes the coordinates, the tissue as GeoJSON and a picture of both. A file that
    the same request finished before is returned as it is.

    Args:
        slide: the slide file, or the URL of one.
        encoder: from `load_encoder`; or a name or folder, whose weights are only loaded if they are needed.
        out: folder for the results.
        options: all choices.
        progress: called with (patches done, patches in all) after each batch.

    Raises:
        SealExtractError: one of its children; nothing half-written is left.
    """

    def tell(_: Path, done: int, total: int) -> None:
        if progress is not None:
            progress(done, total)

    entries = keep_names([_entry(slide)], Path(out))
    if not isinstance(encoder, Encoder):
        request = encoder if isinstance(encoder, EncoderRequest) else EncoderRequest(encoder)
        if (finished := resume(entries[0], request, out, options)) is not None:
            return finished
        encoder = request.load()
    (result,) = extract_many(entries, encoder, out, options=options, progress=tell)
    if result.error is not None:
        raise result.error
    return result.features[0]


def extract_many(
    slides: Iterable[SlideLike | None],
    encoders: Encoder | Sequence[Encoder],
    out: str | os.PathLike[str],
    *,
    options: ExtractOptions = ExtractOptions(),
    progress: Progress | None = None,
) -> Iterator[SlideResult]:
    """`extract` for slide after slide without a pause between them; a slide that fails stops no other.

    Each slide is read once for all encoders.

    Args:
        slides: slide files or URLs of different names, or entries of a `SlideList`; taken as their turn
            comes near. None as long as there is no other yet.
        encoders: one or several, from `load_encoder`, of different names, on one device.
        out: folder for the results.
        options: all choices.
        progress: called with (slide, patches done, patches in all) after each batch, by a thread.

    Yields:
        What became of each slide, as soon as it is known.

    Raises:
        SealExtractError: what would be the same for every slide, such as a patch size that an encoder
            cannot take.
    """
    encoders = [encoders] if isinstance(encoders, Encoder) else list(encoders)
    _check(encoders, options)
    with ExitStack() as closing:
        forwards = [
            open_embedder(encoder, options.patch_px, options.batch_size, options.workers)
            for encoder in encoders
        ]
        for forward in forwards:
            closing.callback(forward.close)
        writer = Writer(encoders, progress)
        stage = _open_stage(slides, options)
        if stage is not None:
            closing.callback(stage.close)
        slides_ahead = _SlidesAhead(slides, encoders, Path(out), options, writer, stage)
        closing.callback(slides_ahead.close)
        closing.callback(writer.close)  # before the slides, of which it draws pictures
        batches = stream_ready(
            slides_ahead.decoders(),
            max(forward.batch_size for forward in forwards),
            device=encoders[0].device,
            workers=options.workers,
            max_read_errors=options.max_read_errors,
            on_failure=writer.fail,
            on_read=slides_ahead.close_slide,
        )
        closing.callback(batches.close)
        for batch in batches:
            if batch is not None:
                writer.write(batch, _submit(batch, forwards, slides_ahead))
            yield from writer.results()
        writer.wait()
        yield from writer.results()


def _check(encoders: Sequence[Encoder], options: ExtractOptions) -> None:
    names = [encoder.spec.name for encoder in encoders]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"encoders are {', '.join(names) or 'none'}; give one or more of different names")
    check_layout(options.layout, names)
    devices = {str(encoder.device) for encoder in encoders}
    if len(devices) > 1:
        raise UsageError(f"encoders lie on {', '.join(sorted(devices))}; load them on one device")


def _open_stage(slides: Iterable[SlideLike | None], options: ExtractOptions) -> Stage | None:
    if options.stage_dir is None:
        return None
    stage = Stage(options.stage_dir, int(options.stage_gb * 1e9))
    if isinstance(slides, Sequence):
        stage.check(map(_entry, slides))
    return stage


def _entry(slide: SlideLike) -> SlideEntry:
    return slide if isinstance(slide, SlideEntry) else SlideEntry.of(slide)


def _submit(batch: PatchBatch, forwards: list[Embedder], slides: _SlidesAhead) -> dict[int, Pending]:
    """Begin to encode a batch with each encoder that one of its slides still needs."""
    needed = {i for slide in set(batch.slide.tolist()) for i in slides.needed_by(slide)}
    return {i: forward.submit(batch.patches) for i, forward in enumerate(forwards) if i in needed}


class _SlidesAhead:
    """Slides opened and planned by a thread before their turn."""

    def __init__(
        self,
        slides: Iterable[SlideLike | None],
        encoders: list[Encoder],
        out: Path,
        options: ExtractOptions,
        writer: Writer,
        stage: Stage | None,
    ) -> None:
        entries = (None if slide is None else _entry(slide) for slide in slides)
        self._slides = entries if stage is None else stage.entries(entries)
        self._stage = stage
        self._encoders, self._out, self._options, self._writer = encoders, out, options, writer
        self._thread = ThreadPoolExecutor(1, "plan")
        self._ahead: deque[Future[Planned]] = deque()
        self._reading: dict[int, PlannedSlide] = {}
        self._needed: dict[int, list[int]] = {}

    def decoders(self) -> Iterator[PatchReader | None]:
        """The slides that have to be read, in order; None while the next is not ready."""
        index = 0
        while True:
            more = self._look_ahead()
            if not self._ahead and not more:
                return
            if not self._ahead or not self._ahead[0].done():
                yield None
                continue
            planned = self._ahead.popleft().result()
            if isinstance(planned, SlideResult):
                self._writer.add(planned)
                continue
            self._warn(planned)
            self._reading[index] = planned
            self._needed[index] = [output.encoder for output in planned.outputs]
            self._writer.begin(index, planned)
            yield planned.decoder
            index += 1

    def _look_ahead(self) -> bool:
        """Have the next slides planned; False once there are no others."""
        while len(self._ahead) <= SLIDES_AHEAD:
            try:
                slide = next(self._slides)
            except StopIteration:
                return False
            if slide is None:
                break
            self._ahead.append(self._thread.submit(self._plan, slide))
        return True

    def needed_by(self, index: int) -> list[int]:
        """The encoders that have still to see a slide."""
        return self._needed[index]

    def close_slide(self, index: int) -> None:
        """No thread reads from a slide any more."""
        planned = self._reading.pop(index)

        def close() -> None:
            planned.plan.slide.close()
            self._release(planned.entry)

        self._writer.close_slide(close)

    def _release(self, entry: SlideEntry) -> None:
        if self._stage is not None:
            self._stage.release(entry)

    def close(self) -> None:
        """Close what was opened and has not been read to its end."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if any(future.running() for future in self._ahead):
            slide_process.stop()
        self._thread.shutdown(wait=True)
        ready = [f.result() for f in self._ahead if not f.cancelled() and f.exception() is None]
        for planned in (*ready, *self._reading.values()):
            if isinstance(planned, PlannedSlide):
                planned.decoder.close()
                planned.plan.slide.close()

    def _plan(self, entry: SlideEntry) -> Planned:
        planned = self._prepare(entry)
        if isinstance(planned, SlideResult):
            self._release(entry)
        return planned

    def _prepare(self, entry: SlideEntry) -> Planned:
        started = perf_counter()
        try:
            if self._stage is not None:
                self._stage.refuse_failed(entry)
            planned = prepare(entry, self._encoders, self._out, self._options)
        except Exception as exc:
            return SlideResult(entry, (), entry.blame(exc), perf_counter() - started)
        if isinstance(planned, PlannedSlide):
            return planned
        return SlideResult(entry, planned, None, perf_counter() - started, True)

    def _warn(self, planned: PlannedSlide) -> None:
        grid = planned.plan.grid
        for encoder in self._encoders:
            if mismatch := encoder.spec.mismatch(grid.patch_px, grid.mpp):
                warnings.warn(mismatch, stacklevel=2)
