"""Cases, their text, their tensors, and the claims that strategies keep to."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infllmv2_conformance.capabilities import Capabilities
from infllmv2_conformance.cases import REGIMES, Case
from infllmv2_conformance.inputs import build_inputs, pick
from infllmv2_conformance.profiles import PROFILES
from infllmv2_conformance.strategies import cases, shape_classes

CPU = torch.device("cpu")


def runner(**claims: object) -> SimpleNamespace:
    candidate = SimpleNamespace(capabilities=Capabilities.from_mapping(claims))
    return SimpleNamespace(candidate=candidate, profile=PROFILES["ci"])


@settings(max_examples=200, deadline=None)
@given(cases(runner(dtypes=["float32"]), dense=True))
def test_text_reads_back(case: Case) -> None:
    assert Case.parse(str(case)) == case


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown name ''"),
        ("seed=1", "must name its sequences"),
        ("sequences=5/3", "does not parse"),
        ("sequences=1/1,color=red", "unknown name 'color'"),
        ("sequences=1/1,seed=x", "does not parse"),
    ],
)
def test_bad_text(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case.parse(text)


CLAIMS = {
    "dtypes": ["bfloat16"],
    "group_sizes": [16],
    "head_dims": [128],
    "block_sizes": [64],
    "windows": [[32, 16]],
    "lse_modes": ["approximate"],
    "history": False,
    "packed": False,
    "empty_sequences": False,
    "longest_context": 300,
}


@settings(max_examples=200, deadline=None)
@given(cases(runner(**CLAIMS), use_nope=True))
def test_only_what_is_claimed_is_drawn(case: Case) -> None:
    assert (case.dtype, case.group, case.head_dim) == ("bfloat16", 16, 128)
    assert (case.block_size, case.kernel_size, case.kernel_stride) == (64, 32, 16)
    assert case.lse == "approximate"
    assert not case.use_nope
    ((num_queries, num_keys),) = case.sequences
    assert 1 <= num_queries == num_keys <= 300


@pytest.mark.parametrize("profile", PROFILES)
def test_every_claimed_value_is_visited(profile: str) -> None:
    claims = Capabilities()
    classes = shape_classes(claims, PROFILES[profile].shape_classes)
    assert {c["group"] for c in classes} == {1, 2, 4, 7, 8, 16, 32}
    assert {c["head_dim"] for c in classes} == {32, 64, 96, 128, 256}
    assert {c["block_size"] for c in classes} >= {16, 32, 64, 128}


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_inputs_are_finite_and_repeat(regime: str, dtype: str) -> None:
    case = Case(((3, 40), (0, 5), (7, 7)), kv_heads=2, group=3, regime=regime, dtype=dtype)
    one, two = (build_inputs(case, CPU) for _ in range(2))
    for name in ("q", "k", "v"):
        assert getattr(one, name).isfinite().all()
        assert torch.equal(getattr(one, name), getattr(two, name))
    other = build_inputs(case.with_(seed=1), CPU)
    assert not torch.equal(one.k, other.k)
    assert one.q.shape == (10, 6, 32)
    assert one.cu_seqlens_k.tolist() == [0, 40, 45, 52]


def test_a_chunk_holds_the_last_rows_of_the_prefill() -> None:
    whole = build_inputs(Case(((40, 40),)), CPU)
    chunk = build_inputs(Case(((3, 40),)), CPU)
    assert torch.equal(chunk.q, whole.q[37:])
    assert torch.equal(chunk.k, whole.k)


@given(st.integers(0, 40), st.integers(0, 40))
@settings(max_examples=20, deadline=None)
def test_pick_takes_rows_and_heads(first: int, second: int) -> None:
    inputs = build_inputs(Case(((40, 40),), kv_heads=2, group=2), CPU)
    rows = [(slice(0, min(first, 4)), slice(0, first)), (slice(0, 0), torch.arange(second))]
    picked = pick(inputs, rows, slice(1, 2))
    assert picked.cu_seqlens_k.tolist() == [0, first, first + second]
    assert torch.equal(picked.k[:first, 0], inputs.k[:first, 1])
    assert torch.equal(picked.q[:, 1], inputs.q[: min(first, 4), 3])


def test_with_changes_a_copy() -> None:
    case = Case(((1, 1),))
    assert case.with_(seed=3) == replace(case, seed=3)
    assert case.seed == 0
