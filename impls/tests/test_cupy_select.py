"""The selection in CUDA C++ against eager, in the emulator: shapes it hardly meets."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from infllmv2_conformance import bounds
from infllmv2_conformance.capabilities import Arithmetic
from infllmv2_conformance.checks import check_values
from infllmv2_impls.cupy import launch, score_hopper, select, topk, tuning
from infllmv2_impls.cupy.implementation import CAPABILITIES
from infllmv2_impls.eager import IMPLEMENTATION as EAGER
from infllmv2_impls.packing import Lengths, Lines, Windows, num_slots
from infllmv2_reference import SparseConfig
from infllmv2_reference.layout import cu_seqlens_of, spans

sys.path.insert(0, str(Path(__file__).parent))
import cuda_emulator

pytestmark = pytest.mark.skipif(not cuda_emulator.is_available(), reason="needs g++ on x86-64")

ARITHMETIC = Arithmetic(**CAPABILITIES["arithmetic"])
SMALL = SparseConfig(
    block_size=16, kernel_size=8, kernel_stride=4, window_size=32, topk=12, dense_len=-1
)
MODEL = SparseConfig(window_size=128, topk=6, dense_len=-1)
SCORES: dict[str, Callable[..., Tensor]] = {
    "distinct": lambda *shape: torch.rand(shape),
    "ties": lambda *shape: torch.randint(0, 4, shape).float(),
    "hardly-any": lambda *shape: torch.where(
        torch.rand(shape) < 0.97, -torch.inf, torch.randn(shape)
    ),
    "zeros": lambda *shape: (
        torch.where(torch.rand(shape) < 0.5, -0.0, 0.0) - (torch.rand(shape) < 0.3).float()
    ),
    "wide": lambda *shape: -torch.rand(shape) * 10.0 ** torch.randint(-30, 30, shape),
}
TILES = [tuning.TopkTile(1, 4), tuning.TopkTile(4, 1), tuning.TopkTile(8, 1)]
# Around the lengths at which a kernel works otherwise: vectors, steps, what is listed as a whole.
LENGTHS = (
    1, 2, 31, 32, 33, 64, 127, 128, 129, 255, 256, 257, 260, 384, 511, 513, 640, 1023, 1025, 1030,
    1281, 1537, 2040, 2049,
)  # fmt: skip
WANTED = (1, 31, 32, 33, 62, 64, 65, 130, 300)
DENORMAL = 1e-45
ROWS: dict[str, Callable[..., Tensor]] = {
    **SCORES,
    "negative": lambda *shape: -1 - torch.rand(shape),
    "equal": lambda *shape: torch.full(shape, 0.25),
    "tied-behind": lambda *shape: torch.where(
        torch.rand(shape) < 0.9, 0.5, torch.rand(shape)
    ).nan_to_num(),
    "nan": lambda *shape: torch.where(
        torch.rand(shape) < 0.9, torch.nan * torch.randn(shape), torch.randn(shape)
    ),
    "some-nan": lambda *shape: torch.where(
        torch.rand(shape) < 0.1, torch.nan * torch.randn(shape), torch.rand(shape)
    ),
    "denormal": lambda *shape: torch.randint(-3, 4, shape) * DENORMAL,
    "infinite": lambda *shape: torch.where(torch.rand(shape) < 0.1, torch.inf, torch.rand(shape)),
    "lowest": lambda *shape: torch.where(
        torch.rand(shape) < 0.5, -torch.inf, torch.finfo(torch.float32).min
    ),
    "ascending": lambda *shape: torch.arange(shape[-1]).expand(shape).float(),
    "descending": lambda *shape: -torch.arange(shape[-1]).expand(shape).float(),
    "clustered": lambda *shape: (
        torch.rand(shape) + 3 * (torch.arange(shape[-1]) // 50 % 7 == 2).float()
    ),
}
CASES = {
    "prefill": (MODEL, 40, 3000, 16, 128),
    "decode": (MODEL, 1, 9000, 16, 128),
    "decode-exact": (replace(MODEL, lse="exact"), 1, 9000, 16, 128),
    "padded-group": (MODEL, 9, 3000, 7, 64),
    "wide-heads": (MODEL, 20, 2000, 32, 256),
    "one-head": (MODEL, 70, 1500, 1, 96),
    "one-stage": (replace(MODEL, kernel_size=64, kernel_stride=64, lse="exact"), 33, 3000, 2, 64),
    "many-windows": (replace(SMALL, block_size=128, window_size=128, topk=3), 33, 2000, 8, 64),
    "not-pooled": (replace(SMALL, kernel_size=32, kernel_stride=16), 33, 1500, 8, 64),
    "ragged": (replace(SMALL, kernel_size=5, kernel_stride=3), 33, 1500, 4, 32),
}
HOPPER = {
    "model": (MODEL, (40,), (3000,), 16, 128),
    "exact": (replace(MODEL, lse="exact"), (20,), (2000,), 16, 64),
    "packed": (MODEL, (5, 0, 33, 17), (1100, 30, 2111, 17), 16, 64),
    "small-blocks": (SMALL, (70, 3), (900, 333), 8, 64),
    "two-heads-beside": (MODEL, (9, 12), (900, 1333), 32, 64),
    "a-block-a-tile": (
        replace(MODEL, block_size=128, kernel_size=16, kernel_stride=8, topk=3),
        (35,),
        (2500,),
        8,
        128,
    ),
    "no-overlap": (replace(MODEL, kernel_size=16), (35,), (2500,), 16, 64),
    "more-overlap": (replace(MODEL, kernel_size=64), (35,), (2500,), 16, 64),
    "not-all-visible": (
        replace(MODEL, kernel_size=80, window_size=64, local_override=1),
        (35,),
        (2500,),
        16,
        64,
    ),
}


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels run in the emulator."""
    monkeypatch.setattr(launch, "backend", cuda_emulator.Emulator())
    torch.manual_seed(0)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("scores", SCORES)
def test_rows_of_any_length(
    scores: str, tile: tuning.TopkTile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Select from rows that one warp has, or that several share."""

    def choose(*_: int) -> tuning.TopkTile:
        return tile

    monkeypatch.setattr(topk, "topk_tile", choose)
    num_keys, num_queries = 16 * 300 + 7, 9
    block_scores = SCORES[scores](2, num_queries, 301)
    ends = cu_seqlens_of([num_queries], "cpu"), cu_seqlens_of([num_keys], "cpu")
    lengths = Lengths(*ends, num_queries, num_keys)
    expected = EAGER.select_blocks(
        block_scores=block_scores,
        cu_seqlens_q=ends[0],
        cu_seqlens_k=ends[1],
        max_seqlen_q=num_queries,
        max_seqlen_k=num_keys,
        config=SMALL,
    )
    assert_close(select.select_blocks(block_scores, lengths, SMALL), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("warps", "wanted"), [*((1, x) for x in WANTED), (8, 1), (8, 62), (8, 300)]
)
@pytest.mark.parametrize("scores", ROWS)
def test_rows_against_a_sort(
    scores: str, warps: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Select what a stable sort puts first, of rows that begin anywhere in a vector."""
    tile = tuning.TopkTile(warps, 4 if warps == 1 else 1)

    def choose(*_: int) -> tuning.TopkTile:
        return tile

    monkeypatch.setattr(topk, "topk_tile", choose)
    size, local = SMALL.block_size, SMALL.local_blocks
    lengths_of = [n + SMALL.init_blocks + local for n in LENGTHS]
    keys = [size * n for n in lengths_of]
    ends = cu_seqlens_of([1] * len(keys), "cpu"), cu_seqlens_of(keys, "cpu")
    lengths = Lengths(*ends, 1, max(keys))
    budget = wanted + SMALL.init_blocks + local
    slots = num_slots(len(keys), len(keys), 1)
    for columns, shift in ((max(lengths_of) + 3, 0), (max(lengths_of) + 1, 1)):
        lines = ROWS[scores](1, len(keys), columns)
        data = torch.full((lines.numel() + shift,), torch.inf)[shift:].view_as(lines).copy_(lines)
        selected = torch.full((1, len(keys), budget), -2, dtype=torch.int32)
        topk.write_selection(Lines(data, 1, slots), selected, lengths, SMALL)
        for line, found, blocks in zip(lines[0], selected[0], lengths_of, strict=True):
            assert found.tolist() == _sorted_choice(line, blocks, wanted, budget)


def _sorted_choice(line: Tensor, blocks: int, wanted: int, budget: int) -> list[int]:
    """Return the choice of a stable sort."""
    init, last = SMALL.init_blocks, blocks - 1 - SMALL.local_blocks
    competing = line[init : last + 1].nan_to_num(-torch.inf, torch.inf, -torch.inf)
    order = torch.sort(competing, descending=True, stable=True).indices[:wanted] + init
    chosen = [*range(init), *sorted(order.tolist()), *range(last + 1, blocks)]
    return chosen + [-1] * (budget - len(chosen))


@pytest.mark.parametrize("case", CASES)
def test_scores_and_chunks(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Score windows within the suite's bounds; select in chunks what the scores of blocks say."""
    config, num_queries, num_keys, group, head_dim = CASES[case]
    dtype = torch.float16 if group < 16 else torch.bfloat16
    q = torch.randn(num_queries, 2 * group, head_dim).to(dtype)
    k = torch.randn(num_keys, 2, head_dim).to(dtype)
    ends = cu_seqlens_of([num_queries], "cpu"), cu_seqlens_of([num_keys], "cpu")
    lengths = Lengths(*ends, num_queries, num_keys)
    kinds = (
        _windows(k, ends[1], config.kernel_size, config.kernel_stride),
        _windows(k, ends[1], config.lse_kernel_size, config.lse_kernel_stride),
    )
    (span,) = spans(*ends)
    windows = (kinds[0].means, kinds[1].means)
    must = bounds.scores(q, *windows, num_keys, config, ARITHMETIC)
    scores = select.score_windows(q, *kinds, lengths, config)[..., : must.value.shape[-1]]
    scores = scores.where(must.value > -torch.inf, -torch.inf)  # anything at invisible windows
    check_values("a window's score is wrong", scores, must, span, "scores", lambda _: None)
    blocks = select.score_blocks(q, *kinds, lengths, config)
    selected = select.select(q, *kinds, lengths, config)
    assert_close(select.select_blocks(blocks, lengths, config), selected, rtol=0, atol=0)
    monkeypatch.setattr(select, "SCRATCH_BYTES", 1)
    assert_close(select.select(q, *kinds, lengths, config), selected, rtol=0, atol=0)


@pytest.mark.parametrize("case", HOPPER)
def test_scores_on_hopper(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Score blocks within the suite's bounds, and select in chunks what these scores say."""
    monkeypatch.setattr(launch, "backend", cuda_emulator.Emulator(capability=(9, 0)))
    config, num_queries, num_keys, group, head_dim = HOPPER[case]
    dtype = torch.float16 if group < 16 else torch.bfloat16
    q = torch.randn(sum(num_queries), 2 * group, head_dim).to(dtype)
    q[0] *= 30
    k = torch.randn(sum(num_keys), 2, head_dim).to(dtype)
    ends = cu_seqlens_of(num_queries, "cpu"), cu_seqlens_of(num_keys, "cpu")
    lengths = Lengths(*ends, max(num_queries), max(num_keys))
    kinds = (
        _windows(k, ends[1], config.kernel_size, config.kernel_stride),
        _windows(k, ends[1], config.lse_kernel_size, config.lse_kernel_stride),
    )
    assert score_hopper.takes(q, kinds[0], config, "hopper")
    blocks = select.score_blocks(q, *kinds, lengths, config, "hopper")
    for span in spans(*ends):
        own = [x.means[x.starts[span.sequence] : x.starts[span.sequence + 1]] for x in kinds]
        score = bounds.scores(q[span.queries], own[0], own[1], span.num_keys, config, ARITHMETIC)
        must = bounds.block_scores(score, span.num_keys, config)
        last = torch.arange(span.num_keys - span.num_queries, span.num_keys) // config.block_size
        columns = torch.arange(must.value.shape[-1])
        competes = columns <= (last - config.local_blocks)[:, None]
        found = blocks[:, span.queries, : len(columns)]
        found = found.where(competes, must.value.float())  # anything at others
        check_values("a block's score is wrong", found, must, span, "blocks", lambda _: None)
    selected = select.select(q, *kinds, lengths, config, "hopper")
    assert_close(select.select_blocks(blocks, lengths, config), selected, rtol=0, atol=0)
    monkeypatch.setattr(select, "SCRATCH_BYTES", 1)
    chunked = select.select(q, *kinds, lengths, config, "hopper")
    assert_close(chunked, selected, rtol=0, atol=0)


def test_misaligned_tensors_are_copied() -> None:
    """Copy what lies at odd addresses, and nothing else."""
    x = torch.arange(4 * 2 * 16, dtype=torch.float16).view(4, 2, 16)
    assert select.aligned(x, 8) is x
    assert select.aligned(x[:, :1], 8).data_ptr() == x.data_ptr()
    odd = torch.empty(129, dtype=torch.float16)[1:].view(4, 2, 16).copy_(x)
    for view in (odd, x.transpose(1, 2)[:, :8], x[..., 1:9]):
        copy = select.aligned(view, 8)
        assert copy.data_ptr() % 16 == 0
        assert copy.is_contiguous()
        assert_close(copy, view)


def _windows(k: Tensor, ends: Tensor, size: int, stride: int) -> Windows:
    means, starts = EAGER.compress_keys(
        k=k, cu_seqlens_k=ends, max_seqlen_k=len(k), kernel_size=size, kernel_stride=stride
    )
    return Windows(means, starts, size, stride)
