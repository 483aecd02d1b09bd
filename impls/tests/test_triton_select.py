"""The selection in Triton against eager, stage by stage, on a GPU or in the interpreter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.testing import assert_close

from infllmv2_impls.eager import IMPLEMENTATION as EAGER
from infllmv2_reference import SparseConfig
from infllmv2_reference.geometry import is_forced
from infllmv2_reference.layout import cu_seqlens_of, spans
from infllmv2_reference.score import visible_windows

pytest.importorskip("triton")

import triton
import triton.language as tl

from infllmv2_impls.packing import Lengths, num_slots
from infllmv2_impls.triton import TritonImplementation, ops, select, sequences, tuning
from infllmv2_impls.triton.device import INTERPRETED
from infllmv2_impls.triton.score import can_pool

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter

DEVICE = "cpu" if INTERPRETED else "cuda"
TRITON = TritonImplementation()
SMALL = SparseConfig(
    block_size=16, kernel_size=8, kernel_stride=4, window_size=16, topk=4, dense_len=-1
)
CONFIGS = {
    "approximate": SMALL,
    "exact": replace(SMALL, lse="exact"),
    "one-stage": replace(SMALL, kernel_size=16, kernel_stride=16, lse="exact", init_blocks=0),
    "long-windows": replace(SMALL, kernel_size=24, kernel_stride=8, local_override=1),
    "literal": replace(SMALL, pooling="paper_eq7", init_blocks=2, topk=5),
    "ragged": replace(SMALL, kernel_size=5, kernel_stride=3, lse_kernel=(11, 5)),
    "many-windows": SparseConfig(128, 2, 1, 1, 0, 2, -1),
    "wide-budget": replace(SMALL, topk=200),
    "no-room": replace(SMALL, topk=2),
}
BATCHES = {
    "prefill": ([70, 1, 30], [70, 1, 30]),
    "history": ([3, 20, 1], [210, 21, 150]),
    "empty": ([0, 5, 0, 2], [0, 5, 40, 61]),
    "nothing": ([], []),
    "no-rows": ([0, 0], [0, 9]),
    "one": ([1], [333]),
    "long": ([4], [700]),
}


class Batch:
    """Inputs of the stages, and what eager makes of them."""

    def __init__(self, name: str, config: SparseConfig, dtype: torch.dtype, group: int = 3) -> None:
        num_q, num_k = BATCHES[name]
        generator = torch.Generator().manual_seed(len(name))

        def draw(rows: int, heads: int) -> Tensor:
            x = torch.randn(rows, heads, 24, generator=generator)
            return x.to(dtype).to(DEVICE)

        self.config = config
        self.q, self.k, self.v = (
            draw(sum(num_q), 2 * group),
            draw(sum(num_k), 2),
            draw(sum(num_k), 2),
        )
        self.lengths: dict[str, Any] = {
            "cu_seqlens_q": cu_seqlens_of(num_q, DEVICE),
            "cu_seqlens_k": cu_seqlens_of(num_k, DEVICE),
            "max_seqlen_q": max(num_q, default=0),
            "max_seqlen_k": max(num_k, default=0),
        }
        self.spans = list(spans(self.lengths["cu_seqlens_q"], self.lengths["cu_seqlens_k"]))

    def compressed(self, implementation: Any, size: int, stride: int) -> tuple[Tensor, Tensor]:
        """Return the windows of one kind."""
        return implementation.compress_keys(
            k=self.k,
            cu_seqlens_k=self.lengths["cu_seqlens_k"],
            max_seqlen_k=self.lengths["max_seqlen_k"],
            kernel_size=size,
            kernel_stride=stride,
        )

    def scoring(self) -> dict[str, Any]:
        """Return the arguments of functions that begin with scores."""
        c = self.config
        k_c1, ends_c1 = self.compressed(EAGER, c.kernel_size, c.kernel_stride)
        k_c2, ends_c2 = self.compressed(EAGER, c.lse_kernel_size, c.lse_kernel_stride)
        windows = {"k_c1": k_c1, "k_c2": k_c2, "cu_seqlens_c1": ends_c1, "cu_seqlens_c2": ends_c2}
        return {"q": self.q, **windows, **self.lengths, "config": c}

    def numbers(self, config: SparseConfig) -> tuple[Any, ...]:
        """Return the last arguments of operators."""
        return *self.lengths.values(), ops.encode(config, -1)

    def competing(self) -> list[Tensor]:
        """Return for every sequence which blocks compete, `[T, N]`."""
        c, results = self.config, []
        for span in self.spans:
            blocks = range(-(-span.num_keys // c.block_size))
            positions = range(span.num_keys - span.num_queries, span.num_keys)
            forced = (c.block_size, c.init_blocks, c.local_blocks)
            rows = [
                [b <= p // c.block_size and not is_forced(b, p, *forced) for b in blocks]
                for p in positions
            ]
            results.append(torch.tensor(rows, dtype=torch.bool).reshape(len(rows), len(blocks)))
        return results


@pytest.fixture(params=BATCHES)
def batch(request: pytest.FixtureRequest) -> Batch:
    return Batch(request.param, SMALL, torch.float32)


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> SparseConfig:
    return CONFIGS[request.param]


def test_windows_of_any_batch(batch: Batch) -> None:
    for size, stride in ((8, 4), (24, 8), (5, 3), (1, 1)):
        (means, ends), (expected, expected_ends) = (
            batch.compressed(x, size, stride) for x in (TRITON, EAGER)
        )
        assert ends.tolist() == expected_ends.tolist()
        assert_close(means[: len(expected)], expected)


def test_batches_of_many_sequences() -> None:
    """More sequences than one step of the sums over them takes."""
    counts = [i % 7 for i in range(140)]
    k = torch.randn(sum(counts), 1, 16, device=DEVICE)
    arguments = {"cu_seqlens_k": cu_seqlens_of(counts, DEVICE), "max_seqlen_k": 6}
    arguments |= {"kernel_size": 3, "kernel_stride": 2}
    means, ends = TRITON.compress_keys(k=k, **arguments)
    expected, expected_ends = EAGER.compress_keys(k=k, **arguments)
    assert ends.tolist() == expected_ends.tolist()
    assert_close(means[: len(expected)], expected)


def test_scores_of_any_batch(batch: Batch) -> None:
    check_scores(batch)


def test_scores_of_any_config(config: SparseConfig) -> None:
    check_scores(Batch("history", config, torch.float16))


@pytest.mark.parametrize("group", [1, 2, 16, 40])
def test_scores_of_any_group(group: int) -> None:
    check_scores(Batch("one", SMALL, torch.float16, group))


def check_scores(batch: Batch) -> None:
    """Compare the scores of visible windows and of competing blocks, and their selection."""
    given, near = batch.scoring(), {"rtol": 1e-4, "atol": 1e-6}
    scores, expected = (x.score_windows(**given) for x in (TRITON, EAGER))
    pooled, expected_pooled = (x.score_blocks(**given) for x in (TRITON, EAGER))
    c = batch.config
    for span, competes in zip(batch.spans, batch.competing(), strict=True):
        sizes = (span.num_queries, span.num_keys, c.kernel_size, c.kernel_stride)
        visible = visible_windows(*sizes)
        rows = slice(span.queries.start, span.queries.stop)
        for ours, theirs, mask in (
            (scores, expected, visible),
            (pooled, expected_pooled, competes),
        ):
            ours, theirs = (x[:, rows, : mask.shape[1]][:, mask] for x in (ours, theirs))
            assert_close(ours, theirs.float(), **near)
    selected = TRITON.select(**given)
    by_scores = TRITON.select_blocks(block_scores=pooled, **batch.lengths, config=c)
    assert torch.equal(selected, by_scores)


@pytest.mark.parametrize("name", ["approximate", "ragged"])
def test_scratch_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Batch("prefill", CONFIGS[name], torch.float16).scoring()
    expected = TRITON.select(**given)
    monkeypatch.setattr(select, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(tuning, "_tokens", lambda *_: 8)
    assert torch.equal(TRITON.select(**given), expected)


def test_windows_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spread the loop over windows over programs, as for few queries."""
    batch = Batch("long", replace(SMALL, lse="exact"), torch.float32)
    given = batch.scoring()
    expected = TRITON.score_blocks(**given)
    for module in ("lse", "score"):
        monkeypatch.setattr(f"infllmv2_impls.triton.{module}.num_parts", lambda *_: 3)
    actual = TRITON.score_blocks(**given)
    for span, competes in zip(batch.spans, batch.competing(), strict=True):
        rows = slice(span.queries.start, span.queries.stop)
        ours, theirs = (x[:, rows, : competes.shape[1]][:, competes] for x in (actual, expected))
        assert_close(ours, theirs)


def draw_scores(kind: str, shape: tuple[int, ...]) -> Tensor:
    """Draw block scores that are hard to choose from."""
    generator = torch.Generator().manual_seed(len(kind))
    x = torch.randn(shape, generator=generator)
    if kind == "ties":
        return x.sign() * torch.randint(0, 2, shape, generator=generator)  # -0.0 and 0.0 tie
    if kind == "equal":
        return torch.full(shape, 0.25)
    if kind == "infinite":
        return torch.where(x > 0, torch.inf, -torch.inf)
    if kind == "missing":
        return x.where(x > 1.0, -torch.inf)
    if kind == "tiny":
        return x * 1e-44  # subnormal
    return x


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "infinite", "missing", "tiny"])
@pytest.mark.parametrize(("init", "topk"), [(1, 30), (0, 70), (2, 2)])
def test_choice_of_blocks(kind: str, init: int, topk: int) -> None:
    """Choose among more blocks than registers hold (in the interpreter: 128)."""
    config = SparseConfig(2, 2, 2, init, 0, max(topk, init + 1), -1, lse="exact")
    num_q, num_k = [5, 2, 1], [600, 3, 350]
    lengths = {"cu_seqlens_q": cu_seqlens_of(num_q, DEVICE), "max_seqlen_q": 5}
    lengths |= {"cu_seqlens_k": cu_seqlens_of(num_k, DEVICE), "max_seqlen_k": 600}
    scores = draw_scores(kind, (2, 8, 300)).to(DEVICE)
    given = {"block_scores": scores, **lengths, "config": config}
    assert torch.equal(TRITON.select_blocks(**given), EAGER.select_blocks(**given))


def test_nan_leaves_no_place_unwritten() -> None:
    """Scores of NaN are nobody's choice, but indices must stay blocks, or kernels read anywhere."""
    config = SparseConfig(2, 2, 2, 1, 0, 5, -1, lse="exact")
    lengths = {"cu_seqlens_q": cu_seqlens_of([3], DEVICE), "max_seqlen_q": 3}
    lengths |= {"cu_seqlens_k": cu_seqlens_of([100], DEVICE), "max_seqlen_k": 100}
    scores = torch.full((1, 3, 50), torch.nan, device=DEVICE)
    selected = TRITON.select_blocks(block_scores=scores, **lengths, config=config)
    assert (selected.diff(dim=-1) > 0).all()
    assert selected.min() == 0
    batch = Batch("one", SMALL, torch.float32)
    batch.q.fill_(torch.nan)
    selected = TRITON.select(**batch.scoring())
    assert (selected.diff(dim=-1) > 0).all()
    assert 0 <= int(selected.min()) <= int(selected.max()) <= 333 // 16


@triton.jit
def find_tiles(ends, places, batch, tile: tl.constexpr):
    """Write what `find_tile` says of each slot."""
    sequence, start, rows, first = sequences.find_tile(tl.program_id(0), ends, batch, tile)
    out = places + tl.program_id(0) * 4
    tl.store(out, sequence)
    tl.store(out + 1, start)
    tl.store(out + 2, rows)
    tl.store(out + 3, first)


@pytest.mark.parametrize("lengths", [[5], [0, 5, 0], [16, 16], [1] * 9, [33, 0, 0, 7, 31, 17], [0]])
def test_every_tile_has_one_slot(lengths: list[int]) -> None:
    ends = cu_seqlens_of(lengths, DEVICE)
    slots = num_slots(sum(lengths), len(lengths), 16)
    places = torch.zeros(max(slots, 1), 4, dtype=torch.int32, device=DEVICE)
    if slots:
        find_tiles[(slots,)](ends, places, len(lengths), tile=16)
    found = [tuple(p) for p in places.tolist()[:slots] if p[3] < p[2]]
    starts = ends.tolist()
    expected = [
        (i, starts[i], n, first) for i, n in enumerate(lengths) for first in range(0, n, 16)
    ]
    assert found == expected


def test_pooling_before_storing() -> None:
    tile = tuning.Tile(16, 64, 4, 3)
    assert can_pool(SparseConfig(), tile)
    assert can_pool(SparseConfig.one_stage(), tile)
    assert can_pool(CONFIGS["long-windows"], tile)
    for name in ("literal", "ragged", "many-windows"):
        assert not can_pool(CONFIGS[name], tile)
    assert not can_pool(replace(SMALL, kernel_size=40), tile)  # reaches over two blocks


def test_operators_keep_to_their_schemas() -> None:
    batch = Batch("history", SMALL, torch.float32)
    given, numbers = batch.scoring(), batch.numbers(SMALL)
    names = ("q", "k_c1", "k_c2", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_c1", "cu_seqlens_c2")
    scoring = (*(given[n] for n in names), *numbers[2:])
    pooled = TRITON.score_blocks(**given)
    scores = TRITON.score_windows(**given)
    opcheck(ops.score_windows, scoring)
    opcheck(ops.score_blocks, scoring)
    opcheck(ops.select_by_windows, scoring)
    lengths = (numbers[0], numbers[1], *numbers[2:])
    opcheck(ops.pool_blocks, (scores, *lengths))
    opcheck(ops.select_blocks, (pooled, *lengths))
    whole = batch.k[:60], cu_seqlens_of([40, 20], DEVICE), 4, 4  # no row behind the last window
    opcheck(ops.compress_keys, whole)


def test_compiles_without_a_break() -> None:
    given = Batch("history", SMALL, torch.float32).scoring()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(**arguments: Any) -> Tensor:
        return TRITON.select(**arguments)

    assert torch.equal(compiled(**given), TRITON.select(**given))


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """Let rows lie so far apart that the last ones are more than 2**31 elements away."""
    stride, rows = 1 << 26, 40
    file = tmp_path / "sparse"
    storage = torch.from_file(str(file), shared=True, size=stride * rows, dtype=torch.float16)
    k = storage.as_strided((rows, 1, 16), (stride, 16, 1))
    k.copy_(torch.randn(rows, 1, 16))
    arguments = {"max_seqlen_k": rows, "kernel_size": 4, "kernel_stride": 2}
    arguments["cu_seqlens_k"] = cu_seqlens_of([rows], DEVICE)
    means, _ = TRITON.compress_keys(k=k.to(DEVICE) if DEVICE == "cuda" else k, **arguments)
    expected, _ = EAGER.compress_keys(
        k=k.contiguous(), **{**arguments, "cu_seqlens_k": cu_seqlens_of([rows])}
    )
    assert_close(means[: len(expected)].cpu(), expected)


def test_grids_do_not_depend_on_lengths() -> None:
    """Only totals and bounds, which the host knows, size results."""
    lengths = Lengths(torch.empty(4), torch.empty(4), 100, 1000)
    assert lengths.batch == 3
    assert lengths.most_blocks(SMALL) == 63
    assert lengths.most_windows(SMALL) == 249


def test_refuses_what_no_tile_holds() -> None:
    batch = Batch("one", SMALL, torch.float32)
    wide = batch.scoring() | {"q": torch.zeros(1, 2 * 257, 24, device=DEVICE)}
    with pytest.raises(ValueError, match="q must have at most 256 heads"):
        TRITON.select(**wide)
    scores = torch.zeros(2, 1, 99, dtype=torch.float64, device=DEVICE)
    with pytest.raises(TypeError, match=r"scores must be torch\.float32"):
        TRITON.pool_blocks(scores=scores, **batch.lengths, config=SMALL)
