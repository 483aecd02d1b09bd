"""The command `infllmv2`."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.padding import Padding
from rich.text import Text

from .bench import command as bench_command
from .child import Order
from .errors import UsageError
from .mutants.command import mutants
from .names import FUNCTIONS, STAGES, check_length, check_names
from .profiles import PROFILES
from .report import Run, check_folder, to_run, write_page, write_reports
from .rules import LONG, RULES, Rule
from .supervisor import Supervisor
from .terminal import Monitor, make_console, show_failure, show_run
from .vectors.cli import app as vectors
from .watch import Watch

app = typer.Typer(
    name="infllmv2",
    help="What InfLLM-V2 attention is, and whether an implementation computes it.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(vectors, name="vectors")

DEVICES = ("cpu", "cuda")
# typer has click's classes under its own name in some versions, and click's own in others
TYPER_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]

Impl = Annotated[
    str, typer.Argument(help="A built-in name, pkg.module:ATTR, path/file.py:ATTR or entry point.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu or cuda; unless given, the first that IMPL claims.")
]
RuleTimeout = Annotated[
    float | None,
    typer.Option(
        min=0.1, help="Seconds after which a rule counts as hanging: 300; long ones 3600."
    ),
]
TIMEOUT, LONG_TIMEOUT = 300.0, 3600.0


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the versions.")] = False,
) -> None:
    """What InfLLM-V2 attention is, and whether an implementation computes it."""
    if version:
        from infllmv2_reference import SPEC_VERSION

        from .environment import package_version

        typer.echo(f"infllmv2 {package_version() or '(from source)'}, spec {SPEC_VERSION}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def check(
    impl: Impl,
    profile: Annotated[str, typer.Option(help=f"Size: {', '.join(PROFILES)}.")] = "quick",
    stage: Annotated[list[str] | None, typer.Option(help="Only this stage; repeatable.")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="Only this rule; repeatable.")] = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="What the search starts from.")] = 0,
    long: Annotated[
        int,
        typer.Option(min=0, metavar="TOKENS", help="Run the stage long instead."),
    ] = 0,
    known_failures: Annotated[
        Path | None, typer.Option(help="Lines 'rule-id[function] reason'; strict.")
    ] = None,
    rule_timeout: RuleTimeout = None,
    workers: Annotated[int, typer.Option("-n", min=0, help="Processes to share the work.")] = 0,
    report: Annotated[Path | None, typer.Option(help="Folder for the reports.")] = None,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at a failure.")] = False,
) -> None:
    """Check an implementation against every rule that it claims to follow."""
    _check_selection(stage, rule, profile, device)
    check_length(long, stage, rule, None)
    if workers and find_spec("xdist") is None:
        raise UsageError("-n needs pytest-xdist: python -m pip install pytest-xdist")
    if report:
        check_folder(report)
    order = Order(
        impl,
        profile=profile,
        device=device,
        seed=seed,
        known_failures=known_failures,
        stage=tuple(stage or ()),
        rule=tuple(rule or ()),
        long=long,
        rule_timeout=rule_timeout or (LONG_TIMEOUT if long else TIMEOUT),
        workers=workers,
        fail_fast=fail_fast,
    )
    console = make_console()
    with Monitor(console) as monitor, Watch(monitor, report) as watch:
        run = Supervisor(order, watch).execute()
    try:
        if report:
            write_reports(run, report)
    finally:
        show_run(console, run)  # also if the disk is full
    if report:
        console.print(f"Reports are in {report}.", soft_wrap=True)
    raise typer.Exit(run.exit_code)


@app.command()
def repro(
    impl: Impl,
    rule: Annotated[str, typer.Option(help="The rule that failed.")],
    case: Annotated[str, typer.Option(help="The case, as the failure prints it.")],
    function: Annotated[str | None, typer.Option(help="The function, for contract rules.")] = None,
    device: Device = None,
    rule_timeout: RuleTimeout = None,
) -> None:
    """Repeat one case of one rule: exit status 1 if it fails, 0 if it passes."""
    _check_selection(None, [rule], "quick", device)
    _check_function(RULES[rule], function)
    functions = (function,) if function else ()
    order = Order(
        impl,
        device=device,
        rule=(rule,),
        function=functions,
        case=case,
        rule_timeout=rule_timeout or (LONG_TIMEOUT if RULES[rule].stage == LONG else TIMEOUT),
    )
    run = Supervisor(order, Watch()).execute()
    _show_repro(run, rule)
    raise typer.Exit(run.exit_code)


@app.command()
def report(
    file: Annotated[Path, typer.Argument(help="A report.json, or the folder that holds it.")],
    html: Annotated[
        Path | None, typer.Option(help="Write the page here, instead of showing it.")
    ] = None,
) -> None:
    """Show a stored report again, here or as a page."""
    from .report.read import read_report

    data = read_report(file / "report.json" if file.is_dir() else file)
    if html:
        write_page(data, html)
    else:
        show_run(make_console(), to_run(data))


@app.command()
def rules(
    stage: Annotated[list[str] | None, typer.Option(help="Only this stage; repeatable.")] = None,
) -> None:
    """List the rules: what each one says, and what an implementation needs for it to apply."""
    check_names("stage", stage, STAGES)
    console = make_console()
    for rule in RULES.values():
        if not stage or rule.stage in stage:
            console.print(Text(rule.id, "bold"))
            console.print(Padding(Text(f"{rule.sentence} Needs {_needs(rule)}."), (0, 0, 0, 4)))


@app.command()
def capabilities(impl: Impl) -> None:
    """Print what an implementation offers and claims."""
    from .loading import load

    candidate = load(impl)
    console = make_console()
    offered = [name for name in FUNCTIONS if candidate.offers(name)]
    facts: dict[str, Any] = {"offers": offered, **candidate.capabilities.to_mapping()}
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        words = Text.assemble((f"{name:<{width}}  ", "bold"), _words(value))
        console.print(words, soft_wrap=True)


app.command()(mutants)
bench_command.register(app)


def main() -> None:
    """Run the command; what the user got wrong is one line and exit status 2."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run the command and return its exit status."""
    try:
        return int(app(arguments, standalone_mode=False) or 0)
    except UsageError as error:
        return _complain(str(error))
    except TYPER_USAGE_ERROR as error:
        return _complain(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        return 130


def _complain(message: str) -> int:
    print(f"infllmv2: {message}", file=sys.stderr)
    return 2


def _check_selection(
    stages: list[str] | None, rules: list[str] | None, profile: str, device: str | None
) -> None:
    """Find wrong names before a process is started for nothing."""
    check_names("stage", stages, STAGES)
    check_names("rule", rules, RULES)
    check_names("profile", [profile], PROFILES)
    check_names("device", [device] if device else None, DEVICES)


def _check_function(rule: Rule, function: str | None) -> None:
    if rule.each and not function:
        raise UsageError(f"{rule.id} applies to each function: add --function NAME")
    if rule.each and function:
        check_names("function", [function], rule.functions)
    if function and not rule.each:
        raise UsageError(f"{rule.id} takes no --function")


def _show_repro(run: Run, rule: str) -> None:
    console = make_console()
    results = run.all_results()
    if not results:
        raise UsageError(run.stopped or f"{run.implementation} does not offer this function")
    for result in results:
        if result.outcome in ("failed", "error"):
            show_failure(console, result)
        elif result.outcome == "not claimed":
            raise UsageError(f"{run.implementation} does not claim {rule}: needs {result.text}")
        else:
            console.print(f"{result.name}: {result.outcome} on this case")


def _needs(rule: Rule) -> str:
    functions = "any function" if rule.each else ", ".join(rule.functions)
    return functions + "".join(f" and the claim {claim}" for claim in rule.claims)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        return ", ".join(f"{name}={_words(item)}" for name, item in items)
    if isinstance(value, (list, tuple)):
        return ", ".join(_words(item) for item in cast("list[Any]", value)) or "none"
    return {None: "any", True: "yes", False: "no"}.get(value, str(value))
