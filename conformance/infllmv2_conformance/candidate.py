"""The implementation under test, as the suite holds it: called by keyword, guarded, distrusted."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from . import integrity
from .capabilities import Capabilities
from .failure import fail
from .guards import HOSTILE, Loan, PoisonedMemory, Surroundings
from .returned import take


class Candidate:
    """Hold an implementation and what it claims.

    Args:
        name: what the user called it; `infllmv2 repro` finds it again by this name.
        target: the object with the functions of `protocol.Implementation`.
        capabilities: what it claims.
    """

    def __init__(self, name: str, target: object, capabilities: Capabilities) -> None:
        self.name = name
        self.target = target
        self.capabilities = capabilities
        self.surroundings = HOSTILE
        self.owns_interrupts = False
        """Whether a KeyboardInterrupt in a call is the implementation's, not the user's."""
        self._claims = copy.deepcopy(getattr(target, "capabilities", None))
        integrity.remember()

    def offers(self, function: str) -> bool:
        """Say whether the implementation has this function of the contract."""
        return callable(getattr(self.target, function, None))

    @contextmanager
    def surrounded(self, surroundings: Surroundings) -> Generator[None]:
        """Let memory that no result may depend on hold something else for a while."""
        before, self.surroundings = self.surroundings, surroundings
        try:
            yield
        finally:
            self.surroundings = before

    def call(self, function: str, **arguments: Any) -> Any:
        """Call a function of the contract with copies of its arguments, and copy the result.

        Raises:
            ConformanceFailure: the function raised, broke a promise about memory, or meddled.
        """
        loan = Loan(arguments, self.surroundings.zones)
        result = self._call(function, loan.arguments)
        loan.check()
        result = take(function, result, {n: zone.buffer for n, zone in loan.zones.items()})
        loan.spoil()
        return result

    def call_on(self, function: str, **arguments: Any) -> Any:
        """Call a function with these very tensors and return what it returns, uncopied.

        For rules about addresses, and about gradients of the arguments.
        """
        return self._call(function, arguments)

    def call_unguarded(self, function: str, **arguments: Any) -> Any:
        """Call a function and do nothing else, for what is timed."""
        return getattr(self.target, function)(**arguments)

    def error_of(self, function: str, **arguments: Any) -> Exception | None:
        """Call a function with bad arguments and return what it raised, for rules about errors."""
        try:
            getattr(self.target, function)(**arguments)
        except Exception as error:
            return error
        except BaseException as error:
            self._blame(function, error)
        return None

    def call_unfinished(self, function: str, **arguments: Any) -> Any:
        """Do as `call_on`, but do not wait for the device, for rules about streams."""
        return self._call(function, arguments, wait=False)

    def guarded(self, what: str, action: Callable[[], Any], *, wait: bool = True) -> Any:
        """Run code of the implementation, wait for the device, and see what it has left behind.

        Raises:
            ConformanceFailure: it raised; whatever it raised is the cause. Or it meddled.
        """
        with integrity.watch():
            try:
                with PoisonedMemory(self.surroundings.fresh):
                    result = action()
                if wait and torch.cuda.is_available():
                    torch.cuda.synchronize()
            except BaseException as error:
                self._blame(what, error)
        return result

    def _call(self, function: str, arguments: dict[str, Any], *, wait: bool = True) -> Any:
        def action() -> Any:
            return getattr(self.target, function)(**arguments)

        result = self.guarded(function, action, wait=wait)
        if getattr(self.target, "capabilities", None) != self._claims:
            fail(f"the capabilities changed during a call of {function}")
        return result

    def _blame(self, what: str, error: BaseException) -> NoReturn:
        """Report an error of the implementation; a user's Ctrl-C is none."""
        if isinstance(error, KeyboardInterrupt) and not self.owns_interrupts:
            raise error
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"
        summary = f"{type(error).__name__}: {_first_line(error)}".strip(": ")
        fail(f"{what} raised {summary}", where={"raised at": place}, expected="a result")
        raise AssertionError("unreachable") from error


def _first_line(error: BaseException) -> str:
    try:
        return next(iter(str(error).splitlines()), "")
    except Exception:
        return "its message cannot be printed"
