"""The file of known failures: which rules an implementation is known to break, and why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .errors import UsageError
from .rules import RULES

LINE = re.compile(r"(?P<rule>[\w.-]+)(?:\[(?P<function>\w+)\])?(?:\s+(?P<reason>.*))?")


class KnownFailuresError(UsageError):
    """A line of the file is wrong, or the file cannot be read."""


@dataclass(frozen=True)
class KnownFailure:
    """One line of the file.

    Args:
        rule: the id of the rule that is broken.
        function: the contract function, for rules that apply to each one; else "".
        reason: why it is broken and what is being done about it.
        place: file and line.
    """

    rule: str
    function: str
    reason: str
    place: str

    @property
    def name(self) -> str:
        """Return the rule as the file writes it."""
        return f"{self.rule}[{self.function}]" if self.function else self.rule


Known = dict[tuple[str, str], KnownFailure]


def read_known_failures(path: Path) -> Known:
    """Read lines `rule-id reason` or `rule-id[function] reason`; `#` starts a comment line.

    Raises:
        KnownFailuresError: the file cannot be read, or a line names no rule or gives no reason.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise KnownFailuresError(f"known failures {path}: {why}") from None
    known: Known = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            entry = _parse(line.strip(), f"{path}:{number}")
            if (entry.rule, entry.function) in known:
                raise KnownFailuresError(f"{entry.place}: {entry.name} is listed twice")
            known[entry.rule, entry.function] = entry
    return known


def _parse(line: str, place: str) -> KnownFailure:
    match = LINE.fullmatch(line)
    if match is None:
        raise KnownFailuresError(f"{place}: must be 'rule-id[function] reason', but is {line!r}")
    rule, function, reason = match["rule"], match["function"] or "", match["reason"] or ""
    entry = KnownFailure(rule, function, reason, place)
    if rule not in RULES:
        raise KnownFailuresError(f"{place}: there is no rule {rule!r} ('infllmv2 rules' lists all)")
    if not reason:
        raise KnownFailuresError(f"{place}: {entry.name} needs a reason, after a space")
    if RULES[rule].each != bool(function):
        form = f"{rule}[function]" if RULES[rule].each else rule
        raise KnownFailuresError(f"{place}: {entry.name} must be written {form}")
    if function and function not in RULES[rule].functions:
        raise KnownFailuresError(f"{place}: {rule} does not apply to {function!r}")
    return entry
