"""The badge: what https://shields.io/badges/endpoint-badge shows in a README."""

from __future__ import annotations

import json
from typing import Any

from .model import Run

LABEL = "InfLLM-V2"


def to_badge(run: Run) -> str:
    """Return the verdict in a few words and a colour, as JSON for shields.io."""
    message, color = _words(run)
    badge = {"schemaVersion": 1, "label": LABEL, "message": message, "color": color}
    return json.dumps(badge, indent=1) + "\n"


def is_ours(text: str) -> bool:
    """Say whether a file was written by `to_badge`."""
    try:
        badge: Any = json.loads(text)
        return (badge["schemaVersion"], badge["label"]) == (1, LABEL)
    except (ValueError, KeyError, TypeError):
        return False


def _words(run: Run) -> tuple[str, str]:
    counts = run.counts()
    tested = sum(counts.values()) - counts["not claimed"]
    known = counts["known failure"]
    scope = ", ".join([*run.only["stages"], *run.only["rules"], run.profile])
    if counts["failed"]:
        return f"{counts['failed']} of {tested} rules failed, {scope}", "red"
    if counts["error"]:
        return f"error of the suite, {scope}", "lightgrey"
    if not run.complete:
        return f"incomplete, {scope}", "lightgrey"
    if not run.green:
        return f"nothing proved, {scope}", "lightgrey"
    if known:
        return f"{counts['passed']} rules, {known} known to fail, {scope}", "yellow"
    return f"{counts['passed']} rules, {scope}", "brightgreen"
