"""The eager implementation against the reference, one sequence at a time, and its own promises."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from infllmv2_impls.eager import IMPLEMENTATION, attend, places, tiles
from infllmv2_reference import (
    SparseConfig,
    attend_blocks,
    attention,
    compress_for_selection,
    compress_keys,
    pool_blocks,
    score_windows,
    select_blocks,
    select_by_windows,
)
from infllmv2_reference.layout import cu_seqlens_of, spans

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TINY = SparseConfig(
    block_size=8, kernel_size=4, kernel_stride=2, window_size=8, topk=3, dense_len=-1
)
CONFIGS = {
    "approximate": TINY,
    "exact": replace(TINY, lse="exact"),
    "eq7": replace(TINY, pooling="paper_eq7", init_blocks=0),
    "one-stage": replace(TINY, kernel_size=8, kernel_stride=8, lse="exact"),
    "ragged": replace(TINY, kernel_size=7, kernel_stride=3, lse_kernel=(11, 5), init_blocks=2),
    "odd": SparseConfig(5, 3, 2, 1, 10, 4, -1, lse_kernel=(9, 4)),
    "unit": SparseConfig(1, 1, 1, 0, 0, 2, -1),
    "long-window": SparseConfig(4, 24, 4, 1, 4, 4, -1, lse="exact"),
    "wide-budget": replace(TINY, topk=50),
    "switch": replace(TINY, dense_len=60),
}
BATCHES = {
    "prefill": ([40, 1, 90], [40, 1, 90]),
    "history": ([3, 30, 1, 70], [77, 31, 150, 200]),
    "empty": ([0, 5, 0, 0, 2], [0, 5, 40, 0, 61]),
    "nothing": ([], []),
    "no-rows": ([0, 0], [0, 9]),
}


@dataclass
class Batch:
    """Inputs in the packed layout, with the reference's view of each sequence."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: dict[str, Any]

    def __post_init__(self) -> None:
        self.spans = list(spans(self.lengths["cu_seqlens_q"], self.lengths["cu_seqlens_k"]))

    def windows(self, config: SparseConfig) -> dict[str, Tensor]:
        """Return the reference's windows, packed, as arguments of the scoring functions."""
        result: dict[str, Tensor] = {}
        for i in (0, 1):
            parts = [compress_for_selection(self.k[s.keys], config)[i] for s in self.spans]
            ends = cu_seqlens_of([len(x) for x in parts], self.k.device)
            spare = self.k.new_full((3, *self.k.shape[1:]), torch.nan)  # rows that may be anything
            result |= {f"k_c{i + 1}": torch.cat([*parts, spare]), f"cu_seqlens_c{i + 1}": ends}
        return result


def make_batch(
    name: str, dtype: torch.dtype = torch.float64, device: str = "cpu", group: int = 3, dim: int = 8
) -> Batch:
    """Draw a batch of `BATCHES` with two kv heads."""
    num_q, num_k = BATCHES[name]
    generator = torch.Generator().manual_seed(len(name))

    def draw(rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, dim, generator=generator, dtype=dtype).to(device)

    lengths = {
        "cu_seqlens_q": cu_seqlens_of(num_q, device),
        "cu_seqlens_k": cu_seqlens_of(num_k, device),
        "max_seqlen_q": max(num_q, default=0),
        "max_seqlen_k": max(num_k, default=0) + 5,
    }
    return Batch(draw(sum(num_q), 2 * group), draw(sum(num_k), 2), draw(sum(num_k), 2), lengths)


@pytest.fixture(params=BATCHES)
def batch(request: pytest.FixtureRequest) -> Batch:
    return make_batch(request.param)


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> SparseConfig:
    return CONFIGS[request.param]


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every chunk as small as it can be, so that tiny inputs are cut and merged."""
    for module in (places, tiles, sys.modules["infllmv2_impls.eager.windows"]):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    monkeypatch.setattr(tiles, "DIAGONAL_ROWS", 3)


def check_stages(b: Batch, c: SparseConfig, tolerance: float = 1e-12) -> None:
    """Compare every stage function with the reference, fed with the reference's earlier stages."""
    near = {"rtol": tolerance, "atol": tolerance}
    size, stride = c.kernel_size, c.kernel_stride
    means, ends = IMPLEMENTATION.compress_keys(
        k=b.k,
        cu_seqlens_k=b.lengths["cu_seqlens_k"],
        max_seqlen_k=b.lengths["max_seqlen_k"],
        kernel_size=size,
        kernel_stride=stride,
    )
    windows = b.windows(c)
    assert torch.equal(ends, windows["cu_seqlens_c1"])
    assert_close(means, windows["k_c1"][: len(means)], **near)

    fused = {"q": b.q, **windows, **b.lengths, "config": c}
    scores = IMPLEMENTATION.score_windows(**fused)
    pooled_fused = IMPLEMENTATION.score_blocks(**fused)
    selected_fused = IMPLEMENTATION.select(**fused)
    pooled = IMPLEMENTATION.pool_blocks(scores=scores, **b.lengths, config=c)
    selected = IMPLEMENTATION.select_blocks(block_scores=pooled, **b.lengths, config=c)
    assert torch.equal(pooled, pooled_fused)
    assert torch.equal(selected, selected_fused)
    for s in b.spans:
        k_c1, k_c2 = compress_for_selection(b.k[s.keys], c)
        expected = score_windows(b.q[s.queries], k_c1, k_c2, s.num_keys, c)
        actual = scores[:, s.queries, : len(k_c1)]
        assert_close(actual, expected, **near)
        expected = pool_blocks(actual, s.num_keys, c)
        assert torch.equal(pooled[:, s.queries, : expected.shape[2]], expected)
        assert torch.equal(selected[:, s.queries], select_blocks(expected, s.num_keys, c))


def check_attention(b: Batch, c: SparseConfig, tolerance: float = 1e-12) -> None:
    """Compare the whole forward with the reference."""
    out, lse, selected = IMPLEMENTATION.attention(q=b.q, k=b.k, v=b.v, **b.lengths, config=c)
    for s in b.spans:
        expected = attention(b.q[s.queries], b.k[s.keys], b.v[s.keys], c)
        assert_close(out[s.queries], expected.out, rtol=tolerance, atol=tolerance)
        assert_close(lse[s.queries], expected.lse, rtol=tolerance, atol=tolerance)
        wanted = -1 if expected.selected is None else expected.selected
        assert bool((selected[:, s.queries] == wanted).all())


def test_stages(batch: Batch, config: SparseConfig) -> None:
    check_stages(batch, config)


def test_attention(batch: Batch, config: SparseConfig) -> None:
    check_attention(batch, config)


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("name", ["approximate", "ragged", "switch"])
def test_chunks_are_merged(name: str) -> None:
    b = make_batch("history")
    check_stages(b, CONFIGS[name])
    check_attention(b, CONFIGS[name])
    check_gradients(make_batch("empty"), CONFIGS[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision(dtype: torch.dtype, device: str) -> None:
    b, c = make_batch("history", dtype, device, group=4, dim=32), CONFIGS["exact"]
    selected = torch.cat(
        [
            select_by_windows(
                *(b.q[s.queries], *compress_for_selection(b.k[s.keys], c), s.num_keys, c)
            )
            for s in b.spans
        ],
        dim=1,
    )
    arguments = {"q": b.q, "k": b.k, "v": b.v, "selected": selected, **b.lengths, "block_size": 8}
    out, lse = IMPLEMENTATION.attend(**arguments)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    for s in b.spans:
        wide = (x.double() for x in (b.q[s.queries], b.k[s.keys], b.v[s.keys]))
        expected, expected_lse = attend_blocks(*wide, selected[:, s.queries], 8)
        assert_close(lse[s.queries].double(), expected_lse, rtol=2e-6, atol=2e-6)
        half_ulp = torch.finfo(dtype).eps * 0.51
        assert_close(out[s.queries].double(), expected, rtol=half_ulp, atol=2e-6)


def check_gradients(b: Batch, c: SparseConfig, tolerance: float = 1e-12) -> None:
    """Compare the gradients of out and lse by q, k and v with autograd through the reference."""
    leaves = [x.clone().requires_grad_() for x in (b.q, b.k, b.v)]
    twins = [x.clone().requires_grad_() for x in (b.q, b.k, b.v)]
    out, lse, _ = IMPLEMENTATION.attention(
        q=leaves[0], k=leaves[1], v=leaves[2], **b.lengths, config=c
    )
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=b.q.dtype)
    ((out * weight.to(out.device)).sum() + lse.sin().sum()).backward()
    total = sum(x.sum() * 0 for x in twins)
    for s in b.spans:
        q, k, v = twins[0][s.queries], twins[1][s.keys], twins[2][s.keys]
        expected = attention(q, k, v, c)
        part = weight.to(out.device)[s.queries]
        total = total + (expected.out * part).sum() + expected.lse.sin().sum()
    assert isinstance(total, Tensor)
    total.backward()
    for leaf, twin in zip(leaves, twins, strict=True):
        assert leaf.grad is not None
        assert twin.grad is not None
        assert_close(leaf.grad, twin.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["approximate", "odd", "switch"])
def test_gradients(batch: Batch, name: str) -> None:
    check_gradients(batch, CONFIGS[name])


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
@pytest.mark.parametrize("name", ["approximate", "ragged", "switch"])
def test_cuda(name: str) -> None:
    b = make_batch("history", device="cuda")
    check_stages(b, CONFIGS[name], 1e-11)
    check_attention(b, CONFIGS[name], 1e-11)
    check_gradients(b, CONFIGS[name], 1e-11)


@pytest.mark.parametrize("device", DEVICES)
def test_bits_repeat(device: str) -> None:
    b = make_batch("prefill", torch.float32, device)

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (b.q, b.k, b.v)]
        q, k, v = leaves
        out, lse, selected = IMPLEMENTATION.attention(q=q, k=k, v=v, **b.lengths, config=TINY)
        out.square().sum().backward()
        grads = [x.grad for x in leaves if x.grad is not None]
        return [out.detach(), lse.detach(), selected, *grads]

    first = run()
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(first, run(), strict=True))


def test_rows_without_blocks() -> None:
    b = make_batch("prefill")
    leaves = [x.clone().requires_grad_() for x in (b.q, b.k, b.v)]
    selected = torch.full((2, len(b.q), 2), -1, dtype=torch.int32)
    out, lse = IMPLEMENTATION.attend(
        q=leaves[0], k=leaves[1], v=leaves[2], selected=selected, **b.lengths, block_size=8
    )
    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())
    out.sum().backward()
    assert all(x.grad is not None and bool((x.grad == 0).all()) for x in leaves)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_attend_reads_selected_past_tokens_only(poison: float) -> None:
    """Poison all that one row may not read; only that row's results are compared."""
    b, c = make_batch("history"), replace(TINY, init_blocks=0)
    _, _, selected = IMPLEMENTATION.attention(q=b.q, k=b.k, v=b.v, **b.lengths, config=c)
    arguments = {"selected": selected, **b.lengths, "block_size": c.block_size}
    clean, clean_lse = IMPLEMENTATION.attend(q=b.q, k=b.k, v=b.v, **arguments)
    for s in b.spans:
        for row in {0, s.num_queries // 2, s.num_queries - 1}:
            at, position = s.queries.start + row, s.num_keys - s.num_queries + row
            tokens = torch.arange(s.num_keys)
            admitted = torch.zeros(2, len(b.k), dtype=torch.bool)
            for head in range(2):
                mine = torch.isin(tokens // c.block_size, selected[head, at]) & (tokens <= position)
                admitted[head, s.keys] = mine
            k, v = (x.masked_fill(~admitted.T[..., None], poison) for x in (b.k, b.v))
            out, lse = IMPLEMENTATION.attend(q=b.q, k=k, v=v, **arguments)
            assert torch.equal(out[at], clean[at])
            assert torch.equal(lse[at], clean_lse[at])


def test_bad_rows_spoil_gradients_of_their_own_tokens_only() -> None:
    b, c = make_batch("prefill"), replace(TINY, init_blocks=0)
    _, _, selected = IMPLEMENTATION.attention(q=b.q, k=b.k, v=b.v, **b.lengths, config=c)
    row = 130  # the last of the last sequence, whose keys begin at 41
    leaves = [x.clone() for x in (b.q, b.k, b.v)]
    leaves[0][row] = torch.nan
    q, k, v = (x.requires_grad_() for x in leaves)
    out, _ = IMPLEMENTATION.attend(
        q=q, k=k, v=v, selected=selected, **b.lengths, block_size=c.block_size
    )
    out.sum().backward()
    for head in range(2):
        mine = torch.isin(torch.arange(90) // c.block_size, selected[head, row])
        admitted = torch.nn.functional.pad(mine, (41, 0))
        for x in (k, v):
            assert x.grad is not None
            assert torch.equal(x.grad[:, head].isnan().any(dim=-1), admitted)


def test_dense_rows_do_not_read_their_future() -> None:
    b, c = make_batch("history"), replace(TINY, dense_len=10**6)
    clean, _, _ = IMPLEMENTATION.attention(q=b.q, k=b.k, v=b.v, **b.lengths, config=c)
    for s in b.spans:
        for row in {0, s.num_queries // 2, s.num_queries - 1}:
            k, v = (torch.full_like(x, torch.nan) for x in (b.k, b.v))
            past = slice(s.keys.start, s.keys.stop - s.num_queries + row + 1)
            k[past], v[past] = b.k[past], b.v[past]
            out, _, _ = IMPLEMENTATION.attention(q=b.q, k=k, v=v, **b.lengths, config=c)
            at = s.queries.start + row
            assert torch.equal(out[at], clean[at])


@pytest.mark.parametrize("name", ["approximate", "exact", "ragged", "eq7"])
def test_selection_reads_visible_windows_only(name: str) -> None:
    b, c = make_batch("history"), CONFIGS[name]
    windows = b.windows(c)
    fused = {"q": b.q, **b.lengths, "config": c}
    clean = IMPLEMENTATION.select(**fused, **windows)
    for s in b.spans:
        position = s.num_keys - s.num_queries  # of the first row
        poisoned = dict(windows)
        pairs = [(c.kernel_size, c.kernel_stride), (c.lse_kernel_size, c.lse_kernel_stride)]
        for kind, (size, stride) in zip(("c1", "c2"), pairs, strict=True):
            start = int(windows[f"cu_seqlens_{kind}"][s.sequence])
            seen = len(compress_keys(b.k[s.keys][: position + 1], size, stride))
            x = torch.full_like(windows[f"k_{kind}"], torch.nan)
            x[start : start + seen] = windows[f"k_{kind}"][start : start + seen]
            poisoned[f"k_{kind}"] = x
        at = s.queries.start
        assert torch.equal(IMPLEMENTATION.select(**fused, **poisoned)[:, at], clean[:, at])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_forced_and_future_scores_are_not_read(poison: float) -> None:
    b, c = make_batch("prefill"), TINY
    scores = torch.rand(2, len(b.q), 12, dtype=torch.float64)
    clean = IMPLEMENTATION.select_blocks(block_scores=scores, **b.lengths, config=c)
    for s in b.spans:
        own = torch.arange(s.num_keys)[s.num_keys - s.num_queries :, None] // c.block_size
        block = torch.arange(12)
        poisoned = (block < c.init_blocks) | (block > own - c.local_blocks)
        scores[:, s.queries] = scores[:, s.queries].masked_fill(poisoned, poison)
    assert torch.equal(
        IMPLEMENTATION.select_blocks(block_scores=scores, **b.lengths, config=c), clean
    )


def test_equal_and_infinite_scores_select_by_index() -> None:
    b, c = make_batch("prefill"), TINY
    values = torch.tensor([0.0, -0.0, 1.0, -torch.inf, torch.inf], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    scores = values[torch.randint(5, (2, len(b.q), 12), generator=generator)]
    selected = IMPLEMENTATION.select_blocks(block_scores=scores, **b.lengths, config=c)
    for s in b.spans:
        expected = select_blocks(scores[:, s.queries], s.num_keys, c)
        assert torch.equal(selected[:, s.queries], expected)


@pytest.mark.parametrize("lse", ["exact", "approximate"])
@pytest.mark.parametrize("dim", [8, 40, 96, 128])
def test_equal_windows_tie(dim: int, lse: str) -> None:
    """BLAS and torch.sum round ragged columns differently; the implementation must not show it."""
    c = replace(TINY, lse=lse)
    for num_keys, group in ((17, 7), (100, 1), (333, 2), (333, 16)):
        q, k = torch.randn(7, 2 * group, dim), torch.randn(1, 2, dim).expand(num_keys, 2, dim)
        ends = {"cu_seqlens_q": cu_seqlens_of([7]), "cu_seqlens_k": cu_seqlens_of([num_keys])}
        b = Batch(q, k, k, {**ends, "max_seqlen_q": 7, "max_seqlen_k": num_keys})
        scores = IMPLEMENTATION.score_windows(q=q, **b.windows(c), **b.lengths, config=c)
        assert bool(((scores == scores[..., :1]) | (scores == -torch.inf)).all())


def test_strided_inputs_are_read_and_not_written() -> None:
    b = make_batch("history")
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (b.q, b.k, b.v))
    strided = Batch(q, k, v, b.lengths)
    check_attention(strided, TINY)
    check_gradients(strided, TINY)
    assert all(torch.equal(x, y) for x, y in ((q, b.q), (k, b.k), (v, b.v)))


def test_gradcheck() -> None:
    q, k, v = (torch.randn(5, h, 3, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    place = places.Place(slice(0, 5), slice(0, 5))
    selected = torch.tensor([[[0, -1], [0, 1], [1, 2], [-1, -1], [0, 2]]], dtype=torch.int32)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend.attend(q, k, v, selected, [place], [], 2)[0]

    assert torch.autograd.gradcheck(run, (q, k, v))
