"""The adapters against the reference; the `infllm_v2` one against a stand-in for its package."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from infllmv2_conformance.capabilities import Capabilities
from infllmv2_impls.adapters import flex_attention, sdpa
from infllmv2_reference import SparseConfig, attend_blocks, compress_keys, pool_blocks
from infllmv2_reference import score_windows as reference_scores
from infllmv2_reference.layout import cu_seqlens_of, spans

ADAPTERS = {"sdpa": sdpa.IMPLEMENTATION, "flex": flex_attention.UNCOMPILED}
BLOCK = 8
# (T, S): prefill, empty, no queries, history, decode, one token, and more than one tile of flex
LENGTHS = [(17, 17), (0, 0), (0, 7), (7, 40), (1, 33), (1, 1), (140, 150)]


def attend_case(dtype, lengths=LENGTHS, heads=(6, 2), head_dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    total_q, total_k = (sum(x) for x in zip(*lengths, strict=True))
    return {
        "q": normal(total_q, heads[0], head_dim),
        "k": normal(total_k, heads[1], head_dim),
        "v": normal(total_k, heads[1], head_dim),
        "selected": random_selection(lengths, heads[1], 3, BLOCK, generator),
        **lengths_of_case(lengths),
        "block_size": BLOCK,
    }


def lengths_of_case(lengths):
    queries, keys = ([pair[i] for pair in lengths] for i in (0, 1))
    return {
        "cu_seqlens_q": cu_seqlens_of(queries),
        "cu_seqlens_k": cu_seqlens_of(keys),
        "max_seqlen_q": max(queries) + 1,
        "max_seqlen_k": max(keys) + 2,
    }


def random_selection(lengths, kv_heads, width, block, generator):
    """Draw visible blocks, ascending; every fifth row has none, and some lack the query's own."""
    rows = []
    for num_queries, num_keys in lengths:
        for position in range(num_keys - num_queries, num_keys):
            for _ in range(kv_heads):
                visible = torch.randperm(position // block + 1, generator=generator)[:width]
                chosen = [] if len(rows) % 5 == 4 else sorted(visible.tolist())
                rows.append(chosen + [-1] * (width - len(chosen)))
    flat = torch.tensor(rows, dtype=torch.int32).reshape(-1, kv_heads, width)
    return flat.transpose(0, 1).contiguous()


def oracle(case):
    """Return out and LSE in float64, and for the bounds `sum p|v|` and `max |q||k|`."""
    outs, lses, weights, logits = [], [], [], []
    for span in spans(case["cu_seqlens_q"], case["cu_seqlens_k"]):
        q, k, v = (
            case[name][rows].double()
            for name, rows in (("q", span.queries), ("k", span.keys), ("v", span.keys))
        )
        selected = case["selected"][:, span.queries]
        out, lse = attend_blocks(q, k, v, selected, case["block_size"])
        outs.append(out)
        lses.append(lse)
        weights.append(attend_blocks(q, k, v.abs(), selected, case["block_size"])[0])
        group = q.shape[1] // k.shape[1]
        sizes = torch.einsum("thd,shd->ths", q.abs(), k.abs().repeat_interleave(group, dim=1))
        sizes = torch.nn.functional.pad(sizes, (0, 1)) * q.shape[2] ** -0.5
        logits.append(sizes.amax(dim=-1))
    return tuple(torch.cat(x) for x in (outs, lses, weights, logits))


def bounds(case, weights, logits):
    """Bound the errors of out and LSE, to first order, from the unit roundoffs alone."""
    dtype = case["q"].dtype
    wide = torch.promote_types(dtype, torch.float32)
    inner, outer = (torch.finfo(d).eps / 2 for d in (wide, dtype))
    terms, head_dim = case["max_seqlen_k"], case["q"].shape[2]
    logit = (head_dim + 4) * inner * logits  # [total_q, HQ]
    relative = 2 * logit + (terms + 8) * inner + 2 * outer
    return relative[..., None] * weights, logit + (terms + 8) * inner


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_attend_matches_the_reference(name, dtype):
    case = attend_case(dtype)
    out, lse = ADAPTERS[name].attend(**case)
    expected, expected_lse, weights, logits = oracle(case)
    bound, lse_bound = bounds(case, weights, logits)
    assert out.dtype == dtype
    assert ((out.double() - expected).abs() <= bound).all()
    empty = expected_lse == -torch.inf
    assert empty.any()
    assert (out[empty] == 0).all()
    if name == "flex":
        assert lse.dtype == torch.promote_types(dtype, torch.float32)
        assert (lse[empty] == -torch.inf).all()
        difference = (lse.double() - expected_lse).abs()
        assert (difference[~empty] <= (lse_bound + lse_bound * expected_lse.abs())[~empty]).all()
    else:
        assert lse is None


@pytest.mark.parametrize("name", ADAPTERS)
def test_attend_takes_strided_views_and_leaves_them_alone(name):
    case = attend_case(torch.float64)
    strided = {x: torch.cat([case[x], case[x]], dim=1)[:, ::2] for x in ("q", "k", "v")}
    plain = {x: y.contiguous() for x, y in strided.items()}
    before = {x: y.clone() for x, y in strided.items()}
    out, _ = ADAPTERS[name].attend(**{**case, **strided})
    again, _ = ADAPTERS[name].attend(**{**case, **plain})
    assert torch.allclose(out, again, rtol=0, atol=64 * torch.finfo(torch.float64).eps)
    assert all(torch.equal(strided[x], before[x]) for x in before)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_batch_without_queries_gives_empty_results(name):
    case = attend_case(torch.float32, lengths=[(0, 0), (0, 9)])
    out, lse = ADAPTERS[name].attend(**case)
    assert out.shape == case["q"].shape
    assert lse is None or lse.shape == out.shape[:2]


@pytest.mark.parametrize("name", ADAPTERS)
def test_bad_input_is_refused(name):
    case = attend_case(torch.float32)
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        ADAPTERS[name].attend(**{**case, "cu_seqlens_k": case["cu_seqlens_k"][:-1]})
    with pytest.raises(TypeError, match="selected"):
        ADAPTERS[name].attend(**{**case, "selected": case["selected"].long()})


def test_the_sdpa_gradients_match_the_reference():
    case = attend_case(torch.float64)
    names = ("q", "k", "v")
    leaves = [case[name].requires_grad_() for name in names]
    out, _ = sdpa.IMPLEMENTATION.attend(**case)
    expected, *_ = oracle(case)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    actual = torch.autograd.grad(out, leaves, weight)
    wanted = torch.autograd.grad(expected, leaves, weight)
    for name, x, y in zip(names, actual, wanted, strict=True):
        bound = 4 * case["max_seqlen_k"] * torch.finfo(torch.float64).eps * y.abs().max()
        assert (x - y).abs().max() <= bound, name


def test_uncompiled_flex_attention_refuses_gradients_on_a_cpu():
    case = attend_case(torch.float32)
    case["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        flex_attention.UNCOMPILED.attend(**case)


def test_compiled_flex_attention_refuses_a_cpu():
    with pytest.raises(ValueError, match="cuda"):
        flex_attention.IMPLEMENTATION.attend(**attend_case(torch.float32))


@pytest.mark.parametrize(("num_queries", "num_keys", "block"), [(300, 300, 8), (7, 500, 48)])
def test_the_tiles_of_flex_attention_cover_the_mask(num_queries, num_keys, block):
    generator = torch.Generator().manual_seed(0)
    selected = random_selection([(num_queries, num_keys)], 2, 2, block, generator)
    chosen = flex_attention.chosen_blocks(selected, num_keys, block)
    mask = flex_attention.block_mask(chosen, 4, num_keys, block)
    exact = flex_attention.flex.create_block_mask(
        mask.mask_mod, 1, 4, num_queries, num_keys, device="cpu", BLOCK_SIZE=flex_attention.TILE
    )
    assert (mask.to_dense() >= exact.to_dense()).all()
    assert mask.shape == exact.shape


@pytest.mark.parametrize(
    "claims",
    [
        sdpa.CAPABILITIES,
        flex_attention.COMPILED_CAPABILITIES,
        flex_attention.UNCOMPILED_CAPABILITIES,
    ],
)
def test_the_claims_are_well_formed(claims):
    Capabilities.from_mapping(claims)


# The infllm_v2 package, played by plain PyTorch with its signatures, layouts and conventions.

HEADS, KV_HEADS, DIM = 32, 2, 128


def fake_stage1(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    cu_seqlens_v,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
):
    assert q.shape[1:] == (HEADS, DIM)
    assert k.shape[1:] == v.shape[1:] == (KV_HEADS, DIM)
    assert max_seqlen_k == cu_seqlens_k.diff().max()
    scores = q.new_zeros(KV_HEADS, len(q), max_seqlen_k)
    both = zip(spans(cu_seqlens_q, cu_seqlens_k), spans(cu_seqlens_q, cu_seqlens_v), strict=True)
    for fine, coarse in both:
        ended = torch.arange(fine.num_queries)[:, None] + 1 if causal else torch.tensor([[1 << 30]])
        queries = q[fine.queries].float().unflatten(1, (KV_HEADS, -1))
        logits = []
        for windows, stride in ((k[fine.keys], 16), (v[coarse.keys], 64)):
            hidden = torch.arange(len(windows)) >= ended // stride - 1
            x = torch.einsum("thgd,chd->hgtc", queries, windows.float()) * DIM**-0.5
            logits.append(x.masked_fill(hidden, -torch.inf))
        lse = logits[1].logsumexp(dim=-1, keepdim=True)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        per_group = (logits[0] - lse).exp().sum(dim=1)
        scores[:, fine.queries, : per_group.shape[2]] = per_group.to(q.dtype)
    return scores


def fake_pooling(
    input,
    cu_seqlens_q,
    cu_seqlens_k,
    cache_lens,
    max_seqlen_q,
    max_seqlen_k,
    local_blocks,
    init_blocks,
    block_size=64,
    stride=16,
):
    assert input.dtype in (torch.float16, torch.bfloat16)
    assert input.is_contiguous()
    assert input.shape[2] == max_seqlen_k
    assert input.shape[1] == cu_seqlens_q[-1]
    assert {x.dtype for x in (cu_seqlens_q, cu_seqlens_k, cache_lens)} == {torch.int32}
    columns = -(-(max_seqlen_q + int(cache_lens.max())) // block_size)
    pooled = input.new_full((input.shape[0], input.shape[1], columns), -torch.inf)
    for span in spans(cu_seqlens_q, cu_seqlens_k):
        for row in range(span.num_queries):
            own = (row + int(cache_lens[span.sequence])) // block_size
            for block in range(columns):
                step = block_size // stride
                seen = input[:, span.queries][:, row, : span.num_keys]
                seen = seen[:, max(block * step - 1, 0) : (block + 1) * step]
                place = pooled[:, span.queries]
                if block < init_blocks or own - local_blocks <= block <= own:
                    place[:, row, block] = torch.inf
                elif seen.shape[1]:
                    place[:, row, block] = seen.amax(dim=1)
    return pooled


def fake_attend(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    return_attn_probs=False,
    topk_idx=None,
):
    assert causal
    assert topk_idx.dtype == torch.int32
    assert topk_idx.is_contiguous()
    outs, lses = [], []
    for span in spans(cu_seqlens_q, cu_seqlens_k):
        selected = topk_idx[:, span.queries]
        x = attend_blocks(q[span.queries], k[span.keys], v[span.keys], selected, 64)
        outs.append(x[0])
        lses.append(x[1])
    lse = torch.cat(lses).unflatten(1, (KV_HEADS, -1)).transpose(0, 1).flatten(1)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # [HK, total_q * G]
    return (torch.cat(outs), lse, None) if return_attn_probs else torch.cat(outs)


ADAPTER = "infllmv2_impls.adapters.infllm_v2"


@pytest.fixture
def package(monkeypatch):
    """Put the stand-in where `import infllm_v2` finds it, and load the adapter anew."""
    module = ModuleType("infllm_v2")
    module.infllmv2_attn_stage1 = fake_stage1
    module.max_pooling_1d_varlen = fake_pooling
    module.infllmv2_attn_varlen_func = fake_attend
    monkeypatch.setitem(sys.modules, "infllm_v2", module)
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    yield SimpleNamespace(module=module, adapter=importlib.import_module(ADAPTER).IMPLEMENTATION)
    sys.modules.pop(ADAPTER, None)


def windows_case(lengths, config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total_q, total_k = (sum(x) for x in zip(*lengths, strict=True))
    q = torch.randn(total_q, HEADS, DIM, generator=generator).bfloat16()
    k = torch.randn(total_k, KV_HEADS, DIM, generator=generator).bfloat16()
    case = {"q": q, **lengths_of_case(lengths), "config": config}
    keys = [k[span.keys] for span in spans(case["cu_seqlens_q"], case["cu_seqlens_k"])]
    kinds = (
        ("c1", config.kernel_size, config.kernel_stride),
        ("c2", config.lse_kernel_size, config.lse_kernel_stride),
    )
    for name, size, stride in kinds:
        packed = [compress_keys(x, size, stride) for x in keys]
        case[f"k_{name}"] = torch.cat(packed)
        case[f"cu_seqlens_{name}"] = cu_seqlens_of([len(x) for x in packed])
    return case


CONFIG = SparseConfig(window_size=64, topk=3, dense_len=-1)


@pytest.mark.parametrize("lengths", [[(200, 200), (130, 130)], [(1, 333), (1, 200)]])
def test_infllm_v2_scores_and_pools_what_the_reference_does(package, lengths):
    case = windows_case(lengths, CONFIG)
    scores = package.adapter.score_windows(**case)
    fused = package.adapter.score_blocks(**case)
    keys = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "config")
    blocks = package.adapter.pool_blocks(scores=scores, **{key: case[key] for key in keys})
    k_c1, k_c2 = (spans(case["cu_seqlens_q"], case[f"cu_seqlens_c{i}"]) for i in (1, 2))
    whole = zip(spans(case["cu_seqlens_q"], case["cu_seqlens_k"]), k_c1, k_c2, strict=True)
    for span, c1, c2 in whole:
        windows = case["k_c1"][c1.keys], case["k_c2"][c2.keys]
        expected = reference_scores(case["q"][span.queries], *windows, span.num_keys, CONFIG)
        actual = scores[:, span.queries, : c1.num_keys]
        visible = expected > -torch.inf
        eps = torch.finfo(torch.bfloat16).eps
        assert ((actual - expected).abs() <= eps * expected.abs())[visible].all()
        pooled = pool_blocks(actual, span.num_keys, CONFIG)
        mine = blocks[:, span.queries, : pooled.shape[2]]
        places = torch.arange(span.num_keys - span.num_queries, span.num_keys)[:, None] // 64
        columns = torch.arange(pooled.shape[2])
        past = (columns <= places).expand_as(pooled)
        assert torch.equal(mine[past], pooled[past])
        free = (columns >= 1) & (columns <= places - CONFIG.local_blocks)
        both = fused[:, span.queries, : pooled.shape[2]], pooled
        assert torch.equal(*(x[free.expand_as(pooled)] for x in both))


def test_infllm_v2_attends_and_turns_its_lse_around(package):
    lengths = [(100, 100), (7, 150), (1, 333)]
    generator = torch.Generator().manual_seed(0)
    total_q, total_k = (sum(x) for x in zip(*lengths, strict=True))
    wide = random_selection(lengths, KV_HEADS, 3, 64, generator).repeat_interleave(2, dim=2)
    case = {
        "q": torch.randn(total_q, HEADS, DIM, generator=generator).bfloat16(),
        "k": torch.randn(total_k, KV_HEADS, DIM, generator=generator).bfloat16(),
        "v": torch.randn(total_k, KV_HEADS, DIM, generator=generator).bfloat16(),
        "selected": wide[..., ::2],  # strided: only a contiguous copy may reach the kernel
        **lengths_of_case(lengths),
        "block_size": 64,
    }
    out, lse = package.adapter.attend(**case)
    for span in spans(case["cu_seqlens_q"], case["cu_seqlens_k"]):
        q, k, v = case["q"][span.queries], case["k"][span.keys], case["v"][span.keys]
        expected = attend_blocks(q, k, v, case["selected"][:, span.queries], 64)
        assert torch.equal(out[span.queries], expected[0])
        assert torch.equal(lse[span.queries], expected[1])
    assert (lse == -torch.inf).any()


def test_infllm_v2_refuses_what_its_kernels_do_not_have(package):
    for config in (SparseConfig.one_stage(), SparseConfig(lse_kernel=(64, 32))):
        case = windows_case([(130, 130)], config)
        with pytest.raises(ValueError, match="for infllm_v2"):
            package.adapter.score_windows(**case)
    case = windows_case([(130, 130)], CONFIG)
    with pytest.raises(ValueError, match="group size"):
        package.adapter.score_windows(**{**case, "q": case["q"][:, :16]})
    with pytest.raises(ValueError, match="dtype"):
        package.adapter.score_windows(**{**case, "q": case["q"].half()})


def test_infllm_v2_claims_are_well_formed(package):
    Capabilities.from_mapping(package.adapter.capabilities)


def test_infllm_v2_is_asked_for_by_name_when_missing_or_old(monkeypatch, package):
    sys.modules.pop(ADAPTER)
    package.module.infllmv2_attn_stage1 = lambda q, k, v: None
    with pytest.raises(ImportError, match="cu_seqlens_v"):
        importlib.import_module(ADAPTER)
    monkeypatch.setitem(sys.modules, "infllm_v2", None)
    with pytest.raises(ImportError, match=r"github\.com/OpenBMB/infllmv2_cuda_impl"):
        importlib.import_module(ADAPTER)
