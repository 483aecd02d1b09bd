"""Notice when an implementation has changed what judges it: functions, settings, the oracle.

This is no sandbox: code in the same process can always get round it. What is caught is accident,
laziness and the obvious tricks; `docs/testing.md` says which.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from operator import attrgetter, is_, itemgetter
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from . import settings
from .failure import fail


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PACKAGES = ("infllmv2_conformance", "infllmv2_reference")
_METHODS = _words("""
    __add__ __and__ __eq__ __float__ __ge__ __getitem__ __gt__ __invert__ __le__ __lt__ __mul__
    __ne__ __or__ __radd__ __rmul__ __rsub__ __setitem__ __sub__ __truediv__ abs all amax amin any
    argmax argsort clamp clone contiguous copy_ cpu cumsum data_ptr detach diff double
    element_size eq expand fill_ flatten float gather ge gt is_floating_point isfinite isinf isnan
    item le log logsumexp long lt masked_fill max min mul ne new_full nonzero numel
    repeat_interleave reshape scatter scatter_ softmax sort split squeeze storage_offset stride
    sub sum to tolist unflatten untyped_storage view where
""")
"""What the judges do with tensors."""
_FUNCTIONS = _words("""
    abs all allclose any arange argsort cat clone einsum empty equal eq exp finfo full full_like
    isclose isfinite isin isnan log maximum mean minimum promote_types rand randint randn stack
    tensor unravel_index where zeros zeros_like
""")
_ELSEWHERE: tuple[tuple[Any, str], ...] = (
    (torch.testing, "assert_close"),
    (torch.cuda, "synchronize"),
    (torch.cuda, "Event"),
    (torch.cuda.Event, "elapsed_time"),
    (torch.cuda.Event, "record"),
    (torch.cuda.Event, "synchronize"),
    (torch.cuda, "Stream"),
    (time, "monotonic"),
    (time, "perf_counter"),
    (time, "perf_counter_ns"),
    (time, "process_time"),
    (time, "time"),
    (sys, "exit"),
)
_NO_JUDGES = _words("""
    bench child cli environment loading memory mutants names plugin report supervisor terminal
""")
"""Modules of the suite that take no part in a verdict."""
_MISSING = object()
_CODE = attrgetter("__code__")
_KINDS = (FunctionType, BuiltinFunctionType, type, ModuleType, property, classmethod, staticmethod)


class _Owner:
    """Hold what a module or class had; it is compared often, so that is done at C speed."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.before: dict[str, Any] = {}
        self.absent: set[str] = set()
        self._read: Callable[[Any], tuple[Any, ...]] | None = None

    def note(self, name: str) -> Any:
        """Note an attribute, unless it is known, and return it."""
        if name not in self.before and name not in self.absent:
            value = vars(self.owner).get(name, _MISSING)
            if value is _MISSING:
                self.absent.add(name)
                return None
            self.before[name] = value
            self._read = None
        return self.before.get(name)

    def restore(self) -> list[str]:
        """Put back what is not as it was, and return its names."""
        now = vars(self.owner)
        if self._same(now) and not any(name in now for name in self.absent):
            return []
        changed = [n for n, value in self.before.items() if now.get(n, _MISSING) is not value]
        for name in changed:
            setattr(self.owner, name, self.before[name])
        added = [n for n in self.absent if n in now]
        for name in added:
            delattr(self.owner, name)
        return changed + added

    def _same(self, now: Any) -> bool:
        if self._read is None:
            self._read = itemgetter(*self.before, "__doc__")  # two names or more give a tuple
        try:
            return all(map(is_, self._read(now), self.before.values()))
        except KeyError:
            return False


_known: dict[int, _Owner] = {}
"""What modules and classes had, by their id."""
_codes: dict[FunctionType, Any] = {}
"""The code of each of our functions."""
_calls = {"running": 0, "asked": 0}


def remember() -> None:
    """Note what the suite is made of; what is known already stays as it was first seen."""
    for owner in dict.fromkeys(c for c in Tensor.__mro__ if c is not object):
        for name in _METHODS:
            _note(owner, name)
    for name in _FUNCTIONS:
        _note(torch, name)
    for owner, name in _ELSEWHERE:
        _note(owner, name)
    for name, module in list(sys.modules.items()):
        package, part = (*name.split("."), "")[:2]
        if package in PACKAGES and part not in _NO_JUDGES and id(module) not in _known:
            _note_all(module)


def changes() -> list[str]:
    """Return what is not as it was, and put it back."""
    found = [f"{_name(o.owner)}.{name}" for o in _known.values() for name in o.restore()]
    if not all(map(is_, map(_CODE, _codes), _codes.values())):
        for function in [f for f, code in _codes.items() if f.__code__ is not code]:
            found.append(f"the code of {function.__module__}.{function.__qualname__}")
            function.__code__ = _codes[function]
    return found


@contextmanager
def watch() -> Generator[None]:
    """Run a call of the implementation, and fail if it leaves something changed.

    Whatever it has changed is put back, also if it raises.
    """
    before = settings.current()
    asked = _calls["asked"]
    _calls["running"] += 1
    try:
        yield
    except BaseException:
        settings.restore(before)
        raise
    finally:
        _calls["running"] -= 1
    left, replaced = settings.restore(before), changes()
    if replaced:
        fail(
            f"the implementation replaced {replaced[0]}, which the suite judges with",
            count=len(replaced),
        )
    if left:
        fail(f"the implementation left {left[0]} changed", count=len(left))
    if _calls["asked"] > asked:
        fail("the implementation looked for the oracle's results during the call")


def refuse_during_call() -> None:
    """Raise if the implementation is running: nobody else may ask for the oracle's results then."""
    if _calls["running"]:
        _calls["asked"] += 1
        raise PermissionError("the oracle's results are not for the implementation")


def _note(owner: Any, name: str) -> None:
    value = _known.setdefault(id(owner), _Owner(owner)).note(name)
    if isinstance(value, FunctionType) and value.__module__.partition(".")[0] in PACKAGES:
        _codes.setdefault(value, value.__code__)


def _note_all(module: ModuleType) -> None:
    """Note the functions, classes and modules that a module of ours uses."""
    _note(module, "__name__")
    for name, value in list(vars(module).items()):
        if isinstance(value, _KINDS):
            _note(module, name)
        if isinstance(value, type) and value.__module__ == module.__name__:
            for attribute, member in list(vars(value).items()):
                if isinstance(member, _KINDS):
                    _note(value, attribute)


def _name(owner: Any) -> str:
    if isinstance(owner, ModuleType):
        return owner.__name__
    return "torch.Tensor" if issubclass(Tensor, owner) else f"{owner.__module__}.{owner.__name__}"
