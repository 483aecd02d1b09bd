"""What `infllmv2 bench` shows: a table for each workload as soon as it is timed, then a summary."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .counts import Ceilings
from .derived import breakdowns, exponents, limited_by
from .figures import Figure
from .gate import Verdict
from .record import Data
from .workloads import Workload, short

STYLES = {"measured": "", "wrong": "bold red", "untrusted": "bold magenta", "not run": "yellow"}
_COLUMNS = ("iqr", "host", "x dense", "roofline", "memory", "of bound")


def seconds_text(seconds: float) -> str:
    """Write a duration with three digits.

    >>> [seconds_text(s) for s in (0.0000123, 0.00456, 0.789, 12.3456)]
    ['12.3 us', '4.56 ms', '789 ms', '12.3 s']
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds / 1e-6)} us"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def show_start(console: Console, data: Data, ceilings: Ceilings | None) -> None:
    """Show where this runs."""
    machine = data["machine"]
    gpu = machine.get("gpu")
    where = f"{gpu['name']}, driver {gpu.get('driver', '?')}" if gpu else "cpu"
    packages = machine["packages"]
    versions = [f"{n} {packages[n]}" for n in ("torch", "triton") if n in packages]
    commit = (machine["commit"] or "unknown")[:12] + (" (changed)" if machine["changed"] else "")
    console.print(
        f"[bold]{', '.join(data['settings']['implementations'])}[/] on {where}, "
        f"{', '.join(versions)}, commit {commit}",
        soft_wrap=True,
    )
    if ceilings:
        show_ceilings(console, ceilings)


def show_ceilings(console: Console, ceilings: Ceilings) -> None:
    """Show what the machine reaches."""
    parts = [
        f"{name} {value / 1e12:.3g} {unit}"
        for name, value, unit in (
            ("copy", ceilings.copy, "TB/s"),
            ("matrix product", ceilings.matmul, "TFLOP/s"),
            ("exponentials", ceilings.exp, "T/s"),
        )
        if value
    ]
    console.print(f"[dim]measured here: {', '.join(parts)}[/]", soft_wrap=True)


def show_workload(
    console: Console, workload: Workload, figures: list[Figure], overlap: dict[str, Any] | None
) -> None:
    """Show the figures of one workload."""
    console.print(Text(f"\n{workload}", "bold"), soft_wrap=True)
    if overlap:
        four, eight, own = (overlap[f"union_of_{n}"] for n in (4, 8, 1))
        console.print(
            f"[dim]{own:.0f} blocks a query; {four:.0f} in the union of 4 neighbours, "
            f"{eight:.0f} of 8[/]"
        )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("function", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    for title in _COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    states = len({figure["l2"] for figure in figures})
    for figure in figures:
        if figure["seconds"]:
            table.add_row(Text(_name(figure, states)), *_numbers(figure))
    if table.row_count:
        console.print(table)
    if any(figure["seconds"] and limited_by(figure) == "host" for figure in figures):
        console.print("[dim]h: the device waited for the host; g: replayed as a CUDA graph[/]")
    _show_reasons(console, figures)


def _show_reasons(console: Console, figures: list[Figure]) -> None:
    """Say what has no number, once for each reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for figure in figures:
        if not figure["seconds"]:
            names = reasons.setdefault((figure["status"], figure["reason"] or ""), [])
            names += [name for name in [_name(figure, 1)] if name not in names]
    for (status, reason), names in reasons.items():
        words = Text.assemble((status, STYLES[status]), f" {', '.join(names)}: {reason}")
        console.print(words, soft_wrap=True)


def _name(figure: Figure, states: int) -> str:
    state = f" ({figure['l2']})" if states > 1 else ""
    return f"{figure['implementation']} {figure['function']}{state}"


def _numbers(figure: Figure) -> list[str]:
    seconds, roofline, memory = figure["seconds"], figure["roofline"], figure["memory_bytes"]
    ratio = figure["ratio_to_dense"]
    mark = " h" if limited_by(figure) == "host" else " g" if figure["timing"] == "graph" else ""
    return [
        seconds_text(seconds["median"]) + mark,
        f"{100 * seconds['iqr'] / seconds['median']:.0f} %" if seconds["median"] else "",
        seconds_text(figure["host_seconds"]),
        "" if ratio is None else f"{_three(ratio)}",
        f"{100 * roofline['share']:.2g} %" if roofline["share"] else "",
        "" if memory is None else f"{memory / 2**20:.0f} MiB",
        f"{figure['worst_ratio']:.2f}",
    ]


def show_summary(console: Console, data: Data) -> None:
    """Show what follows from all figures together."""
    figures = data["figures"]
    rows = breakdowns(figures)
    if rows:
        table = _table("stages of the forward", "compress", "select", "attend", "selecting is")
        for row in rows:
            times = [seconds_text(row[name]) for name in ("compress", "select", "attend")]
            table.add_row(_where(row), *times, f"{100 * row['selection_share']:.0f} %")
        console.print(table)
    rows = [row for row in exponents(figures) if row["exponent"] is not None]
    if rows:
        table = _table("time grows as length to the", "exponent", "lengths")
        for row in rows:
            lengths = "-".join(short(n) for n in (row["lengths"][0], row["lengths"][-1]))
            where = Text(f"{row['function']}, {_where(row)}")
            table.add_row(where, f"{row['exponent']:.2f}", lengths)
        console.print(table)
    counts = {s: sum(f["status"] == s for f in figures) for s in STYLES}
    words = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
    console.print(f"{words} in {data['seconds']:.0f} s", soft_wrap=True)


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first)
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _where(row: dict[str, Any]) -> str:
    length = f" {short(row['length'])}" if "length" in row else ""
    batch = f" of {row['batch']}" if row["task"] == "decode" else ""
    return (
        f"{row['implementation']} {row['shape']}{length}{batch} b{row['budget']} {row['inputs']}"
        f" {row['l2']}"
    )


def show_verdict(console: Console, verdict: Verdict, fail_above: float) -> None:
    """Show a comparison: what failed, what changed most, and the verdict."""
    for change in verdict.failed:
        if change.slower is None:
            text = f"[bold red]lost[/] {change.key}: {change.reason}"
        else:
            text = f"[bold red]slower by {100 * change.slower:.1f} %[/] {change.key}"
        console.print(text, soft_wrap=True)
    slower = [change.slower for change in verdict.changes if change.slower is not None]
    if slower:
        console.print(
            f"{len(verdict.changes)} figures compared; from {100 * min(slower):+.1f} % to "
            f"{100 * max(slower):+.1f} %, and more than {100 * fail_above:+.0f} % fails; "
            f"{len(verdict.skipped)} not run now, {len(verdict.by_host)} limited by the host",
            soft_wrap=True,
        )
    text = f"{len(verdict.failed)} regressions" if verdict.failed else "no regression"
    console.print(Text(text, "bold red" if verdict.failed else "bold green"))
