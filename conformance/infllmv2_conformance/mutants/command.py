"""The command `infllmv2 mutants`. The bank needs torch, so it is imported when it is needed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infllmv2_conformance.errors import UsageError
from infllmv2_conformance.names import STAGES, check_names
from infllmv2_conformance.profiles import PROFILES

if TYPE_CHECKING:
    from rich.console import Console

    from .matrix import Matrix, Row

MOST_WORKERS = 8
"""Processes that are started unless `-n` says otherwise: each one holds a torch of its own."""


def mutants(
    ids: Annotated[
        list[str] | None, typer.Argument(help="Only these mutants; all unless given.", metavar="ID")
    ] = None,
    profile: Annotated[
        str, typer.Option(help=f"Size of the rules that must kill: {', '.join(PROFILES)}.")
    ] = "ci",
    stage: Annotated[list[str] | None, typer.Option(help="Only this stage; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="What the search starts from.")] = 0,
    list_only: Annotated[bool, typer.Option("--list", help="Only say what each one is.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Run all rules against all mutants: about an hour.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="File to write the matrix to.")] = None,
    workers: Annotated[
        int, typer.Option("-n", min=0, help="Processes to share the work; 0: as many as fit.")
    ] = 0,
) -> None:
    """Check the suite: run it against deliberately wrong implementations."""
    check_names("stage", stage, STAGES)
    check_names("profile", [profile], PROFILES)
    if json:
        _check_file(json)
    from infllmv2_conformance.terminal import make_console

    chosen = _choose(ids, stage)
    if list_only:
        _list(make_console(), chosen)
        return
    workers = workers or min(len(os.sched_getaffinity(0)), MOST_WORKERS, len(chosen))
    matrix = _run(make_console(), chosen, profile, seed, full, workers)
    if json:
        from .report import to_json

        json.write_text(to_json(matrix), encoding="utf-8")
    raise typer.Exit(1 if matrix.problems() else 0)


def _choose(ids: list[str] | None, stages: list[str] | None) -> list[str]:
    from .bank import MUTANTS

    check_names("mutant", ids, MUTANTS)
    chosen = [
        mutant.id
        for mutant in MUTANTS.values()
        if (not ids or mutant.id in ids) and (not stages or mutant.stage in stages)
    ]
    if not chosen:
        raise UsageError("no mutant is of all that was asked for")
    return chosen


def _list(console: Console, ids: list[str]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    from .bank import MUTANTS

    for mutant in (MUTANTS[i] for i in ids):
        console.print(Text(mutant.id, "bold"))
        words = f"{mutant.sentence} Killed by {mutant.rule}. Seen: {mutant.seen}"
        console.print(Padding(Text(words), (0, 0, 0, 4)))


def _run(
    console: Console, ids: list[str], profile: str, seed: int, full: bool, workers: int
) -> Matrix:
    from .bank import MUTANTS
    from .build import missing
    from .examine import run_bank
    from .matrix import Matrix
    from .terminal import show_grid, show_head, show_row, show_rules, show_skipped, show_verdict

    begin = time.monotonic()
    whole = len(ids) == len(MUTANTS)
    skipped = {i: missing(MUTANTS[i]) for i in ids if missing(MUTANTS[i])}
    ids = [i for i in ids if i not in skipped]
    show_skipped(console, skipped)
    show_head(console, len(ids), profile, seed, workers)
    found = run_bank(ids, profile, seed=seed, full=full, workers=workers)
    rows: list[Row] = []
    for row in _watched(console, found, len(ids)):
        show_row(console, row)
        rows.append(row)
    seconds = time.monotonic() - begin
    matrix = Matrix(tuple(rows), profile, seed, whole, seconds)
    if full:
        show_grid(console, rows)
    show_rules(console, matrix, full)
    show_verdict(console, matrix)
    return matrix


def _watched(console: Console, rows: Iterable[Row], count: int) -> Iterator[Row]:
    """Pass rows on; on a terminal, show beside them how far the run is."""
    if not console.is_terminal:
        yield from rows
        return
    from rich.progress import track

    yield from track(rows, "", total=count, console=console, transient=True)


def _check_file(path: Path) -> None:
    """Make sure that the file can be written, before anything runs.

    Raises:
        UsageError: it cannot, or it holds something else.
    """
    from .report import is_ours

    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder")
    if path.exists() and not is_ours(path.read_text(encoding="utf-8", errors="replace")):
        raise UsageError(f"{path} is not a matrix of infllmv2: not overwriting it")
