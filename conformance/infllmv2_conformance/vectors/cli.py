"""The commands `infllmv2 vectors ...`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from infllmv2_conformance.errors import UsageError
from infllmv2_conformance.terminal import STYLES, make_console

if TYPE_CHECKING:
    from .verify import Outcome

app = typer.Typer(
    help="Golden vectors: files that an implementation in any language can be checked against.",
    no_args_is_help=True,
)
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the vectors.")]
Device = Annotated[
    str | None, typer.Option(help="cpu or cuda; unless given, the first that IMPL claims.")
]


@app.command()
def write(folder: Folder) -> None:
    """Write a set of vectors; a set that is there is replaced, anything else is left alone."""
    from .catalogue import CATALOGUE
    from .folder import write_set

    size = write_set(folder, CATALOGUE)
    make_console().print(f"{len(CATALOGUE)} vectors, {size / 1e6:.2f} MB, are in {folder}.")


@app.command()
def verify(
    folder: Folder,
    impl: Annotated[
        str | None, typer.Argument(help="The implementation, as 'infllmv2 check' takes it.")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Folder of results written by another program, instead.")
    ] = None,
    device: Device = None,
) -> None:
    """Judge an implementation by a set of vectors, after checking the set itself.

    Exit status 1 if a vector is failed, or none is passed, or the set is not today's.
    """
    from .folder import read_set
    from .verify import asking, changes, reading
    from .verify import verify as judge

    if (impl is None) == (answers is None):
        raise UsageError("give an implementation, or --answers FOLDER")
    if answers is not None and not answers.is_dir():
        raise UsageError(f"--answers: {answers} is not a folder")
    goldens = read_set(folder)
    changed = [problem for golden in goldens for problem in changes(golden)]
    if changed:
        _complain(changed)
        raise typer.Exit(1)
    ask = reading(answers) if answers else asking(str(impl), device)
    outcomes = list(judge(goldens, ask))
    _show(outcomes)
    found = [o.outcome for o in outcomes]
    passed, failed = found.count("passed"), found.count("failed")
    counts = f"{passed} vectors passed, {failed} failed, {found.count('not claimed')} not claimed"
    make_console().print(f"{impl or answers}: {counts}", soft_wrap=True)
    raise typer.Exit(int(bool(failed) or not passed))


@app.command()
def answer(
    folder: Folder,
    impl: Annotated[str, typer.Argument(help="As 'infllmv2 check' takes it.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New or empty folder.")],
    device: Device = None,
) -> None:
    """Write the results of an implementation, as another program would write its own."""
    from .folder import read_set, write_answers
    from .verify import asking

    ask = asking(impl, device)
    found = {golden.vector.name: ask(golden) for golden in read_set(folder)}
    kept = {name: tensors for name, tensors in found.items() if not isinstance(tensors, str)}
    write_answers(out, kept)
    make_console().print(f"{len(kept)} answers are in {out}.", soft_wrap=True)


def _complain(changed: list[str]) -> None:
    console = make_console()
    what = "The set is not what today's oracle says: the specification or its bounds have changed."
    console.print(what, soft_wrap=True)
    for problem in changed:
        console.print(f"  {problem}", soft_wrap=True, markup=False)


def _show(outcomes: list[Outcome]) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("vector", "result", "worst", "why"):
        table.add_column(title, no_wrap=title != "why", overflow="fold")
    for o in outcomes:
        ratio = "" if o.ratio is None else f"{o.ratio:.2f}"
        table.add_row(o.name, Text(o.outcome, STYLES[o.outcome]), ratio, Text(o.text))
    make_console().print(table)
