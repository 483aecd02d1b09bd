"""Ask the judges after every rule whether they still tell right from wrong."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .arguments import arguments
from .capabilities import Arithmetic
from .cases import Case
from .failure import ConformanceFailure, Finding
from .inputs import build_inputs
from .judges import judge
from .oracle import Oracle

_CASE = Case(sequences=((3, 60),), head_dim=8, block_size=4, kernel_size=4, kernel_stride=2)


def check_judges() -> None:
    """Fail unless the judges refuse wrong results and admit right ones.

    It is asked after the calls of a rule, in case that one of them has changed a comparison.
    """
    for question in _QUESTIONS:
        for answer in question.wrong:
            if not question.refuses(answer):
                _give_up(f"a wrong result of {question.function} is accepted")
        if question.refuses(question.right):
            _give_up(f"a right result of {question.function} is refused")


def _give_up(how: str) -> None:
    what = f"the suite cannot judge any more, something has changed it: {how}"
    raise ConformanceFailure(Finding(what))


@dataclass(frozen=True)
class _Question:
    """Hold a function of the contract, with a right result and wrong ones on the CPU."""

    function: str

    @cached_property
    def oracle(self) -> Oracle:
        return Oracle(_CASE, build_inputs(_CASE, torch.device("cpu")), Arithmetic())

    @cached_property
    def given(self) -> dict[str, Any]:
        return arguments(self.function, self.oracle.inputs, self.oracle)

    @cached_property
    def right(self) -> Tensor:
        if self.function == "attend":
            return self.oracle.attend(self.oracle.spans[0], self.given["selected"])[0].value.float()
        if self.function == "pool_blocks":
            return self.oracle.block_scores[0].value.float()
        return self.oracle.selected[0]

    @cached_property
    def wrong(self) -> list[Tensor]:
        if self.function == "attend":
            return [self.right * factor for factor in (1 + 2**-6, torch.nan)]
        if self.function == "pool_blocks":
            return [self.right * (1 + 2**-20)]
        other = self.right.clone()
        other[..., 1] = 1 if self.right[0, 0, 1] != 1 else 2
        return [other]

    def refuses(self, answer: Tensor) -> bool:
        try:
            judge(
                self.function,
                (answer, None),
                self.oracle.spans[0],
                self.oracle,
                self.given,
                lambda _: None,
            )
        except ConformanceFailure:
            return True
        return False


_QUESTIONS = [_Question(name) for name in ("attend", "pool_blocks", "select_blocks", "select")]
