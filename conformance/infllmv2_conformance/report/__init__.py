"""Reports of a run: what they are written from, and one module per format."""

from .data import to_data, to_run
from .files import ReportError, check_folder, write_page, write_reports
from .model import Result, Run

__all__ = [
    "ReportError",
    "Result",
    "Run",
    "check_folder",
    "to_data",
    "to_run",
    "write_page",
    "write_reports",
]
