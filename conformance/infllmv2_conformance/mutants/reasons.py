"""Why a rule stays that kills no mutant first."""

from __future__ import annotations

_GUARDED = "Every call is guarded, so the first rule of the stage meets the fault; this names it."
REASONS: dict[str, str] = {
    "contract.inputs-unchanged": _GUARDED,
    "contract.fully-written": _GUARDED,
    "contract.red-zones": _GUARDED,
    "contract.streams": "It applies on CUDA alone, and mutants run on a CPU.",
}
"""Rules whose faults another rule meets before them, each with what it is there for."""
