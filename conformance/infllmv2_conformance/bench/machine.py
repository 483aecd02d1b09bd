"""Where a benchmark ran: what `environment.py` says, and the GPU's driver, clocks and limits."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from infllmv2_conformance.environment import describe_environment

COMMIT_VARIABLE = "INFLLMV2_COMMIT"
"""Names the commit where the sources are not in a git repository."""
_QUERY = {
    "name": "name",
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "sm_clock_limit_mhz": "clocks.max.sm",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return plain data about the machine, the software, the commit and the device in use."""
    facts = describe_environment() | {"threads": torch.get_num_threads(), **read_commit()}
    facts["device"] = device.type
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            **read_gpu(device),
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
        }
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def read_gpu(device: torch.device) -> dict[str, Any]:
    """Read driver, clocks, temperature and power as they are now; nothing is ever set."""
    if device.type != "cuda":
        return {}
    uuid: Any = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    name = f"GPU-{uuid}" if uuid else str(device.index or 0)
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY.values())}", f"--id={name}"]
    command.append("--format=csv,noheader,nounits")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [_number(word) for word in done.stdout.strip().split("\n")[0].split(", ")]
    return dict(zip(_QUERY, values, strict=False))


def read_commit() -> dict[str, Any]:
    """Return the commit of these sources, and whether they differ from it; None if unknown."""
    if os.environ.get(COMMIT_VARIABLE):
        return {"commit": os.environ[COMMIT_VARIABLE], "changed": None}
    here = Path(__file__).parent
    if _git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"commit": None, "changed": None}
    status = _git(here, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(here, "rev-parse", "HEAD"), "changed": bool(status)}


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _number(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word
