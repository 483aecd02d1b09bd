"""One example of every stage that can be followed with a pencil.

Keys are chosen so that their logits are logarithms: `exp` then gives whole numbers, and weights are
fractions. Where the head dim D is 1 the scale is 1; where it is 4 the scale is 1/2.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf, log

import pytest
import torch
from torch import Tensor

from infllmv2_reference import (
    SparseConfig,
    append_tokens,
    attend_blocks,
    attend_dense,
    attention,
    compress_keys,
    decode,
    empty_cache,
    pool_blocks,
    score_windows,
    select_blocks,
    truncate,
)
from infllmv2_reference.layout import Span, cu_seqlens_of, lengths_of, spans, window_lengths


def column(*values: float) -> Tensor:
    """Return one number per token (or window) for one head: `[len(values), 1, 1]`."""
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1)


def row(*values: float) -> Tensor:
    """Return the scores of one key/value head and one query: `[1, 1, len(values)]`."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, -1)


def assert_close(actual: Tensor, expected: object) -> None:
    """Compare numbers and shapes; infinities must agree exactly."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-12, atol=1e-12)


# Stage 1: compress


def test_compress_overlapping_windows() -> None:
    keys = column(1, 3, 5, 9, 1)
    # Windows of 2 tokens, 1 apart: (1+3)/2, (3+5)/2, (5+9)/2, (9+1)/2.
    assert_close(compress_keys(keys, 2, 1).flatten(), [2, 4, 7, 5])
    # Windows of 2 tokens, 2 apart: the fifth key is in no complete window.
    assert_close(compress_keys(keys, 2, 2).flatten(), [2, 7])
    # Windows of 5 tokens: all keys, 19/5. Of 6: none is complete.
    assert_close(compress_keys(keys, 5, 1).flatten(), [3.8])
    assert compress_keys(keys, 6, 1).shape == (0, 1, 1)


def test_compress_keeps_heads_and_channels_apart() -> None:
    keys = torch.tensor([[[1.0, 10.0], [2.0, 20.0]], [[3.0, 30.0], [6.0, 60.0]]])  # [S, HK, D]
    assert_close(compress_keys(keys, 2, 1), [[[2.0, 20.0], [4.0, 40.0]]])


def test_compress_accumulates_wide_and_stores_narrow() -> None:
    # bfloat16 has 8 bits of mantissa: 256 + 1 = 256 in it, so that a narrow sum would be 258.
    keys = column(256, 1, 1, 2).bfloat16()
    mean = compress_keys(keys, 4, 4)
    assert mean.dtype == torch.bfloat16
    assert_close(mean.flatten(), [65])  # (256 + 1 + 1 + 2) / 4, not 258 / 4 = 64.5


# Stage 2: score windows

EXACT = SparseConfig(
    block_size=2, kernel_size=2, kernel_stride=1, window_size=0, topk=2, dense_len=-1, lse="exact"
)
"""Windows of 2 tokens, 1 apart, in blocks of 2; forced are block 0 and the query's own."""

APPROXIMATE = replace(EXACT, lse="approximate", lse_kernel=(4, 1))


def test_score_with_the_exact_normaliser() -> None:
    k_c1 = column(log(1), log(2), log(3))  # the windows of S = 4 tokens; they end at 1, 2, 3
    scores = score_windows(column(1, 1, 1, 1), k_c1, column(), 4, EXACT)
    expected = [
        [-inf, -inf, -inf],  # p = 0: no window has ended
        [1, -inf, -inf],  # p = 1: the softmax of one window
        [1 / 3, 2 / 3, -inf],  # p = 2: 1 : 2
        [1 / 6, 2 / 6, 3 / 6],  # p = 3: 1 : 2 : 3
    ]
    assert_close(scores, [expected])


def test_score_of_a_chunk_is_that_of_its_rows() -> None:
    k_c1 = column(log(1), log(2), log(3))
    scores = score_windows(column(1, 1), k_c1, column(), 4, EXACT)  # positions 2 and 3 of 4
    assert_close(scores, [[[1 / 3, 2 / 3, -inf], [1 / 6, 2 / 6, 3 / 6]]])


def test_score_with_the_approximate_normaliser() -> None:
    k_c1, k_c2 = column(log(1), log(2), log(3)), column(log(4))  # K_C2's one window ends at 3
    scores = score_windows(column(1, 1, 1, 1), k_c1, k_c2, 4, APPROXIMATE)
    expected = [
        [-inf, -inf, -inf],
        [0, -inf, -inf],  # D4: a window to score, but none to normalise with
        [0, 0, -inf],
        [1 / 4, 2 / 4, 3 / 4],  # D3: divided by 4, the only window's; they need not add up to 1
    ]
    assert_close(scores, [expected])


def test_score_is_summed_over_the_heads_of_a_group() -> None:
    q = torch.tensor([[[1.0], [0.0]]], dtype=torch.float64)  # T = 1, HQ = 2, D = 1
    scores = score_windows(q, column(log(1), log(2), log(3)), column(), 4, EXACT)
    # Head 0 gives 1/6, 2/6, 3/6; head 1 has logits 0, 0, 0 and gives 1/3 to each.
    assert_close(scores, [[[1 / 2, 2 / 3, 5 / 6]]])


def test_score_reads_the_kv_head_of_the_group() -> None:
    # HQ = 4, HK = 2: query heads 0 and 1 read kv head 0, heads 2 and 3 read kv head 1.
    k_c1 = torch.tensor([[0.0, 0.0], [log(3), 0.0]], dtype=torch.float64)[..., None]  # [C, HK, D]
    q = torch.tensor([0.0, 1.0, 5.0, 7.0], dtype=torch.float64).reshape(1, 4, 1)
    scores = score_windows(q, k_c1, column(), 3, EXACT)
    # kv head 0: (1/2, 1/2) from head 0 and (1/4, 3/4) from head 1; kv head 1: twice (1/2, 1/2).
    assert_close(scores, [[[3 / 4, 5 / 4]], [[1, 1]]])


def test_score_is_scaled() -> None:
    # D1: D = 4, so the scale is 1/2 and q . k = 2 ln 3 is the logit ln 3: weights 1 : 3.
    q = torch.tensor([[[2.0, 0.0, 0.0, 0.0]]], dtype=torch.float64)
    k_c1 = torch.tensor([[[0.0, 1, 1, 1]], [[log(3), 0, 0, 0]]], dtype=torch.float64)
    assert_close(score_windows(q, k_c1, k_c1[:0], 3, EXACT), [[[1 / 4, 3 / 4]]])


# Stage 3: pool

POOL = SparseConfig(block_size=8, kernel_size=4, kernel_stride=2, window_size=0, topk=2)
"""As in the paper l = B/2 and s = B/4: an inner block b overlaps the windows 4b-1 .. 4b+3."""

SCORES = (5, 1, 2, 9, 3, 4, 8)  # windows 0..6 of 16 tokens; window c covers 2c .. 2c+3


def test_pool_takes_the_best_window_that_overlaps() -> None:
    # Query at p = 15: all windows have ended. Block 0 (tokens 0..7) meets windows 0..3, and block 1
    # (tokens 8..15) meets 3..6. Window 3 (tokens 6..9) counts for both.
    assert_close(pool_blocks(row(*SCORES), 16, POOL), [[[9, 9]]])


def test_pool_by_the_literal_equation_7() -> None:
    # D5: windows 0..4 for block 0, 4..8 for block 1: window 3 is lost to block 1.
    literal = replace(POOL, pooling="paper_eq7")
    assert_close(pool_blocks(row(*SCORES), 16, literal), [[[9, 8]]])


def test_pool_leaves_out_windows_that_have_not_ended() -> None:
    scores = row(5, 1, 2, inf).expand(1, 10, 4)  # 10 tokens have 4 complete windows
    pooled = pool_blocks(scores, 10, POOL)
    assert_close(pooled[0, 2], [-inf, -inf])  # p = 2: window 0 ends at 3
    assert_close(pooled[0, 3], [5, -inf])  # p = 3
    assert_close(pooled[0, 8], [5, -inf])  # p = 8: window 3 ends at 9, its score is not read
    assert_close(pooled[0, 9], [inf, inf])  # p = 9: now it is


def test_pool_of_one_window_per_block_is_the_score() -> None:
    one_stage = replace(POOL, kernel_size=8, kernel_stride=8)
    # 20 tokens: blocks 0 and 1 have their window, the third has no complete one.
    assert_close(pool_blocks(row(0.25, 0.75), 20, one_stage), [[[0.25, 0.75, -inf]]])


# Stage 4: select


def test_select_fills_the_budget_with_the_best_and_breaks_ties_by_index() -> None:
    config = replace(EXACT, topk=3)  # B = 2; budget 3 = block 0 + own block + one more
    # p = 9 is in block 4. Forced: 0 and 4. Of 1, 2, 3 the best is 2 or 3: D7 takes 2.
    selected = select_blocks(row(0.0, 0.5, 0.7, 0.7, 0.0), 10, config)
    assert selected.tolist() == [[[0, 2, 4]]]
    assert selected.dtype == torch.int32


def test_select_of_every_row_of_a_prefill() -> None:
    config = replace(EXACT, topk=3)
    scores = row(9.0, 0.1, 0.2, 0.3).expand(1, 7, 4)  # 7 tokens: blocks 0..3, the last one short
    expected = [
        [0, -1, -1],  # p = 0, 1: block 0 is all there is
        [0, -1, -1],
        [0, 1, -1],  # p = 2, 3
        [0, 1, -1],
        [0, 1, 2],  # p = 4, 5: three blocks fit the budget
        [0, 1, 2],
        [0, 2, 3],  # p = 6: 0 and 3 are forced, 2 beats 1
    ]
    assert select_blocks(scores, 7, config).tolist() == [expected]


def test_select_does_not_read_forced_or_future_scores() -> None:
    config = replace(EXACT, topk=3)
    nan = float("nan")
    selected = select_blocks(row(nan, -inf, 0.0, nan, nan, nan)[:, [0, 0]], 8, config)
    assert selected[0, 1].tolist() == [0, 2, 3]  # p = 7: own block 3; 4 and 5 do not exist yet


def test_select_without_any_score_still_fills_the_budget() -> None:
    config = replace(EXACT, topk=3)
    assert select_blocks(row(-inf, -inf, -inf, -inf), 8, config).tolist() == [[[0, 1, 3]]]


# Stage 5: attend


def test_attend_two_tokens() -> None:
    k, v = column(0, log(3)), column(4, 8)
    selected = torch.tensor([[[0]]], dtype=torch.int32)
    out, lse = attend_blocks(column(1), k, v, selected, block_size=2)
    assert_close(out.flatten(), [7])  # exp: 1 : 3, so 1/4 * 4 + 3/4 * 8 = 1 + 6
    assert_close(lse, [[log(4)]])  # ln(1 + 3)


def test_attend_only_selected_tokens_up_to_the_position() -> None:
    k, v = column(log(5), 0, log(3), log(2), 0), column(100, 4, 8, 6, 100)
    # B = 1, query at p = 3 of 5 tokens and at p = 4; blocks 1, 2 and 4 are selected.
    selected = torch.tensor([[[1, 2, 4], [1, 2, 4]]], dtype=torch.int32)
    out, lse = attend_blocks(column(1, 1), k, v, selected, block_size=1)
    # p = 3: token 4 is in the future, so the weights are 1/4, 3/4 as above.
    # p = 4: 1 : 3 : 1, so (4 + 24 + 100) / 5.
    assert_close(out.flatten(), [7, 25.6])
    assert_close(lse.flatten(), [log(4), log(5)])


def test_attend_nothing() -> None:
    selected = torch.tensor([[[-1, -1], [0, -1]]], dtype=torch.int32)
    out, lse = attend_blocks(column(1, 1), column(0, 0), column(3, 5), selected, block_size=1)
    assert_close(out.flatten(), [0, 3])
    assert_close(lse.flatten(), [-inf, 0])


def test_attend_is_scaled() -> None:
    # D1: D = 4, scale 1/2: q . k = 2 ln 3 is the logit ln 3.
    q = torch.tensor([[[2.0, 0, 0, 0]]], dtype=torch.float64)
    k = torch.tensor([[[0.0, 1, 1, 1]], [[log(3), 0, 0, 0]]], dtype=torch.float64)
    v = torch.tensor([[[4.0, 0, 4, 0]], [[8.0, 4, 0, 0]]], dtype=torch.float64)
    out, lse = attend_dense(q, k, v)
    assert_close(out, [[[7, 3, 1, 0]]])
    assert_close(lse, [[log(4)]])


# Stage 6: the switch, and the whole forward

WHOLE = replace(EXACT, kernel_stride=2, init_blocks=0, topk=2)
"""One window per block of 2 tokens; a query attends its own block and the best other one."""

KEYS = column(0, 0, log(2), log(2), 0, 0)
VALUES = column(9, 9, 3, 3, 0, 6)


def test_attention_end_to_end() -> None:
    out, lse, selected = attention(column(1), KEYS, VALUES, WHOLE)
    # The means are 0, ln 2, 0 and the scores 1/4, 2/4, 1/4: p = 5 selects block 1 and its own.
    assert selected is not None
    assert selected.tolist() == [[[1, 2]]]
    # The weights of tokens 2..5 are 2, 2, 1, 1, so (2*3 + 2*3 + 0 + 6) / 6.
    assert_close(out.flatten(), [3])
    assert_close(lse, [[log(6)]])


@pytest.mark.parametrize(
    ("dense_len", "sparse"), [(-1, True), (0, True), (5, True), (6, True), (7, False)]
)
def test_attention_is_sparse_from_dense_len_on(dense_len: int, sparse: bool) -> None:
    result = attention(column(1), KEYS, VALUES, replace(WHOLE, dense_len=dense_len))
    assert (result.selected is not None) == sparse
    # Dense: the weights are 1, 1, 2, 2, 1, 1, so (9 + 9 + 6 + 6 + 0 + 6) / 8.
    assert_close(result.out.flatten(), [3 if sparse else 4.5])
    assert_close(result.lse, [[log(6) if sparse else log(8)]])


# Stage 7: cache and decode

CACHED = replace(EXACT, lse="approximate", lse_kernel=(3, 2))


def test_cache_completes_several_windows_at_once() -> None:
    cache = append_tokens(empty_cache(1, 1, torch.float64), column(1), column(10), CACHED)
    assert (len(cache.k_c1), len(cache.k_c2)) == (0, 0)  # one token completes no window
    cache = append_tokens(cache, column(3, 5), column(20, 30), CACHED)
    assert_close(cache.k_c1.flatten(), [2, 4])  # (1+3)/2 and (3+5)/2
    assert_close(cache.k_c2.flatten(), [3])  # (1+3+5)/3
    cache = append_tokens(cache, column(9, 1), column(40, 50), CACHED)
    assert_close(cache.k_c1.flatten(), [2, 4, 7, 5])
    assert_close(cache.k_c2.flatten(), [3, 5])  # (5+9+1)/3
    assert_close(cache.keys.flatten(), [1, 3, 5, 9, 1])
    assert_close(cache.values.flatten(), [10, 20, 30, 40, 50])


def test_cache_is_truncated_with_its_windows() -> None:
    five = column(1, 3, 5, 9, 1)
    cache = append_tokens(empty_cache(1, 1, torch.float64), five, five, CACHED)
    cache = truncate(cache, 4, CACHED)
    assert_close(cache.keys.flatten(), [1, 3, 5, 9])
    assert_close(cache.values.flatten(), [1, 3, 5, 9])
    assert_close(cache.k_c1.flatten(), [2, 4, 7])  # the window of tokens 3 and 4 is gone
    assert_close(cache.k_c2.flatten(), [3])  # as is that of tokens 2..4
    cache = append_tokens(cache, column(3), column(3), CACHED)
    assert_close(cache.k_c1.flatten(), [2, 4, 7, 6])  # (9+3)/2: made anew from the new token


@pytest.mark.parametrize("num_keys", [-1, 3])
def test_cache_cannot_be_truncated_to_tokens_it_has_not(num_keys: int) -> None:
    two = column(1, 2)
    cache = append_tokens(empty_cache(1, 1, torch.float64), two, two, CACHED)
    with pytest.raises(ValueError, match=rf"num_keys must be in 0\.\.2, but it is {num_keys}"):
        truncate(cache, num_keys, CACHED)


def test_decode_one_token() -> None:
    cache = append_tokens(empty_cache(1, 1, torch.float64), KEYS[:5], VALUES[:5], WHOLE)
    cache = append_tokens(cache, KEYS[5:], VALUES[5:], WHOLE)
    out, lse, selected = decode(cache, column(1), WHOLE)
    assert selected is not None
    assert selected.tolist() == [[[1, 2]]]  # as in test_attention_end_to_end
    assert_close(out.flatten(), [3])
    assert_close(lse, [[log(6)]])
    dense = decode(cache, column(1), replace(WHOLE, dense_len=7))
    assert dense.selected is None
    assert_close(dense.out.flatten(), [4.5])


# Stage 8: packing


def test_packed_sequences_lie_end_to_end() -> None:
    # Three sequences: a prefill of 2 tokens, an empty one, and 1 query over 5 keys.
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_of([2, 0, 1]), cu_seqlens_of([2, 0, 5])
    assert cu_seqlens_q.tolist() == [0, 2, 2, 3]
    assert cu_seqlens_k.tolist() == [0, 2, 2, 7]
    assert lengths_of(cu_seqlens_k) == [2, 0, 5]
    assert list(spans(cu_seqlens_q, cu_seqlens_k)) == [
        Span(0, slice(0, 2), slice(0, 2)),
        Span(1, slice(2, 2), slice(2, 2)),
        Span(2, slice(2, 3), slice(2, 7)),
    ]
    last = list(spans(cu_seqlens_q, cu_seqlens_k))[2]
    assert (last.num_queries, last.num_keys) == (1, 5)
    # Windows of 2 tokens, 2 apart: one in 2 tokens, none in 0, two in 5.
    assert window_lengths(cu_seqlens_k, 2, 2) == [1, 0, 2]
