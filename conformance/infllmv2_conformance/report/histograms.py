"""Draw how many numbers use how much of their bound; both axes are logarithmic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from . import svg

LOW, HIGH = -20, 7
"""The octaves that small histograms show; what lies beyond is counted at their ends."""
WIDTH, LEFT, TOP, PLOT, FOOT = 440.0, 34.0, 14.0, 150.0, 42.0

Margins = dict[str, Any]


def add_margins(many: Sequence[Margins | None]) -> Margins | None:
    """Return the counts of several histograms together, None if there is none."""
    found = [margins for margins in many if margins]
    if not found:
        return None
    octaves: dict[int, int] = {}
    for margins in found:
        for octave, count in margins["octaves"].items():
            octaves[int(octave)] = octaves.get(int(octave), 0) + count
    ends = {end: sum(margins[end] for margins in found) for end in ("zero", "infinite")}
    return {**ends, "octaves": octaves}


def sparkline(margins: Margins) -> Markup:
    """Draw a histogram as small as a word: nothing but bars and the bound."""
    slot, bar, height = 4.0, 3.0, 22.0
    bars = _bars(margins, LOW, HIGH)
    top = math.log10(1 + max(count for _, count in bars))
    width = (HIGH - LOW + 3) * slot
    shapes = [svg.path("axis", f"M0 {height:g}h{width:g}")]
    for place, count in bars:
        tall = max(1.5, (height - 2) * math.log10(1 + count) / top)
        outline = f"M{place * slot:g} {height:g}v{-tall:.1f}h{bar:g}v{tall:.1f}z"
        shapes.append(svg.path(_class(place, LOW), outline))
    shapes.append(svg.path("bound", f"M{(2 - LOW) * slot - 0.5:g} 0V{height:g}"))
    return svg.drawing(width, height + 1, "sparkline", "", shapes)


def histogram(margins: Margins, title: str) -> Markup:
    """Draw a histogram with its axes."""
    used = [int(octave) for octave in margins["octaves"]]
    low, high = min([-10, *used]), max([3, *(octave + 2 for octave in used)])
    slot = (WIDTH - LEFT) / (high - low + 3)
    bars = _bars(margins, low, high)
    tallest = max(1, math.ceil(math.log10(max(count for _, count in bars))))
    base = TOP + PLOT

    def height(count: int) -> float:
        return PLOT * (math.log10(count) + 0.3) / (tallest + 0.3)  # a single number is seen too

    shapes: list[str] = []
    for power in range(0, tallest + 1, -(-tallest // 5)):
        y = base - height(10**power)
        shapes.append(svg.path("grid", f"M{LEFT:g} {y:.1f}H{WIDTH:g}"))
        shapes.append(svg.text(LEFT - 5, y + 4, _short(10**power), "end"))
    for place, count in bars:
        tall, x = height(count), LEFT + place * slot
        outline = f"M{x + 1:.1f} {base:g}v{-tall:.1f}h{slot - 2:.1f}v{tall:.1f}z"
        words = f"{_range(place, low, high)}: {count:,}"
        shapes.append(svg.path(_class(place, low), outline, words))
    shapes += _axis(low, high, slot, base)
    if margins["infinite"]:
        shapes.append(svg.text(WIDTH - slot / 2, base + 15, "∞"))
    return svg.drawing(WIDTH, base + FOOT, "histogram", title, shapes)


def _axis(low: int, high: int, slot: float, base: float) -> list[str]:
    shapes = [svg.path("axis", f"M{LEFT:g} {base:g}H{WIDTH:g}")]
    shapes.append(svg.text(LEFT + slot / 2, base + 15, "0"))
    bound = LEFT + (2 - low) * slot
    first, last = math.ceil((low - 1) / math.log2(10)), math.floor(high / math.log2(10))
    apart = next(n for n in (1, 3, 6, 18, 36) if n * math.log2(10) * slot > 34)
    for power in range(first + -first % apart, last + 1, apart):
        x = bound + power * math.log2(10) * slot
        if power and LEFT + 2 * slot < x < WIDTH - 16:
            words = f"{10.0**power:g}" if abs(power) <= 3 else svg.power_of_ten(power)
            shapes += [svg.path("axis", f"M{x:.1f} {base:g}v4"), svg.text(x, base + 15, words)]
    shapes.append(svg.path("bound", f"M{bound:.1f} {TOP - 2:g}V{base + 4:g}"))
    shapes += [svg.text(bound, base + 15, "1"), svg.text(bound, TOP - 5, "bound")]
    shapes.append(svg.text((LEFT + WIDTH) / 2, base + 34, "error / bound"))
    return shapes


def _bars(margins: Margins, low: int, high: int) -> list[tuple[int, int]]:
    """Return (place, count): place 0 is zero, then come the octaves, and the last is infinite."""
    counts: dict[int, int] = {0: margins["zero"], high - low + 2: margins["infinite"]}
    for octave, count in margins["octaves"].items():
        place = min(max(int(octave), low), high) - low + 1
        counts[place] = counts.get(place, 0) + count
    return [(place, count) for place, count in sorted(counts.items()) if count]


def _class(place: int, low: int) -> str:
    return "over" if place > 1 - low else "within"


def _range(place: int, low: int, high: int) -> str:
    if place == 0:
        return "no more than the final rounding"
    if place == high - low + 2:
        return "infinite"
    octave = place - 1 + low
    return f"{2.0 ** (octave - 1):.3g} to {2.0**octave:.3g} of the bound"


def _short(number: int) -> str:
    for power, letter in ((9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number // 10**power}{letter}"
    return str(number)
