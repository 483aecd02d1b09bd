"""How Sphinx builds these pages: `sphinx-build -q -W -n -b html docs OUT`."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS)]
# The pages describe the checkout that they lie in, whatever is installed beside it.
sys.path[:0] = [str(DOCS.parent / package) for package in ("reference", "conformance", "impls")]

project = "infllmv2-conformance"
author = "the infllmv2-conformance authors"
try:
    version = release = metadata.version(project)
except metadata.PackageNotFoundError:
    version = release = "from source"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "mathml",
    "mutant_pages",
    "report_pages",
    "rule_pages",
    "rule_lists",
    "drawings",
    "examples",
    "stored",
    "survivor_pages",
]
myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_*", "examples", "tests"]
nitpicky = True
OTHERS = r"(torch|jaxtyping|collections\.abc)(\..*)?|Tensor|Float|Int|Bool"
nitpick_ignore_regex = [("py:class", OTHERS)]  # documented elsewhere, and the pages build offline

# Docstrings: Google style, with code between single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_rtype = False
python_maximum_signature_line_length = 70

html_theme = "furo"
html_static_path = ["_static"]
html_title = "InfLLM-V2: specification and conformance"
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
