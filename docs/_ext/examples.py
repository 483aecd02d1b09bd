"""Cut the empty line at the end of examples: doctest needs it, a reader does not."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, Any]:
    """Trim every `pycon` block after its page is parsed."""
    app.connect("doctree-read", _trim)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def _trim(_: Sphinx, doctree: nodes.document) -> None:
    for block in doctree.findall(nodes.literal_block):
        if block.get("language") == "pycon":
            text = block.astext().rstrip("\n")
            block.rawsource = text  # Sphinx highlights a block whose text is its source
            block.children = [nodes.Text(text)]
