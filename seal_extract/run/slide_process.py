"""Slides opened, and their tissue found, in a process of its own, within a limit of time and memory.

A damaged or hostile file may lead a reading library into a loop, into memory without end, or into a crash.
There it costs one slide: the process is killed and another one started. Only a slide that went well is opened
in the process that embeds.
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
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from seal_extract.errors import SealExtractError, SlideOpenError, as_ours
from seal_extract.run.options import ExtractOptions, SlidePlan, plan_slide
from seal_extract.slides.entry import SlideEntry, open_entry
from seal_extract.slides.identity import file_stamp
from seal_extract.slides.slide import Slide

if TYPE_CHECKING:
    from seal_extract.patches.grid import PatchGrid
    from seal_extract.tissue.mask import TissueMask

PLAN_GB = 6  # beyond what the process takes to start; a plain image of the largest size allowed takes 4.2
GRACE_S = 30  # after which the process ends by itself, if whoever started it is no longer there to end it
COMMAND = "import sys; sys.path[:] = sys.argv[1:]; from seal_extract.run.slide_process import serve; serve()"


def open_within(entry: SlideEntry, options: ExtractOptions) -> Slide:
    """`open_entry`, tried in the other process before.

    Raises:
        SlideError: see `open_entry`; or the limits were exceeded.
    """
    if options.plan_timeout_s and _shared.start():
        _shared.ask(entry, options, plans=False)
    return open_entry(entry, options.slide_mpp, options.override_mpp)


def plan_within(slide: Slide, entry: SlideEntry, options: ExtractOptions) -> SlidePlan:
    """`plan_slide` of a slide that is open here, done in the other process.

    Raises:
        SealExtractError: see `plan_slide`; or the limits were exceeded.
    """
    if not (options.plan_timeout_s and _shared.start()):
        return plan_slide(slide, options, entry.name)
    if entry.url is not None:
        entry = replace(entry, copy=slide.path)
    mask, grid, told = _shared.ask(entry, options, plans=True)
    for message in told:
        warnings.warn(message, stacklevel=2)
    return SlidePlan(slide, mask, grid)


def start_ahead(options: ExtractOptions) -> None:
    """Start the other process without waiting for it, so that it is ready when it is needed."""
    if options.plan_timeout_s:
        _shared.start()


def stop() -> None:
    """Let the other process answer no more: the slide at which it works has failed."""
    _shared.stop()


class _Planner:
    """The other process as this one sees it: one slide at a time; after a kill another is started."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._asking = threading.Lock()
        self._starter = 0  # a forked copy of this process must not use its pipes
        self._is_ready = self._is_hopeless = False

    def start(self) -> bool:
        """Start the process if there is none; False where none can be."""
        if self._is_hopeless:
            return False
        if self._process is None or self._starter != os.getpid() or self._process.poll() is not None:
            self.kill()
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", COMMAND, *sys.path],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for the process that the user sees
                )
            except OSError as exc:
                return self._give_up(exc)
            self._starter, self._is_ready = os.getpid(), False
        return True

    def _give_up(self, why: object) -> bool:
        self._is_hopeless = True
        warnings.warn(
            f"slides are opened without limits of time and memory: no process for it starts ({why})",
            stacklevel=2,
        )
        return False

    def ask(self, entry: SlideEntry, options: ExtractOptions, *, plans: bool) -> Any:
        """What the process finds out about a slide.

        Raises:
            SealExtractError: that of the slide; or the limits were exceeded.
        """
        with self._asking:
            self.start()
            process, late = self._process, threading.Event()
            assert process is not None
            assert process.stdin is not None
            assert process.stdout is not None

            def end() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(options.plan_timeout_s, end)
            timer.daemon = True
            try:
                if not self._is_ready:
                    self._is_ready = pickle.load(process.stdout)
                timer.start()
                pickle.dump((os.getcwd(), entry, options, plans), process.stdin)
                process.stdin.flush()
                answer = pickle.load(process.stdout)
            except (OSError, EOFError, pickle.UnpicklingError):
                self.kill()
                raise _why_not(entry, options, process.wait(), late.is_set()) from None
            except BaseException:  # Ctrl-C: what is still to come would be taken for the next answer
                self.kill()
                raise
            finally:
                timer.cancel()
        if isinstance(answer, SealExtractError):
            raise answer
        return answer

    def stop(self) -> None:
        """End the process; whoever waits for its answer clears up."""
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


def _why_not(entry: SlideEntry, options: ExtractOptions, status: int, late: bool) -> SlideOpenError:
    if late:
        return SlideOpenError(
            f"{entry.source}: opening it and finding its tissue took more than {options.plan_timeout_s:g} s; "
            "copy it again, or type --plan-timeout SECONDS if its storage is slow"
        )
    return SlideOpenError(
        f"{entry.source}: the process that opened it ended with status {status}; the file is damaged, or "
        f"takes more than {PLAN_GB} GB of memory: copy or scan it again"
    )


_shared = _Planner()
atexit.register(_shared.kill)


# --- in the other process -----------------------------------------------------------------------------


def serve() -> None:
    """Answer what comes through standard input, until it ends."""
    import seal_extract.tissue.segmentation  # noqa: F401  # now, not within the first slide's limits

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints gets among the answers
    requests: queue.SimpleQueue[tuple[str, SlideEntry, ExtractOptions, bool]] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, requests), daemon=True).start()
    _limit_memory()
    pickle.dump(True, answers)
    answers.flush()
    opened: tuple[Any, Slide] | None = None
    while True:
        folder, entry, options, plans = requests.get()
        if hasattr(signal, "alarm"):
            signal.alarm(int(options.plan_timeout_s) + GRACE_S)
        answer: Any = None
        try:
            os.chdir(folder)  # the other process may have gone elsewhere since
            which = folder, entry, options, file_stamp(entry.file)
            if opened is None or opened[0] != which:
                if opened is not None:
                    opened[1].close()
                opened = None
                opened = which, _open_quietly(entry, options)
            if plans:
                answer = _plan(opened[1], options, entry.name)
                opened[1].close()
                opened = None
        except MemoryError:
            answer = SlideOpenError(
                f"{entry.source}: opening it and finding its tissue takes more than {PLAN_GB} GB of memory; "
                "copy it again, or make a tiled TIFF with a pyramid of it"
            )
        except Exception as exc:
            answer = as_ours(exc, entry.source)
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


def _open_quietly(entry: SlideEntry, options: ExtractOptions) -> Slide:
    with warnings.catch_warnings():  # whoever asks opens it too, and is warned then
        warnings.simplefilter("ignore")
        return open_entry(entry, options.slide_mpp, options.override_mpp)


def _plan(slide: Slide, options: ExtractOptions, name: str) -> tuple[TissueMask | None, PatchGrid, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = plan_slide(slide, options, name)
    return plan.mask, plan.grid, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def _limit_memory() -> None:
    """Let this process take `PLAN_GB` more; only Linux holds a process to that."""
    if sys.platform != "linux":
        return
    import resource

    words = Path("/proc/self/status").read_text().partition("VmData:")[2].split()
    resource.setrlimit(resource.RLIMIT_DATA, (int(words[0]) * 1024 + PLAN_GB * 2**30,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
