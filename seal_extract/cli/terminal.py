"""Printing on the terminal. No name of a file or slide can move the cursor or colour the text."""

import os
import sys
from collections.abc import Callable

from seal_extract.names import shown


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


def progress_line(quiet: bool) -> Callable[[str], None]:
    """A function that shows the current step in one line of the terminal and replaces it each time."""
    if quiet or not sys.stderr.isatty():
        return lambda step: None
    return lambda step: print(f"\r\033[K{shown(step)}", end="", file=sys.stderr, flush=True)
