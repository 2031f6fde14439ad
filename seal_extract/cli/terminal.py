"""What is said on the terminal, where no name of a file or slide may move the cursor."""

import os
import sys
from collections.abc import Callable

from seal_extract.names import shown


def echo(*lines: object, error: bool = False) -> None:
    """Print lines on standard output, or standard error, at once; see `shown`."""
    stream = sys.stderr if error else sys.stdout
    for line in lines:
        encoding = stream.encoding or "utf-8"  # ASCII, for some terminals and logs
        text = shown(str(line)).encode(encoding, "backslashreplace").decode(encoding)
        try:
            print(text, file=stream, flush=True)
        except BrokenPipeError:
            raise
        except OSError as exc:  # a disk that is full ends no run
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if not error:
                fail(f"standard output can no longer be written ({exc.strerror}); the run goes on", 1)


def progress_line(quiet: bool) -> Callable[[str], None]:
    """Says what is being done, in a line that the next replaces; nothing where there is no terminal."""
    if quiet or not sys.stderr.isatty():
        return lambda what: None
    return lambda what: print(f"\r\033[K{shown(what)}", end="", file=sys.stderr, flush=True)


def fail(message: str, status: int) -> int:
    """Print the message on standard error; the exit status is handed through."""
    echo(f"seal-extract: {message}", error=True)
    return status
