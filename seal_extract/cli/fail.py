"""One line on standard error."""

import sys


def fail(message: str, status: int) -> int:
    """Print the message; the exit status is handed through."""
    print(f"seal-extract: {message}", file=sys.stderr)
    return status
