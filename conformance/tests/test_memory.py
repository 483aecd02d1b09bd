from __future__ import annotations

import torch

from infllmv2_conformance.cases import Case
from infllmv2_conformance.inputs import build_inputs
from infllmv2_conformance.memory import remembered, remembering

CALLS: list[int] = []


@remembered
def double(x: torch.Tensor, times: int = 2) -> torch.Tensor:
    CALLS.append(times)
    return x * times


def count(limit: int, *tensors: torch.Tensor) -> int:
    CALLS.clear()
    with remembering(limit):
        for x in tensors:
            assert torch.equal(double(x), x * 2)
    return len(CALLS)


def test_off_unless_asked_for():
    CALLS.clear()
    double(torch.ones(2))
    double(torch.ones(2))
    assert len(CALLS) == 2


def test_tensors_are_told_by_content():
    x = torch.ones(2)
    assert count(1 << 10, x, x.clone()) == 1
    assert count(1 << 10, x, x + 1, x.double(), x.view(1, 2)) == 4


def test_keeps_the_last_used_up_to_a_limit():
    a, b, c = (torch.full((100,), float(i)) for i in range(3))  # 400 bytes each
    assert count(900, a, b, a, c, a) == 3  # c drives out b, not a
    assert count(900, a, b, c, a) == 4


def test_inputs_are_copies():
    case = Case(((3, 5),))
    with remembering(1 << 20):
        first = build_inputs(case, torch.device("cpu"))
        kept = first.q.clone()
        first.q.zero_()
        again = build_inputs(case, torch.device("cpu"))
    assert torch.equal(again.q, kept)
