"""What all drawings share: colours, sizes and a few marks.

The colours are those of Okabe and Ito, which people with colour-blindness tell apart. In the page
they are CSS variables of the same names, so that each has a light and a dark tone.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

PALETTE = {
    "ink": "#1b1b1b",
    "soft": "#7a7a7a",
    "faint": "#dddddd",
    "paper": "#fefefe",
    "dark": "#010101",
    "blue": "#0072b2",
    "sky": "#56b4e9",
    "orange": "#e69f00",
    "green": "#009e73",
    "red": "#d55e00",
    "purple": "#cc79a7",
}
INK, SOFT, FAINT, PAPER, DARK = (
    PALETTE[name] for name in ("ink", "soft", "faint", "paper", "dark")
)
BLUE, SKY, ORANGE = (PALETTE[name] for name in ("blue", "sky", "orange"))
GREEN, RED, PURPLE = (PALETTE[name] for name in ("green", "red", "purple"))

ON = {FAINT: INK, PAPER: INK, SKY: DARK, ORANGE: DARK}
"""The colour of text on a light fill; on the others it is that of the page, `PAPER`."""

WIDTH = 6.8  # inches
RC = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "figure.constrained_layout.use": True,
}


def canvas(
    height: float, rows: int = 1, columns: int = 1, **options: object
) -> tuple[Figure, list[Axes]]:
    """Return a figure of the pages' width, and its axes in reading order."""
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def box(
    axes: Axes, x: float, y: float, width: float, height: float, colour: str, **style: object
) -> None:
    """Fill a rectangle with its lower left corner at (x, y)."""
    style = {"linewidth": 0.6, "edgecolor": PAPER} | style
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, **style))


def seamless(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    """Fill a rectangle so that no line shows between it and a neighbour of its colour."""
    box(axes, x, y, width, height, colour, linewidth=0.5, edgecolor=colour)


def cell(
    axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str
) -> None:
    """Fill a rectangle and write into it."""
    box(axes, x, y, width, height, colour, linewidth=1.5)
    middle = {"ha": "center", "va": "center", "fontsize": 8, "clip_on": True}
    axes.text(x + width / 2, y + height / 2, text, color=ON.get(colour, PAPER), **middle)


def bare(axes: Axes, left: str = "") -> None:
    """Leave out an axis that carries no numbers."""
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    if left:
        axes.set_ylabel(left, rotation=0, ha="right", va="center")


def key(axes: Axes, entries: dict[str, str], **options: object) -> None:
    """Explain colours above the axes."""
    handles = [Rectangle((0, 0), 1, 1, facecolor=colour) for colour in entries.values()]
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "ncols": len(entries)}
    tight = {"borderaxespad": 0.2, "handlelength": 1.0, "columnspacing": 1.2, "borderpad": 0.2}
    axes.legend(handles, list(entries), **(place | tight | options))
