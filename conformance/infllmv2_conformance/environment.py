"""Where a run took place: versions, machine, device."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "numpy", "hypothesis", "pytest", "triton", "cupy-cuda12x", "cupy-cuda13x")


def describe_environment() -> dict[str, Any]:
    """Return plain data about Python, the packages that matter, the machine and its GPUs."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "packages": {name: v for name in PACKAGES if (v := package_version(name))},
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def package_version(name: str = "infllmv2-conformance") -> str | None:
    """Return the version of an installed package, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
