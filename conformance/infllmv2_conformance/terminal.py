"""What `infllmv2 check` shows: progress, the table of rules, failures, the verdict."""

from __future__ import annotations

from types import TracebackType

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.rule import Rule as Line
from rich.table import Table
from rich.text import Text

from .report.model import Result, Run, worst
from .rules import RULES
from .visible import visible

STYLES = {
    "passed": "green",
    "failed": "bold red",
    "error": "bold magenta",
    "known failure": "yellow",
    "not claimed": "dim",
    "not run": "yellow",
}
PLAIN_WIDTH = 100
SHOWN_IN_FULL = 3


def make_console(*, stderr: bool = False) -> Console:
    """Return a console; where there is no terminal, lines are wide enough for a table."""
    console = Console(stderr=stderr, highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(stderr=stderr, highlight=False, emoji=False, width=PLAIN_WIDTH)
    return console


class Monitor:
    """Show a run while it goes on: a live line on a terminal, a line per rule elsewhere.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal
        self._bad = self._passed = 0
        self._progress = Progress(
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[tally]}"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("loading", total=None, tally="")

    def __enter__(self) -> Monitor:
        if self.live:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live:
            self._progress.stop()

    def planned(self, run: Run) -> None:
        """Show what is tested."""
        session = run.session
        version = session.get("package_version") or "from source"
        where = f"{run.device}, {session['environment']['packages'].get('torch', '?')}"
        self._say(
            f"[bold]{run.implementation}[/]: spec {session['spec_version']}, suite {version}, "
            f"profile {run.profile}, seed {run.seed}, {where.replace(', ', ', torch ')}"
        )
        self._progress.update(self._task, total=len(run.plan))

    def started(self, result: Result) -> None:
        """Show what runs now."""
        self._progress.update(self._task, description=result.name)

    def finished(self, run: Run, result: Result) -> None:
        """Show what became of a rule: on a terminal only bad ones, the first of them in full."""
        self._passed += result.outcome == "passed"
        bad = result.outcome in ("failed", "error")
        self._bad += bad
        tally = f"[green]{self._passed} passed[/]"
        tally += f" [red]{self._bad} failed[/]" if self._bad else ""
        self._progress.update(self._task, completed=len(run.results), tally=tally)
        if bad and self._bad == 1:
            self._say("")
            show_failure(self.console, result)
            self._say("")
        elif bad or (not self.live and result.outcome != "not claimed"):
            style, first = STYLES[result.outcome], result.text.split("\n")[0]
            words = Text.assemble((f"{result.outcome:<12}", style), " ", result.name)
            words.append("" if self.live else f"  {_summary(result)}")
            if first:
                words.append(f"\n    {visible(first).removeprefix(f'{result.rule}: ')}")
            self._say(words)

    def _say(self, words: str | Text) -> None:
        self.console.print(words, soft_wrap=not self.live)


def show_run(console: Console, run: Run) -> None:
    """Show the table, what is not claimed, the failures that matter, and the verdict."""
    if run.plan:
        console.print()
        console.print(_table(run))
        _show_unclaimed(console, run)
    _show_texts(console, run)
    _show_verdict(console, run)


def show_failure(console: Console, result: Result) -> None:
    """Show one failure in full, unwrapped, so that its command can be copied."""
    rule = RULES.get(result.rule)  # a stored report may have rules of another version
    if rule:
        console.print(f"{rule.sentence}  [dim]{rule.link}[/]", soft_wrap=True)
    console.print(visible(result.text), markup=False, soft_wrap=True)


def _table(run: Run) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("rule", no_wrap=True, overflow="ellipsis")
    table.add_column("result", no_wrap=True)
    for title in ("cases", "worst", "sec"):
        table.add_column(title, justify="right", no_wrap=True)
    for rule, results in run.by_rule().items():
        outcome = worst(results)
        if outcome == "not claimed":
            continue  # the summary below the table names what is missing
        table.add_row(rule, Text(outcome, STYLES[outcome]), *_numbers(results))
        odd = [r for r in results if r.function and r.outcome != "passed"]
        if any(result.outcome != outcome for result in results) or outcome == "failed":
            for result in odd:
                name = Text(f"  {result.function}", "dim")
                words = Text(result.outcome, STYLES[result.outcome])
                table.add_row(name, words, *_numbers([result]))
    return table


def _numbers(results: list[Result]) -> tuple[str, str, str]:
    """Return cases, worst error over bound, and seconds."""
    cases = sum(result.cases for result in results)
    ratios = [result.worst_ratio for result in results if result.worst_ratio is not None]
    seconds = sum(result.seconds for result in results)
    return (
        str(cases) if cases else "",
        _ratio(max(ratios, default=None)),
        f"{seconds:.1f}" if cases else "",
    )


def _ratio(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 100 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def _summary(result: Result) -> str:
    parts = [_plural(result.cases, "case")] if result.cases else []
    if result.worst_ratio is not None:
        of = "of" if result.worst_ratio <= 1 else "times"
        parts.append(f"worst {_ratio(result.worst_ratio)} {of} the bound")
    return ", ".join([*parts, f"{result.seconds:.1f} s"])


def _show_unclaimed(console: Console, run: Run) -> None:
    """Say which claims are missing for the rules that did not apply."""
    missing: dict[str, list[str]] = {}
    for result in run.all_results():
        if result.outcome == "not claimed":
            missing.setdefault(result.text, []).append(result.rule)
    if missing:
        parts = [f"{what} ({_plural(len(set(r)), 'rule')})" for what, r in missing.items()]
        console.print(f"Not claimed: {', '.join(parts)}.\n")


def _show_texts(console: Console, run: Run) -> None:
    """Show the first failures of the first broken stage in full, and a line for each other one."""
    bad = [r for r in run.all_results() if r.outcome in ("failed", "error")]
    first_stage = [r for r in bad if r.stage == bad[0].stage]
    for result in first_stage[:SHOWN_IN_FULL]:
        console.print(Line(f"[{STYLES[result.outcome]}]{result.outcome}[/]", align="left"))
        show_failure(console, result)
        console.print()
    others = [r for r in bad if r not in first_stage[:SHOWN_IN_FULL]]
    if others:
        console.print("Also broken, perhaps for the same reason (--report has each in full):")
        for result in others:
            what = result.text.split("\n")[0].removeprefix(f"{result.rule}: ")
            console.print(f"  {result.name}: {visible(what)}", markup=False, soft_wrap=True)
        console.print()
    known = [r for r in run.all_results() if r.outcome == "known failure"]
    for result in known:
        reason = result.text.split("\n")[0].removeprefix("known: ")
        console.print(f"[yellow]known failure[/] {result.name}: {reason}", soft_wrap=True)


def _show_verdict(console: Console, run: Run) -> None:
    if run.stopped:
        first, _, rest = visible(run.stopped).partition("\n")
        console.print(f"[yellow]Stopped:[/] {first}. The result is partial.", soft_wrap=True)
        if rest:
            console.print(Padding(Text(rest), (0, 0, 0, 4)))
    elif run.complete and not run.green and not run.counts()["failed"] + run.counts()["error"]:
        console.print("[yellow]No rule passed[/], so this run proves nothing.", soft_wrap=True)
    elif not run.plan:
        console.print(
            "[yellow]Nothing ran[/]: the implementation claims nothing of what was asked for.",
            soft_wrap=True,
        )
    console.print(Text(run.verdict(), "bold green" if run.green else "bold red"), soft_wrap=True)


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" + ("s" if count != 1 else "")
