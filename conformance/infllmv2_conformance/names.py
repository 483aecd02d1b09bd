"""Check the names that a user gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from .errors import UsageError
from .rules import RULES

STAGES = tuple(dict.fromkeys(rule.stage for rule in RULES.values()))
FUNCTIONS = tuple(dict.fromkeys(name for rule in RULES.values() for name in rule.functions))

FEW, MANY = 4, 20
"""Up to how many names all are listed instead of the one that is meant, or at all."""
LISTS = {"rule": "infllmv2 rules", "mutant": "infllmv2 mutants --list"}
"""Commands that list what is too much for a line."""


def check_names(what: str, names: Sequence[str] | None, known: Iterable[str]) -> None:
    """Make sure that all names are known.

    Raises:
        UsageError: one is not; says which ones are, or which one is like it.
    """
    known = list(known)
    for name in names or ():
        if name not in known:
            close = get_close_matches(name, known, n=1) if len(known) > FEW else []
            hint = f"did you mean {close[0]}?" if close else _list(what, known)
            raise UsageError(f"unknown {what} {name!r}; {hint}")


def _list(what: str, known: list[str]) -> str:
    if len(known) > MANY:
        return f"'{LISTS[what]}' lists every {what}"
    return f"known: {', '.join(known)}"
