"""`attend` in CUDA C++ within the suite's bounds, and its lists; in the emulator."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import cuda_emulator

from infllmv2_conformance import bounds
from infllmv2_conformance.capabilities import Arithmetic
from infllmv2_conformance.checks import check_values
from infllmv2_impls.cupy import attend as stage
from infllmv2_impls.cupy import launch
from infllmv2_impls.cupy import union as lists
from infllmv2_impls.cupy.implementation import CAPABILITIES
from infllmv2_reference.geometry import num_blocks
from infllmv2_reference.layout import cu_seqlens_of, spans

ARITHMETIC = Arithmetic(**CAPABILITIES["arithmetic"])

if not cuda_emulator.is_available():
    pytest.skip("the CUDA emulator does not work here", allow_module_level=True)


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "backend", cuda_emulator.Emulator(capability=(9, 0)))


@dataclass(frozen=True)
class Problem:
    """State sizes, and draw tensors of them."""

    sequences: tuple[tuple[int, int], ...]
    kv_heads: int = 1
    group: int = 16
    head_dim: int = 32
    block_size: int = 16
    budget: int = 3
    dtype: torch.dtype = torch.float16
    dense_len: int = 0

    @property
    def lengths(self) -> dict[str, Any]:
        queries, keys = zip(*self.sequences, strict=True)
        return {
            "cu_seqlens_q": cu_seqlens_of(queries, "cpu"),
            "cu_seqlens_k": cu_seqlens_of(keys, "cpu"),
            "max_seqlen_q": max(queries),
            "max_seqlen_k": max(keys),
        }

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v."""
        generator = torch.Generator().manual_seed(0)
        totals = [sum(lengths) for lengths in zip(*self.sequences, strict=True)]
        rows = (totals[0], totals[1], totals[1])
        heads = (self.group * self.kv_heads, self.kv_heads, self.kv_heads)
        q, k, v = (
            torch.randn(n, h, self.head_dim, generator=generator).to(self.dtype)
            for n, h in zip(rows, heads, strict=True)
        )
        return q, k, v

    def select(self, everything: bool = False) -> Tensor:
        """Return rows of every length, empty ones included; or all that is visible."""
        draw = random.Random(0)
        rows: list[list[list[int]]] = []
        for _ in range(self.kv_heads):
            rows.append([])
            for queries, keys in self.sequences:
                for position in range(keys - queries, keys):
                    visible = range(position // self.block_size + 1)
                    most = min(len(visible), self.budget)
                    some = draw.sample(visible, draw.choice((0, 1, most, most)))
                    rows[-1].append(list(visible) if everything else sorted(some))
        width = max((len(row) for line in rows for row in line), default=0)
        padded = [[row + [-1] * (width - len(row)) for row in line] for line in rows]
        shape = self.kv_heads, len(rows[0]), width
        return torch.tensor(padded, dtype=torch.int32).reshape(shape)

    def attend(
        self, selected: Tensor, *qkv: Tensor, kernels: stage.Kernels = "portable"
    ) -> tuple[Tensor, Tensor]:
        q, k, v = qkv or self.draw()
        return stage.attend(
            q=q,
            k=k,
            v=v,
            selected=selected,
            **self.lengths,
            block_size=self.block_size,
            dense_len=self.dense_len,
            kernels=kernels,
        )


PROBLEMS = {
    "one token": Problem(((1, 300), (0, 9), (1, 17), (1, 1)), head_dim=128, block_size=64),
    "few tokens": Problem(((2, 200), (1, 40)), block_size=128, head_dim=128, kv_heads=2),
    "a tile of two pieces": Problem(((40, 70), (3, 3)), group=1, block_size=48),
    "rows without head": Problem(((20, 60), (0, 0)), group=7, head_dim=96, block_size=32),
    "queries in shared memory": Problem(((6, 70), (5, 5)), group=4, head_dim=256, kv_heads=2),
    "two warps of a token": Problem(((5, 90),), group=32, head_dim=64, block_size=64),
    "bfloat16": Problem(((7, 90),), group=16, head_dim=64, dtype=torch.bfloat16),
    "nothing to attend with": Problem(((0, 5),)),
}

HOPPER_PROBLEMS = {
    "history": Problem(((5, 300), (0, 9), (20, 90), (1, 1)), head_dim=128, block_size=64),
    "blocks of two pieces": Problem(((70, 70), (7, 200)), 2, head_dim=64, block_size=128),
    "8 heads": Problem(((30, 260),), 1, 8, 64, 64, dtype=torch.bfloat16),
    "32 heads": Problem(((9, 200), (2, 129)), 1, 32, 128, 64, dtype=torch.bfloat16),
    "more pieces than stages": Problem(((15, 1500), (2, 700)), 1, 16, 128, 64, budget=9),
    "few pieces far apart": Problem(((24, 3000),), 1, 8, 64, 64, budget=2),
}


def assert_same(problem: Problem, got: tuple[Tensor, Tensor], selected: Tensor) -> None:
    """Judge by the suite's bounds."""
    out, lse = got
    q, k, v = problem.draw()
    ends_q, ends_k, *_ = problem.lengths.values()
    dtype = str(problem.dtype).removeprefix("torch.")
    for span in spans(ends_q, ends_k):
        tokens = q[span.queries], k[span.keys], v[span.keys]
        mine = selected[:, span.queries]
        must = bounds.attend(*tokens, mine, problem.block_size, ARITHMETIC, dtype)
        check_values("the output is wrong", out[span.queries], must[0], span, "out", _note)
        check_values("the LSE is wrong", lse[span.queries], must[1], span, "lse", _note)


def _note(_: Tensor) -> None:
    """Nobody asks how close it was."""


# Either way of a kernel is compiled of its own, so that few problems have both.
WHOLE = [name for name in PROBLEMS if name != "few tokens"]
IN_PARTS = ["one token", "few tokens", "queries in shared memory", "nothing to attend with"]


@pytest.mark.parametrize(
    ("name", "parts"), [*((name, 1) for name in WHOLE), *((name, 5) for name in IN_PARTS)]
)
def test_within_bounds(name: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = PROBLEMS[name]

    def cut(*_: object) -> int:
        return parts

    monkeypatch.setattr(stage, "_parts", cut)
    selected = problem.select()
    assert_same(problem, problem.attend(selected), selected)


@pytest.mark.parametrize("order", ["1", "-1", "7", "8"])
@pytest.mark.parametrize("name", HOPPER_PROBLEMS)
def test_within_bounds_on_hopper(name: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFLLMV2_EMULATOR_ORDER", order)
    problem = HOPPER_PROBLEMS[name]
    selected = problem.select()
    assert_same(problem, problem.attend(selected, kernels="hopper"), selected)


@pytest.mark.parametrize("order", ["1", "-1", "7", "8"])
def test_groups_on_hopper_may_be_far_apart(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFLLMV2_EMULATOR_ORDER", order)
    problem = Problem(((12, 1608),), head_dim=128, block_size=64)  # one tile
    rows = [[1, 14, 19, 25]] * 4 + [[*range(1, 26, 2)]] * 4 + [[*range(26)]] * 4
    for first in (0, 4, 8):
        turned = rows[first:] + rows[:first]
        selected = torch.tensor([[row + [-1] * (26 - len(row)) for row in turned]])
        selected = selected.to(torch.int32)
        assert_same(problem, problem.attend(selected, kernels="hopper"), selected)


SMALL = {"portable": Problem(((4, 50), (3, 37)), kv_heads=2)}
SMALL["hopper"] = Problem(((4, 350), (13, 137)), kv_heads=2, head_dim=64, block_size=64)
either = pytest.mark.parametrize("kernels", SMALL)


@either
def test_short_sequences_attend_everything_whatever_is_selected(kernels: stage.Kernels) -> None:
    problem = replace(SMALL[kernels], sequences=((5, 70), (9, 9), (1, 33)), dense_len=71)
    selected = torch.full((2, 15, 2), 1 << 30, dtype=torch.int32)
    got = problem.attend(selected, kernels=kernels)
    assert_same(problem, got, problem.select(everything=True))


@either
def test_rows_that_nobody_attends_are_not_read(kernels: stage.Kernels) -> None:
    problem = replace(SMALL[kernels], kv_heads=1, budget=2)
    selected = problem.select()
    q, k, v = problem.draw()
    starts = problem.lengths["cu_seqlens_k"].tolist()
    ends = problem.lengths["cu_seqlens_q"].tolist()
    for i, (_, keys) in enumerate(problem.sequences):
        used = set(selected[:, ends[i] : ends[i + 1]].flatten().tolist())
        for block in set(range(num_blocks(keys, problem.block_size))) - used:
            first = starts[i] + block * problem.block_size
            last = min(first + problem.block_size, starts[i + 1])
            k[first:last] = v[first:last] = float("nan")
    assert k.isnan().any()
    assert_same(problem, problem.attend(selected, q, k, v, kernels=kernels), selected)


@either
def test_what_lies_behind_a_sequence_has_no_effect(kernels: stage.Kernels) -> None:
    problem = replace(SMALL[kernels], sequences=SMALL[kernels].sequences[:1])
    assert problem.sequences[0][1] % problem.block_size
    selected = problem.select(everything=True)
    q, k, v = problem.draw()
    behind = (0, 0, 0, 0, 0, problem.block_size)
    k, v = (torch.nn.functional.pad(x, behind, value=float("nan")) for x in (k, v))
    assert_same(problem, problem.attend(selected, q, k, v, kernels=kernels), selected)


@either
def test_tensors_may_be_strided_and_begin_anywhere(kernels: stage.Kernels) -> None:
    problem = SMALL[kernels]
    selected = problem.select()
    q, k, v = problem.draw()
    k = torch.stack((k, v), 1)[:, 0]
    v = torch.nn.functional.pad(v, (1, 0))[..., 1:]
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    selected = selected.transpose(0, 2).contiguous().transpose(0, 2)
    assert_same(problem, problem.attend(selected, q, k, v, kernels=kernels), selected)


def list_pieces(problem: Problem, selected: Tensor, tokens: int, piece: int) -> dict[Any, Any]:
    """Return the members of the pieces of every tile, by the head and the tile's last row."""
    tiles: dict[Any, dict[int, int]] = {}
    for head, lines in enumerate(selected.tolist()):
        row = 0
        for queries, keys in problem.sequences:
            for position in range(keys - queries, keys):
                base = position // tokens * tokens
                first = row - (position - base)  # the row that the tile's first token has
                tile = tiles.setdefault((head, first, base), {})
                for block in lines[row]:
                    for key in range(block * problem.block_size, (block + 1) * problem.block_size):
                        if 0 <= key <= position:
                            bit = 1 << position - base
                            tile[key // piece] = tile.get(key // piece, 0) | bit
                row += 1
    return tiles


@pytest.mark.parametrize(
    ("tokens", "piece", "window"), [(12, 16, 5), (32, 64, 8192), (1, 64, 2), (16, 32, 3)]
)
def test_lists_are_the_union(
    tokens: int, piece: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "WINDOW", window)
    problem = Problem(((50, 700), (3, 3), (0, 10), (33, 64)), kv_heads=2, block_size=64, budget=5)
    selected = problem.select()
    ends_q, ends_k, _, most = problem.lengths.values()
    union = lists.unite(selected, ends_q, ends_k, most, 64, 0, tokens, piece)
    expected = list_pieces(problem, selected, tokens, piece)
    for (head, tile), count in zip(
        [(h, t) for h in range(2) for t in range(union.num_tiles)],
        union.counts.flatten().tolist(),
        strict=True,
    ):
        row, base = union.tiles[tile, :2].tolist()
        pieces = expected.pop((head, row, base), {})
        assert union.pieces[head, tile, :count].tolist() == sorted(pieces, reverse=True)
        bits = [bits & 0xFFFFFFFF for bits in union.members[head, tile, :count].tolist()]
        assert bits == [pieces[piece] for piece in sorted(pieces, reverse=True)]
        assert union.members[head, tile, count] == -1 or not count
    assert not expected
