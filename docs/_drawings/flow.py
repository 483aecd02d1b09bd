"""The data flow of the stages."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from .style import BLUE, GREEN, INK, ORANGE, PAPER, SOFT, canvas

HALF_HEIGHT = 0.3


def flow() -> Figure:
    """Draw what every stage takes and gives."""
    figure, (axes,) = canvas(2.75)
    axes.set(xlim=(0, 12.1), ylim=(0.15, 4.55))
    axes.axis("off")
    for x, name, result, shape in (
        (2.1, "1 compress", "windows", "[C, HK, D]"),
        (4.5, "2 score", "scores", "[HK, T, C]"),
        (6.9, "3 pool", "block scores", "[HK, T, N]"),
        (9.3, "4 select", "selected", "[HK, T, K]"),
    ):
        _stage(axes, x, 3.3, name, BLUE)
        axes.text(x, 2.72, f"{result}\n{shape}", ha="center", va="top", color=INK, fontsize=8)
    _stage(axes, 9.3, 1.15, "5 attend", GREEN)
    for name, y in (("k", 3.3), ("q", 4.2), ("v", 1.15)):
        axes.text(0.15, y, name, ha="left", va="center", weight="bold")
    for start, end in ((0.45, 1.15), (3.05, 3.6), (5.4, 6.0), (7.8, 8.4)):
        _arrow(axes, (start, 3.3), (end, 3.3))
    _path(axes, [(0.45, 4.2), (4.5, 4.2), (4.5, 3.63)])
    _arrow(axes, (9.3, 2.05), (9.3, 1.48))
    _arrow(axes, (0.45, 1.15), (8.4, 1.15))
    _path(axes, [(0.75, 3.3), (0.75, 1.15)], head=False)
    _path(axes, [(1.0, 4.2), (1.0, 1.15)], head=False)
    axes.plot([0.75, 1.0], [1.15, 1.15], "o", color=SOFT, markersize=3)
    axes.text(3.9, 1.3, "q, k and v themselves", ha="center", color=INK, fontsize=8)
    _arrow(axes, (10.2, 1.15), (10.75, 1.15))
    axes.text(10.85, 1.15, "out, lse", va="center", weight="bold")
    axes.add_patch(
        FancyBboxPatch((0.55, 0.28), 11.35, 0.34, "round,pad=0.06", fc="none", ec=ORANGE, ls="--")
    )
    text = "6 switch: with fewer than dense_len keys, stage 5 attends everything, without 1 to 4"
    axes.text(6.2, 0.44, text, ha="center", va="center", fontsize=8)
    return figure


def _stage(axes: Axes, x: float, y: float, name: str, colour: str) -> None:
    shape = FancyBboxPatch(
        (x - 0.8, y - HALF_HEIGHT), 1.6, 2 * HALF_HEIGHT, "round,pad=0.08", fc=PAPER, ec=colour
    )
    axes.add_patch(shape)
    axes.text(x, y, name, ha="center", va="center", weight="bold", color=colour)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": SOFT, "shrinkB": 0})


def _path(axes: Axes, points: list[tuple[float, float]], head: bool = True) -> None:
    line = points[:-1] if head else points
    axes.plot(*zip(*line, strict=True), color=SOFT, linewidth=1.0)
    if head:
        _arrow(axes, points[-2], points[-1])


ALL = (flow,)
