"""Settings of PyTorch that a call must leave alone: read them, compare them, put them back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


def _all() -> dict[str, Setting]:
    """Return what a call must leave as it was: how to read it, and how to set it."""
    cuda: dict[str, Setting] = {
        "the current CUDA device": (torch.cuda.current_device, torch.cuda.set_device),
        "the current CUDA stream": (torch.cuda.current_stream, torch.cuda.set_stream),
    }
    return _SETTINGS | (cuda if torch.cuda.is_initialized() else {})


def _precision() -> str:
    """Return how float32 matrices are multiplied; PyTorch refuses to say if that is mixed."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "mixed"


def _set_precision(value: str) -> None:
    torch.set_float32_matmul_precision("highest" if value == "mixed" else value)


_SETTINGS: dict[str, Setting] = {
    "the grad mode": (torch.is_grad_enabled, torch._C._set_grad_enabled),  # pyright: ignore
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "the precision of float32 products": (_precision, _set_precision),
    "the use of deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "autocast": (
        lambda: [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")],
        lambda on: [
            torch.set_autocast_enabled(device, value)
            for device, value in zip(("cpu", "cuda"), on, strict=True)
        ],
    ),
}


@dataclass(frozen=True)
class Settings:
    """Hold what settings were: their values by name, and how many modes were active."""

    values: dict[str, Any]
    depths: tuple[int, int]


def current() -> Settings:
    """Return the settings as they are."""
    return Settings({name: get() for name, (get, _) in _all().items()}, mode_depths())


def restore(before: Settings) -> list[str]:
    """Put settings and modes back, and return what was changed."""
    found = drop_modes(before.depths)
    for name, (get, put) in _all().items():
        if name in before.values and get() != before.values[name]:
            found.append(name)
            put(before.values[name])
    return found


def mode_depths() -> tuple[int, int]:
    """Return how many modes that see every operation are active, of both kinds."""
    c = torch._C  # pyright: ignore[reportPrivateUsage]
    return c._len_torch_function_stack(), c._len_torch_dispatch_stack()  # pyright: ignore


def drop_modes(depths: tuple[int, int]) -> list[str]:
    """End modes that were begun since `mode_depths` gave `depths`; return a word if there are."""
    c: Any = torch._C  # pyright: ignore[reportPrivateUsage]
    changed = mode_depths() != depths
    while c._len_torch_function_stack() > depths[0]:
        c._pop_torch_function_stack()
    while c._len_torch_dispatch_stack() > depths[1]:
        c._pop_torch_dispatch_stack(None)
    return ["a mode that sees every operation of PyTorch"] if changed else []
