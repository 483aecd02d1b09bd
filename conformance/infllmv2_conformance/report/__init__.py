"""Reports of a run: what they are written from, and one module per format."""

from .files import ReportError, check_folder, write_reports
from .model import Result, Run

__all__ = ["ReportError", "Result", "Run", "check_folder", "write_reports"]
