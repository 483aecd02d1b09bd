"""Follow a run: show it, and keep a report that survives whatever ends it."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from .report import Result, Run, write_reports
from .terminal import Monitor

SAVE_SECONDS = 2.0, 5.0
"""How old the report on disk may get: the longer, the longer it takes to write it."""
SAVE_SHARE = 0.02
"""The part of the time that may go into writing, within these limits."""


class Watch:
    """Tell a monitor what happens, and write the report every now and then.

    Args:
        monitor: shows the run, unless None.
        folder: takes the reports, unless None.
    """

    def __init__(self, monitor: Monitor | None = None, folder: Path | None = None) -> None:
        self._monitor, self._folder = monitor, folder
        self._next = 0.0
        self._run: Run | None = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        """Write the report of what was planned, also where the run ends with an exception."""
        self._next = 0.0
        if self._run:
            self._save(self._run)

    def planned(self, run: Run) -> None:
        """Show the plan, and write a first report."""
        if self._monitor:
            self._monitor.planned(run)
        self._run = run
        self._save(run)

    def started(self, result: Result) -> None:
        """Show what begins."""
        if self._monitor:
            self._monitor.started(result)

    def finished(self, run: Run, result: Result) -> None:
        """Show what became of a rule."""
        if self._monitor:
            self._monitor.finished(run, result)

    def waiting(self, run: Run) -> None:
        """Write the report, if it is time to; a run that may yet be refused leaves none."""
        if self._run:
            self._save(run)

    def _save(self, run: Run) -> None:
        """Write the report; whatever goes wrong there, the run goes on, and its end tells."""
        begin = time.monotonic()
        if self._folder and begin >= self._next:
            with suppress(Exception):
                write_reports(run, self._folder)
            spent = time.monotonic() - begin
            shortest, longest = SAVE_SECONDS
            self._next = begin + min(max(shortest, spent / SAVE_SHARE), longest)
