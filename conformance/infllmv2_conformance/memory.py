"""Remember results of the oracle, while many implementations are run on the same cases.

Off unless `remember` or `remembering` is called: a check of one implementation meets hardly any input twice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from torch import Tensor

from .guards import fingerprint

P = ParamSpec("P")
R = TypeVar("R")


class Memory:
    """Keep the results that were used last, up to a number of bytes.

    Args:
        limit: bytes of the tensors that are kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def recall(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return what was kept under `key`, or compute it and keep it."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        result = compute()
        size = _bytes(result)
        self._kept[key] = result, size
        self.used += size
        while self.used > self.limit:
            _, (_, freed) = self._kept.popitem(last=False)
            self.used -= freed
        return result


_memories: list[Memory] = []


def remember(limit: int) -> None:
    """Let `remembered` functions of this process keep up to `limit` bytes; 0 ends it."""
    _memories[:] = [Memory(limit)] if limit else []


@contextmanager
def remembering(limit: int) -> Generator[None]:
    """Let `remembered` functions keep up to `limit` bytes for a while."""
    before = list(_memories)
    remember(limit)
    try:
        yield
    finally:
        _memories[:] = before


def remembered(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function return an earlier result for the same arguments, if `remember` was called.

    Tensors are told by their content. Nobody may change a result in place.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _memories:
            return function(*args, **kwargs)
        given = *args, *sorted(kwargs.items())
        key = function.__module__, function.__qualname__, *map(_key, given)
        return _memories[0].recall(key, lambda: function(*args, **kwargs))

    return call


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return fingerprint(value)
    if isinstance(value, tuple):
        return tuple(_key(x) for x in cast("tuple[Any, ...]", value))
    return value


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, (tuple, list)):
        return sum(_bytes(x) for x in cast("list[Any]", value))
    if is_dataclass(value):
        return sum(_bytes(getattr(value, f.name)) for f in fields(value))
    return 0
