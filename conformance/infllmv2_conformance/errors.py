"""Errors of the user's: each is one line that says what was given and what it must be."""

from __future__ import annotations


class UsageError(ValueError):
    """What was asked for is not there, or cannot be read or written."""
