"""The grid of patches, and the stream of their pixels in batches on the device."""

import os


def available_cores() -> int:
    """The cores that this process may use: fewer than the machine's under Slurm, for example."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
