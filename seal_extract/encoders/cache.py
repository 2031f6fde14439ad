"""The cache of the Hugging Face Hub, without ``huggingface_hub``, whose import takes a third of a second."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path:
    """Folder of downloads, by the present environment, as ``huggingface_hub`` chooses it."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if cache := os.environ.get(name):
            return _expanded(cache)
    home = os.environ.get("HF_HOME")
    if not home:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return _expanded(home) / "hub"


def is_cached(repo_id: str, filenames: Sequence[str], commit: str | None = None) -> bool:
    """Whether the cache holds a file under any of its names, of a commit or of main; no network is used."""
    folder = cache_folder() / f"models--{repo_id.replace('/', '--')}"
    commits = [commit] if commit else []
    with suppress(OSError, UnicodeError):
        commits.append((folder / "refs" / "main").read_text(encoding="utf-8").strip())
    return any((folder / "snapshots" / c / name).is_file() for c in commits for name in filenames)


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(path)))
