"""What the pictures of the page are made of: SVG text without scripts, colours by class name."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

CHARACTER = 6.6
"""Width of a character of a label in pixels, roughly."""
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def drawing(width: float, height: float, name: str, title: str, shapes: Sequence[str]) -> Markup:
    """Return a picture; one without a title is an ornament that a screen reader passes over."""
    told = f'role="img" aria-label="{escape(title)}"' if title else 'aria-hidden="true"'
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    heading = f"<title>{escape(title)}</title>" if title else ""
    return Markup(f'<svg class="{name}" {size} {told}>{heading}{"".join(shapes)}</svg>')


def path(name: str, outline: str, title: str = "") -> str:
    """Return an outline of a class, with words that show when it is pointed at."""
    if title:
        return f'<path class="{name}" d="{outline}"><title>{escape(title)}</title></path>'
    return f'<path class="{name}" d="{outline}"/>'


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    """Return a label that begins ("start"), ends ("end") or has its middle at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def power_of_ten(exponent: int) -> str:
    """Return a power of ten, with the exponent raised."""
    return f"10{str(exponent).translate(SUPERSCRIPT)}"
