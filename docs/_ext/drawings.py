"""Draw figures when the pages are built: a page names a function, and gets its SVG inline.

    ```{drawing} staircase
    :alt: what the figure shows, for those who do not see it
    The caption.
    ```

The functions are in `docs/_drawings`; they return a matplotlib figure that is drawn from the
reference or from stored results. Inline SVG follows the theme: `style.PALETTE` names the colours
that stand in the SVG as CSS variables, which `_static/pages.css` sets for light and dark.
"""

from __future__ import annotations

import html
import io
import re
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from matplotlib import rc_context
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

from _drawings import DRAWINGS
from _drawings.style import PALETTE, RC

UNWANTED = re.compile(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<!--.*?-->", re.DOTALL)
FONT = re.compile(r"font: ([\d.]+)px [^;\"]+")


class Drawing(SphinxDirective):
    """Insert one drawing as a figure with a caption."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {"alt": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """Return the figure's node."""
        name = self.arguments[0]
        if name not in DRAWINGS:
            raise self.error(f"no drawing {name!r}; there are {sorted(DRAWINGS)}")
        if not self.options.get("alt"):
            raise self.error(f"drawing {name!r} needs ':alt:', what it shows")
        figure = nodes.figure(classes=["drawing"])
        self.set_source_info(figure)
        svg = draw(name, " ".join(self.options["alt"].split()))
        figure += nodes.raw("", f'<div class="drawing-scroll">{svg}</div>', format="html")
        caption = self.parse_content_to_nodes()
        if caption:
            figure += nodes.caption("", "", *caption[0].children)
        return [figure]


def draw(name: str, alt: str) -> str:
    """Return a drawing as an `<svg>` element that takes its colours and font from the page."""
    file = io.StringIO()
    with rc_context(RC | {"svg.hashsalt": name}):
        figure = DRAWINGS[name]()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = UNWANTED.sub("", file.getvalue()).strip()
    text = FONT.sub(r"font: \1px var(--font-stack)", text)
    for variable, colour in PALETTE.items():
        text = text.replace(colour, f"var(--drawing-{variable})")
    for attribute in (r'\bid="', r'href="#', r"url\(#"):  # names are unique within a page
        text = re.sub(f"({attribute})", rf"\1{name}-", text)
    return _open(text, name, alt)


def _open(text: str, name: str, alt: str) -> str:
    """Replace the opening tag by one without a fixed size, and with a description."""
    box = re.match(r'<svg [^>]*viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*>', text)
    if box is None:
        raise ExtensionError(f"drawing {name!r}: matplotlib wrote no viewBox")
    width, height = box.groups()
    tag = f'<svg role="img" aria-label="{html.escape(alt)}" viewBox="0 0 {width} {height}">'
    return tag + text[box.end() :]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive and its colours."""
    app.add_directive("drawing", Drawing)
    app.add_css_file("pages.css")
    app.connect("env-before-read-docs", _read_again)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def _read_again(_: Sphinx, env: Any, docnames: list[str]) -> None:
    """Read pages with drawings in every build: they follow code that Sphinx does not watch."""
    unread = sorted(env.found_docs - set(docnames))
    docnames += [n for n in unread if "{drawing}" in env.doc2path(n).read_text(encoding="utf-8")]
