"""Check the names that a user gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from .errors import UsageError
from .rules import LONG, RULES

STAGES = tuple(dict.fromkeys(rule.stage for rule in RULES.values()))
FUNCTIONS = tuple(dict.fromkeys(name for rule in RULES.values() for name in rule.functions))

SHORTEST = 1024
"""The least that counts as a long context."""
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


def check_length(
    length: int, stages: Sequence[str] | None, rules: Sequence[str] | None, case: str | None
) -> None:
    """Make sure that the stage `long`, and no other, runs exactly if a length is given.

    Raises:
        UsageError: a length is missing, or other rules are asked for beside it.
    """
    if 0 < length < SHORTEST:
        raise UsageError(f"--long must be at least {SHORTEST}, but is {length}")
    asked = [*(stages or ()), *(rules or ())]
    others = [name for name in asked if name.split(".")[0] != LONG]
    if length and others:
        raise UsageError(f"--long runs the rules of the stage {LONG} alone, without {others[0]}")
    if len(others) < len(asked) and not length and not case:
        raise UsageError(f"the stage {LONG} needs a length: add --long TOKENS, as --long 131072")


def _list(what: str, known: list[str]) -> str:
    if len(known) > MANY:
        return f"'{LISTS[what]}' lists every {what}"
    return f"known: {', '.join(known)}"
