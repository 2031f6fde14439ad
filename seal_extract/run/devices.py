"""A cohort on several devices of this machine: one process for each; how they share it is in `workers`."""

from __future__ import annotations

import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import IO, TYPE_CHECKING

from seal_extract.encoders.request import EncoderRequest
from seal_extract.errors import UsageError
from seal_extract.patches import available_cores
from seal_extract.run.job import Channel, SlideJob
from seal_extract.run.options import ExtractOptions
from seal_extract.run.slide_process import start_serving
from seal_extract.run.status_table import Progress, SlideResult
from seal_extract.run.workers import WARN_S, death, requests_of, share

if TYPE_CHECKING:
    from seal_extract.encoders import Encoder

STOP_S = 20.0  # for a process to clear up, until it is killed


@dataclass(frozen=True)
class DeviceEngine:
    """Runs a cohort on several devices of this machine.

    Attributes:
        devices: such as ``("cuda:0", "cuda:1")``, all of one kind; ``("cpu", "cpu")`` shares the cores.

    Raises:
        UsageError: there is no such device, or they are of two kinds, whose embeddings would differ.
    """

    devices: tuple[str, ...]

    def __post_init__(self) -> None:
        wrong = [device for device in self.devices if not re.fullmatch(r"cpu|cuda:\d+", device)]
        if wrong or not self.devices:
            raise UsageError(
                f"--device has {', '.join(map(repr, wrong)) or 'no device'}; allowed: all, or several, as in "
                "cuda:0,cuda:1"
            )
        if len({device.split(":")[0] for device in self.devices}) > 1:
            raise UsageError(
                f"--device {','.join(self.devices)} are of two kinds, whose embeddings differ; give one kind"
            )

    @classmethod
    def all(cls) -> DeviceEngine:
        """All GPUs.

        Raises:
            UsageError: there is none.
        """
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UsageError("--device all means all CUDA devices, and this machine has none; leave it out")
        return cls(tuple(f"cuda:{i}" for i in range(count)))

    def placed(self, encoders: Sequence[EncoderRequest | Encoder]) -> list[EncoderRequest | Encoder]:
        """The encoders on the first device, whose kind decides their precision."""
        return [replace(request, device=self.devices[0]) for request in requests_of(encoders)]

    def run(
        self,
        jobs: Sequence[SlideJob],
        encoders: Sequence[EncoderRequest | Encoder],
        options: ExtractOptions,
        progress: Progress | None,
    ) -> Iterator[SlideResult]:
        """Embed slides; results in any order, as soon as they are known.

        Raises:
            UsageError: an encoder is loaded already.
            SealExtractError: see `share`.
        """
        requests = requests_of(encoders)
        devices = self.devices[: len(jobs)]
        theirs = replace(
            options.resolved(),
            workers=options.workers or max(1, available_cores() // len(devices)),
            stage_gb=options.stage_gb / len(devices),
        )
        given = {job.entry.resolved().path: job.entry.path for job in jobs}

        def show(slide: Path, done: int, total: int) -> None:
            if progress is not None:
                progress(given[slide], done, total)

        workers = [
            _DeviceProcess(device, [replace(r, device=device) for r in requests], theirs, show, shows=not i)
            for i, device in enumerate(devices)
        ]
        try:
            yield from share(jobs, workers)
        finally:
            for worker in workers:
                worker.stop()
            for worker in workers:
                worker.end()


class _DeviceProcess:
    """A worker as this process sees it."""

    def __init__(
        self,
        device: str,
        requests: Sequence[EncoderRequest],
        options: ExtractOptions,
        progress: Progress,
        *,
        shows: bool,
    ) -> None:
        """Start the process; only one that ``shows`` what it downloads may write to standard error."""
        self.name, self._progress = device, progress
        self._orders = requests, options
        self._stderr = None if shows else subprocess.DEVNULL
        self._notes: deque[str] = deque()
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        self._running: dict[str, Future[SlideResult]] = {}  # by name of the slide
        self._is_ready, self._heard = False, monotonic()
        self._death: Exception | None = None
        self._process = start_serving(__name__, self._stderr)
        self._send(self._orders)
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()

    def embed(self, job: SlideJob) -> Future[SlideResult]:
        """See `Worker.embed`."""
        future: Future[SlideResult] = Future()
        with self._lock:
            if self._death is None:
                self._running[job.entry.name] = future
            else:
                future.set_exception(self._death)
        self._send(job)
        return future

    def restart(self) -> None:
        """See `Worker.restart`."""
        self._process.kill()
        self.end()
        self._start()

    def notes(self) -> Iterator[str]:
        """See `Worker.notes`."""
        while self._notes:
            yield self._notes.popleft()
        if self._running and monotonic() - self._heard > WARN_S:
            work = f"embedding {', '.join(self._running)}" if self._is_ready else "loading its encoders"
            yield f"waiting for {self.name}, which has been {work} for {WARN_S:g} s or longer"

    def stop(self) -> None:
        """Let the process clear up and end, without waiting for it."""
        self._send(None)
        if self._running and os.name == "posix":
            self._process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """Wait until the process has ended."""
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._listening.join()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def _send(self, what: object) -> None:
        with suppress(OSError):  # of a process that has died, which `_listen` notices
            pickle.dump(what, self._process.stdin)  # type: ignore[arg-type]
            self._process.stdin.flush()  # type: ignore[union-attr]

    def _listen(self) -> None:
        error: Exception | None = None
        with suppress(OSError, EOFError, pickle.UnpicklingError):
            while error is None:
                kind, what = pickle.load(self._process.stdout)  # type: ignore[arg-type]
                self._heard = monotonic()
                if kind == "result":
                    self._running.pop(what.name).set_result(what)
                elif kind == "progress":
                    self._progress(*what)
                elif kind == "note":
                    self._notes.append(what)
                elif kind == "ready":
                    self._is_ready = True
                else:
                    error = what
        if error is None:
            ended = RuntimeError(f"its process ended with status {self._process.wait()}")
            error = death(ended, ready=self._is_ready)
        with self._lock:
            self._death = error
            lost, self._running = self._running, {}
        for future in lost.values():
            future.set_exception(error)


# --- in the process of a device -----------------------------------------------------------------------


def serve() -> None:
    """Embed the slides that come through standard input, until it ends."""
    answers, sending = os.fdopen(os.dup(1), "wb"), threading.Lock()
    os.dup2(2, 1)  # nothing that a library prints gets among the answers

    def answer(kind: str, what: object) -> None:
        with sending:
            pickle.dump((kind, what), answers)
            answers.flush()

    def note(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, UserWarning):
            answer("note", str(message))

    warnings.showwarning = note
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have set it to be ignored
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # our error message covers its retries
    requests, options = pickle.load(sys.stdin.buffer)
    jobs: Channel[SlideJob] = Channel()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, jobs), daemon=True).start()
    is_ready = False
    try:
        encoders = [request.load() for request in requests]
        from seal_extract.run.extract import extract_jobs

        answer("ready", None)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        is_ready = True
        for result in extract_jobs(jobs, encoders, options, lambda *done: answer("progress", done)):
            answer("result", result)
    except Exception as exc:
        answer("death", death(exc, ready=is_ready))


def _receive(source: IO[bytes], jobs: Channel[SlideJob]) -> None:
    """Take jobs until there are no more; end this process at once when the other one has ended."""
    while True:
        try:
            job = pickle.load(source)
        except BaseException:
            os._exit(1)
        if job is None:
            return jobs.end()
        jobs.put(job)
