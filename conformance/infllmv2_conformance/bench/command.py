"""The commands `infllmv2 bench`, `bench-compare` and `bench-plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from infllmv2_conformance.errors import UsageError
from infllmv2_conformance.terminal import make_console

from .words import FAIL_ABOVE, INPUTS, SHAPE_NAMES, TASKS

Impls = Annotated[list[str], typer.Argument(help="What to time, as `check` takes it; several.")]
FailAbove = Annotated[
    float, typer.Option(min=0.0, help="A slow-down by more than this share fails.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to `infllmv2`."""
    app.command("bench")(bench)
    app.command("bench-compare")(bench_compare)
    app.command("bench-plot")(bench_plot)


def bench(
    impls: Impls,
    lengths: Annotated[str | None, typer.Option(help="Such as 8k,32k,1M.")] = None,
    shapes: Annotated[str | None, typer.Option(help=f"Of: {', '.join(SHAPE_NAMES)}.")] = None,
    budgets: Annotated[str | None, typer.Option(help="Blocks per query, such as 96,64.")] = None,
    inputs: Annotated[str, typer.Option(help="Kinds of q and k.")] = ",".join(INPUTS),
    tasks: Annotated[str, typer.Option(help="What is timed.")] = ",".join(TASKS),
    batches: Annotated[str | None, typer.Option(help="Sequences of decode: 1,16.")] = None,
    functions: Annotated[str | None, typer.Option(help="Only these contract functions.")] = None,
    baselines: Annotated[
        str | None, typer.Option(help="cudnn, flash, math or implementations; or none.")
    ] = None,
    l2: Annotated[str, typer.Option(help="Caches before a call: cold, hot or both.")] = "cold",
    dtype: Annotated[str | None, typer.Option(help="Of q, k and v.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    seed: Annotated[int, typer.Option(help="What tensors are drawn from.")] = 0,
    seconds: Annotated[float | None, typer.Option(min=1.0, help="Stop after this long.")] = None,
    effort: Annotated[
        float | None, typer.Option(min=0.01, help="Seconds of rounds a workload.")
    ] = None,
    longest_call: Annotated[
        float, typer.Option(min=0.01, help="Leave out what takes longer a call.")
    ] = 10.0,
    output: Annotated[Path, typer.Option(help="JSON; a run in it is continued.")] = Path(
        "infllmv2-bench.json"
    ),
    compare: Annotated[
        Path | None, typer.Option(help="A benchmark that this one must keep up with.")
    ] = None,
    fail_above: FailAbove = FAIL_ABOVE,
) -> None:
    """Time implementations beside dense attention, on inputs whose results are checked."""
    from . import table
    from .machine import describe_machine
    from .planning import make_candidates, make_wish
    from .record import Record
    from .record import load as load_record
    from .session import Session

    old = load_record(compare) if compare else None
    candidates, where = make_candidates(impls, device)
    names = [candidate.name for candidate in candidates]
    wish = make_wish(
        where,
        names,
        lengths=lengths,
        shapes=shapes,
        budgets=budgets,
        inputs=inputs,
        tasks=tasks,
        batches=batches,
        functions=functions,
        baselines=baselines,
        l2=l2,
        dtype=dtype,
        seed=seed,
        seconds=float("inf") if seconds is None else seconds,
        effort=effort,
        longest_call=longest_call,
    )
    record = Record(output, describe_machine(where), wish.settings(names))
    console = make_console()
    table.show_start(console, record.data, record.ceilings)

    def show(workload: Any, figures: Any, overlap: Any) -> None:
        table.show_workload(console, workload, figures, overlap)

    session = Session(candidates, where, wish, record, show)
    try:
        session.run()
    finally:
        table.show_summary(console, record.data)
        console.print(f"Figures are in {output}.", soft_wrap=True)
    bad = any(f["status"] in ("wrong", "untrusted") for f in record.data["figures"])
    if old is not None and _compare(console, old, record.data, fail_above):
        bad = True
    raise typer.Exit(1 if bad else 0)


def bench_compare(
    old: Annotated[Path, typer.Argument(help="The stored benchmark.")],
    new: Annotated[Path, typer.Argument(help="The new one, of the same kind of GPU.")],
    fail_above: FailAbove = FAIL_ABOVE,
) -> None:
    """Compare two benchmarks by their ratios to dense attention: exit status 1 if slower."""
    from .record import load

    console = make_console()
    raise typer.Exit(1 if _compare(console, load(old), load(new), fail_above) else 0)


def bench_plot(
    benchmark: Annotated[Path, typer.Argument(help="A file that `infllmv2 bench` wrote.")],
    folder: Annotated[Path, typer.Argument(help="Takes the SVG files.")],
) -> None:
    """Draw latency, speed-up, roofline and stages of a stored benchmark."""
    try:
        from .plots import draw_all
    except ImportError as error:
        raise UsageError(f"drawing needs matplotlib: pip install matplotlib ({error})") from None
    from .record import load

    for path in draw_all(load(benchmark), folder):
        typer.echo(path)


def _compare(console: Any, old: Any, new: Any, fail_above: float) -> bool:
    from .gate import compare
    from .table import show_verdict

    verdict = compare(old, new, fail_above)
    show_verdict(console, verdict, fail_above)
    return bool(verdict.failed)
