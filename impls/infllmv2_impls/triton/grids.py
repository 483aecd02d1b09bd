"""How many programs a grid needs to keep a device busy."""

from __future__ import annotations

import functools

import torch

WITHOUT_GPU = 4
"""Multiprocessors that the interpreter is said to have: few, as it runs programs one by one."""


def programs_at_once(device: torch.device) -> int:
    """Return the number of multiprocessors of a device."""
    return _multiprocessors(device) if device.type == "cuda" else WITHOUT_GPU


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
