"""Turn what a user wrote into what is timed: names become candidates, words become a `Wish`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from infllmv2_conformance.candidate import Candidate
from infllmv2_conformance.device import choose_device
from infllmv2_conformance.errors import UsageError
from infllmv2_conformance.loading import load
from infllmv2_conformance.names import FUNCTIONS, check_names

from .baselines import BACKENDS
from .session import Wish, default_baselines
from .words import INPUTS, TASKS
from .workloads import SHAPES, parse_lengths

L2 = {"cold": ("cold",), "hot": ("hot",), "both": ("cold", "hot")}
DTYPES = ("bfloat16", "float16", "float32")
EFFORT = {"cuda": 2.0, "cpu": 0.2}
"""Seconds of rounds for a workload, unless others are asked for."""
NONE = "none"
DEFAULTS = {
    "cuda": {
        "lengths": "8k,16k,32k,64k,128k,256k,512k,1M",
        "shapes": "minicpm4,mha16,gqa8",
        "batches": "1,16",
        "dtype": "bfloat16",
    },
    "cpu": {"lengths": "128,256", "shapes": "tiny", "batches": "1,4", "dtype": "float32"},
}


def make_candidates(names: list[str], device: str | None) -> tuple[list[Candidate], torch.device]:
    """Load implementations and choose the device: a GPU if there is one that they take.

    Raises:
        UsageError: one cannot be loaded, or does not run there.
    """
    candidates = [load(name) for name in dict.fromkeys(names)]
    claims = candidates[0].capabilities
    if device is None and torch.cuda.is_available() and "cuda" in claims.devices:
        device = "cuda"
    where = choose_device(claims, device)
    for candidate in candidates:
        choose_device(candidate.capabilities, where.type)
    return candidates, where


def make_wish(
    device: torch.device,
    names: list[str],
    *,
    lengths: str | None = None,
    shapes: str | None = None,
    budgets: str | None = None,
    inputs: str | None = None,
    tasks: str | None = None,
    batches: str | None = None,
    functions: str | None = None,
    baselines: str | None = None,
    l2: str | None = None,
    dtype: str | None = None,
    effort: float | None = None,
    **numbers: Any,
) -> Wish:
    """Read words such as `8k,32k`; what is None has the default of the device.

    Raises:
        UsageError: a word means nothing.
    """
    defaults = DEFAULTS[device.type]
    check_names("l2", [l2] if l2 else None, L2)
    others = _words(baselines) or default_baselines(device, names)
    models = _known("shape", shapes or defaults["shapes"], SHAPES)
    wish = Wish(
        shapes=tuple(SHAPES[name] for name in models),
        lengths=tuple(parse_lengths(lengths or defaults["lengths"])),
        budgets=_numbers("budgets", budgets),
        inputs=_known("input", inputs or ",".join(INPUTS), INPUTS),
        tasks=_known("task", tasks or ",".join(TASKS), TASKS),
        batches=_numbers("batches", batches or defaults["batches"]),
        functions=_known("function", functions or "", FUNCTIONS),
        baselines=tuple(n for n in others if n != NONE and n not in names),
        l2=L2[l2 or "cold"],
        dtype=_known("dtype", dtype or defaults["dtype"], DTYPES)[0],
        effort=EFFORT[device.type] if effort is None else effort,
        **numbers,
    )
    for name in wish.baselines:
        if name not in BACKENDS:
            load(name)  # a wrong name is found before anything runs
    for workload in wish.workloads():
        _ = workload.config  # and so is a budget that does not hold the forced blocks
    return wish


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip()) if text else ()


def _known(what: str, text: str, known: Iterable[str]) -> tuple[str, ...]:
    words = _words(text)
    check_names(what, words, known)
    return words


def _numbers(what: str, text: str | None) -> tuple[int, ...]:
    words = _words(text)
    for word in words:
        if not word.isdecimal() or int(word) == 0:
            raise UsageError(f"{what} must be numbers such as 1,16, but one is {word!r}")
    return tuple(int(word) for word in words)
