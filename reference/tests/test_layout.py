"""Packed batches: every malformed one is refused, in words that name the argument."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from infllmv2_reference.layout import check_cu_seqlens, check_packed, cu_seqlens_of


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "max_q", "max_k"),
    [
        (int32(0), int32(0), 0, 0),  # an empty batch
        (int32(0, 0), int32(0, 0), 0, 0),  # an empty sequence
        (int32(0, 0, 0), int32(0, 5, 5), 0, 5),  # keys without queries
        (int32(0, 3, 3, 4), int32(0, 3, 3, 8), 3, 5),
        (int32(0, 3), int32(0, 3), 100, 100),  # a maximum may be larger than needed
    ],
)
def test_legal_batches(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    check_packed(cu_q, cu_k, max_q, max_k)


GOOD = int32(0, 2, 5)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (GOOD.long(), TypeError, "{} must be int32, but it is torch.int64"),
        (GOOD.float(), TypeError, "{} must be int32, but it is torch.float32"),
        (GOOD[None], ValueError, "{} must have shape [batch + 1], but it has [1, 3]"),
        (GOOD[0], ValueError, "{} must have shape [batch + 1], but it has []"),
        (GOOD[:0], ValueError, "{} must have shape [batch + 1], but it has [0]"),
        (int32(1, 2, 5), ValueError, "{} must start at 0 and never fall, but it is [1, 2, 5]"),
        (int32(0, 5, 2), ValueError, "{} must start at 0 and never fall, but it is [0, 5, 2]"),
    ],
)
def test_malformed_lengths(name: str, bad: Tensor, error: type[Exception], message: str) -> None:
    arguments = {"cu_seqlens_q": GOOD, "cu_seqlens_k": GOOD} | {name: bad}
    with pytest.raises(error) as raised:
        check_packed(**arguments, max_seqlen_q=9, max_seqlen_k=9)
    assert str(raised.value) == message.format(name)


@pytest.mark.parametrize("name", ["q", "k"])
def test_maximum_below_the_longest(name: str) -> None:
    maxima = {"max_seqlen_q": 3, "max_seqlen_k": 3} | {f"max_seqlen_{name}": 2}
    message = (
        rf"^max_seqlen_{name} must be at least the longest sequence of cu_seqlens_{name} \(3\), "
        r"but it is 2$"
    )
    with pytest.raises(ValueError, match=message):
        check_packed(GOOD, GOOD, **maxima)


def test_different_batch_sizes() -> None:
    message = r"^cu_seqlens_k must have as many entries as cu_seqlens_q \(3\), but it has 2$"
    with pytest.raises(ValueError, match=message):
        check_packed(GOOD, int32(0, 5), 9, 9)


def test_more_queries_than_keys() -> None:
    message = "no sequence more queries than keys, but sequence 1 has 3 queries and 2 keys$"
    with pytest.raises(ValueError, match=message):
        check_packed(int32(0, 2, 5), int32(0, 4, 6), 9, 9)


def test_one_argument_alone_is_checked_by_its_name() -> None:
    check_cu_seqlens("cu_seqlens", GOOD, 3, "max_seqlen")
    with pytest.raises(ValueError, match=r"^max_seqlen must be at least .* of cu_seqlens \(3\)"):
        check_cu_seqlens("cu_seqlens", GOOD, 2, "max_seqlen")


def test_cumulative_lengths() -> None:
    assert cu_seqlens_of([]).tolist() == [0]
    assert cu_seqlens_of([0, 4, 0, 1]).tolist() == [0, 0, 4, 4, 5]
    assert cu_seqlens_of([4]).dtype == torch.int32
