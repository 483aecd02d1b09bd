"""The JSON report."""

from __future__ import annotations

import json
from typing import Any, cast

from .data import FORMAT, to_data
from .model import Run

LINE = 100


def to_json(run: Run) -> str:
    """Return the report of a run as JSON text, small parts and rows of numbers on one line."""
    return _lay_out(to_data(run), " ") + "\n"


def is_ours(text: str) -> bool:
    """Say whether a file was written by `to_json`."""
    try:
        data: Any = json.loads(text)
        return data["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        return False


def _lay_out(value: Any, indent: str) -> str:
    line = json.dumps(value, allow_nan=False)
    if not isinstance(value, (dict, list)) or len(indent) + len(line) <= LINE:
        return line
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        parts = [f"{json.dumps(key)}: {_lay_out(item, indent + ' ')}" for key, item in items]
    else:
        many = cast("list[Any]", value)
        if not any(isinstance(item, (dict, list)) for item in many):
            return line
        parts = [_lay_out(item, indent + " ") for item in many]
    begin, end = line[0], line[-1]
    return f"{begin}\n{indent}" + f",\n{indent}".join(parts) + f"\n{indent[1:]}{end}"
