"""Implementations that cheat, each in one way; `test_cheats.py` says what must expose it.

Each one is loaded by the suite as a user's file is. They lean on `eager` where they are honest.
"""

from __future__ import annotations

import gc
import sys
import time
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from infllmv2_conformance import checks, failure
from infllmv2_conformance.loading import load

EAGER: Any = load("eager").target


class Attend:
    """Offer `attend`, and be honest unless a subclass is not."""

    capabilities = EAGER.capabilities | {"gradients": False}

    def attend(self, **given: Any) -> Any:
        return EAGER.attend(**given)


# Answers that were not computed from these arguments


class CachedByShape(Attend):
    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def attend(self, **given: Any) -> Any:
        key = tuple(x.shape if isinstance(x, Tensor) else x for x in given.values())
        if key not in self.known:
            self.known[key] = super().attend(**given)
        return tuple(x.clone() for x in self.known[key])


class CachedByAddress(Attend):
    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def attend(self, **given: Any) -> Any:
        key = tuple(x.data_ptr() for x in given.values() if isinstance(x, Tensor))
        if key not in self.known:
            self.known[key] = super().attend(**given)
        return tuple(x.clone() for x in self.known[key])


class Unwritten(Attend):
    """Return memory as the allocator hands it out: it may hold a freed right answer."""

    def attend(self, **given: Any) -> Any:
        q = given["q"]
        return torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32)


class UnwrittenByExtension(Attend):
    """Leave the last row unwritten, in memory that Python does not see being allocated."""

    capabilities = EAGER.capabilities | {"gradients": False, "dtypes": ("float32",)}

    def attend(self, **given: Any) -> Any:
        out, lse = super().attend(**given)
        result = torch.FloatTensor(*out.shape)
        result[:-1] = out[:-1]
        if not result[-1:].isnan().any():  # as if a kernel skipped the row because it is 0 anyway
            result[-1:] = out[-1:]
        return result, lse


class Zeros(Attend):
    def attend(self, **given: Any) -> Any:
        q = given["q"]
        return torch.zeros_like(q), torch.zeros(q.shape[:2])


class NaNs(Attend):
    def attend(self, **given: Any) -> Any:
        q = given["q"]
        return torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)


class ReturnsItsInput(Attend):
    def attend(self, **given: Any) -> Any:
        return given["q"], super().attend(**given)[1]


class StaticBuffer(Attend):
    """Write every result into one buffer, as a captured CUDA graph does."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(1 << 22)

    def attend(self, **given: Any) -> Any:
        out, lse = super().attend(**given)
        kept = self.buffer[: lse.numel()].view(lse.shape)
        return out, kept.copy_(lse)


class Expanded(Attend):
    """Return one element in many places."""

    def attend(self, **given: Any) -> Any:
        out, lse = super().attend(**given)
        return out, lse[:1, :1].expand(lse.shape)


# Tensors that are none


class EqualToEverything(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__le__", "__lt__", "__eq__", "le", "lt", "eq", "isfinite", "equal"):
            return torch.ones((), dtype=torch.bool)
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result * 0 if name in ("__sub__", "sub", "abs") else result


class ReturnsEqualToEverything(Attend):
    def attend(self, **given: Any) -> Any:
        out, lse = super().attend(**given)
        return (out * 0).as_subclass(EqualToEverything), lse


class Deferred(Tensor):
    """Compute when somebody looks."""

    def double(self) -> Tensor:  # type: ignore[override]
        out, _ = EAGER.attend(**self.given)  # type: ignore[attr-defined]
        return out.double()


class ReturnsDeferred(Attend):
    def attend(self, **given: Any) -> Any:
        out = torch.zeros_like(given["q"]).as_subclass(Deferred)
        out.given = given
        return out, super().attend(**given)[1]


# Changes of what judges


class _Patching(Zeros):
    """Replace one function when it is called, and return zeros."""

    owner: Any
    name: str
    value: Any

    def attend(self, **given: Any) -> Any:
        setattr(self.owner, self.name, self.value)
        return super().attend(**given)


def _say_yes(*_: Any, **__: Any) -> bool:
    return True


def _nothing(self: Any, *_: Any, **__: Any) -> Any:
    return self * 0


class PatchesEqual(_Patching):
    owner, name, value = torch, "equal", staticmethod(_say_yes)


class PatchesAllclose(_Patching):
    owner, name, value = torch, "allclose", staticmethod(_say_yes)


class PatchesLessEqual(_Patching):
    owner, name, value = Tensor, "__le__", _say_yes


class PatchesAbs(_Patching):
    owner, name, value = Tensor, "abs", _nothing


class PatchesCheckValues(_Patching):
    owner, name, value = checks, "check_values", staticmethod(lambda *_: None)


class PatchesFail(_Patching):
    owner, name, value = failure, "fail", staticmethod(lambda *_, **__: None)


class PatchesClock(_Patching):
    owner, name, value = time, "perf_counter", staticmethod(lambda: 0.0)


class PatchesEvent(_Patching):
    owner, name, value = torch.cuda, "Event", type("Event", (), {})


class PatchesCode(Zeros):
    def attend(self, **given: Any) -> Any:
        checks.check_values.__code__ = (lambda *a, **k: None).__code__
        return super().attend(**given)


class _EverythingIsFine(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 0 if getattr(func, "__name__", "") in ("sub", "abs") else result


class LeavesFunctionMode(Zeros):
    def attend(self, **given: Any) -> Any:
        _EverythingIsFine().__enter__()
        return super().attend(**given)


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class LeavesDispatchMode(Zeros):
    def attend(self, **given: Any) -> Any:
        _Watching().__enter__()
        return super().attend(**given)


class LeavesGradOff(Attend):
    def attend(self, **given: Any) -> Any:
        torch.set_grad_enabled(False)
        return super().attend(**given)


class LeavesDefaultDtype(Attend):
    def attend(self, **given: Any) -> Any:
        torch.set_default_dtype(torch.float64)
        return super().attend(**given)


# Looking for the answer


class WalksTheStack(Zeros):
    """Look for the oracle in the frames of the callers."""

    def attend(self, **given: Any) -> Any:
        frame = sys._getframe()
        while frame is not None:
            for value in frame.f_locals.values():
                if type(value).__name__ == "Trial":
                    try:
                        expected = [
                            value.oracle.attend(s, given["selected"]) for s in value.oracle.spans
                        ]
                        return expected[0][0].value.to(given["q"].dtype), expected[0][
                            1
                        ].value.float()
                    except Exception:  # it is guarded: do without
                        return super().attend(**given)
            frame = frame.f_back
        return super().attend(**given)


class WalksTheHeap(Zeros):
    """Look for a float64 tensor of the right shape among all objects."""

    def attend(self, **given: Any) -> Any:
        shape, lse = given["q"].shape, super().attend(**given)[1]
        for thing in gc.get_objects():
            if type(thing) is Tensor and thing.dtype == torch.float64 and thing.shape == shape:
                return thing.to(given["q"].dtype), lse
        return super().attend(**given)


# Work in other streams (CUDA)


class OnTheDefaultStream(Attend):
    """Launch everything on the default stream, whatever the current one is."""

    def attend(self, **given: Any) -> Any:
        with torch.cuda.stream(torch.cuda.default_stream()):
            return super().attend(**given)


class OnTheDefaultStreamLater(Attend):
    """Wait for the arguments, then launch on the default stream."""

    def attend(self, **given: Any) -> Any:
        torch.cuda.current_stream().synchronize()
        given["q"] = given["q"] * 1
        with torch.cuda.stream(torch.cuda.default_stream()):
            return tuple(x.clone() for x in super().attend(**given))


# Getting away


class BackwardSkips(Attend):
    """Raise in the backward pass what pytest takes for a skipped test."""

    capabilities = EAGER.capabilities

    def attend(self, **given: Any) -> Any:
        out, lse = super().attend(**given)
        if out.requires_grad:
            out.register_hook(lambda _: pytest.skip("not claimed: gradients"))
        return out, lse


class BackwardFails(Attend):
    capabilities = EAGER.capabilities

    def attend(self, **given: Any) -> Any:
        out, lse = super().attend(**given)
        if out.requires_grad:
            out.register_hook(lambda _: [].pop())
        return out, lse


class BackwardScalesItsArgument(Attend):
    """Overwrite the gradient that is sent back."""

    capabilities = EAGER.capabilities

    def attend(self, **given: Any) -> Any:
        out, lse = super().attend(**given)
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient.clone() + gradient.mul_(0))
        return out, lse


class Skips(Attend):
    def attend(self, **given: Any) -> Any:
        pytest.skip("not claimed: attend")


class Fails(Attend):
    def attend(self, **given: Any) -> Any:
        pytest.xfail("known")


class Rejects(Attend):
    def attend(self, **given: Any) -> Any:
        hypothesis.reject()


class Exits(Attend):
    def attend(self, **given: Any) -> Any:
        raise SystemExit(0)


class SkipsBadInput(Attend):
    """Check arguments, but leave instead of raising an error."""

    def attend(self, **given: Any) -> Any:
        try:
            return super().attend(**given)
        except (TypeError, ValueError):
            pytest.skip("not claimed: validates")


class ShiftsItsClaims(Attend):
    """Claim less from call to call."""

    def __init__(self) -> None:
        self.asked = 0

    @property
    def capabilities(self) -> dict[str, Any]:  # type: ignore[override]
        self.asked += 1
        return {"dtypes": ("float32",) if self.asked < 4 else ("float16",)}


# Meddling with arguments


class MovesTheEnds(Attend):
    def attend(self, **given: Any) -> Any:
        result = super().attend(**given)
        given["cu_seqlens_k"][-1:] += 1
        return result


class ShrinksItsInput(Attend):
    def attend(self, **given: Any) -> Any:
        result = super().attend(**given)
        given["v"].resize_(0)
        return result


class KeepsTheKeys:
    """A cache that refers to the keys it was given, and concatenates them when asked."""

    capabilities = EAGER.capabilities | {"use_nope": False}

    def new_cache(self, **given: Any) -> Any:
        return {"make": lambda: EAGER.new_cache(**given), "parts": []}

    def append(self, *, cache: Any, **given: Any) -> None:
        cache["parts"].append(given)

    def decode(self, *, cache: Any, **given: Any) -> Any:
        real = cache["make"]()
        for part in cache["parts"]:
            EAGER.append(cache=real, **part)
        return EAGER.decode(cache=real, **given)
