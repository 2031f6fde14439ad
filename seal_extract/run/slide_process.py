"""Processes of their own that open slides and find their tissue, within a limit of time and memory.

A damaged or hostile file may lead a reading library into a loop, into memory without end, or into a crash.
There it costs one slide: the process is killed and another one started. Only a slide that went well is opened
in the process that embeds. There are as many processes as threads that ask at the same time.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from seal_extract.errors import SealExtractError, SlideOpenError, as_ours
from seal_extract.run.job import SlideJob, find_tissue_and_grid
from seal_extract.run.options import RunOptions
from seal_extract.slides.slide import Slide

if TYPE_CHECKING:
    from seal_extract.patches.grid import PatchGrid
    from seal_extract.slides.readers import Array
    from seal_extract.tissue.mask import TissueMask

LIMIT_GB = 6  # beyond what the process takes to start; a plain image of the largest size allowed takes 4.2
GRACE_S = 30  # after which the process ends by itself, if whoever started it is no longer there to end it


def start_serving(module: str, stderr: int | None) -> subprocess.Popen[bytes]:
    """Start a process that runs the ``serve`` of a module, with pipes to its standard input and output.

    Raises:
        OSError: no process can be started.
    """
    command = f"import sys; sys.path[:] = sys.argv[1:]; from {module} import serve; serve()"
    return subprocess.Popen(
        [sys.executable, "-c", command, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,  # Ctrl-C is for the process that the user sees
    )


def open_tried(job: SlideJob) -> Slide:
    """Open a slide that the other process could open.

    Raises:
        SlideError: see `open_entry`; or the limits were exceeded.
    """
    with _process_for(job.options) as process:
        if process is not None:
            process.ask(job, finds_tissue=False)
    return job.open()


def open_with_grid(job: SlideJob) -> tuple[Slide, TissueMask | None, PatchGrid, Array]:
    """Open a slide; its tissue, grid and picture come from the other process; see `find_tissue_and_grid`.

    Raises:
        SealExtractError: the slide cannot be used, or the limits were exceeded.
    """
    with _process_for(job.options) as process:
        answer = None if process is None else process.ask(job, finds_tissue=True)
    if answer is not None:
        *found, messages = answer
        for message in messages:
            warnings.warn(message, stacklevel=2)
        return job.open(), *found
    slide = job.open()
    try:
        return slide, *find_tissue_and_grid(slide, job.options)
    except BaseException:
        slide.close()
        raise


def start_ahead(options: RunOptions) -> None:
    """Start a process without waiting for it, so that it is ready when it is needed."""
    with _process_for(options):
        pass


def stop() -> None:
    """Let the processes answer no more: the slides at which they work have failed."""
    for process in list(_asked):
        process.stop()


_idle: list[_SlideProcess] = []
_asked: list[_SlideProcess] = []
_is_hopeless = False  # no process can be started on this machine


@contextmanager
def _process_for(options: RunOptions) -> Iterator[_SlideProcess | None]:
    """A process that no other thread asks meanwhile; None if there are no limits, or none can be started."""
    if not options.plan_timeout_s or _is_hopeless:
        yield None
        return
    try:
        process = _idle.pop()  # lists change in one step, which threads cannot share
    except IndexError:
        process = _SlideProcess()
        atexit.register(process.kill)
    _asked.append(process)
    try:
        yield process if process.start() else None
    finally:
        _asked.remove(process)
        _idle.append(process)


class _SlideProcess:
    """Another process as this one sees it: one slide at a time; after a kill another is started."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._starter = 0  # a forked copy of this process must not use its pipes
        self._is_ready = False

    def start(self) -> bool:
        """Start the process if there is none; False where none can be."""
        global _is_hopeless
        if self._process is None or self._starter != os.getpid() or self._process.poll() is not None:
            self.kill()
            try:
                self._process = start_serving(__name__, subprocess.DEVNULL)
            except OSError as exc:
                _is_hopeless = True
                warnings.warn(
                    f"slides are opened without limits of time and memory: no process can be started ({exc})",
                    stacklevel=2,
                )
                return False
            self._starter, self._is_ready = os.getpid(), False
        return True

    def ask(self, job: SlideJob, *, finds_tissue: bool) -> Any:
        """What the process finds out about a slide.

        Raises:
            SealExtractError: that of the slide; or the limits were exceeded.
        """
        process, late = self._process, threading.Event()
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(job.options.plan_timeout_s, end)
        timer.daemon = True
        try:
            if not self._is_ready:
                self._is_ready = pickle.load(process.stdout)
            timer.start()
            pickle.dump((os.getcwd(), job, finds_tissue), process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            self.kill()
            raise _beyond_limits(job, process.wait(), late.is_set()) from None
        except BaseException:  # Ctrl-C: what is still to come would be taken for the next answer
            self.kill()
            raise
        finally:
            timer.cancel()
        if isinstance(answer, SealExtractError):
            raise answer
        return answer

    def stop(self) -> None:
        """End the process; the thread that waits for its answer clears up."""
        process = self._process
        if process is not None and self._starter == os.getpid():
            process.kill()

    def kill(self) -> None:
        """End the process, and clear up."""
        process, self._process = self._process, None
        if process is not None and self._starter == os.getpid():
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was not sent will never be
                    pipe.close()  # type: ignore[union-attr]


def _beyond_limits(job: SlideJob, status: int, late: bool) -> SlideOpenError:
    if late:
        return SlideOpenError(
            f"{job.entry.source}: opening it and finding its tissue took more than "
            f"{job.options.plan_timeout_s:g} s; copy it again, or type --plan-timeout SECONDS if its storage "
            "is slow"
        )
    return SlideOpenError(
        f"{job.entry.source}: the process that opened it ended with status {status}; the file is damaged, or "
        f"takes more than {LIMIT_GB} GB of memory: copy or scan it again"
    )


# --- in the other process -----------------------------------------------------------------------------


def serve() -> None:
    """Answer what comes through standard input, until it ends."""
    import seal_extract.tissue.segmentation  # noqa: F401  # now, not within the first slide's limits

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints gets among the answers
    requests: queue.SimpleQueue[tuple[str, SlideJob, bool]] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, requests), daemon=True).start()
    _limit_memory()
    pickle.dump(True, answers)
    answers.flush()
    while True:
        folder, job, finds_tissue = requests.get()
        if hasattr(signal, "alarm"):
            signal.alarm(int(job.options.plan_timeout_s) + GRACE_S)
        try:
            os.chdir(folder)  # the other process may have gone elsewhere since
            answer = _answer(job, finds_tissue)
        except MemoryError:
            answer = SlideOpenError(
                f"{job.entry.source}: opening it and finding its tissue takes more than {LIMIT_GB} GB of "
                "memory; copy it again, or make a tiled TIFF with a pyramid of it"
            )
        except Exception as exc:
            answer = as_ours(exc, job.entry.source)
        pickle.dump(answer, answers)
        answers.flush()
        if hasattr(signal, "alarm"):
            signal.alarm(0)


def _receive(source: IO[bytes], requests: queue.SimpleQueue[Any]) -> None:
    """Take requests; end this process at once when the other one has ended."""
    while True:
        try:
            requests.put(pickle.load(source))
        except BaseException:
            os._exit(0)


def _answer(job: SlideJob, finds_tissue: bool) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")  # the process that embeds opens it too, and is warned then
        with job.open() as slide:
            if not finds_tissue:
                return None
            warnings.simplefilter("always")
            found = find_tissue_and_grid(slide, job.options)
    return *found, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def _limit_memory() -> None:
    """Let this process take `LIMIT_GB` more; only Linux enforces that."""
    if sys.platform != "linux":
        return
    import resource

    words = Path("/proc/self/status").read_text().partition("VmData:")[2].split()
    resource.setrlimit(resource.RLIMIT_DATA, (int(words[0]) * 1024 + LIMIT_GB * 2**30,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
