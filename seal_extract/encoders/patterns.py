"""Regular expressions out of files of others, some of which never come to an end.

They are matched by a process of their own, with limits of time and memory; Python's matcher has none itself.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

SECONDS, BYTES = 10, 2**30
_PLAIN = re.compile(r"(?:[\w-]|\\?\.)*")  # matched in one go
_MATCHER = f"""
import json, re, sys, warnings
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({BYTES}, {BYTES}))
except (ImportError, ValueError, OSError):
    pass
warnings.simplefilter("ignore")
patterns, names = json.load(sys.stdin)
try:
    found = [[re.fullmatch(p, n) is not None for n in names] for p in patterns]
except (re.error, RecursionError, OverflowError, MemoryError) as exc:
    found = str(exc) or type(exc).__name__
json.dump(found, sys.stdout)
"""


def matches(patterns: Sequence[str], names: Sequence[str]) -> list[list[bool]]:
    """Whether each pattern matches each name as a whole, [patterns][names].

    Raises:
        ValueError: a pattern is none, or does not come to an end.
    """
    if all(_PLAIN.fullmatch(pattern) for pattern in patterns):
        return [[re.fullmatch(pattern, name) is not None for name in names] for pattern in patterns]
    command = [sys.executable, "-I", "-S", "-c", _MATCHER]
    try:
        done = subprocess.run(
            command, input=json.dumps([patterns, names]), capture_output=True, text=True, timeout=SECONDS
        )
        found = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as exc:
        raise ValueError(f"its patterns take more than {SECONDS} s or {BYTES:,} bytes to match") from exc
    if isinstance(found, str):
        raise ValueError(f"one of its patterns is no regular expression: {found}")
    return found  # type: ignore[no-any-return]
