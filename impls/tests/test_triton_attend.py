"""`attend` in Triton against eager, and its lists against brute force."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("triton", reason="the extra 'triton' is not installed")

from infllmv2_impls.eager import IMPLEMENTATION as EAGER
from infllmv2_impls.triton.attend import attend
from infllmv2_impls.triton.attend_operator import attend_operator
from infllmv2_impls.triton.device import INTERPRETED
from infllmv2_impls.triton.readers import Readers, list_readers
from infllmv2_impls.triton.union import Union, unite
from infllmv2_reference.geometry import num_blocks
from infllmv2_reference.layout import cu_seqlens_of

DEVICE = "cpu" if INTERPRETED else "cuda"


@dataclass(frozen=True)
class Problem:
    """State sizes, and draw tensors of them."""

    sequences: tuple[tuple[int, int], ...]
    kv_heads: int = 1
    group: int = 2
    head_dim: int = 32
    block_size: int = 16
    budget: int = 3
    dtype: torch.dtype = torch.float32
    dense_len: int | None = None

    @property
    def lengths(self) -> dict[str, Any]:
        queries, keys = zip(*self.sequences, strict=True)
        return {
            "cu_seqlens_q": cu_seqlens_of(queries, DEVICE),
            "cu_seqlens_k": cu_seqlens_of(keys, DEVICE),
            "max_seqlen_q": max(queries),
            "max_seqlen_k": max(keys),
        }

    def draw(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, k, v and a selection with rows of every length, empty ones included."""
        generator = torch.Generator().manual_seed(seed)
        total_q = sum(t for t, _ in self.sequences)
        total_k = sum(s for _, s in self.sequences)
        heads = (self.group * self.kv_heads, self.kv_heads, self.kv_heads)
        rows = (total_q, total_k, total_k)
        q, k, v = (
            torch.randn(n, h, self.head_dim, generator=generator).to(self.dtype).to(DEVICE)
            for n, h in zip(rows, heads, strict=True)
        )
        selected = torch.full((self.kv_heads, total_q, self.budget), -1, dtype=torch.int32)
        row = 0
        for num_queries, num_keys in self.sequences:
            for t in range(num_queries):
                visible = (num_keys - num_queries + t) // self.block_size + 1
                for head in range(self.kv_heads):
                    most = min(visible, self.budget) + 1
                    count = int(torch.randint(0, most, (1,), generator=generator))
                    blocks = torch.randperm(visible, generator=generator)[:count].sort().values
                    selected[head, row, :count] = blocks.int()
                row += 1
        return q, k, v, selected.to(DEVICE)

    def written_out(self, selected: Tensor) -> Tensor:
        """Return a selection in which dense sequences list every block up to the query's own."""
        most = max(num_blocks(s, self.block_size) for _, s in self.sequences)
        wide = selected.new_full((*selected.shape[:2], max(most, self.budget)), -1)
        wide[..., : self.budget] = selected
        row = 0
        for num_queries, num_keys in self.sequences:
            for t in range(num_queries):
                if num_keys < (self.dense_len or 0):
                    visible = (num_keys - num_queries + t) // self.block_size + 1
                    wide[:, row] = -1
                    wide[:, row, :visible] = torch.arange(visible)
                row += 1
        return wide


PROBLEMS = {
    "history": Problem(((20, 53), (33, 33)), kv_heads=2),
    "empty sequences": Problem(((0, 7), (9, 40), (0, 0))),
    "blocks of 48, group of 7": Problem(((30, 100), (1, 1)), 1, 7, 96, 48),
    "blocks of 128, half precision": Problem(((40, 300),), 1, 16, 64, 128, dtype=torch.float16),
    "dense and sparse": Problem(((30, 60), (30, 100)), 2, 4, 32, 16, dense_len=61),
    "few tokens": Problem(((1, 90), (0, 3), (2, 40)), 2, 4, 32, 32),
    "few tokens, dense": Problem(((1, 90), (1, 300)), 1, 16, 32, 64, dense_len=100),
    "large heads": Problem(((9, 40),), 1, 2, 256, 32),
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3}


def run(call: Any, inputs: tuple[Tensor, ...], **arguments: Any) -> list[Tensor]:
    """Return output, LSE and the gradients of both, for fixed gradients that go back."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = call(q=leaves[0], k=leaves[1], v=leaves[2], **arguments)
    some = lse.detach().isfinite()
    generator = torch.Generator().manual_seed(5)
    grad_out = torch.randn(out.shape, generator=generator).to(DEVICE)
    grad_lse = torch.randn(lse.shape, generator=generator).to(DEVICE)
    ((out * grad_out).float().sum() + (lse * grad_lse)[some].sum()).backward()
    return [out.detach(), lse.detach(), *(x.grad for x in leaves)]  # type: ignore[list-item]


@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_eager(name: str) -> None:
    problem = PROBLEMS[name]
    *inputs, selected = problem.draw()
    given = problem.lengths | {"block_size": problem.block_size}
    actual = run(attend, tuple(inputs), selected=selected, dense_len=problem.dense_len, **given)
    wide = tuple(x.float() for x in inputs)
    expected = run(EAGER.attend, wide, selected=problem.written_out(selected), **given)
    assert actual[0].dtype == problem.dtype
    tolerance = TOLERANCE[problem.dtype]
    for x, y in zip(actual, expected, strict=True):
        assert_close(x.float(), y, atol=tolerance, rtol=tolerance)


def test_strides_of_any_kind_are_read() -> None:
    problem = PROBLEMS["history"]
    q, k, v, selected = problem.draw()
    given = problem.lengths | {"block_size": problem.block_size}
    expected, _ = attend(q=q, k=k, v=v, selected=selected, **given)
    moved = q.transpose(0, 1).contiguous().transpose(0, 1)
    padded = torch.nn.functional.pad(k, (0, 3))[..., :-3]
    spread = torch.stack([v, v], dim=-1).flatten(-2)[..., ::2]
    chosen = selected.transpose(0, 2).contiguous().transpose(0, 2)
    actual, _ = attend(q=moved, k=padded, v=spread, selected=chosen, **given)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("rows", [2, 40])
def test_blocks_that_do_not_exist_are_not_read(rows: int) -> None:
    """Trust nothing that lies on the device: the result is that of the blocks that exist."""
    problem = Problem(((rows, 50),))
    q, k, v, selected = problem.draw()
    given = problem.lengths | {"block_size": problem.block_size}
    selected[:] = torch.tensor([0, -1, -1])
    expected, _ = attend(q=q, k=k, v=v, selected=selected, **given)
    for nonsense in (4, 1 << 27, (1 << 31) - 1):
        selected[..., 1] = nonsense
        actual, _ = attend(q=q, k=k, v=v, selected=selected, **given)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 24}, "block_size must be one of"),
        ({"head_dim": 48}, "head dim of"),
        ({"group": 33}, "at most 32 heads"),
    ],
)
def test_what_there_is_no_kernel_for_is_refused(changes: dict[str, int], message: str) -> None:
    problem = Problem(((4, 30),), **changes)
    q, k, v, selected = problem.draw()
    with pytest.raises(ValueError, match=message):
        attend(q=q, k=k, v=v, selected=selected, block_size=problem.block_size, **problem.lengths)


def test_operator_keeps_to_the_rules_of_operators() -> None:
    problem = PROBLEMS["history"]
    q, k, v, selected = problem.draw()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    numbers = (*problem.lengths.values(), problem.block_size, 0)
    torch.library.opcheck(attend_operator, (*leaves, selected, *numbers))


def test_compiles_without_a_break() -> None:
    problem = PROBLEMS["few tokens"]
    q, k, v, selected = problem.draw()
    given = problem.lengths | {"block_size": problem.block_size}

    def call(q: Tensor) -> Tensor:
        out, lse = attend(q=q * 2, k=k, v=v, selected=selected, **given)
        return out.sum() + lse.exp().sum()

    x, y = (q.clone().requires_grad_() for _ in range(2))
    expected = call(x)
    actual = torch.compile(call, backend="aot_eager", fullgraph=True)(y)
    expected.backward()
    actual.backward()
    assert_close(actual, expected)
    assert_close(y.grad, x.grad)


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", ["history", "few tokens"])
def test_replays_in_a_cuda_graph(name: str) -> None:
    problem = PROBLEMS[name]
    q, k, v, selected = problem.draw()
    given = problem.lengths | {"block_size": problem.block_size, "selected": selected}
    attend(q=q, k=k, v=v, **given)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attend(q=q, k=k, v=v, **given)
    new = problem.draw(seed=1)
    for old, x in zip((q, k, v, selected), new, strict=True):
        old.copy_(x)
    graph.replay()
    expected, _ = attend(q=q, k=k, v=v, **given)
    assert torch.equal(out, expected)


LISTED = Problem(((40, 90), (0, 20), (25, 25), (70, 70)), kv_heads=2, dense_len=26)


def union_of(problem: Problem, tokens: int, piece: int) -> tuple[Union, Tensor]:
    selected = problem.draw()[3]
    given = problem.lengths
    ends, longest = (given["cu_seqlens_q"], given["cu_seqlens_k"]), given["max_seqlen_k"]
    dense_len = problem.dense_len or 0
    union = unite(selected, *ends, longest, problem.block_size, dense_len, tokens, piece)
    return union, selected


def attended(problem: Problem, selected: Tensor, piece: int) -> dict[tuple[int, int], list[int]]:
    """Return the pieces that each row attends, by kv head and row; None for everything."""
    pieces: dict[tuple[int, int], list[int]] = {}
    parts, row = problem.block_size // piece, 0
    for num_queries, num_keys in problem.sequences:
        for t in range(num_queries):
            own = (num_keys - num_queries + t) // piece
            for head in range(problem.kv_heads):
                blocks = [b for b in selected[head, row].tolist() if b >= 0]
                if num_keys < (problem.dense_len or 0):
                    blocks = list(range(own // parts + 1))
                every = [b * parts + i for b in blocks for i in range(parts)]
                pieces[head, row] = [p for p in every if p <= own]
            row += 1
    return pieces


@pytest.mark.parametrize(("tokens", "piece"), [(1, 16), (8, 16), (12, 16), (16, 8), (24, 16)])
def test_union_lists_what_each_token_attends(tokens: int, piece: int) -> None:
    union, selected = union_of(LISTED, tokens, piece)
    expected = attended(LISTED, selected, piece)
    actual: dict[tuple[int, int], list[int]] = {}
    for tile, (row, base, first, num_keys, _, dense, *_) in enumerate(union.tiles.tolist()):
        for head in range(LISTED.kv_heads):
            count = int(union.counts[head, tile])
            if count == 0:
                continue
            assert base % tokens == 0
            pieces = union.pieces[head, tile, :count].tolist()
            members = union.members[head, tile, : count + 1].tolist()
            if dense:
                pieces, members = list(range(count))[::-1], [-1] * (count + 1)
            assert pieces == sorted(set(pieces), reverse=True)
            assert members[count] == -1
            for token in range(tokens):
                if first <= base + token < num_keys:
                    mine = [p for p, m in zip(pieces, members, strict=False) if m >> token & 1]
                    mine = [p for p in mine if p <= (base + token) // piece] if dense else mine
                    actual[head, row + token] = mine[::-1]
    assert actual == {key: value for key, value in expected.items() if value or key in actual}


@pytest.mark.parametrize("item_readers", [16, 1024])
def test_readers_are_listed_in_order(item_readers: int) -> None:
    piece = 16
    union, selected = union_of(LISTED, 8, piece)
    expected = attended(LISTED, selected, piece)
    given = LISTED.lengths
    total_q, total_k = (int(given[name][-1]) for name in ("cu_seqlens_q", "cu_seqlens_k"))
    ends = given["cu_seqlens_q"], given["cu_seqlens_k"]
    sizes = (LISTED.dense_len or 0, total_q, total_k, LISTED.budget, item_readers)
    readers = list_readers(union, *ends, *sizes)
    seen = 0
    row = key = 0
    for index, (num_queries, num_keys) in enumerate(LISTED.sequences):
        for block in range(num_blocks(num_keys, piece)):
            number = key // piece + index + block
            for head in range(LISTED.kv_heads):
                mine = [r for r in range(row, row + num_queries) if block in expected[head, r]]
                assert listed(readers, number, head) == mine
                seen += len(mine)
            record = readers.records[number].tolist()
            assert record[:2] == [key + block * piece, min(piece, num_keys - block * piece)]
        row, key = row + num_queries, key + num_keys
    assert seen == sum(len(pieces) for pieces in expected.values())
    assert int(readers.items[-1]) <= readers.num_items


def listed(readers: Readers, number: int, head: int) -> list[int]:
    """Return the readers of a piece, and check how they are cut into items."""
    pair = head * readers.num_pieces + number
    start, stop = readers.starts[pair : pair + 2].tolist()
    first, end = readers.items[pair : pair + 2].tolist()
    assert end - first == max(1, -(-(stop - start) // readers.item_readers))
    _, keys, _, origin, earliest, count, everyone = readers.records[number].tolist()[:7]
    if everyone and keys:
        return list(range(origin + earliest, origin + earliest + count))
    return readers.rows[start:stop].tolist()
