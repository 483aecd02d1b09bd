"""What a mutant is: one small, named change to a correct implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Call = Callable[..., Any]


@dataclass(frozen=True)
class Edit:
    """Replace one piece of a source file.

    Args:
        module: the file's name without `.py`, in the package that is mutated.
        before: text that occurs in it exactly once.
        after: what stands there instead.
    """

    module: str
    before: str
    after: str


@dataclass(frozen=True)
class Around:
    """Replace contract functions by others that call them.

    Args:
        functions: names of the contract functions.
        body: called with the function and its keyword arguments, as a mapping that it may change;
            what it returns is the result.
        fresh: whether `body` is a maker of bodies, one for each mutant built: for those with state.
        backward: whether gradients alone are changed.
    """

    functions: tuple[str, ...]
    body: Callable[..., Any]
    fresh: bool = False
    backward: bool = False

    def __call__(self, target: object) -> object:
        """Return `target` with the functions replaced."""
        body = self.body() if self.fresh else self.body
        return Composite(target, {n: _bind(body, getattr(target, n)) for n in self.functions})


class Composite:
    """An implementation made of another one, with some of its functions replaced."""

    def __init__(self, target: object, functions: Mapping[str, Call]) -> None:
        self._target, self._functions = target, dict(functions)

    def __getattr__(self, name: str) -> Any:
        """Return a replaced function, or else what the other implementation has."""
        if name.startswith("_"):
            raise AttributeError(name)
        return self._functions.get(name) or getattr(self._target, name)


def _bind(body: Callable[..., Any], inner: Call) -> Call:
    def call(**arguments: Any) -> Any:
        return body(inner, arguments)

    return call


@dataclass(frozen=True)
class Mutant:
    """Describe a wrong implementation.

    Args:
        id: stage and name, for example "attend.diagonal-mask".
        rule: the rule that must kill it.
        sentence: what is changed.
        seen: where such a fault is seen in practice.
        edits: changes of source text.
        wrap: a change that is no edit, for faults of how a function is called.
        functions: the contract functions that are changed, all unless given: a fault in a fused
            kernel alone.
        function: the function that a `contract.*` rule is applied to.
        claims: capabilities that it claims otherwise than the original.
        base: the original that is changed: "eager", or "triton", the small kernels of `kernels/`.
    """

    id: str
    rule: str
    sentence: str
    seen: str
    edits: tuple[Edit, ...] = ()
    wrap: Around | None = None
    functions: tuple[str, ...] = ()
    function: str = ""
    claims: Mapping[str, Any] = field(default_factory=dict[str, Any])
    base: str = "eager"

    @property
    def stage(self) -> str:
        """Return the stage at which it must be killed."""
        return self.rule.split(".")[0]
