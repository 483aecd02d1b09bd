"""The drawings of the studies, from their stored results."""

from __future__ import annotations

ALL = ()
