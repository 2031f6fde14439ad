"""Gene panels: which gene each column of expression is. Nobody has published SEAL's; users bring theirs."""

from __future__ import annotations

from collections.abc import Sequence

from seal_extract.errors import UsageError


def check_panel(names: Sequence[str], genes: int, what: str) -> tuple[str, ...]:
    """Hold a gene panel to one name per column.

    Args:
        names: in the order of the columns.
        genes: how many columns there are.
        what: whose columns, for the message.

    Raises:
        UsageError: another count, a name twice, or something that is no name.
    """
    panel = tuple(names) if not isinstance(names, str) else (names,)
    bad = [name for name in panel if not isinstance(name, str) or not name.strip()]
    if bad:
        raise UsageError(f"the gene panel holds {bad[0]!r}; allowed: one name per column, as text")
    if len(panel) != genes:
        raise UsageError(f"the gene panel has {len(panel)} names; {what} has {genes} columns, one name each")
    twice = _first_repeated(panel)
    if twice:
        raise UsageError(f"the gene panel names {twice} twice; allowed: one column per gene")
    return panel


def _first_repeated(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
