"""A cohort shared by workers, each on a device of its own: who gets which slide, and what a death costs.

A slide whose worker died is tried once more, alone, because nobody knows which of the worker's slides it was;
then it has failed. A worker that dies again and again gets no more slides. Features get their names only when
they are complete, so a death leaves none that are not.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from seal_extract.encoders.request import EncoderRequest
from seal_extract.errors import (
    DeviceError,
    EncoderError,
    SealExtractError,
    SlideOpenError,
    UsageError,
    first_line,
)
from seal_extract.run.job import SlideJob
from seal_extract.run.options import ExtractOptions
from seal_extract.run.status_table import Progress, SlideResult

if TYPE_CHECKING:
    from seal_extract.encoders import Encoder

SLIDES_PER_WORKER = 4  # given to it at a time: one is encoded, the next are opened
MOST_DEATHS = 3  # of a worker in a row, without a slide finished between them
WARN_S = 30.0  # without a sign of life, until a warning says what is waited for


class StartError(Exception):
    """A worker could not load its encoders, for a reason that another one need not have."""


def death(error: BaseException, *, ready: bool) -> Exception:
    """What a worker says when an error ends it: the error, if every slide would have it, or that it is dead.

    Args:
        error: of the worker.
        ready: it had loaded its encoders.
    """
    if isinstance(error, SealExtractError) and not isinstance(error, DeviceError):
        return error
    return (RuntimeError if ready else StartError)(first_line(error).partition(";")[0])


class Worker(Protocol):
    """A process that embeds slides.

    Attributes:
        name: for messages.
    """

    name: str

    def embed(self, job: SlideJob) -> Future[SlideResult]:
        """Embed a slide after those given before; an error that is not one of ours is the worker's death."""
        ...

    def restart(self) -> None:
        """Start anew, without any slide."""
        ...

    def notes(self) -> Iterable[str]:
        """What the user has to be told now: warnings, and what it has waited for longer than `WARN_S`."""
        ...


class Engine(Protocol):
    """Where the work of a cohort is done, if not in this process."""

    def placed(self, encoders: Sequence[EncoderRequest | Encoder]) -> Sequence[EncoderRequest | Encoder]:
        """The encoders as the workers load them, which decides their precision."""
        ...

    def run(
        self,
        jobs: Sequence[SlideJob],
        encoders: Sequence[EncoderRequest | Encoder],
        options: ExtractOptions,
        progress: Progress | None,
    ) -> Iterator[SlideResult]:
        """Embed slides; results in any order, as soon as they are known."""
        ...


def requests_of(encoders: Sequence[EncoderRequest | Encoder]) -> list[EncoderRequest]:
    """The encoders, which each worker loads by itself.

    Raises:
        UsageError: one is loaded already.
    """
    requests = [encoder for encoder in encoders if isinstance(encoder, EncoderRequest)]
    if len(requests) < len(encoders):
        raise UsageError("workers load encoders by themselves; give their names, not loaded encoders")
    return requests


@dataclass(eq=False)
class _Staffed:
    """A worker, its slides, and its deaths since it last finished one."""

    worker: Worker
    running: dict[Future[SlideResult], SlideJob] = field(default_factory=dict)
    deaths: int = 0


def share(jobs: Sequence[SlideJob], workers: Sequence[Worker]) -> Iterator[SlideResult]:
    """Embed slides; results in any order, as soon as they are known.

    Raises:
        SealExtractError: an error of ours that stopped a worker, which every slide would have.
        EncoderError: no worker is left.
    """
    yield from _Cohort(jobs, workers).results()


class _Cohort:
    def __init__(self, jobs: Sequence[SlideJob], workers: Sequence[Worker]) -> None:
        self._entries = {job.entry.name: job.entry for job in jobs}  # as the user gave them
        self._waiting = deque(job.resolved() for job in jobs)
        self._suspects: deque[SlideJob] = deque()  # one of which may have been the death of a worker
        self._tried: set[str] = set()  # names of all that ever were suspects
        self._staff = [_Staffed(worker) for worker in workers]

    def results(self) -> Iterator[SlideResult]:
        told: set[str] = set()
        while self._give():
            running = [future for one in self._staff for future in one.running]
            done, _ = wait(running, WARN_S, FIRST_COMPLETED)
            for words in (words for one in self._staff for words in one.worker.notes()):
                if words not in told:
                    warnings.warn(words, stacklevel=2)
                told.add(words)
            for one in list(self._staff):
                ended = [future for future in one.running if future in done]
                for future in (f for f in ended if f.exception() is None):
                    one.deaths = 0
                    yield replace(future.result(), entry=self._entries[one.running.pop(future).entry.name])
                if error := next((f.exception() for f in ended if f.exception() is not None), None):
                    yield from self._bury(one, error)

    def _give(self) -> bool:
        """Give each worker slides, in turn, so that few slides are spread over all; whether any has one."""
        for _ in range(SLIDES_PER_WORKER):
            for one in self._staff:
                if (job := self._next(one)) is not None:
                    one.running[one.worker.embed(job)] = job
        return any(one.running for one in self._staff)

    def _next(self, one: _Staffed) -> SlideJob | None:
        if self._suspects and not one.running:
            return self._suspects.popleft()
        is_alone = any(job.entry.name in self._tried for job in one.running.values())
        if is_alone or not self._waiting or len(one.running) == SLIDES_PER_WORKER:
            return None
        return self._waiting.popleft()

    def _bury(self, one: _Staffed, error: BaseException) -> Iterator[SlideResult]:
        """Take the slides of a dead worker back, and restart it."""
        if isinstance(error, SealExtractError):
            raise error
        lost, one.running = list(one.running.values()), {}
        one.deaths += 1
        why = f"{one.worker.name} died ({first_line(error)})"
        for job in lost:
            entry = self._entries[job.entry.name]
            if isinstance(error, StartError):
                (self._suspects if entry.name in self._tried else self._waiting).appendleft(job)
            elif entry.name not in self._tried:
                self._tried.add(entry.name)
                self._suspects.append(job)
            else:
                twice = f"{entry.source}: {why}, and so did the worker that had it before; run it by itself"
                yield SlideResult(entry, (), SlideOpenError(twice), 0.0)
        if one.deaths < MOST_DEATHS:
            warnings.warn(f"{why}; it is restarted", stacklevel=2)
            return one.worker.restart()
        self._staff.remove(one)
        why = f"{why}, {one.deaths} times in a row"
        if not self._staff and (self._waiting or self._suspects):
            raise EncoderError(f"{why}; finished slides are kept, run the same command again to continue")
        warnings.warn(f"{why}; it gets no more slides", stacklevel=2)
