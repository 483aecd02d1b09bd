"""How Sphinx builds these pages: `sphinx-build -q -W -n -b html docs OUT`."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS / "_ext"))
# The pages describe the checkout that they lie in, whatever is installed beside it.
sys.path[:0] = [str(DOCS.parent / package) for package in ("reference", "conformance")]

project = "infllmv2-conformance"
author = "the infllmv2-conformance authors"
try:
    version = release = metadata.version(project)
except metadata.PackageNotFoundError:
    version = release = "from source"

extensions = ["myst_parser", "mathml", "rule_pages", "survivor_pages"]
myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_ext", "_scripts", "examples"]
nitpicky = True

html_theme = "furo"
html_title = "InfLLM-V2: specification and conformance"
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
