"""What `infllmv2 mutants` shows: a line for each mutant, a line for each rule, the verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from infllmv2_conformance.rules import ORDINARY

from .bank import MUTANTS
from .examine import OTHERS
from .matrix import LEAST_SHARE, LUCKY, Matrix, Row
from .reasons import REASONS

ID, RULE = 34, 28
"""Widths of the columns with a mutant's id and a rule's."""


def show_head(console: Console, count: int, profile: str, seed: int, workers: int) -> None:
    """Say what is run, and how."""
    console.print(
        f"{count} mutants, {workers} processes, seed {seed}. Rules that must kill: profile "
        f"{profile}; rules before them, most of which pass: profile {OTHERS}.",
        soft_wrap=True,
    )
    heads = f"{'mutant':<{ID}} {'must be killed by':<{RULE}} {'first killed by':<{RULE}}"
    console.print(f"\n{heads} cases   sec", soft_wrap=True)


def show_skipped(console: Console, skipped: Mapping[str, str]) -> None:
    """Say which mutants cannot run here, and what they lack."""
    for package in sorted(set(skipped.values())):
        names = ", ".join(name for name, lacks in skipped.items() if lacks == package)
        console.print(
            f"[yellow]Skipped[/], because {package} is not installed: {names}.", soft_wrap=True
        )


def show_row(console: Console, row: Row) -> None:
    """Show what became of one mutant."""
    first = row.first.rule if row.first else "-"
    same = row.first is not None and row.first.rule == row.expected.rule
    words = f"{row.mutant:<{ID}} {row.expected.rule:<{RULE}} {'same' if same else first:<{RULE}}"
    words += f" {row.expected.cases:>5} {row.seconds:>5.1f}"
    if not row.expected.killed:
        words += "  survives"
    elif row.early:
        words += "  too early"
    elif row.expected.cases > LUCKY:
        words += "  many cases"
    wrong = not row.expected.killed or row.early
    console.print(Text(words, "bold red" if wrong else ""), soft_wrap=True)


def show_grid(console: Console, rows: Iterable[Row]) -> None:
    """Show every mutant against every rule."""
    console.print("\nEvery mutant (row) against every rule (column): # killed, . passed, and")
    console.print("nothing where the mutant does not reach the rule. The columns are, in order:\n")
    numbers = {rule: i for i, rule in enumerate(ORDINARY)}
    for rule, i in numbers.items():
        console.print(f"{i + 1:>4} {rule}", soft_wrap=True)
    for digit in (10, 1):
        line = "".join(str((i + 1) // digit % 10) for i in range(len(ORDINARY)))
        console.print(f"{'' if digit > 1 else 'mutant':<{ID}} {line}", soft_wrap=True)
    for row in rows:
        cells = [" "] * len(ORDINARY)
        for outcome in (row.expected, *row.others):
            i = numbers[outcome.rule]
            if outcome.claimed and cells[i] != "#":
                cells[i] = "#" if outcome.killed else "."
        console.print(Text(f"{row.mutant:<{ID}} {''.join(cells)}"), soft_wrap=True)


def show_rules(console: Console, matrix: Matrix, full: bool) -> None:
    """Show what each rule kills, and why those stay that kill nothing first."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("rule", no_wrap=True)
    titles = ("must kill", "kills first", "kills" if full else "kills, of those it ran against")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for rule in ORDINARY:
        expected = sum(row.expected.rule == rule for row in matrix.rows)
        first = len(matrix.first_kills(rule))
        if matrix.whole or expected or first:
            counts = (expected, first, len(matrix.kills(rule)))
            table.add_row(rule, *(str(n) if n else "" for n in counts))
    console.print()
    console.print(table)
    idle = [rule for rule in ORDINARY if rule in REASONS and not matrix.first_kills(rule)]
    if matrix.whole and idle:
        console.print("Rules that kill nothing first, and why they stay:")
        for rule in idle:
            console.print(f"  {rule}: {REASONS[rule]}", markup=False, soft_wrap=True)
        console.print()


def show_verdict(console: Console, matrix: Matrix) -> None:
    """Show what is wrong, what might be luck, and the verdict."""
    if matrix.lucky:
        names = ", ".join(f"{row.mutant} ({row.expected.cases})" for row in matrix.lucky)
        console.print(f"Needed more than {LUCKY} cases: {names}.\n", soft_wrap=True)
    least = LEAST_SHARE.get(matrix.profile, 1.0)
    if matrix.survivors and matrix.share >= least:
        names = ", ".join(row.mutant for row in matrix.survivors)
        console.print(
            f"Survive, which profile {matrix.profile} allows up to {1 - least:.0%}: {names}.\n",
            soft_wrap=True,
        )
    problems = matrix.problems()
    for text in problems:
        console.print(f"[bold red]wrong[/] {text}", soft_wrap=True)
    killed = len(matrix.rows) - len(matrix.survivors)
    text = f"{killed} of {len(matrix.rows)} mutants killed ({matrix.share:.1%})"
    if not matrix.whole:
        text += f", of {len(MUTANTS)} in the bank"
    text += f"; {len(problems)} problem{'s' if len(problems) != 1 else ''}"
    facts = f" ({matrix.profile}, seed {matrix.seed}, {matrix.seconds:.0f} s)"
    console.print(Text(text + facts, "bold red" if problems else "bold green"), soft_wrap=True)
