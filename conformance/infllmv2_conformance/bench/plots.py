"""Draw a stored benchmark as SVG: latency, speed-up, roofline, stages; for light and dark pages."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas

from .derived import breakdowns
from .figures import Figure
from .record import Data
from .workloads import short

SIZE = (8.4, 3.7)
"""Inches; as wide as the text of a README, so that its letters are as large as the text's."""
PANELS = {"forward": "attention", "backward": "attention.backward", "decode": "decode"}
"""What stands for each task: the whole, not a stage."""
STYLE = {
    "svg.fonttype": "none",  # letters stay letters, in the reader's font
    "svg.hashsalt": "infllmv2",
    "font.family": "sans-serif",
    "font.size": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}
_DIGITS = 16


@dataclass(frozen=True)
class Theme:
    """Hold colours that read well on a light or a dark page; the background is transparent."""

    name: str
    ink: str
    faint: str
    series: tuple[str, ...]


THEMES = (
    Theme("light", "#1f2328", "#c8cdd3", ("#57606a", "#9a6700", "#0969da", "#cf222e", "#1a7f37")),
    Theme("dark", "#e6edf3", "#3d444d", ("#9da7b3", "#d29922", "#58a6ff", "#ff7b72", "#3fb950")),
)


def draw_all(data: Data, folder: Path) -> list[Path]:
    """Draw every plot that the figures suffice for, in both themes; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for name, draw in PLOTS.items():
        for theme in THEMES:
            settings: Any = STYLE | _colours(theme)
            with mpl.rc_context(settings):
                canvas = Canvas(figsize=SIZE, layout="constrained")
                if not draw(canvas, data, theme):
                    break
                path = folder / f"{name}-{theme.name}.svg"
                source = f"sha256 {digest(data)}"
                meta = {"Date": None, "Creator": f"matplotlib {mpl.__version__}", "Source": source}
                canvas.savefig(path, transparent=True, metadata=meta)
                _tidy(path)
                paths.append(path)
    return paths


def digest(data: Data) -> str:
    """Return what a plot was drawn from: the benchmark's figures, as one word."""
    text = repr([(sorted(figure.items()), data["ceilings"]) for figure in data["figures"]])
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def _tidy(path: Path) -> None:
    """Take away trailing blanks, which editors and reviewers stumble over."""
    lines = [line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _colours(theme: Theme) -> dict[str, Any]:
    names = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    return dict.fromkeys(names, theme.ink) | {"grid.color": theme.faint, "grid.linewidth": 0.6}


Lines = dict[tuple[str, str], list[tuple[int, Figure]]]
"""For each competitor and kind of inputs, its figures by length."""


def _lines(data: Data, task: str) -> Lines:
    """Return the figures of a task, for the first shape, budget, batch and state of the caches."""
    found: Lines = defaultdict(list)
    settings = data["settings"]
    figures = [f for f in data["figures"] if f["task"] == task and f["seconds"]]
    first = {name: next((f[name] for f in figures), None) for name in ("budget", "batch", "l2")}
    for figure in figures:
        wanted = {"shape": settings["shapes"][0], **first}
        if any(figure[name] != value for name, value in wanted.items()):
            continue
        is_dense = figure["function"].startswith("dense")
        if is_dense and figure["inputs"] == settings["inputs"][0]:
            found[figure["implementation"], ""].append((figure["length"], figure))
        elif figure["function"] == PANELS[task]:
            found[figure["implementation"], figure["inputs"]].append((figure["length"], figure))
    return {who: sorted(points, key=lambda p: p[0]) for who, points in found.items()}


def _style(theme: Theme, data: Data, who: tuple[str, str]) -> dict[str, Any]:
    names = list(dict.fromkeys(f["implementation"] for f in data["figures"]))
    colour = theme.series[names.index(who[0]) % len(theme.series)]
    dense = who[0] in data["settings"]["dense"]
    label = f"dense, {who[0]}" if dense else f"{who[0]}, {who[1]}"
    dashes = "--" if who[1] == "correlated" else "-"
    return {"color": colour, "label": label, "linestyle": dashes, "marker": "o"}


def _by_length(
    canvas: Canvas,
    data: Data,
    theme: Theme,
    value: Callable[[Figure], float | None],
    title: str,
) -> bool:
    """Draw `value` over length, one panel for each task that has something to show."""
    panels = [(task, lines) for task in PANELS if (lines := _lines(data, task))]
    if not panels:
        return False
    axes: Any = canvas.subplots(1, len(panels), squeeze=False)[0]
    for ax, (task, lines) in zip(axes, panels, strict=True):
        lengths: set[int] = set()
        for who, points in lines.items():
            known = [(n, y) for n, f in points if (y := value(f)) is not None]
            if known:
                lengths |= {n for n, _ in known}
                ax.plot(*zip(*known, strict=True), **_style(theme, data, who))
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(sorted(lengths), [short(n) for n in sorted(lengths)])
        ax.minorticks_off()
        ax.grid(True, axis="y")
        batch = next(f["batch"] for points in lines.values() for _, f in points)
        ax.set_title(f"{task}, {batch} sequences" if batch > 1 else task, fontsize=11)
        ax.set_xlabel("tokens")
    axes[0].set_ylabel(title)
    pairs = [zip(*ax.get_legend_handles_labels(), strict=True) for ax in axes]
    handles = {label: handle for found in pairs for handle, label in found}
    canvas.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, handlelength=3.5
    )
    return True


def _latency(canvas: Canvas, data: Data, theme: Theme) -> bool:
    return _by_length(canvas, data, theme, lambda f: 1e3 * f["seconds"]["median"], "milliseconds")


def _speed_up(canvas: Canvas, data: Data, theme: Theme) -> bool:
    def value(figure: Figure) -> float | None:
        ratio = figure["ratio_to_dense"]
        return None if ratio is None else 1 / ratio

    return _by_length(canvas, data, theme, value, "times as fast as dense")


def _roofline(canvas: Canvas, data: Data, theme: Theme) -> bool:
    """Draw operations per second over operations per byte, below what the machine reached."""
    ceilings = data["ceilings"] or {}
    if not (ceilings.get("copy") and ceilings.get("matmul")):
        return False
    longest: dict[tuple[str, str], Figure] = {}
    for figure in sorted(data["figures"], key=lambda f: f["length"]):
        first = figure["shape"] == data["settings"]["shapes"][0] and figure["batch"] == 1
        if first and figure["seconds"] and figure["work"]["flop"]:
            longest[figure["implementation"], figure["function"]] = figure
    points: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for (name, function), figure in longest.items():
        work, seconds = figure["work"], figure["seconds"]["median"]
        text = f"{function} {short(figure['length'])}"
        points[name].append((work["flop"] / work["bytes"], work["flop"] / seconds / 1e12, text))
    if not points:
        return False
    ax: Any = canvas.subplots()
    ridge = ceilings["matmul"] / ceilings["copy"]
    xs = [x for found in points.values() for x, _, _ in found]
    left, right = min(1.0, *xs) / 2, max(ridge, *xs) * 4
    roof = [(x, min(x * ceilings["copy"], ceilings["matmul"]) / 1e12) for x in (left, ridge, right)]
    ax.plot(*zip(*roof, strict=True), color=theme.ink, linewidth=1.5)
    for name, found in points.items():
        style = _style(theme, data, (name, "")) | {"linestyle": "", "label": name}
        ax.plot([x for x, _, _ in found], [y for _, y, _ in found], **style)
        for x, y, text in found:
            ax.annotate(text, (x, y), xytext=(6, -4), textcoords="offset points", size=8.5)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.grid(True)
    ax.set_xlabel("floating-point operations per byte; each function at its longest")
    ax.set_ylabel("TFLOP/s")
    canvas.legend(loc="outside lower center", ncols=4)
    return True


def _stages(canvas: Canvas, data: Data, theme: Theme) -> bool:
    """Draw what compressing, selecting and attending take of the forward."""
    rows = [
        row for row in breakdowns(data["figures"]) if row["shape"] == data["settings"]["shapes"][0]
    ]
    rows = [row for row in rows if row["inputs"] == rows[-1]["inputs"]]
    first = {name: rows[0][name] for name in ("budget", "l2")} if rows else {}
    rows = [row for row in rows if all(row[name] == value for name, value in first.items())]
    if not rows:
        return False
    rows.sort(key=lambda row: (row["implementation"], row["length"]))
    ax: Any = canvas.subplots()
    names = [f"{row['implementation']}\n{short(row['length'])}" for row in rows]
    below = [0.0] * len(rows)
    for part, colour in zip(("compress", "select", "attend"), theme.series[1:4], strict=True):
        whole = [row["compress"] + row["select"] + row["attend"] for row in rows]
        heights = [100 * row[part] / total for row, total in zip(rows, whole, strict=True)]
        ax.bar(range(len(rows)), heights, bottom=below, color=colour, label=part, width=0.6)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    ax.axhline(30, color=theme.ink, linewidth=1, linestyle=":")
    ax.set_xlim(-1, max(len(rows), 4))
    ax.set_xticks(range(len(rows)), names)
    ax.set_ylabel(f"% of the stages, {rows[0]['inputs']} inputs")
    canvas.legend(loc="outside lower center", ncols=4)
    return True


PLOTS: dict[str, Callable[[Canvas, Data, Theme], bool]] = {
    "latency": _latency,
    "speed-up": _speed_up,
    "roofline": _roofline,
    "stages": _stages,
}
