"""Run the suite against one implementation: parametrise, select, judge, and tell what happens."""

from __future__ import annotations

import faulthandler
import os
import signal
import stat
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import pytest

from infllmv2_reference import SPEC_VERSION

from . import device as devices
from .capabilities import Capabilities
from .cases import Case
from .comparison import Comparison
from .environment import describe_environment, package_version
from .errors import UsageError
from .events import EventLog, EventTail
from .failure import ConformanceFailure, Finding
from .known import read_known_failures
from .loading import load
from .long.inputs import check_long_case
from .names import FUNCTIONS, STAGES, check_length, check_names
from .plugin import SUITE, option
from .profiles import PROFILES
from .rules import LONG, RULES, Rule
from .runner import Runner
from .trial import Trial
from .verdicts import NOT_CLAIMED, Verdict, judge_phase

LOST_STATUS = 70
"""Exit status of a process whose CUDA context is lost."""


@dataclass
class LoggedRunner(Runner):
    """Tell each case before it runs, and give up at once when the device is lost."""

    tell: Callable[[str], None] | None = None

    def run_case(self, case: Case, check: Callable[[Trial], object]) -> None:
        """Apply `check` to one case, and say which one it is before it can do harm."""
        if self.tell:
            self.tell(str(case))
        try:
            super().run_case(case, check)
        except (Exception, SystemExit) as error:
            failure = self._blame(error, case)
            if devices.is_lost():
                raise devices.DeviceLostError(failure) from error
            if failure is error:
                raise
            raise failure from error

    def _blame(self, error: Exception | SystemExit, case: Case) -> Exception:
        """Return what an error is reported as: the implementation's failure, or itself."""
        if isinstance(error, SystemExit):
            return self._failure(f"the implementation ended Python: exit({error.code})", case)
        if devices.is_lost() and not isinstance(error, ConformanceFailure):
            return self._failure(f"CUDA is lost: {type(error).__name__}: {error}", case)
        return error

    def _failure(self, what: str, case: Case) -> ConformanceFailure:
        failure = ConformanceFailure(Finding(what))
        self.dress(failure, case)
        return failure


@dataclass
class Course:
    """Follow one test through its phases."""

    rule: Rule
    function: str
    verdict: Verdict = field(default_factory=Verdict)
    runner: Runner | None = None
    lost: bool = False


COURSE = pytest.StashKey[Course]()


class SuitePlugin:
    """Hooks and fixtures of a session that runs the suite.

    Args:
        config: of the session; its options are those of `plugin.OPTIONS`.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        events = option(config, "events")
        self.events = Path(events) if events else None
        self.log = EventLog(self.events) if self.events else None
        worker = getattr(config, "workerinput", None)
        self.worker: str | None = worker["workerid"] if worker else None
        self.parent = os.getppid()
        self.comparison = Comparison()
        self.shares: dict[str, int] = {}
        self.controls = bool(getattr(config.option, "numprocesses", None)) and not worker
        if not self.controls:
            self._prepare()

    def _prepare(self) -> None:
        """Check the options and load the implementation, in each process that runs tests."""
        try:
            check_names("profile", [option(self.config, "profile")], PROFILES)
            check_names("rule", option(self.config, "rule"), RULES)
            check_names("stage", option(self.config, "stage"), STAGES)
            path, case = option(self.config, "known-failures"), option(self.config, "case")
            self.length = int(option(self.config, "long"))
            stages, rules = option(self.config, "stage"), option(self.config, "rule")
            check_length(self.length, stages, rules, case)
            self.known = read_known_failures(Path(path)) if path else {}
            self.only = _parse_case(case) if case else None
            if self.only and any(RULES[name].stage == LONG for name in rules or ()):
                check_long_case(self.only)
            self.candidate = load(option(self.config, "impl"))
            self.candidate.owns_interrupts = self.log is not None  # Ctrl-C reaches its parent
            claims = self.candidate.capabilities
            _check_claimed_length(self.length, claims)
            self.device = devices.choose_device(claims, option(self.config, "device"))
        except UsageError as error:
            self._refuse(str(error))
        if self.worker:
            devices.use_share(self.config.workerinput["infllmv2_share"])  # type: ignore[attr-defined]
        if self.log and hasattr(signal, "SIGUSR1"):
            faulthandler.register(signal.SIGUSR1, file=2, all_threads=False)

    def _refuse(self, message: str) -> NoReturn:
        self._tell("usage-error", message=message)
        raise pytest.UsageError(message)

    def _tell(self, event: str, **facts: Any) -> None:
        if self.log:
            self.log.write(event, worker=self.worker, **facts)

    # What is run

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Apply contract rules to each function that is offered."""
        rule = _rule(metafunc.definition)
        if rule and rule.each and "function" in metafunc.fixturenames:
            offered = [name for name in rule.functions if self.candidate.offers(name)]
            if offered:
                metafunc.parametrize("function", offered, indirect=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Keep what was asked for, in the order of the rules; refuse tests that fit no rule."""
        ours = [item for item in items if item.path.is_relative_to(SUITE)]
        for item in ours:
            item.stash[COURSE] = Course(_the_rule(item), _function(item))
        courses = {id(item): item.stash[COURSE] for item in ours}
        if {item.path for item in ours} >= set(SUITE.glob("test_*.py")):
            self._check_complete(list(courses.values()))
        begun = self._begun()
        dropped = [i for i in ours if not self._wanted(courses[id(i)], begun)]
        config.hook.pytest_deselected(items=dropped)
        kept = [item for item in ours if item not in dropped]
        order = list(RULES)
        kept.sort(key=lambda item: order.index(courses[id(item)].rule.id))
        items[:] = [*kept, *(item for item in items if id(item) not in courses)]

    def _check_complete(self, courses: list[Course]) -> None:
        """Refuse a suite with rules that nothing tests, and known failures that match nothing."""
        untested = sorted(set(RULES) - {course.rule.id for course in courses})
        if untested:
            self._refuse(f"these rules have no test: {', '.join(untested)}")
        for entry in self.known.values():
            missing = self._missing(RULES[entry.rule], entry.function)
            if missing:
                what = f"{entry.place}: {entry.name} is not claimed: needs {' and '.join(missing)}"
                self._refuse(what)

    def _wanted(self, course: Course, begun: set[tuple[str, str]]) -> bool:
        stages, rules = option(self.config, "stage"), option(self.config, "rule")
        functions = option(self.config, "function")
        is_long = bool(self.length) or (self.only is not None and bool(rules))
        return (
            (self.length == 0 or course.rule.stage == LONG)
            and (is_long or course.rule.stage != LONG)
            and (not stages or course.rule.stage in stages)
            and (not rules or course.rule.id in rules)
            and (not functions or not course.rule.each or course.function in functions)
            and (course.rule.id, course.function) not in begun
        )

    def _begun(self) -> set[tuple[str, str]]:
        if not self.events or not option(self.config, "resume"):
            return set()
        events = EventTail(self.events).read()
        return {(e["rule"], e["function"]) for e in events if e["event"] == "start"}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Tell what is tested, where, and what is planned."""
        courses = [item.stash[COURSE] for item in session.items if COURSE in item.stash]
        self._tell(
            "session",
            implementation=self.candidate.name,
            functions=[name for name in FUNCTIONS if self.candidate.offers(name)],
            capabilities=self.candidate.capabilities.to_mapping(),
            device=str(self.device),
            profile=option(self.config, "profile"),
            seed=option(self.config, "seed"),
            spec_version=SPEC_VERSION,
            package_version=package_version(),
            environment=describe_environment(),
            plan=[[course.rule.id, course.function] for course in courses],
        )

    # What the tests use

    @cached_property
    def profile(self) -> Any:
        """Return the profile."""
        return PROFILES[option(self.config, "profile")]

    @pytest.fixture
    def function(self, request: pytest.FixtureRequest) -> str:
        """Return the contract function that a contract rule is applied to, or ""."""
        return getattr(request, "param", "")

    @pytest.fixture
    def run(self, request: pytest.FixtureRequest, function: str) -> Runner:
        """Return what draws cases and checks them; end the test if the rule is not claimed."""
        course: Course = request.node.stash[COURSE]
        self._check_claimed(course)
        course.runner = LoggedRunner(
            self.candidate,
            self.profile,
            self.device,
            option(self.config, "seed"),
            course.rule.id,
            function,
            self.only,
            shrink=(course.rule.id, function) not in self.known,
            length=self.length,
            tell=lambda case: self._tell("case", case=case),
        )
        return course.runner

    def _check_claimed(self, course: Course) -> None:
        missing = self._missing(course.rule, course.function)
        if missing:
            pytest.skip(NOT_CLAIMED + " and ".join(missing))

    def _missing(self, rule: Rule, function: str) -> list[str]:
        """Return what the implementation lacks for a rule to apply."""
        if rule.each:
            needed = (function,) if function in rule.functions else ()
            missing = [] if needed else ["any function"]
        else:
            needed, missing = rule.functions, list[str]()
        missing += [name for name in needed if not self.candidate.offers(name)]
        claims = self.candidate.capabilities
        return missing + [name for name in rule.claims if not getattr(claims, name)]

    # What became of it

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Tell when a rule begins and what became of it."""
        if COURSE not in item.stash:
            return (yield)
        if os.getppid() != self.parent and self.log:
            os._exit(LOST_STATUS)  # whoever started the run is gone
        course, begin = item.stash[COURSE], time.monotonic()
        name = {"rule": course.rule.id, "function": course.function}
        self._tell("start", **name, errors=_size_of_errors())
        result = yield
        self._tell("result", **name, **self._summary(course), seconds=time.monotonic() - begin)
        if course.lost:
            self._end_process()
        if course.verdict.outcome != "passed":
            devices.free_memory()
        return result

    def _summary(self, course: Course) -> dict[str, Any]:
        tally = course.runner.tally if course.runner else None
        return {
            "cases": tally.cases if tally else 0,
            "worst_ratio": tally.worst_ratio if tally else None,
            "margins": tally.margins.to_json() if tally else None,
            **vars(course.verdict),
        }

    def _end_process(self) -> None:
        """End a process whose CUDA context is lost; the supervisor goes on with a new one."""
        self._tell("device-lost")
        if self.log:
            os._exit(LOST_STATUS)
        pytest.exit("a CUDA error has broken this process; the other rules did not run", 1)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Judge a phase, and let pytest show a failure in the failure's own words."""
        report = yield
        if COURSE not in item.stash:
            return report
        course = item.stash[COURSE]
        error = call.excinfo.value if call.excinfo else None
        known = self.known.get((course.rule.id, course.function))
        if isinstance(error, ConformanceFailure) and course.runner and not known:
            self.comparison.add_to(error, course.runner)
        verdict = judge_phase(error, report.longreprtext, call.when, known)
        course.lost = course.lost or isinstance(error, devices.DeviceLostError)
        if verdict.outcome != "passed":
            course.verdict = verdict
            _show(report, verdict)
        if call.when == "call":
            report.user_properties += [("rule", course.rule.id), *self._summary(course).items()]
        return report

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Give a worker of pytest-xdist the smallest number that is free, to choose its GPU by."""
        free = next(n for n in count() if n not in self.shares.values())
        self.shares[node.gateway.id] = node.workerinput["infllmv2_share"] = free

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Tell which worker of pytest-xdist died, and how; the one in its place gets its number."""
        self.shares.pop(node.gateway.id, None)
        process = getattr(getattr(node.gateway, "_io", None), "popen", None)
        if error and self.log:
            status = process.wait(5) if process else None
            self.log.write("worker-down", worker=node.gateway.id, status=status)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Tell that the session ended by itself."""
        if not self.worker:
            self._tell("end", status=int(exitstatus))


def _show(report: pytest.TestReport, verdict: Verdict) -> None:
    """Let pytest show the verdict; errors of the suite keep pytest's traceback."""
    if verdict.outcome == "known failure":
        report.outcome, report.wasxfail = "skipped", verdict.text
    elif verdict.outcome == "failed" or (verdict.outcome, report.outcome) == ("error", "skipped"):
        report.outcome, report.longrepr = "failed", verdict.text


def _size_of_errors() -> int:
    """Return how long stderr is, so that what a rule writes to it can be told from the rest."""
    status = os.fstat(2)
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _check_claimed_length(length: int, claims: Capabilities) -> None:
    if length > claims.longest_context:
        claimed = f"the implementation claims longest_context {claims.longest_context}"
        raise UsageError(f"--long must be at most that, but is {length}: {claimed}")


def _parse_case(text: str) -> Case:
    try:
        case = Case.parse(text)
        case.config  # noqa: B018
    except ValueError as error:
        raise UsageError(str(error)) from None
    return case


def _rule(node: Any) -> Rule | None:
    marks = list(node.iter_markers("rule"))
    return RULES.get(marks[0].args[0]) if len(marks) == 1 else None


def _the_rule(item: pytest.Item) -> Rule:
    rule = _rule(item)
    if rule is None:
        raise pytest.UsageError(f"{item.nodeid} must carry exactly one rule that exists")
    return rule


def _function(item: pytest.Item) -> str:
    callspec: Any = getattr(item, "callspec", None)
    return callspec.params.get("function", "") if callspec else ""
