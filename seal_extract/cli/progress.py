"""``--log-json``: one JSON line an event, for whoever watches a run."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, TYPE_CHECKING

from seal_extract.cli.terminal import fail
from seal_extract.errors import OutputError, SealExtractError, UnexpectedError
from seal_extract.names import shown

if TYPE_CHECKING:
    from seal_extract.run.status_table import SlideResult

STDERR = "-"


class Events:
    """Writes events to a file, or to stderr for ``-``; without either it keeps them to itself."""

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

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def tell(self, event: str, **facts: object) -> None:
        """Write one event, at once."""
        if self._file is not None:
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            said = {"time": now, "event": event, **{key: _printable(fact) for key, fact in facts.items()}}
            try:
                print(json.dumps(said), file=self._file, flush=True)
            except OSError as exc:  # a disk that is full ends no run
                self._file = None
                with suppress(OSError):
                    self._closing.close()
                fail(f"--log-json can no longer be written ({exc.strerror}); the run goes on without it", 1)

    def tell_result(self, result: SlideResult) -> None:
        """What became of a slide."""
        slide, seconds = result.entry.source, round(result.seconds, 2)
        if result.error is not None:
            kind = type(result.error).__name__
            more = {"traceback": result.error.details} if isinstance(result.error, UnexpectedError) else {}
            self.tell("failed", slide=slide, name=result.name, error=kind, reason=str(result.error), **more)
            return
        first = result.features[0]
        self.tell(
            "finished before" if result.finished_before else "done",
            slide=slide,
            name=result.name,
            patches=len(first.grid),
            seconds=seconds,
            read_errors=first.provenance["read_errors"],
            files=[str(features.path) for features in result.features],
        )

    def tell_slide_level(self, result: SlideResult, said: str | SealExtractError) -> None:
        """What became of one of its slide-level files."""
        slide = result.entry.source
        if isinstance(said, SealExtractError):
            kind = type(said).__name__
            self.tell("slide level failed", slide=slide, name=result.name, error=kind, reason=str(said))
        else:
            self.tell("slide level", slide=slide, name=result.name, result=said)


def _printable(fact: object) -> object:
    if isinstance(fact, list):
        return [_printable(one) for one in fact]
    return "\n".join(map(shown, fact.split("\n"))) if isinstance(fact, str) else fact
