"""Follow a run: show it, and keep a report that survives whatever ends it."""

from __future__ import annotations

import time
from pathlib import Path

from .report import Result, Run, write_reports
from .terminal import Monitor

SAVE_SECONDS = 2.0


class Watch:
    """Tell a monitor what happens, and write the report every now and then.

    Args:
        monitor: shows the run, unless None.
        folder: takes the reports, unless None.
    """

    def __init__(self, monitor: Monitor | None = None, folder: Path | None = None) -> None:
        self._monitor, self._folder = monitor, folder
        self._saved = 0.0

    def planned(self, run: Run) -> None:
        """Show the plan, and write a first report."""
        if self._monitor:
            self._monitor.planned(run)
        self._save(run)

    def started(self, result: Result) -> None:
        """Show what begins."""
        if self._monitor:
            self._monitor.started(result)

    def finished(self, run: Run, result: Result) -> None:
        """Show what became of a rule."""
        if self._monitor:
            self._monitor.finished(run, result)
        self._save(run)

    def _save(self, run: Run) -> None:
        if self._folder and time.monotonic() > self._saved + SAVE_SECONDS:
            write_reports(run, self._folder)
            self._saved = time.monotonic()
