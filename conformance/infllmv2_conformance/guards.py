"""Guards against results that are right by accident: poisoned memory, red zones, lent arguments.

An implementation never holds a tensor of the suite. Every call gets copies that lie between red
zones; afterwards they are compared with what was lent, and overwritten.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from infllmv2_reference import SparseConfig

from .failure import fail

_ALLOCATIONS: set[Any] = {
    torch.empty,
    torch.empty_like,
    torch.empty_permuted,
    torch.empty_strided,
    Tensor.new_empty,
    Tensor.new_empty_strided,
}
_RED_ZONE_ELEMENTS = 4096
_LARGE_INTEGER = 1 << 30
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Surroundings:
    """Say what memory holds that a result must not depend on.

    Args:
        fresh: what memory holds that the implementation allocates, or what fills it in.
        zones: what lies before and behind every argument.
    """

    fresh: float | Callable[[Tensor], None] = torch.nan
    zones: float = torch.nan


HOSTILE = Surroundings()
CALM = Surroundings(fresh=0.0, zones=0.0)


class PoisonedMemory(TorchFunctionMode):
    """Fill what `torch.empty` and its kin return, so that an element left unwritten shows.

    Allocations from compiled extensions are not seen: for those there is `prime`.

    Args:
        fresh: what floating memory holds, and integers a number derived from it; or what fills it.
    """

    def __init__(self, fresh: float | Callable[[Tensor], None]) -> None:
        super().__init__()
        self.fresh = fresh

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func` and overwrite what it allocated."""
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS and isinstance(result, Tensor):
            if callable(self.fresh):
                self.fresh(result)
            else:
                poison(result, self.fresh)
        return result


def poison(x: Tensor, fill: float) -> None:
    """Overwrite a tensor in place: floating ones with `fill`, integers with a matching number."""
    x.detach().fill_(_number_for(x.dtype, fill))


def prime(like: Iterable[Tensor], fill: float) -> None:
    """Leave blocks that hold `fill` to the allocator, of the sizes of some tensors.

    The next allocations of these sizes most likely get them, also those of compiled extensions.
    """
    blocks = [torch.full_like(x, _number_for(x.dtype, fill)) for x in like for _ in range(4)]
    del blocks


def stale(values: Iterable[Tensor]) -> Callable[[Tensor], None]:
    """Return a filling of fresh memory: with one of `values` if it has that size, else with 0.25.

    What a result is made of is then what another call left behind: plausible, and wrong.
    """
    by_size = {(x.numel(), x.dtype): x.detach().clone() for x in values}

    def fill(x: Tensor) -> None:
        old = by_size.get((x.numel(), x.dtype))
        if old is None:
            poison(x, 0.25)
        else:
            x.detach().copy_(old.reshape(x.shape))

    return fill


def fingerprint(x: Tensor) -> str:
    """Return a digest of a tensor's form and of every bit of its elements."""
    data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    form = f"{tuple(x.shape)} {x.stride()} {x.dtype} {x.device}"
    return hashlib.blake2b(data, digest_size=16).hexdigest() + form


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors of one shape and dtype agree in every bit."""
    bits = _BITS[a.element_size()]
    return torch.equal(a.detach().view(bits), b.detach().view(bits))


class RedZone:
    """Copy a tensor into the middle of a larger allocation, and see what becomes of it.

    Args:
        x: what is copied; `tensor` is the copy, with the strides of `x` unless elements overlap.
        fill: what lies around it and in its gaps, for floating numbers.
    """

    def __init__(self, x: Tensor, fill: float = torch.nan) -> None:
        self.original = x
        overlaps = any(stride == 0 and n > 1 for n, stride in zip(x.shape, x.stride(), strict=True))
        strides = x.contiguous().stride() if overlaps else x.stride()
        self._size = extent(x.shape, strides)
        shape = (self._size + 2 * _RED_ZONE_ELEMENTS,)
        number = _number_for(x.dtype, fill)
        self.buffer = torch.full(shape, number, dtype=x.dtype, device=x.device)
        self.tensor = self.buffer.as_strided(x.shape, strides, _RED_ZONE_ELEMENTS)
        self.tensor.copy_(x.detach())
        self._before = self.buffer.clone()
        self._form = self._describe()

    def check(self, name: str) -> None:
        """Fail if the copy, called `name`, or the memory around it has changed."""
        if self._describe() != self._form:
            fail(
                f"the argument {name} was given another form",
                expected=str(self._form[:-1]),
                actual=str(self._describe()[:-1]),
            )
        if same_bits(self.buffer, self._before):
            return
        middle = slice(_RED_ZONE_ELEMENTS, _RED_ZONE_ELEMENTS + self._size)
        if same_bits(self.buffer[middle], self._before[middle]):
            fail(f"memory next to the argument {name} was overwritten")
        fail(f"the argument {name} was modified")

    def spoil(self) -> None:
        """Overwrite the copy, as a caller may who needs the memory for something else."""
        poison(self.buffer, torch.nan)

    def _describe(self) -> tuple[object, ...]:
        x = self.tensor
        return tuple(x.shape), x.stride(), x.dtype, x.data_ptr()


class Loan:
    """Lend the arguments of one call.

    Args:
        given: arguments by name; `arguments` holds copies of the tensors, lists and parameters.
        fill: what lies around the tensors.
    """

    def __init__(self, given: dict[str, Any], fill: float = torch.nan) -> None:
        self.zones = {n: RedZone(x, fill) for n, x in given.items() if isinstance(x, Tensor)}
        self._lists = {n: list(x) for n, x in given.items() if isinstance(x, list)}
        self.arguments = {n: _copy(x) for n, x in given.items()}
        self.arguments |= {n: zone.tensor for n, zone in self.zones.items()}

    def check(self) -> None:
        """Fail if an argument was modified, or memory next to it."""
        for name, zone in self.zones.items():
            zone.check(name)
        for name, before in self._lists.items():
            if self.arguments[name] != before:
                fail(f"the argument {name} was modified", actual=repr(self.arguments[name]))

    def spoil(self) -> None:
        """Overwrite what was lent: an implementation must not need it any more."""
        for zone in self.zones.values():
            zone.spoil()


def extent(shape: Iterable[int], strides: Iterable[int]) -> int:
    """Return how many elements lie between the first and the last one, both included."""
    shape = tuple(shape)
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _copy(value: Any) -> Any:
    if isinstance(value, list):
        return list(value)  # pyright: ignore[reportUnknownVariableType]
    return replace(value) if type(value) is SparseConfig else value


def _number_for(dtype: torch.dtype, fill: float) -> float | int | bool:
    """Return `fill`, or for integers 0 if it is a number, and a large one that no index has."""
    if dtype.is_floating_point:
        return fill
    if dtype == torch.bool:
        return False
    return 0 if fill == fill else min(_LARGE_INTEGER, torch.iinfo(dtype).max // 2)
