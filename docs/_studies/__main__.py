"""Run the studies and store their results: `python docs/_studies [NAME ...]`.

Every study is run twice, at full and at small size. `--check` repeats the small ones, within a
minute, and compares them with what is stored: results and code then belong together.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import covered
import data
import local_blocks
import needles
import normaliser
import sensitivity
from infllmv2_reference import SPEC_VERSION

RESULTS = Path(__file__).resolve().parents[1] / "results" / "studies"
STUDIES = {
    "needles": needles,
    "normaliser": normaliser,
    "coverage": covered,
    "sensitivity": sensitivity,
    "local-blocks": local_blocks,
}
RELATIVE = 1e-4
"""Sums of float32 in another order move results by less; a changed study moves them by more."""


def main() -> int:
    """Run or check the named studies, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(STUDIES), metavar="NAME")
    parser.add_argument("--check", action="store_true", help="only repeat the small runs")
    options = parser.parse_args()
    unknown = set(options.names) - set(STUDIES)
    if unknown:
        parser.error(f"no study {sorted(unknown)}; there are {list(STUDIES)}")
    torch.set_grad_enabled(False)
    failed = [name for name in options.names if not (check if options.check else store)(name)]
    return 1 if failed else 0


def store(name: str) -> bool:
    """Run one study at both sizes and write its file."""
    study, start = STUDIES[name], time.perf_counter()
    record = {
        "study": name,
        "command": f"python docs/_studies {name}",
        "seed": data.SEED,
        "spec": SPEC_VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "parameters": study.FULL,
        "small_parameters": study.SMALL,
        "small": study.run(**study.SMALL),
        "results": study.run(**study.FULL),
    }
    record["seconds"] = round(time.perf_counter() - start)
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(record), indent=1) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
    print(f"{name}: stored after {record['seconds']} s", flush=True)
    return True


def check(name: str) -> bool:
    """Repeat one study at small size and compare it with the stored run."""
    study = STUDIES[name]
    stored = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    wrong = []
    for part, parameters in (("parameters", study.FULL), ("small_parameters", study.SMALL)):
        wrong += _differences(part, stored[part], json.loads(json.dumps(parameters)))
    again = json.loads(json.dumps(_rounded(study.run(**study.SMALL))))
    wrong += _differences("small", stored["small"], again)
    for line in wrong:
        print(f"{name}: {line}; run 'python docs/_studies {name}'")
    print(f"{name}: {'differs from what is stored' if wrong else 'as stored'}", flush=True)
    return not wrong


def _differences(path: str, stored: Any, now: Any) -> list[str]:
    """Return a line per number or name that is not the same."""
    if isinstance(stored, dict) and isinstance(now, dict) and stored.keys() == now.keys():
        return [
            line for key in now for line in _differences(f"{path}.{key}", stored[key], now[key])
        ]
    if isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now):
        pairs = enumerate(zip(stored, now, strict=True))
        return [line for i, (a, b) in pairs for line in _differences(f"{path}.{i}", a, b)]
    if isinstance(stored, float) and isinstance(now, float):
        same = math.isclose(stored, now, rel_tol=RELATIVE, abs_tol=RELATIVE)
    else:
        same = stored == now
    return [] if same else [f"{path} is stored as {stored!r} and now is {now!r}"]


def _rounded(value: Any) -> Any:
    """Round floats to six digits, so that files stay readable."""
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
