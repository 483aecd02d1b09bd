"""Why a rule stays that kills no mutant first."""

from __future__ import annotations

REASONS: dict[str, str] = {}
"""Rules whose faults another rule meets before them, each with what it is there for."""
