"""Run the stage `long` in this process and print what it costs; `test_long_rules.py` starts it.

By hand, for the table in `docs/long-contexts.md`:

    python conformance/tests/measure_long.py eager 131072
    python conformance/tests/measure_long.py eager 1048576 --device cuda --rule long.attention

One JSON object a rule: seconds and CPU seconds in the implementation and in the checker, and the
peak of memory. On a CPU that is the resident size of the process; on CUDA what is allocated beside
the tensors that the call was given, during the call and while its result is judged.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from infllmv2_conformance.candidate import Candidate
from infllmv2_conformance.loading import load
from infllmv2_conformance.mutants.suite_tests import rule_tests
from infllmv2_conformance.profiles import PROFILES
from infllmv2_conformance.rules import LONG, RULES
from infllmv2_conformance.runner import Runner


class Measured(Candidate):
    """Note the time that the implementation takes, and the memory of both sides."""

    def __init__(self, inner: Candidate) -> None:
        super().__init__(inner.name, inner.target, inner.capabilities)
        self.seconds = self.cpu_seconds = 0.0
        self.before = self.call_peak = self.judge_peak = 0

    def guarded(self, what: str, action: Callable[[], Any], *, wait: bool = True) -> Any:
        """Run code of the implementation."""
        self._note_judging()
        self.before = _allocated()
        start, cpu = time.monotonic(), time.process_time()
        result = super().guarded(what, action, wait=wait)
        self.seconds += time.monotonic() - start
        self.cpu_seconds += time.process_time() - cpu
        self.call_peak = max(self.call_peak, _peak() - self.before)
        _reset()
        return result

    def _note_judging(self) -> None:
        if self.before:
            self.judge_peak = max(self.judge_peak, _peak() - self.before)
        _reset()

    def finish(self) -> dict[str, float]:
        """Return what was noted."""
        self._note_judging()
        gigabytes = {"call_peak_gb": self.call_peak / 1e9, "judge_peak_gb": self.judge_peak / 1e9}
        return {
            "implementation_s": self.seconds,
            "implementation_cpu_s": self.cpu_seconds,
            **(gigabytes if torch.cuda.is_initialized() else {}),
        }


def measure(name: str, length: int, device: torch.device, rule: str) -> dict[str, Any]:
    """Run one rule and return its costs."""
    candidate = Measured(load(name))
    run = Runner(candidate, PROFILES["quick"], device, 0, rule, length=length)
    start, cpu = time.monotonic(), time.process_time()
    rule_tests()[rule](run)
    seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu
    costs = candidate.finish()
    return {
        "rule": rule,
        "cases": run.tally.cases,
        "worst": run.tally.worst_ratio,
        "checker_s": seconds - candidate.seconds,
        "checker_cpu_s": cpu_seconds - candidate.cpu_seconds,
        **costs,
        "process_peak_gb": _resident_peak() / 1e9,
    }


def _resident_peak() -> int:
    """Return the most bytes that this program was resident with.

    `ru_maxrss` would begin with what the parent was resident with as it started this process.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kilobytes) << 10


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0


def _reset() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    """Measure the rules that are asked for, all of them unless any is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("impl")
    parser.add_argument("length", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rule", action="append")
    options = parser.parse_args()
    claims = load(options.impl).capabilities
    claimed = [r for r in RULES if all(getattr(claims, name) for name in RULES[r].claims)]
    for rule in options.rule or [r for r in claimed if RULES[r].stage == LONG]:
        found = measure(options.impl, options.length, torch.device(options.device), rule)
        rounded = {n: round(x, 3) if isinstance(x, float) else x for n, x in found.items()}
        print(json.dumps(rounded), flush=True)


if __name__ == "__main__":
    main()
