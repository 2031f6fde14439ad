"""Everything that commands print: lines, progress, and one JSON object per event for ``--log-json``.

No name of a file or slide can move the cursor or colour the text.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

from seal_extract.errors import OutputError, SealExtractError, UnexpectedError
from seal_extract.names import shown

if TYPE_CHECKING:
    from seal_extract.features.store import SlideFeatures
    from seal_extract.run.status_table import SlideResult

Item = TypeVar("Item")
STDERR = "-"


def echo(*lines: object, error: bool = False) -> None:
    """Print lines on standard output or standard error, at once; control characters are escaped."""
    stream = sys.stderr if error else sys.stdout
    for line in lines:
        encoding = stream.encoding or "utf-8"  # ASCII, for some terminals and logs
        text = shown(str(line)).encode(encoding, "backslashreplace").decode(encoding)
        try:
            print(text, file=stream, flush=True)
        except BrokenPipeError:
            raise
        except OSError as exc:  # a full disk does not end the run
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if not error:
                fail(f"standard output can no longer be written ({exc.strerror}); the run continues", 1)


def progress(args: argparse.Namespace) -> Callable[[object], None]:
    """What prints a line on the progress of a command; nothing with ``--quiet``."""
    return (lambda line: None) if args.quiet else echo


def warn(message: str) -> None:
    """Print a message on standard error."""
    echo(f"seal-extract: {message}", error=True)


def fail(message: str, status: int) -> int:
    """Print a message on standard error; returns the exit status given."""
    warn(message)
    return status


def exit_status(failed: int, total: int, what: str) -> int:
    """0, or 1 with a line that says how many of the files or slides failed."""
    return fail(f"{failed} of {total} {what} failed", 1) if failed else 0


def print_each(items: Iterable[Item], line_of: Callable[[Item], str], *, alone: bool) -> int:
    """Print a line for each item; a failure stops the others only if the item is ``alone``.

    Returns:
        The exit status.
    """
    status = 0
    for item in items:
        try:
            echo(line_of(item))
        except SealExtractError as exc:
            if alone:
                raise
            status = fail(f"FAILED {exc}", 1)
    return status


def progress_line(quiet: bool) -> Callable[[str], None]:
    """A function that shows the current step in one line of the terminal and replaces it each time."""
    if quiet or not sys.stderr.isatty():
        return lambda step: None
    return lambda step: print(f"\r\033[K{shown(step)}", end="", file=sys.stderr, flush=True)


class EventLog:
    """Writes events to a file, or to standard error for ``-``; without either, it writes nothing."""

    def __init__(self, target: str | None) -> None:
        self._closing = ExitStack()
        self._file: IO[str] | None = None
        if target == STDERR:
            self._file = sys.stderr
        elif target is not None:
            try:
                file = Path(target).open("a", encoding="utf-8")  # noqa: SIM115
            except OSError as exc:
                raise OutputError(f"cannot write --log-json {target}: {exc.strerror}; give a file") from exc
            self._file = self._closing.enter_context(file)

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def write(self, event: str, **facts: object) -> None:
        """Write one event, at once."""
        if self._file is None:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        entry = {"time": now, "event": event, **{key: _printable(fact) for key, fact in facts.items()}}
        try:
            print(json.dumps(entry), file=self._file, flush=True)
        except OSError as exc:  # a full disk does not end the run
            self._file = None
            with suppress(OSError):
                self._closing.close()
            fail(f"--log-json can no longer be written ({exc.strerror}); the run continues without it", 1)

    def write_result(self, result: SlideResult) -> None:
        """Write the outcome of a slide."""
        slide = {"slide": result.entry.source, "name": result.name}
        if result.error is not None:
            more = {"traceback": result.error.details} if isinstance(result.error, UnexpectedError) else {}
            self.write("failed", **slide, **_failure(result.error), **more)
            return
        first = result.features[0]
        self.write(
            "finished before" if result.finished_before else "done",
            **slide,
            patches=len(first.grid),
            seconds=round(result.seconds, 2),
            read_errors=first.provenance["read_errors"],
            files=[str(features.path) for features in result.features],
        )

    def write_outcome(self, event: str, outcome: str | SealExtractError, **of: str) -> None:
        """Print and write the outcome of one slide-level or patient-level file."""
        if isinstance(outcome, SealExtractError):
            self.write(f"{event} failed", **of, **_failure(outcome))
            fail(f"FAILED {outcome}", 1)
        else:
            self.write(event, **of, result=outcome)
            echo(outcome)


def _failure(error: SealExtractError) -> dict[str, str]:
    return {"error": type(error).__name__, "reason": str(error)}


def _printable(fact: object) -> object:
    if isinstance(fact, list):
        return [_printable(one) for one in fact]
    return "\n".join(map(shown, fact.split("\n"))) if isinstance(fact, str) else fact


class ProgressBars:
    """Bars for the slides and for the patches of the current slide; no bars where there is no terminal."""

    def __init__(self, quiet: bool, slides: int) -> None:
        from tqdm import tqdm

        off = True if quiet else None  # None: no terminal
        self._slides = tqdm(
            total=slides, unit="slide", disable=True if slides == 1 else off, leave=False, position=0
        )
        self._patches = tqdm(unit="patch", disable=off, leave=False, position=0 if slides == 1 else 1)
        self._slide: Path | None = None

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()
        self._slides.close()

    def show(self, slide: Path, done: int, total: int) -> None:
        """Show the patches done of a slide; called by other threads."""
        if slide != self._slide:
            self._slide = slide
            self._patches.reset(total)
            self._patches.set_description(shown(slide.name), refresh=False)
        self._patches.update(done - self._patches.n)

    def next_slide(self) -> None:
        """Count a slide as ended and make room for its line."""
        self._patches.clear()
        self._slides.clear()
        self._slides.update()


def result_lines(result: SlideResult) -> list[str]:
    """One line per encoder of a slide that succeeded."""
    name = result.path.name
    if result.finished_before:
        return [f"{name}: {len(f.grid)} patches, finished before -> {f.path}" for f in result.features]
    return [_closing_line(name, features, result.seconds) for features in result.features]


def _closing_line(name: str, result: SlideFeatures, seconds: float) -> str:
    slide, n, tissue = result.provenance["slide"], len(result.grid), result.provenance["tissue"] or {}
    if not n:
        area = tissue.get("area_mm2")
        little = f"{area:.2g} mm² of tissue, too little for one" if area else "no tissue found"
        return f"{name}: 0 patches, {little} -> {result.path}; look at its overlay"
    unread = result.provenance["read_errors"]
    errors = f", {unread} of them UNREADABLE and zero" if unread else ""
    uncovered = tissue.get("uncovered")
    left = f"; {uncovered:.1%} of the tissue under no patch" if uncovered is not None else ""
    padding = result.provenance["padding"]
    padded = f" ({padding:.1%} of their area beyond the slide)" if padding else ""
    return (
        f"{name}: {n} patches{padded}{errors} by {result.provenance['encoder']['name']}, "
        f"{slide['mpp']:.4g} µm/px by {slide['mpp_source']}, {slide['reader']} ({slide['decoder']}), "
        f"{seconds:.1f} s, {n / seconds:.3g} patches/s{left} -> {result.path}"
    )
