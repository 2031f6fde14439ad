"""The story: list -> for each slide: open -> tissue -> grid -> patches -> embeddings -> HDF5.

Threads of `_Run` work at the same time, on different slides, and hand over through bounded channels: some
open the next slides and find their tissue, one reads patches and feeds the encoders, one writes.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter

from seal_extract.encoders import Encoder
from seal_extract.encoders.request import EncoderRequest
from seal_extract.errors import UsageError, as_ours, is_of_lost_device
from seal_extract.features.layouts import check_layout
from seal_extract.features.store import SlideFeatures, read_features
from seal_extract.features.tokens import has_tokens, tokens_file
from seal_extract.patches import available_cores
from seal_extract.patches.reader import open_patch_reader
from seal_extract.patches.regions import PatchReader
from seal_extract.patches.stream import stream_batches
from seal_extract.run import slide_process
from seal_extract.run.embed import Embedder, open_embedder
from seal_extract.run.job import Channel, OpenSlide, Output, SlideJob, Stopped
from seal_extract.run.options import ExtractOptions
from seal_extract.run.provenance import describe, fingerprint, keep_names, without_finished
from seal_extract.run.staging import Stage
from seal_extract.run.status_table import Progress, SlideResult
from seal_extract.run.writer import Writer
from seal_extract.slides.entry import SlideEntry, stamp_of

SLIDES_AHEAD = 2  # open, with their tissue found, before their turn to be read; and one of each thread
CORES_TO_OPEN = 4  # of which one opens slides and finds their tissue, ...
MOST_OPENED = 8  # ... by at most so many threads, each with a process that may take gigabytes
BATCHES_AHEAD = 3  # batches being encoded, or pictures to draw, that may wait to be written


def extract(
    slide: str | os.PathLike[str],
    encoder: str | os.PathLike[str] | EncoderRequest | Encoder,
    out: str | os.PathLike[str],
    *,
    options: ExtractOptions = ExtractOptions(),
    progress: Callable[[int, int], None] | None = None,
) -> SlideFeatures:
    """Embed the tissue of one slide into ``out``, in the layout of ``options``.

    It also writes the coordinates, the tissue as GeoJSON and a picture of both. Features that the same slide,
    options and weights made before are returned without any work.

    Args:
        slide: the slide file, or the URL of one.
        encoder: from `load_encoder`; or a name or folder, whose weights are loaded only if they are needed.
        out: folder for the results.
        options: all choices.
        progress: called with (patches done, patches in all) after each batch.

    Raises:
        SealExtractError: the slide cannot be embedded; no half-written file is left.
    """
    (entry,) = keep_names([SlideEntry.of(slide)], Path(out))
    if not isinstance(encoder, Encoder | EncoderRequest):
        encoder = EncoderRequest(encoder)
    result = without_finished(SlideJob.of(entry, Path(out), options), [encoder])
    if isinstance(result, SlideJob):
        loaded = encoder.load() if isinstance(encoder, EncoderRequest) else encoder

        def on_batch(_: Path, done: int, total: int) -> None:
            if progress is not None:
                progress(done, total)

        (result,) = extract_jobs([result], [loaded], options, on_batch)
    if result.error is not None:
        raise result.error
    return result.features[0]


def extract_many(
    slides: Iterable[str | os.PathLike[str] | SlideEntry],
    encoders: Encoder | Sequence[Encoder],
    out: str | os.PathLike[str],
    *,
    options: ExtractOptions = ExtractOptions(),
    progress: Progress | None = None,
) -> Iterator[SlideResult]:
    """`extract` for many slides, without a pause between them; a slide that fails stops no other slide.

    Each slide is read once for all encoders.

    Args:
        slides: slide files or URLs of different names, or entries of a `SlideList`.
        encoders: one or several, from `load_encoder`, of different names, on one device.
        out: folder for the results.
        options: all choices.
        progress: called with (slide, patches done, patches in all) after each batch, by a thread.

    Yields:
        The result of each slide, as soon as it is known; the order may differ from that of ``slides``.

    Raises:
        SealExtractError: an error that every slide would have, such as a patch size that an encoder cannot
            take.
    """
    encoders = [encoders] if isinstance(encoders, Encoder) else list(encoders)
    entries = (slide if isinstance(slide, SlideEntry) else SlideEntry.of(slide) for slide in slides)
    jobs: Iterable[SlideJob] = (SlideJob.of(entry, Path(out), options) for entry in entries)
    if isinstance(slides, Sequence):
        jobs = list(jobs)
    return extract_jobs(jobs, encoders, options, progress)


def extract_jobs(
    jobs: Iterable[SlideJob],
    encoders: Sequence[Encoder],
    options: ExtractOptions,
    progress: Progress | None = None,
) -> Iterator[SlideResult]:
    """See `extract_many`; a `Channel` of jobs is stopped at the end."""
    names = [encoder.spec.name for encoder in encoders]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"encoders are {', '.join(names) or 'none'}; give one or more of different names")
    check_layout(options.layout, names)
    devices = {str(encoder.device) for encoder in encoders}
    if len(devices) > 1:
        raise UsageError(f"encoders lie on {', '.join(sorted(devices))}; load them on one device")
    with ExitStack() as stack:
        embedders = [
            open_embedder(
                encoder, options.patch_px, options.batch_size, options.workers, tokens=options.tokens
            )
            for encoder in encoders
        ]
        for embedder in embedders:
            stack.callback(embedder.close)
        stage = None
        if options.stage_dir is not None:
            stage = stack.enter_context(closing(Stage(options.stage_dir, int(options.stage_gb * 1e9))))
            if isinstance(jobs, Sequence):
                stage.check(job.entry for job in jobs)
        copied = jobs if stage is None else stage.copied(jobs)
        run = stack.enter_context(closing(_Run(copied, encoders, embedders, options, stage, progress)))
        for source in (jobs, stage):  # in which a thread of the run may be waiting
            if isinstance(source, Channel | Stage):
                stack.callback(source.stop)
        yield from run.results


def opening_threads(workers: int | None) -> int:
    """The number of slides that are opened at a time beside ``workers`` reading threads, or all cores."""
    return max(1, min(MOST_OPENED, (workers or available_cores()) // CORES_TO_OPEN))


class _Run:
    """The threads of one run over many slides."""

    def __init__(
        self,
        jobs: Iterable[SlideJob],
        encoders: Sequence[Encoder],
        embedders: Sequence[Embedder],
        options: ExtractOptions,
        stage: Stage | None,
        progress: Progress | None,
    ) -> None:
        self._jobs, self._taking = enumerate(jobs), threading.Lock()
        self._encoders, self._embedders = encoders, embedders
        self._options, self._stage = options, stage
        openers = opening_threads(options.workers)
        self._opened: Channel[OpenSlide] = Channel(SLIDES_AHEAD, senders=openers)
        self._tasks: Channel[Callable[[], None]] = Channel(BATCHES_AHEAD)
        self.results: Channel[SlideResult] = Channel()
        self._writer = Writer(encoders, self.results.put, progress)
        self._still_open: set[OpenSlide] = set()
        self._opening = [self._start(self._open) for _ in range(openers)]
        self._threads = [*self._opening, self._start(self._embed), self._start(self._write)]

    def _start(self, work: Callable[[], None]) -> threading.Thread:
        def body() -> None:
            try:
                work()
            except Stopped:
                pass
            except BaseException as exc:  # the iteration over the results raises it
                self.results.end(as_ours(exc, self._writer.current) if is_of_lost_device(exc) else exc)

        thread = threading.Thread(target=body, name=work.__name__, daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        """Stop the threads, and close the slides that have not been read to their end."""
        self._opened.stop()
        self._tasks.stop()
        if any(thread.is_alive() for thread in self._opening):
            slide_process.stop()
        for thread in self._threads:
            thread.join()
        for slide in list(self._still_open):
            self._close_slide(slide)

    def _close_slide(self, slide: OpenSlide) -> None:
        slide.close()
        self._still_open.discard(slide)
        self._release(slide.job)

    def _release(self, job: SlideJob) -> None:
        if self._stage is not None:
            self._stage.release(job.entry)

    # --- list -> for each slide: open -> tissue -> grid ------------------------------------------------

    def _open(self) -> None:
        """Several threads do this at once; the slides are handed on in their order all the same."""
        while (taken := self._take_job()) is not None:
            turn, job = taken
            started = perf_counter()
            try:
                opened = self._open_slide(job)
            except Exception as exc:
                opened = SlideResult(job.entry, (), job.entry.blame(exc), perf_counter() - started)
            if isinstance(opened, SlideResult):
                self._release(job)
                self.results.put(opened)
                self._opened.put_in_turn(turn, None)
            else:
                self._still_open.add(opened)
                self._opened.put_in_turn(turn, opened)
        self._opened.end()

    def _take_job(self) -> tuple[int, SlideJob] | None:
        with self._taking:
            self._opened.check()
            return next(self._jobs, None)

    def _open_slide(self, job: SlideJob) -> OpenSlide | SlideResult:
        """The slide, ready to be read, with its coordinates written; or its result, if it was finished."""
        unfinished = without_finished(job, self._encoders)
        if isinstance(unfinished, SlideResult):
            return unfinished
        stamp = stamp_of(job.entry)
        slide, mask, grid, picture = slide_process.open_with_grid(unfinished)
        with ExitStack() as stack:
            stack.callback(slide.close)
            layout = job.layout_of(grid)
            if job.options.coords is not None:  # the folder of the features depends on their grid
                unfinished = without_finished(unfinished, self._encoders, layout)
                if isinstance(unfinished, SlideResult):
                    return unfinished
            device, options = self._encoders[0].device, job.options
            reader = open_patch_reader(
                *(slide, grid, device),
                filter=options.resample,
                fast=options.fast_decode,
                gpu_decode=options.gpu_decode,
            )
            opened = OpenSlide(unfinished, slide, mask, grid, picture, reader, layout, stamp)
            stack.callback(opened.reader.close)
            outputs = [
                self._output(opened, i, encoder)
                for i, encoder in enumerate(self._encoders)
                if encoder.spec.name not in unfinished.complete
            ]
            layout.write_coords(opened.label, grid, outputs[0].provenance, overwrite=options.overwrite)
            stack.pop_all()
        return replace(opened, outputs=tuple(outputs))

    def _output(self, opened: OpenSlide, index: int, encoder: Encoder) -> Output:
        job, grid, entry, name = opened.job, opened.grid, opened.job.entry, encoder.spec.name
        if mismatch := encoder.spec.mismatch(grid.patch_px, grid.mpp):
            warnings.warn(mismatch, stacklevel=2)
        request = fingerprint(opened.slide, job.fingerprint, encoder.identity)
        if name in job.finished:  # whose tokens are made now; an older version may have recorded less
            request = read_features(job.finished[name]).provenance["request"]
        description = encoder.description | {"mismatch": mismatch}
        provenance = describe(
            entry, opened.slide, opened.mask, grid, request, description, opened.reader.name
        )
        # features that exist but do not count as finished have more unreadable patches than are allowed now
        features = name not in job.finished
        there = features and opened.layout.find(entry.name, name) is not None
        overwrite = job.options.overwrite or there
        if job.options.tokens and not overwrite:  # refused before anything is read
            has_tokens(tokens_file(opened.layout, entry.name, name), request)
        return Output(index, provenance, overwrite, features, job.options.tokens)

    # --- patches -> embeddings -------------------------------------------------------------------------

    def _embed(self) -> None:
        slides: dict[int, OpenSlide] = {}  # those that are being read, by position in the stream
        encoders_of: dict[int, set[int]] = {}

        def readers() -> Iterator[PatchReader]:
            for position, slide in enumerate(self._opened):
                slides[position] = slide
                encoders_of[position] = {output.encoder for output in slide.outputs}
                self._tasks.put(partial(self._writer.begin, position, slide))
                yield slide.reader

        batches = stream_batches(
            readers(),
            max(embedder.batch_size for embedder in self._embedders),
            device=self._encoders[0].device,
            workers=self._options.workers,
            max_read_errors=self._options.max_read_errors,
            is_next_ready=self._opened.is_ready,
            on_failure=lambda position, exc: self._tasks.put(partial(self._writer.fail, position, exc)),
            make_room=self._make_room,
            on_read=lambda position: self._tasks.put(partial(self._close_slide, slides.pop(position))),
        )
        with closing(batches):
            for batch in batches:
                needed = set[int]().union(*(encoders_of[slide] for slide in batch.slide.tolist()))
                pending = {i: self._embedders[i].submit(batch.patches) for i in sorted(needed)}
                self._tasks.put(partial(self._writer.write, batch, pending))
        self._tasks.end()

    def _make_room(self) -> bool:
        made = [embedder.make_room() for embedder in self._embedders]  # each of them
        return any(made)

    # --- embeddings -> HDF5 ----------------------------------------------------------------------------

    def _write(self) -> None:
        self._writer.run(self._tasks)
        self.results.end()
