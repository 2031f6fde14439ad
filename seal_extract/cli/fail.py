"""What is said on the terminal, where no name of a file or slide may move the cursor."""

import sys
from collections.abc import Callable

from seal_extract.names import shown


def say(*lines: object, error: bool = False) -> None:
    """Print lines on standard output, or standard error, at once; see `shown`."""
    for line in lines:
        print(shown(str(line)), file=sys.stderr if error else sys.stdout, flush=True)


def passing_line(quiet: bool) -> Callable[[str], None]:
    """Says what is being done, in a line that the next replaces; nothing where there is no terminal."""
    if quiet or not sys.stderr.isatty():
        return lambda what: None
    return lambda what: print(f"\r\033[K{shown(what)}", end="", file=sys.stderr, flush=True)


def fail(message: str, status: int) -> int:
    """Print the message on standard error; the exit status is handed through."""
    say(f"seal-extract: {message}", error=True)
    return status
