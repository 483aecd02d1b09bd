"""The implementation under test, as the suite holds it: called by keyword, failures caught."""

from __future__ import annotations

import traceback
from typing import Any, NoReturn

import torch

from .capabilities import Capabilities
from .failure import fail


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

    def offers(self, function: str) -> bool:
        """Say whether the implementation has this function of the contract."""
        return callable(getattr(self.target, function, None))

    def call(self, function: str, **arguments: Any) -> Any:
        """Call a function of the contract and wait for the device.

        Raises:
            ConformanceFailure: the function raised; whatever it raised is the cause.
        """
        try:
            result = getattr(self.target, function)(**arguments)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except (Exception, SystemExit) as error:
            _report(function, error)
        return result

    def call_unguarded(self, function: str, **arguments: Any) -> Any:
        """Call a function of the contract and let its errors through, for rules about errors."""
        return getattr(self.target, function)(**arguments)


def _report(function: str, error: BaseException) -> NoReturn:
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"
    first_line = next(iter(str(error).splitlines()), "")
    summary = f"{type(error).__name__}: {first_line}".strip(": ")
    fail(f"{function} raised {summary}", where={"raised at": place}, expected="a result")
    raise AssertionError("unreachable") from error
