"""What slides are called, so that no result overwrites another's: unique in a list, and the same for ever."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

SEPARATOR = "__"  # between folder and name


def choose_names(paths: Sequence[Path], given: Mapping[Path, str] | None = None) -> list[str]:
    """Stems; names with suffix where one folder has two of a stem; folders in front where that clashes.

    Args:
        paths: of the slides, resolved.
        given: names that slides have got before, by their paths. They keep them, and no other slide gets
            one: a slide that has moved, so that its old path is gone, counts as the same.
    """
    given = given or {}
    owners = {name: path for path, name in given.items()}
    stems = Counter(path.with_suffix("") for path in {*paths, *given})
    tails = [path.name if stems[path.with_suffix("")] > 1 else path.stem for path in paths]
    names = [given.get(path, tail) for path, tail in zip(paths, tails, strict=True)]
    depth = 0
    while True:
        counts = Counter(names)
        clashing = [
            i
            for i, path in enumerate(paths)
            if path not in given and (counts[names[i]] > 1 or _is_taken(names[i], path, owners))
        ]
        if not clashing:
            return names
        depth += 1
        for i in clashing:
            folders = [part for part in paths[i].parent.parts if part != paths[i].anchor]
            if depth > len(folders):  # a__b/c and a/b__c
                tails[i] = hashlib.sha256(str(paths[i]).encode(errors="surrogateescape")).hexdigest()[:8]
            names[i] = SEPARATOR.join([*folders[-depth:], tails[i]])


def _is_taken(name: str, path: Path, owners: Mapping[str, Path]) -> bool:
    """Whether a name is another slide's; of a copy elsewhere its size tells."""
    owner = owners.get(name)
    if owner is None:
        return False
    try:
        return owner.name != path.name or owner.stat().st_size != path.stat().st_size
    except OSError:  # it has moved, or is at a URL
        return False
