"""Ask an implementation for its answers to vectors, as far as it claims what they need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infllmv2_conformance.candidate import Candidate
from infllmv2_conformance.capabilities import Arithmetic, Capabilities
from infllmv2_conformance.failure import fail
from infllmv2_conformance.programs import parse_steps
from infllmv2_conformance.rules import CACHE_FUNCTIONS

from .draw import Given
from .expected import ARITHMETIC, Expected
from .folder import Golden

Answers = dict[str, Tensor]
_DIGITS = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}


def unclaimed(golden: Golden, candidate: Candidate) -> str:
    """Return what an implementation lacks for a vector, or ""."""
    claims, case = candidate.capabilities, golden.vector.case
    offers = [f for f in functions(golden) if not candidate.offers(f)]
    if offers:
        return " and ".join(offers)
    coarse = _coarser(golden, claims.arithmetic)
    needs = (
        (coarse, not coarse),
        (f"dtype {case.dtype}", case.dtype in claims.dtypes),
        (
            f"head_dim {case.head_dim}",
            claims.head_dims is None or case.head_dim in claims.head_dims,
        ),
        (f"group {case.group}", claims.group_sizes is None or case.group in claims.group_sizes),
        (_config_words(golden), _supports(golden, claims)),
        ("packed", claims.packed or len(case.sequences) == 1),
        ("history", claims.history or not _has_history(golden)),
        ("empty_sequences", claims.empty_sequences or all(t and s for t, s in case.sequences)),
        ("gradients", claims.gradients or golden.vector.function != "attend_gradients"),
    )
    return next((what for what, met in needs if not met), "")


def functions(golden: Golden) -> tuple[str, ...]:
    """Return the contract functions that a vector calls."""
    function = golden.vector.function
    if function == "decode":
        resets = any(op == "r" for op, _ in parse_steps(golden.vector.case.steps))
        return (*CACHE_FUNCTIONS, "reset") if resets else CACHE_FUNCTIONS
    return ("attend",) if function == "attend_gradients" else (function,)


def _supports(golden: Golden, claims: Capabilities) -> bool:
    """Say whether the configuration is claimed, as far as the function reads it."""
    case = golden.vector.case
    if golden.vector.function in ("attend", "attend_gradients", "select_blocks"):
        return claims.block_sizes is None or case.block_size in claims.block_sizes
    if golden.vector.function == "compress_keys":
        kernel = (case.kernel_size, case.kernel_stride)
        return claims.windows is None or kernel in claims.windows
    return claims.supports(case.config)


def _config_words(golden: Golden) -> str:
    c = golden.vector.case
    words = f"block_size {c.block_size}, windows {c.kernel_size}/{c.kernel_stride}, lse {c.lse}"
    return f"{words}, pooling {c.pooling}{', use_nope' if c.use_nope else ''}"


def _has_history(golden: Golden) -> bool:
    stages = ("compress_keys", "decode")
    return golden.vector.function not in stages and any(
        t < s for t, s in golden.vector.case.sequences
    )


def _coarser(golden: Golden, declared: Arithmetic) -> str:
    """Return which part of the declared arithmetic the stored bounds do not allow for, or ""."""
    function, dtype = golden.vector.function, golden.vector.case.dtype
    probabilities = dtype if declared.probabilities == "input" else declared.probabilities
    wide = max(_DIGITS[declared.accumulate], _DIGITS[dtype])
    scored = function in ("score_windows", "score_blocks", "select", "attention", "decode")
    attended = function in ("attend", "attend_gradients", "attention", "decode")
    summed = scored or attended or function == "compress_keys"
    parts = (
        ("accumulate", summed and wide < _DIGITS[ARITHMETIC.accumulate]),
        ("products", dtype == "float32" and declared.products != "ieee"),
        ("probabilities", attended and _DIGITS[probabilities] < _DIGITS[dtype]),
        ("scores", scored and _DIGITS[declared.scores] < _DIGITS[ARITHMETIC.scores]),
        ("group_sum", function == "attend_gradients" and declared.group_sum != "accumulate"),
    )
    coarse = next((name for name, is_coarse in parts if is_coarse), "")
    return f"arithmetic.{coarse} as fine as the stored bounds assume" if coarse else ""


def answer(golden: Golden, candidate: Candidate, device: torch.device) -> Answers:
    """Call the function of a vector, and return its results by name, cut to their size.

    Raises:
        ConformanceFailure: the function raised, or what it returned has the wrong form.
    """
    given: Given = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in golden.given.items()
    }
    function = golden.vector.function
    if function == "attend_gradients":
        answers = _gradients(candidate, given)
    else:
        answers = (_decode if function == "decode" else _stage)(golden, candidate, given)
    return {e.name: _cut(answers[e.name], e) for e in golden.expected if e.name in answers}


def _stage(golden: Golden, candidate: Candidate, given: Given) -> Answers:
    case, function = golden.vector.case, golden.vector.function
    extra: dict[str, Any] = {"config": case.config}
    if function in ("compress_keys", "attend"):
        extra = {}
    result = candidate.call(function, **given, **extra)
    return _named(result, [e.name for e in golden.expected], function)


def _named(result: Any, names: list[str], function: str) -> Answers:
    """Give the parts of a result their names; an optional part may be None."""
    parts = result if isinstance(result, tuple) else (result,)
    if len(parts) != len(names):  # pyright: ignore[reportUnknownArgumentType]
        fail(f"{function} must return ({', '.join(names)})", actual=repr(type(result)))
    pairs: list[tuple[str, Any]] = list(zip(names, parts, strict=True))
    wrong = [n for n, x in pairs if not (x is None or isinstance(x, Tensor))]
    if wrong:
        fail(f"{function} must return a tensor as {wrong[0]}")
    return {name: x for name, x in pairs if x is not None}


def _gradients(candidate: Candidate, given: Given) -> Answers:
    sent = given.pop("grad_out")
    leaves = {n: given[n].clone().requires_grad_() for n in ("q", "k", "v")}
    out = candidate.call_on("attend", **(given | leaves))[0]
    if not out.requires_grad:
        fail("the output is not differentiable, although gradients are claimed")
    try:
        out.backward(sent)
    except RuntimeError as error:
        fail(f"the backward pass raised {type(error).__name__}: {error}")
    return {
        f"grad_{n}": torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()
    }


def _decode(golden: Golden, candidate: Candidate, given: Given) -> Answers:
    case, answers = golden.vector.case, Answers()
    cache = candidate.call(
        "new_cache",
        batch=given["batch"],
        max_seqlen_k=given["max_seqlen_k"],
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=given["0.k"].dtype,
        device=given["0.k"].device,
        config=case.config,
    )
    names = {"a": "append", "d": "decode", "r": "reset"}
    for i, (op, counts) in enumerate(parse_steps(case.steps)):
        prefix = f"{i}."
        own = {n.removeprefix(prefix): x for n, x in given.items() if n.startswith(prefix)}
        if op == "r":
            own = {"lengths": own["lengths"].tolist()}
        else:
            own["max_seqlen" if op == "a" else "max_seqlen_q"] = max(counts)
        result = candidate.call(names[op], cache=cache, **own)
        if op == "d":
            answers |= _named(result, [f"{i}.{n}" for n in ("out", "lse", "selected")], "decode")
    return answers


def _cut(actual: Tensor, expected: Expected) -> Tensor:
    """Leave out padding: rows behind the last window, columns behind the last window or block."""
    if expected.check == "certificate" or actual.ndim != expected.tensors["value"].ndim:
        return actual
    axis = {"windows": 0, "scores": -1, "block_scores": -1}.get(expected.name)
    if axis is None:
        return actual
    size = expected.tensors["value"].shape[axis]
    return actual.narrow(axis, 0, min(size, actual.shape[axis]))
