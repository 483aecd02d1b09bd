"""The stream of events between the process that runs the suite and the one that watches it.

One JSON object per line, each with "event": "session" (what is tested, and the plan), "start",
"case", "result", "device-lost", "worker-down", "usage-error" or "end". Several processes append to
one file: a line is one write, so lines never mix, and what was written survives a crash.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

LOG_STATUS = 71
"""Exit status of a process that cannot write its events, mostly because the disk is full."""

Event = dict[str, Any]


class EventLog:
    """Append events to a file, each line at once and unbuffered."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, event: str, **facts: Any) -> None:
        """Append one event; the process that writes it is noted."""
        line = json.dumps(plain({"event": event, "pid": os.getpid(), **facts}), allow_nan=False)
        data = f"{line}\n".encode()
        try:
            whole = os.write(self._file, data) == len(data)
        except OSError:
            whole = False
        if not whole:
            os._exit(LOG_STATUS)  # nobody could be told what became of the rule


class EventTail:
    """Read the events that were appended since the last look."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read(self) -> Iterator[Event]:
        """Yield new events; a line that is not complete yet waits for the next look."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                try:
                    event = json.loads(line)
                except ValueError:
                    continue  # torn by a full disk: the process that wrote it has ended itself
                yield event


def plain(value: Any) -> Any:
    """Return JSON data: containers become lists and dicts, and nan and inf their names."""
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {str(key): plain(item) for key, item in items}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in cast("list[Any]", value)]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
