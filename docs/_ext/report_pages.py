"""Render the stored reports to pages, `reports/NAME.html` in the built documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

from infllmv2_conformance.errors import UsageError
from infllmv2_conformance.report import write_page
from infllmv2_conformance.report.read import read_report

FOLDERS = ("conformance", "sample")
"""Where reports are, under `results/`."""


def setup(app: Sphinx) -> dict[str, Any]:
    """Write the pages once the others are there."""
    app.connect("build-finished", _render)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def _render(app: Sphinx, error: Exception | None) -> None:
    if error or app.builder.format != "html":
        return
    folder = Path(app.outdir) / "reports"
    folder.mkdir(exist_ok=True)
    results = Path(app.srcdir) / "results"
    stored = sorted(path for name in FOLDERS for path in (results / name).glob("*.json"))
    if len({path.stem for path in stored}) < len(stored):
        raise ExtensionError("two reports under docs/results have the same name")
    for path in stored:
        try:
            write_page(read_report(path), folder / f"{path.stem}.html")
        except UsageError as problem:
            raise ExtensionError(str(problem)) from problem
