"""Run the suite in another process, and survive what the implementation does to it."""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from textwrap import indent
from types import FrameType
from typing import Any, Protocol

from .child import Child, Order, how_it_ended, last_words
from .errors import UsageError
from .events import LOG_STATUS, Event, EventTail
from .failure import ConformanceFailure, Finding
from .known import read_known_failures
from .report.model import Result, Run

POLL_SECONDS = 0.05
STARTUP_SECONDS = 180.0
"""How long an implementation may take to import, at least."""
MAX_HANGS = 5
"""How many rules may hang before the run is given up: each one costs the whole time limit."""
EXIT_SECONDS = 20.0
"""How long a process may take to end after its last rule."""


class Terminated(KeyboardInterrupt):
    """The run was ended by a signal.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__("Ctrl-C" if number == signal.SIGINT else name)
        self.number = number


class Listener(Protocol):
    """What is told as the run goes on."""

    def planned(self, run: Run) -> None:
        """Take note of the plan."""

    def started(self, result: Result) -> None:
        """Take note of a rule that begins."""

    def finished(self, run: Run, result: Result) -> None:
        """Take note of what became of a rule."""

    def waiting(self, run: Run) -> None:
        """Take note that the run goes on; called many times a second."""


@dataclass
class _Running:
    result: Result
    worker: str | None
    since: float
    errors: int
    case: str = ""


class Supervisor:
    """Start processes that run the suite until every planned rule has a result.

    A process that crashes or hangs costs the rule that it was at: the rule has failed, and a new
    process goes on with the rest.

    Args:
        order: what to run.
        listener: is told what happens.

    Raises:
        UsageError: the file of known failures is wrong, or there is no room for temporary files.
    """

    def __init__(self, order: Order, listener: Listener) -> None:
        self.order, self.listener = order, listener
        path = order.known_failures
        self._known = read_known_failures(path) if path else {}
        only = {"stages": list(order.stage), "rules": list(order.rule)}
        self.run = Run(order.impl, order.size, order.seed, only=only)
        self._folder = _make_folder()
        self._tail = EventTail(self._folder / "events")
        self._running: dict[int, _Running] = {}
        self._begin = time.monotonic()
        self._child: Child | None = None
        self._last_event = self._begin
        self._ended = False
        self._hung = 0
        self._asked: list[int] = []

    def execute(self) -> Run:
        """Run it all; an interrupted run keeps what it has, and says so in `run.stopped`.

        Raises:
            UsageError: the run cannot begin.
        """
        self.run.session["started"] = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            with _signals() as self._asked:
                self._run_children()
        except Terminated as stop:
            self.run.stopped, self.run.signal = str(stop), stop.number
        except KeyboardInterrupt:
            self.run.stopped, self.run.signal = "Ctrl-C", signal.SIGINT
        except UsageError as error:
            if not self.run.plan:
                raise
            self.run.stopped = str(error)
        except Exception:
            self.run.stopped = "an error of infllmv2 itself, please report it"
            raise
        finally:
            if self._child:
                self._child.kill()
            self.run.seconds = time.monotonic() - self._begin
            shutil.rmtree(self._folder, ignore_errors=True)
        return self.run

    def _run_children(self) -> None:
        while True:
            before = len(self.run.results)
            child = Child(self.order, self._folder, resume=bool(self.run.plan))
            self._child, self._ended, self._last_event = child, False, time.monotonic()
            self._follow(child)
            child.kill()  # what the implementation may have left behind
            if not self.run.plan or self.run.stopped or not self.run.remaining:
                break
            if len(self.run.results) == before:
                words = last_words(child.stderr) or last_words(child.stdout)
                self.run.stopped = f"the suite {how_it_ended(child.status())}\n{words}"
                break
        if not self.run.plan and not self.run.stopped:
            self._explain_start(child)

    def _follow(self, child: Child) -> None:
        """Take in what one process tells until it has ended."""
        running = True
        while running and not self.run.stopped:
            if self._asked:
                raise Terminated(self._asked[0])
            running = child.running()
            for event in self._tail.read():
                self._take(event, child)
                if self.run.stopped:
                    break
            self._end_hanging(child)
            self._end_silent(child)
            self._tell_waiting()
            time.sleep(POLL_SECONDS if running else 0)
        if not child.running() and child.status() == LOG_STATUS:
            self._stop_for_room()
        for pid in list(self._running):
            self._lose(pid, child, how_it_ended(child.status() if not child.running() else None))
        self._tell_waiting()

    def _stop_for_room(self) -> None:
        """End a run whose processes cannot tell what they find; no rule is to blame."""
        self._running.clear()
        self.run.stopped = f"the suite cannot write to {self._folder.parent} (is the disk full?)"

    def _tell_waiting(self) -> None:
        self.run.seconds = time.monotonic() - self._begin
        self.run.running = [running.result.name for running in self._running.values()]
        self.listener.waiting(self.run)

    def _take(self, event: Event, child: Child) -> None:
        self._last_event = time.monotonic()
        match event:
            case {"event": "usage-error", "message": message}:
                raise UsageError(message)
            case {"event": "session"} if not self.run.plan:
                self.run.session |= {k: v for k, v in event.items() if k not in ("event", "plan")}
                self.run.plan = [(rule, function) for rule, function in event["plan"]]
                self.listener.planned(self.run)
            case {"event": "start", "pid": pid}:
                result = Result(event["rule"], event["function"])
                running = _Running(result, event["worker"], time.monotonic(), event["errors"])
                self._running[pid] = running
                self.listener.started(result)
            case {"event": "case", "pid": pid, "case": case} if pid in self._running:
                self._running[pid].case = case
            case {"event": "result", "pid": pid} if pid in self._running:
                del self._running[pid]
                self._finish(_result(event))
            case {"event": "worker-down", "status": status} if status == LOG_STATUS:
                self._stop_for_room()
            case {"event": "worker-down", "worker": worker, "status": status}:
                for pid in [p for p, r in self._running.items() if r.worker == worker]:
                    self._lose(pid, child, how_it_ended(status))
            case {"event": "end"}:
                self._ended = True
            case _:
                pass

    def _finish(self, result: Result) -> None:
        self.run.results[result.rule, result.function] = result
        self.listener.finished(self.run, result)
        if self.order.fail_fast and result.outcome in ("failed", "error"):
            self.run.stopped = "the first failure (--fail-fast)"

    def _end_hanging(self, child: Child) -> None:
        """End processes whose rule takes longer than it may."""
        limit = self.order.rule_timeout
        for pid, running in list(self._running.items()):
            if time.monotonic() > running.since + limit:
                child.kill_hanging(pid)
                self._lose(pid, child, f"did not end within the time limit of {limit:g} s")
                self._hung += 1
        if self._hung >= MAX_HANGS and self.run.remaining:
            self.run.stopped = f"{self._hung} rules did not end within {limit:g} s each"

    def _end_silent(self, child: Child) -> None:
        """End a process that is at no rule and does not come to one."""
        limit = EXIT_SECONDS if self._ended else max(STARTUP_SECONDS, self.order.rule_timeout)
        if not self._running and time.monotonic() > self._last_event + limit:
            child.kill()
            if not self.run.plan:
                raise UsageError(f"cannot load {self.order.impl!r}: importing it does not end")

    def _lose(self, pid: int, child: Child, how: str) -> None:
        """Report the rule that a process was at when it died."""
        running = self._running.pop(pid)
        words = last_words(child.stderr, running.errors)
        failure = ConformanceFailure(Finding(f"the process running the implementation {how}"))
        failure.rule, failure.function = running.result.rule, running.result.function
        failure.case, failure.implementation = running.case, self.order.impl
        failure.device = self.run.device or "cpu"
        failure.finding.actual = (
            f"its last words were\n{indent(words, ' ' * 11)}" if words else None
        )
        known = self._known.get((failure.rule, failure.function))
        self._finish(
            Result(
                running.result.rule,
                running.result.function,
                "known failure" if known else "failed",
                cases=int(bool(running.case)),
                seconds=time.monotonic() - running.since,
                text=f"known: {known.reason}\n{failure}" if known else str(failure),
                failure=failure.to_json(),
            )
        )

    def _explain_start(self, child: Child) -> None:
        """Say why no rule was even planned."""
        status, words = child.status(), last_words(child.stderr) or last_words(child.stdout)
        if status < 0 or status > 5:
            what = f"cannot load {self.order.impl!r}: the process importing it"
            raise UsageError(f"{what} {how_it_ended(status)}\n{words}".rstrip())
        if words and status != 5:
            self.run.stopped = f"the suite did not start\n{words}"


def _make_folder() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="infllmv2-"))
    except OSError as error:
        raise UsageError(f"cannot make a folder for the run: {error}") from None


def _result(event: dict[str, Any]) -> Result:
    ratio = event["worst_ratio"]
    return Result(
        event["rule"],
        event["function"],
        event["outcome"],
        event["cases"],
        None if ratio is None else float(ratio),
        event["seconds"],
        event["text"],
        event["failure"],
        event["margins"],
    )


@contextmanager
def _signals() -> Generator[list[int]]:
    """Yield a list that takes the signals which end a job, so that they end the run in order.

    The first one only goes onto the list: an exception wherever the program happens to be could
    leave a lock held, and the run would never end. A second one does raise.
    """
    asked: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise Terminated(number)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    names = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = {name: signal.signal(name, stop) for name in names}
    try:
        yield asked
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
