"""Gradients flow through attending only; every floating dtype runs, and rounds little."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from infllmv2_reference import (
    SparseConfig,
    attend_blocks,
    attend_dense,
    attention,
    compress_for_selection,
    compress_keys,
    pool_blocks,
    score_windows,
    select_by_windows,
)

CONFIG = SparseConfig(
    block_size=8, kernel_size=4, kernel_stride=2, window_size=8, topk=3, dense_len=-1
)
NOPE = SparseConfig(
    block_size=8, kernel_size=4, kernel_stride=2, window_size=8, topk=3, dense_len=-1, use_nope=True
)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def draw(seed: int, *shape: int, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def draw_qkv(seed: int, num_keys: int, grad: bool = False) -> list[Tensor]:
    """Return a prefill with HQ = 4, HK = 2, D = 16."""
    return [draw(seed + i, num_keys, heads, 16, grad=grad) for i, heads in enumerate((4, 2, 2))]


def loss_gradients(tensors: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    """Return the gradients of a weighted sum of the finite elements."""
    total = sum((draw(9, *x.shape) * x).masked_fill(~x.isfinite(), 0).sum() for x in tensors)
    return list(torch.autograd.grad(total, inputs))


def test_gradients_are_those_of_the_formula() -> None:
    """Finite differences, of the output and of the LSE, with a row that attends nothing."""
    q, k, v = draw(0, 3, 2, 2, grad=True), draw(1, 6, 1, 2, grad=True), draw(2, 6, 1, 2, grad=True)
    selected = torch.tensor([[[0, 1, -1], [-1, -1, -1], [0, 2, -1]]], dtype=torch.int32)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attend_blocks(q, k, v, selected, block_size=2)
        return out, lse[[0, 2]]  # -inf in row 1 has no difference quotient

    assert torch.autograd.gradcheck(attend, (q, k, v))
    out, lse = attend_blocks(q, k, v, selected, block_size=2)
    assert out[1].eq(0).all()
    assert lse[1].eq(-torch.inf).all()


@pytest.mark.parametrize("budget", [0, 1, 4])
def test_a_row_that_attends_nothing_has_zero_gradient(budget: int) -> None:
    """Zero, not NaN, though its softmax has no terms."""
    q, k, v = draw_qkv(0, 6, grad=True)
    selected = torch.full((2, 6, budget), -1, dtype=torch.int32)
    out, lse = attend_blocks(q, k, v, selected, block_size=2)
    assert out.eq(0).all()
    with torch.autograd.set_detect_anomaly(True):  # nor is a NaN made on the way
        for gradient in torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True):
            assert gradient.eq(0).all()
        for gradient in torch.autograd.grad(lse.sum(), (q, k)):
            assert gradient.eq(0).all()


def test_tokens_that_are_not_attended_have_zero_gradient() -> None:
    """Unselected blocks, and tokens after the position in a selected one."""
    _, k, v = draw_qkv(0, 8, grad=True)
    q = draw(5, 2, 4, 16, grad=True)  # positions 6 and 7
    selected = torch.tensor([[[0, 3], [0, -1]], [[1, -1], [1, 2]]], dtype=torch.int32)
    attended = {0: [0, 1, 6], 1: [2, 3, 4, 5]}  # per kv head; token 7 is after position 6
    for gradient in loss_gradients(attend_blocks(q, k, v, selected, block_size=2), [k, v])[:2]:
        for head, tokens in attended.items():
            zero = gradient[:, head].eq(0).all(dim=-1)
            assert [t for t in range(8) if not zero[t]] == tokens


def test_the_selection_is_a_constant() -> None:
    """The gradients of the whole are those of attending what was selected."""
    q, k, v = draw_qkv(0, 70, grad=True)
    whole = attention(q, k, v, CONFIG)
    assert whole.selected is not None
    attended = attend_blocks(q, k, v, whole.selected, CONFIG.block_size)
    actual = loss_gradients((whole.out, whole.lse), [q, k, v])
    expected = loss_gradients(attended, [q, k, v])
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_selection_inputs_get_no_gradient() -> None:
    q, k, v = draw_qkv(0, 70)
    nope_q, nope_k, _ = draw_qkv(7, 70, grad=True)
    out, lse, selected = attention(q, k, v, NOPE, nope_q, nope_k)
    assert selected is not None
    assert not any(x.requires_grad for x in (out, lse, selected))
    k_c1, k_c2 = compress_for_selection(nope_k, NOPE)
    assert k_c1.requires_grad
    assert not select_by_windows(nope_q, k_c1, k_c2, 70, NOPE).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_runs(dtype: torch.dtype) -> None:
    """Outputs come in the inputs' dtype; scores and LSE in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in draw_qkv(0, 70))
    k_c1, k_c2 = compress_for_selection(k, CONFIG)
    scores = score_windows(q, k_c1, k_c2, 70, CONFIG)
    out, lse, selected = attention(q, k, v, CONFIG)
    assert selected is not None
    assert (k_c1.dtype, k_c2.dtype, scores.dtype) == (dtype, dtype, wide)
    assert pool_blocks(scores, 70, CONFIG).dtype == wide
    assert (out.dtype, lse.dtype, selected.dtype) == (dtype, wide, torch.int32)
    dense_out, dense_lse = attend_dense(q, k, v)
    assert (dense_out.dtype, dense_lse.dtype) == (dtype, wide)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_that_of_storing_the_result(dtype: torch.dtype) -> None:
    """Against float64 on the same rounded inputs.

    What is stored in `dtype` may be half a unit in the last place off. What is computed in float32
    (or float64) is a few dozen roundings off, relative to the sum of the magnitudes.
    """
    store = torch.finfo(dtype).eps / 2
    compute = 64 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    q, k, v = (x.to(dtype) for x in draw_qkv(0, 70))
    wide_q, wide_k, wide_v = (x.double() for x in (q, k, v))

    means, magnitudes = (compress_keys(x, 4, 2) for x in (wide_k, wide_k.abs()))
    error = (compress_keys(k, 4, 2).double() - means).abs()
    assert (error <= store * means.abs() + compute * magnitudes).all()

    k_c1, k_c2 = compress_for_selection(k, CONFIG)
    scores = score_windows(q, k_c1, k_c2, 70, CONFIG).double()
    expected = score_windows(wide_q, k_c1.double(), k_c2.double(), 70, CONFIG)
    torch.testing.assert_close(scores, expected, rtol=compute, atol=0)

    selected = attention(q, k, v, CONFIG).selected
    assert selected is not None
    out, lse = attend_blocks(q, k, v, selected, 8)
    expected, expected_lse = attend_blocks(wide_q, wide_k, wide_v, selected, 8)
    magnitudes, _ = attend_blocks(wide_q, wide_k, wide_v.abs(), selected, 8)
    error = (out.double() - expected).abs()
    assert (error <= store * expected.abs() + compute * magnitudes).all()
    assert ((lse.double() - expected_lse).abs() <= compute * (1 + expected_lse.abs())).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_do_not_overflow_a_narrow_dtype(dtype: torch.dtype) -> None:
    """Logits of 90000 are beyond float16, and their exponentials beyond float32."""
    k = torch.full((4, 1, 1), 300.0, dtype=dtype)
    v = torch.arange(4.0).reshape(4, 1, 1).to(dtype)
    out, lse = attend_dense(k, k, v)
    assert out.flatten().tolist() == [0.0, 0.5, 1.0, 1.5]
    assert lse.isfinite().all()
    config = SparseConfig(
        block_size=2, kernel_size=1, kernel_stride=1, window_size=0, topk=2, lse="exact"
    )
    scores = score_windows(k, k, k[:0], 4, config)
    # The normaliser is itself about 90000, and float32 numbers of that size are 1/128 apart.
    assert scores[0, 3].tolist() == pytest.approx([0.25] * 4, rel=1 / 128)
