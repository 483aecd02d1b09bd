"""Draw the tables of `pictures.py`: errors by place, and blocks by query block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from . import svg

CELL, WIDTH, HEIGHT = 18.0, 620.0, 280.0
"""The largest cell, how wide all of them may be together, and how high they are if wide."""
STEPS = (1, 2, 5, 10, 20, 50, 100)
HEAT = (
    ("within-0", 0.0, "final rounding at most"),
    ("within-1", 0.1, "up to 0.1"),
    ("within-2", 0.5, "up to 0.5"),
    ("within-3", 1.0, "up to 1, the bound"),
    ("over-1", 2.0, "up to 2"),
    ("over-2", 10.0, "up to 10"),
    ("over-3", 100.0, "up to 100"),
    ("over-4", math.inf, "above 100"),
)
"""Classes of error over bound: name, upper end, label."""
INFINITE = ("over-5", "infinite or NaN")
BLOCKS = {
    "f": "forced",
    "s": "scored",
    "F": "missed",
    "m": "missed",
    "x": "extra",
    "w": "extra",
    ".": "unselected",
}
"""Classes of the cells of a selection map."""
LABELS = {
    "selection": {
        "forced": "forced: in both",
        "scored": "by score: in both",
        "missed": "missed: only the oracle has it",
        "extra": "extra: only the kernel has it",
        "unselected": "in neither",
    },
    "form": {
        "forced": "forced, and selected",
        "scored": "selected, not judged",
        "missed": "forced, but missing",
        "extra": "selected, though after the query",
        "unselected": "not selected",
    },
    "nothing": {"forced": "forced", "scored": "by score", "unselected": "not selected"},
}
"""What the classes mean, by what is judged."""

Picture = dict[str, Any]


def error_map(picture: Picture, title: str) -> Markup:
    """Draw the error over bound of every place, the worst one framed, wrong ones dotted."""
    kinds = [[heat(value) for value in row] for row in picture["values"]]
    table = _Table(picture, len(kinds), len(kinds[0]))
    shapes = table.frame()
    found = sorted({kind for row in kinds for kind in row if kind})
    shapes += [svg.path(kind, table.cells(kinds, kind)) for kind in found]
    for kind in found:
        if kind.startswith("over"):
            shapes.append(svg.path(f"dot on-{kind}", table.dots(kinds, kind)))
    shapes.append(svg.path("worst", table.box(*picture["worst"])))
    return svg.drawing(table.width, table.height, "map", title, shapes)


def selection_map(picture: Picture, title: str) -> Markup:
    """Draw which blocks were selected, which were missed and which taken instead."""
    rows = [list(row) for row in picture["cells"]]
    table = _Table(picture, len(rows), len(rows[0]))
    shapes = table.frame()
    found = [kind for kind in BLOCKS if any(kind in row for row in rows)]
    shapes += [svg.path(BLOCKS[kind], table.cells(rows, kind)) for kind in found]
    shapes += [svg.path("dot on-extra", table.dots(rows, kind)) for kind in found if kind in "xw"]
    shapes += [svg.path("ring", table.rings(rows, kind)) for kind in found if kind in "mFw"]
    x = table.left + table.columns * table.cell + 4
    for row in picture["wrong_rows"]:
        shapes.append(svg.path("mark", f"M{x:.1f} {table.y(row) + table.tall / 2:.1f}l6 -4v8z"))
    return svg.drawing(table.width + 12, table.height, "map", title, shapes)


def is_wide(picture: Picture) -> bool:
    """Say whether a map is wider than a phone."""
    cells = picture["cells"] if "cells" in picture else picture["values"]
    return len(cells[0]) * CELL > 280


def error_legend(picture: Picture) -> list[tuple[str, str]]:
    """Return the classes in an error map, and what they mean."""
    found = {heat(value) for row in picture["values"] for value in row}
    labels = [(name, label) for name, _, label in HEAT]
    return [(name, label) for name, label in (*labels, INFINITE) if name in found]


def selection_legend(picture: Picture) -> list[tuple[str, str]]:
    """Return the classes in a selection map, and what they mean."""
    found = {BLOCKS.get(cell) for row in picture["cells"] for cell in row}
    labels = LABELS[picture["judged"]]
    return [(name, label) for name, label in labels.items() if name in found]


def heat(value: Any) -> str:
    """Return the class of a ratio, "" where nothing was compared."""
    if value is None:
        return ""
    number = float(value)
    if not math.isfinite(number):
        return INFINITE[0]
    return next(name for name, end, _ in HEAT if number <= end)


class _Table:
    """Place the cells of a map, and the labels of its axes."""

    def __init__(self, picture: Picture, rows: int, columns: int) -> None:
        self.picture, self.rows, self.columns = picture, rows, columns
        self.cell = max(5.0, min(CELL, WIDTH / columns))
        self.tall = max(self.cell, min(14.0, HEIGHT / rows))
        longest = max(len(str(number)) for _, number in self._ticks("rows", rows))
        self.left, self.top = 10 + longest * svg.CHARACTER, 20.0
        across = max(columns * self.cell, (len(picture["columns"]["axis"]) + 3) * svg.CHARACTER)
        down = len(picture["rows"]["axis"]) * svg.CHARACTER
        self.width, self.height = max(self.left + across, down) + 6, self.y(rows) + 36

    def y(self, row: int) -> float:
        """Return where a row begins."""
        return self.top + row * self.tall

    def frame(self) -> list[str]:
        """Return the outline, the labels and the names of the axes."""
        wide, bottom = self.columns * self.cell, self.y(self.rows)
        outline = f"M{self.left:.1f} {self.top:g}h{wide:.1f}V{bottom:.1f}h{-wide:.1f}z"
        shapes = [
            svg.path("frame", outline),
            svg.text(0, 11, self.picture["rows"]["axis"], "start"),
            svg.text(self.left, bottom + 31, f"{self.picture['columns']['axis']} →", "start"),
        ]
        for row, number in self._ticks("rows", self.rows):
            y = self.y(row) + self.tall / 2 + 4
            shapes.append(svg.text(self.left - 5, y, str(number), "end"))
        for column, number in self._ticks("columns", self.columns):
            x = self.left + (column + 0.5) * self.cell
            shapes.append(svg.text(x, bottom + 15, str(number)))
        return shapes

    def _ticks(self, name: str, cells: int) -> Iterator[tuple[int, int]]:
        """Yield cells to label, and their numbers, so far apart that labels do not meet."""
        axis = self.picture[name]
        last = axis["first"] + axis["count"] - 1
        room = 14 if name == "rows" else (len(str(last)) + 1.5) * svg.CHARACTER
        size = self.tall if name == "rows" else self.cell
        apart = next(step for step in STEPS if step * size >= room)
        for cell in range(0, cells, apart):
            yield cell, axis["first"] + cell * axis["step"]

    def cells(self, kinds: list[list[str]], kind: str) -> str:
        """Return the outline of all cells of a kind; neighbours in a row become one."""
        parts: list[str] = []
        for row, found in enumerate(kinds):
            start = 0
            for end in range(1, len(found) + 1):
                if end < len(found) and found[end] == found[start]:
                    continue
                if found[start] == kind:
                    x, wide = self.left + start * self.cell, (end - start) * self.cell
                    corner = f"M{x:.1f} {self.y(row):.1f}"
                    parts.append(f"{corner}h{wide:.1f}v{self.tall:.1f}h{-wide:.1f}z")
                start = end
        return "".join(parts)

    def dots(self, kinds: list[list[str]], kind: str) -> str:
        """Return a small square in the middle of every cell of a kind."""
        inset = (self.cell - max(1.5, self.cell / 5)) / 2
        return "".join(self.box(row, column, inset) for row, column in _where(kinds, kind))

    def rings(self, kinds: list[list[str]], kind: str) -> str:
        """Return an inner outline of every cell of a kind."""
        inset = self.cell / 6
        return "".join(self.box(row, column, inset) for row, column in _where(kinds, kind))

    def box(self, row: int, column: int, inset: float = 0.0) -> str:
        """Return the outline of one cell, or of what lies `inset` within it."""
        wide, tall = self.cell - 2 * inset, self.tall - 2 * min(inset, self.tall / 2 - 1)
        x, y = self.left + column * self.cell + inset, self.y(row) + (self.tall - tall) / 2
        return f"M{x:.1f} {y:.1f}h{wide:.1f}v{tall:.1f}h{-wide:.1f}z"


def _where(kinds: list[list[str]], kind: str) -> Iterator[tuple[int, int]]:
    return ((r, c) for r, row in enumerate(kinds) for c, cell in enumerate(row) if cell == kind)
