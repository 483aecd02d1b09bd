"""Properties of the whole: chunk invariance, prefix stability, the switch, independent inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infllmv2_reference import (
    Attention,
    Cache,
    SparseConfig,
    append_tokens,
    attend_blocks,
    attend_dense,
    attention,
    compress_for_selection,
    compress_keys,
    decode,
    empty_cache,
    pool_blocks,
    score_windows,
    select_blocks,
    select_by_windows,
    truncate,
)
from infllmv2_reference.geometry import num_selected

quick = settings(max_examples=15, deadline=None, derandomize=True, database=None)

BASE = SparseConfig(
    block_size=8, kernel_size=4, kernel_stride=2, window_size=8, topk=3, dense_len=-1
)
"""The released proportions at an eighth of the size: K_C2 is 16/8; 1 init + 2 local + 1 scored."""

CONFIGS = {
    "approximate": BASE,
    "exact": replace(BASE, lse="exact"),
    "one stage": replace(BASE, kernel_size=8, kernel_stride=8, lse="exact"),
    "odd": replace(BASE, block_size=6, kernel_size=5, init_blocks=0, window_size=6, topk=2),
    "long windows": replace(BASE, kernel_size=11, kernel_stride=3, lse_kernel=(13, 5)),
    "paper_eq7": replace(BASE, pooling="paper_eq7"),
    "short local": replace(BASE, local_override=1),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
seeds = st.integers(0, 2**31)
lengths = st.integers(0, 70)
chunkings = st.lists(st.integers(0, 25), max_size=8)

HEADS, KV_HEADS, DIM = 4, 2, 3


def draw(seed: int, *sizes: tuple[int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return normal tensors `[tokens, heads, DIM]`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, heads, DIM) for tokens, heads in sizes]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def draw_qkv(seed: int, num_keys: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return the queries, keys and values of a prefill."""
    sizes = (num_keys, HEADS), (num_keys, KV_HEADS), (num_keys, KV_HEADS)
    return draw(seed, *sizes, dtype=dtype)


def new_cache() -> Cache:
    return empty_cache(KV_HEADS, DIM, torch.float64)


def rows_of(whole: Attention, start: int, end: int) -> Attention:
    """Return the results of the queries `start .. end - 1` of a prefill."""
    assert whole.selected is not None
    return Attention(whole.out[start:end], whole.lse[start:end], whole.selected[:, start:end])


def assert_same(actual: Attention, expected: Attention) -> None:
    """Selections are equal; outputs agree to the rounding of float64 sums in another order."""
    assert actual.selected is not None
    assert torch.equal(actual.selected, expected.selected)
    torch.testing.assert_close(actual.out, expected.out, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(actual.lse, expected.lse, rtol=1e-12, atol=1e-13)


@configs
@quick
@given(seed=seeds, chunks=chunkings)
def test_any_chunks_give_what_one_prefill_gives(
    config: SparseConfig, seed: int, chunks: list[int]
) -> None:
    """Chunk invariance of `attention` with history, and of `decode` from a cache."""
    q, k, v = draw_qkv(seed, sum(chunks))
    whole = attention(q, k, v, config)
    cache, start = new_cache(), 0
    for length in chunks:
        end = start + length
        cache = append_tokens(cache, k[start:end], v[start:end], config)
        expected = rows_of(whole, start, end)
        assert_same(attention(q[start:end], k[:end], v[:end], config), expected)
        assert_same(decode(cache, q[start:end], config), expected)
        start = end


@configs
@quick
@given(seed=seeds, num_keys=lengths, chunks=chunkings, num_queries=st.integers(1, 70))
def test_decode_does_not_depend_on_how_tokens_arrived(
    config: SparseConfig, seed: int, num_keys: int, chunks: list[int], num_queries: int
) -> None:
    """Chunks first and the rest one token at a time, then the last few queries at once."""
    q, k, v = draw_qkv(seed, num_keys)
    whole = attention(q, k, v, config)
    cache = new_cache()
    while (start := len(cache.keys)) < num_keys:
        end = start + (chunks.pop() if chunks else 1)
        cache = append_tokens(cache, k[start:end], v[start:end], config)
    start = max(0, num_keys - num_queries)
    assert_same(decode(cache, q[start:], config), rows_of(whole, start, num_keys))


@configs
@quick
@given(seed=seeds, num_keys=lengths, chunks=chunkings, kept=lengths)
def test_cache_holds_the_windows_of_its_keys(
    config: SparseConfig, seed: int, num_keys: int, chunks: list[int], kept: int
) -> None:
    """However tokens arrived, and after a truncation; complete windows are kept bit by bit."""
    _, k, v = draw_qkv(seed, num_keys)
    cache = new_cache()
    for length in [*chunks, num_keys]:
        before, start = cache, len(cache.keys)
        cache = append_tokens(cache, k[start : start + length], v[start : start + length], config)
        assert torch.equal(cache.k_c1[: len(before.k_c1)], before.k_c1)
        assert torch.equal(cache.k_c2[: len(before.k_c2)], before.k_c2)
    for length in (num_keys, min(kept, num_keys)):
        cache = truncate(cache, length, config)
        assert torch.equal(cache.keys, k[:length])
        assert torch.equal(cache.values, v[:length])
        k_c1, k_c2 = compress_for_selection(k[:length], config)
        torch.testing.assert_close(cache.k_c1, k_c1, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(cache.k_c2, k_c2, rtol=1e-14, atol=1e-14)


@configs
@quick
@given(seed=seeds, num_keys=lengths, position=st.integers(0, 69))
def test_tokens_after_a_position_change_nothing_for_it(
    config: SparseConfig, seed: int, num_keys: int, position: int
) -> None:
    """Prefix stability: not the selection, nor the output."""
    q, k, v = draw_qkv(seed, num_keys)
    first = attention(q, k, v, config)
    later_k, later_v = k.clone(), v.clone()
    later_k[position + 1 :] = 100.0
    later_v[position + 1 :] = -100.0
    second = attention(q, later_k, later_v, config)
    assert_same(rows_of(second, 0, position + 1), rows_of(first, 0, position + 1))


@configs
@quick
@given(seed=seeds, num_keys=lengths)
def test_selections_are_well_formed(config: SparseConfig, seed: int, num_keys: int) -> None:
    """Int32, strictly ascending, then -1; no future block; as many as the budget allows."""
    selected = attention(*draw_qkv(seed, num_keys), config).selected
    assert selected is not None
    assert (selected.dtype, selected.shape) == (torch.int32, (KV_HEADS, num_keys, config.budget))
    shape = config.block_size, config.init_blocks, config.local_blocks, config.budget
    for head in selected.tolist():
        for position, row in enumerate(head):
            blocks = row[: num_selected(position, *shape)]
            assert row == sorted(set(blocks)) + [-1] * (config.budget - len(blocks))
            assert set(blocks) <= set(range(position // config.block_size + 1))


@configs
@quick
@given(seed=seeds, num_keys=lengths)
def test_a_budget_for_every_block_gives_dense_attention(
    config: SparseConfig, seed: int, num_keys: int
) -> None:
    """D8: dense and sparse agree, bit by bit, where the budget covers all visible blocks."""
    q, k, v = draw_qkv(seed, num_keys)
    sparse = attention(q, k, v, replace(config, topk=80))
    dense = attention(q, k, v, replace(config, dense_len=1000))
    assert sparse.selected is not None
    assert dense.selected is None
    assert torch.equal(sparse.out, dense.out)
    assert torch.equal(sparse.lse, dense.lse)
    assert torch.equal(dense.out, attend_dense(q, k, v)[0])


@quick
@given(seed=seeds, num_keys=st.integers(1, 70))
def test_dense_attention_is_that_of_pytorch(seed: int, num_keys: int) -> None:
    q, k, v = draw_qkv(seed, num_keys)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(0, 1)
    torch.testing.assert_close(attend_dense(q, k, v)[0], expected, rtol=1e-12, atol=1e-13)


@configs
@quick
@given(seed=seeds, num_keys=lengths)
def test_kv_heads_do_not_meet(config: SparseConfig, seed: int, num_keys: int) -> None:
    """Query head h reads kv head h // G, in selecting as in attending."""
    q, k, v = draw_qkv(seed, num_keys)
    whole = attention(q, k, v, config)
    group = HEADS // KV_HEADS
    for head in range(KV_HEADS):
        heads = slice(head * group, (head + 1) * group)
        alone = attention(q[:, heads], k[:, [head]], v[:, [head]], config)
        assert whole.selected is not None
        expected = Attention(whole.out[:, heads], whole.lse[:, heads], whole.selected[[head]])
        assert_same(alone, expected)


def test_the_two_readings_of_equation_7_select_differently() -> None:
    """D5: the variant is no mere renaming."""
    qkv = draw_qkv(0, 70)
    overlap, literal = (attention(*qkv, CONFIGS[name]) for name in ("approximate", "paper_eq7"))
    assert not torch.equal(overlap.selected, literal.selected)


def test_the_two_normalisers_score_differently() -> None:
    """D3: over several heads the approximation is no common factor."""
    q, k, _ = draw_qkv(0, 70)
    k_c1, k_c2 = compress_for_selection(k, BASE)
    exact, approximate = (
        score_windows(q, k_c1, k_c2, 70, CONFIGS[name])[:, 20:, 0]
        for name in ("exact", "approximate")
    )
    assert (exact / approximate).std() > 0.01


@configs
@quick
@given(seed=seeds, num_keys=lengths)
def test_use_nope_selects_by_its_own_inputs(config: SparseConfig, seed: int, num_keys: int) -> None:
    config = replace(config, use_nope=True)
    q, k, v = draw_qkv(seed, num_keys)
    nope_q, nope_k, _ = draw_qkv(seed + 1, num_keys)
    k_c1, k_c2 = compress_for_selection(nope_k, config)
    selected = select_by_windows(nope_q, k_c1, k_c2, num_keys, config)
    expected = Attention(*attend_blocks(q, k, v, selected, config.block_size), selected)
    assert_same(attention(q, k, v, config, nope_q, nope_k), expected)
    cache = append_tokens(new_cache(), k, v, config, nope_k)
    assert_same(decode(cache, q, config, nope_q), expected)


def test_selection_inputs_are_given_exactly_with_use_nope() -> None:
    """A missing one never falls back to the rotated input, a needless one is never ignored."""
    with_nope = replace(BASE, use_nope=True)
    q, k, v = draw_qkv(0, 5)
    cache = append_tokens(new_cache(), k, v, BASE)
    missing = r"^selection_{} must be given with use_nope=True, but it is None$"
    for inputs, name in (({}, "q"), ({"selection_q": q}, "k"), ({"selection_k": k}, "q")):
        with pytest.raises(ValueError, match=missing.format(name)):
            attention(q, k, v, with_nope, **inputs)
    with pytest.raises(ValueError, match=missing.format("k")):
        append_tokens(new_cache(), k, v, with_nope)
    with pytest.raises(ValueError, match=missing.format("q")):
        decode(cache, q, with_nope)
    needless = r"^selection_{} must be None with use_nope=False, but it is given$"
    for inputs, name in (({"selection_q": q}, "q"), ({"selection_k": k}, "k")):
        with pytest.raises(ValueError, match=needless.format(name)):
            attention(q, k, v, BASE, **inputs)
    with pytest.raises(ValueError, match=needless.format("k")):
        append_tokens(new_cache(), k, v, BASE, k)
    with pytest.raises(ValueError, match=needless.format("q")):
        decode(cache, q, BASE, q)


@configs
def test_no_input_is_modified(config: SparseConfig) -> None:
    """Style rule 6; the version counter also sees what is undone, or done through a view."""
    q, k, v = draw_qkv(0, 40)
    k_c1, k_c2 = compress_for_selection(k, config)
    scores = score_windows(q, k_c1, k_c2, 40, config)
    block_scores = pool_blocks(scores, 40, config)
    selected = select_blocks(block_scores, 40, config)
    cache = append_tokens(new_cache(), k, v, config)
    inputs = [q, k, v, k_c1, k_c2, scores, block_scores, selected, *vars(cache).values()]
    before = [(x._version, x.clone()) for x in inputs]
    compress_keys(k, config.kernel_size, config.kernel_stride)
    score_windows(q, k_c1, k_c2, 40, config)
    pool_blocks(scores, 40, config)
    select_blocks(block_scores, 40, config)
    attend_blocks(q, k, v, selected, config.block_size)
    attend_dense(q, k, v)
    attention(q, k, v, config)
    decode(cache, q, config)
    truncate(append_tokens(cache, k, v, config), 3, config)
    for x, (version, values) in zip(inputs, before, strict=True):
        assert x._version == version
        assert torch.equal(x, values)


@configs
@pytest.mark.parametrize("num_keys", [0, 1, 40])
def test_no_queries_is_legal(config: SparseConfig, num_keys: int) -> None:
    """And so is an empty sequence."""
    _, k, v = draw_qkv(0, num_keys)
    for dense_len in (-1, 1000):
        q = torch.empty(0, HEADS, DIM, dtype=torch.float64)
        out, lse, selected = attention(q, k, v, replace(config, dense_len=dense_len))
        assert (out.shape, lse.shape) == ((0, HEADS, DIM), (0, HEADS))
        assert selected is None or selected.shape == (KV_HEADS, 0, config.budget)


def test_more_queries_than_keys_are_refused() -> None:
    """They would have positions before 0; packed batches are checked in `layout`."""
    q, k, v = draw(0, (3, HEADS), (2, KV_HEADS), (2, KV_HEADS))
    with pytest.raises(AssertionError):
        attend_dense(q, k, v)
    with pytest.raises(AssertionError):
        attention(q, k, v, BASE)
