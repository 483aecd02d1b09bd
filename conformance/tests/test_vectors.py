"""Golden vectors: right implementations pass, wrong ones fail, and the rule is what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from infllmv2_conformance.candidate import Candidate
from infllmv2_conformance.capabilities import Arithmetic
from infllmv2_conformance.loading import load
from infllmv2_conformance.mutants.bank import MUTANTS
from infllmv2_conformance.mutants.build import build
from infllmv2_conformance.vectors.answer import answer, unclaimed
from infllmv2_conformance.vectors.catalogue import CATALOGUE
from infllmv2_conformance.vectors.compare import compare
from infllmv2_conformance.vectors.draw import draw
from infllmv2_conformance.vectors.expected import Expected, UncertainError, expect
from infllmv2_conformance.vectors.folder import Golden, read_set
from infllmv2_conformance.vectors.verify import Outcome, changes, verify
from infllmv2_reference import SPEC_VERSION

COMMITTED = Path(__file__).parents[2] / "docs" / "results" / "vectors"
CPU = torch.device("cpu")
REFERENCE = "infllmv2_conformance.reference_impl:IMPLEMENTATION"


@pytest.fixture(scope="module")
def goldens() -> list[Golden]:
    return read_set(COMMITTED)


def judge(goldens: list[Golden], candidate: Candidate) -> dict[str, Outcome]:
    def ask(golden: Golden) -> dict[str, Tensor] | str:
        return unclaimed(golden, candidate) or answer(golden, candidate, CPU)

    return {outcome.name: outcome for outcome in verify(goldens, ask)}


# The committed set


def test_committed_set_is_the_catalogue_and_small(goldens):
    assert [g.vector.name for g in goldens] == [v.name for v in CATALOGUE]
    sizes = [path.stat().st_size for path in COMMITTED.iterdir()]
    assert len(sizes) == len(CATALOGUE) + 1
    assert max(sizes) < 1_400_000
    assert sum(sizes) < 3_000_000
    assert json.loads((COMMITTED / "manifest.json").read_text())["spec_version"] == SPEC_VERSION


def test_every_function_and_dtype_has_a_vector():
    functions = {v.function for v in CATALOGUE}
    assert functions >= {"compress_keys", "score_windows", "pool_blocks", "select_blocks"}
    assert functions >= {"score_blocks", "select", "attend", "attention", "decode"}
    assert "attend_gradients" in functions
    assert {v.case.dtype for v in CATALOGUE} == {"bfloat16", "float16", "float32"}
    assert {v.case.lse for v in CATALOGUE if v.function == "score_windows"} == {
        "approximate",
        "exact",
    }


def test_committed_set_is_what_the_oracle_says_today(goldens):
    assert [problem for golden in goldens for problem in changes(golden)] == []


@pytest.mark.parametrize("name", ["eager", REFERENCE])
def test_right_implementations_pass_all(goldens, name):
    outcomes = judge(goldens, load(name)).values()
    assert [o for o in outcomes if o.outcome != "passed"] == []


KILLED_BY = {
    "compress.last-token-lost": {"compress-bf16", "compress-f16", "compress-f32"},
    "score.no-scale": {"score-approximate-bf16", "score-exact-f16", "fused-select-f32"},
    "score.visible-late": {"score-approximate-bf16"},
    "score.no-normaliser-one": {"score-no-normaliser-f32"},
    "pool.paper-span": {"pool-overlap"},
    "pool.trusts-padding": {"pool-overlap", "pool-odd"},
    "select.ties-to-larger": {"select-ties"},
    "select.local-one-short": {"select-tight", "select-paper-preset"},
    "select.row-maximum": {"select-random"},
    "fused_select.ties-to-larger": {"fused-select-ties"},
    "attend.diagonal-mask": {"attend-released-bf16", "attend-f16"},
    "attend.lse-base-2": {"attend-released-bf16", "attend-f16", "attend-f32"},
    "attend.empty-row-nan": {"attend-f32"},
    "attend.naive-exponential": {"attend-huge-f32"},
    "attend.at-most-16-blocks": {"attend-many-blocks-f16"},
    "attend.dq-no-scale": {"gradients-bf16", "gradients-f32"},
    "attention.switch-late": {"attention-switch-bf16"},
    "attention.selection-k-ignored": {"attention-nope-f32"},
    "decode.k-c2-not-updated": {"decode-several-tokens-f32", "decode-ragged-f16"},
    "decode.window-late": {"decode-one-token-f32"},
    "decode.selection-k-ignored": {"decode-nope-f32"},
    "decode.switch-late": {"decode-switch-f32"},
    "decode.reset-to-zero": {"decode-ragged-f16"},
}


@pytest.mark.parametrize("mutant", KILLED_BY)
def test_wrong_implementations_fail(goldens, mutant):
    """The vectors that show a fault fail; those of functions that it does not touch pass."""
    candidate = build(MUTANTS[mutant])
    stage = mutant.split(".")[0]
    earlier = {"compress-f32", "select-ties"} if stage in ("attend", "attention", "decode") else {}
    asked = [g for g in goldens if g.vector.name in {*KILLED_BY[mutant], *earlier}]
    outcomes = judge(asked, candidate)
    assert {n for n, o in outcomes.items() if o.outcome == "failed"} == KILLED_BY[mutant]


# The rule


VALUE = torch.tensor([[1.0, -torch.inf, 0.0], [2.0, 3.0, 4.0]], dtype=torch.float64)
BOUND = torch.tensor([[0.1, 0.0, 0.0], [torch.inf, 0.5, 0.0]], dtype=torch.float64)
DEFINED = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.uint8)
BOUNDED = Expected("out", "bound", {"value": VALUE, "bound": BOUND, "defined": DEFINED})


@pytest.mark.parametrize(
    ("place", "number", "right"),
    [
        ((0, 0), 1.09, True),
        ((0, 0), 1.11, False),
        ((0, 0), torch.nan, False),
        ((0, 0), torch.inf, False),
        ((0, 1), torch.inf, False),
        ((0, 1), -1e30, False),
        ((0, 2), -0.0, True),
        ((0, 2), 1e-30, False),
        ((1, 0), 1e30, True),
        ((1, 0), torch.inf, True),
        ((1, 0), torch.nan, False),
        ((1, 1), 3.5, True),
        ((1, 2), torch.nan, True),
    ],
)
def test_bound(place, number, right):
    actual = VALUE.float()
    assert compare(BOUNDED, actual, 0).problem == ""
    actual[place] = number
    verdict = compare(BOUNDED, actual, 0)
    assert (verdict.problem == "") == right
    assert verdict.ratio is not None
    assert (verdict.ratio <= 1) == right


@pytest.mark.parametrize("actual", [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32)])
def test_form_of_a_bounded_result(actual):
    assert "must be" in compare(BOUNDED, actual, 0).problem


def test_exact():
    value = torch.tensor([[0, 3, -1]], dtype=torch.int32)
    expected = Expected("selected", "exact", {"value": value})
    assert compare(expected, value, 0).problem == ""
    assert "dtype" in compare(expected, value.long(), 0).problem
    assert "at [0, 1] it must be 3" in compare(expected, value.where(value != 3, 2), 0).problem


SCORES = torch.tensor([[[9.0, 5.0, 5.05, 5.0, 1.0, 0.0, 7.0]]], dtype=torch.float64)
KIND = torch.tensor([[1, 2, 2, 2, 2, 1, 0]], dtype=torch.uint8)
CERTIFICATE = Expected(
    "selected",
    "certificate",
    {"value": SCORES, "bound": torch.full_like(SCORES, 0.1), "kind": KIND},
)


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        ([0, 1, 2, 5], ""),
        ([0, 1, 3, 5], ""),
        ([0, 2, 4, 5], "block 1 was passed over for block 4"),
        ([0, 2, 1, 5], "must ascend"),
        ([0, 2, 2, 5], "must ascend"),
        ([0, -1, 2, 5], "must ascend"),
        ([0, 2, 5, -2], "must ascend"),
        ([0, 2, 5, 6], "not visible"),
        ([0, 2, 5, 7], "not visible"),
        ([1, 2, 3, 5], "forced"),
        ([0, 2, 5, -1], "4 blocks must be selected"),
    ],
)
def test_certificate(ids, problem):
    verdict = compare(CERTIFICATE, torch.tensor([[ids]], dtype=torch.int32), 4)
    assert problem in verdict.problem
    assert bool(verdict.problem) == bool(problem)


def test_certificate_with_ties_and_unbounded_scores():
    tied = replace(CERTIFICATE, ties=True)
    third = torch.tensor([[[0, 2, 3, 5]]], dtype=torch.int32)
    assert (
        "block 1 was passed over for block 3, which scores the same"
        in compare(tied, third, 4).problem
    )
    assert compare(CERTIFICATE, third, 4).problem == ""
    bound = CERTIFICATE.tensors["bound"].clone()
    bound[..., 4] = torch.inf
    free = replace(CERTIFICATE, tensors=CERTIFICATE.tensors | {"bound": bound})
    assert compare(free, torch.tensor([[[0, 2, 4, 5]]], dtype=torch.int32), 4).problem == ""
    assert "dtype" in compare(CERTIFICATE, third.long(), 4).problem
    assert "shape" in compare(CERTIFICATE, third[..., :3], 4).problem


# What is claimed


@pytest.mark.parametrize(
    ("name", "claims", "lacks"),
    [
        ("compress-f16", {"dtypes": ("bfloat16",)}, "dtype float16"),
        ("compress-f16", {"windows": ((32, 16),)}, "windows 5/3"),
        ("attend-f16", {"head_dims": (64,)}, "head_dim 16"),
        ("attend-f16", {"group_sizes": (2,)}, "group 3"),
        ("attend-f16", {"block_sizes": (64,)}, "block_size 16"),
        ("attend-f16", {"windows": ((32, 16),)}, ""),
        ("attend-f16", {"packed": False}, "packed"),
        ("attend-f16", {"history": False}, "history"),
        ("compress-bf16", {"empty_sequences": False}, "empty_sequences"),
        ("gradients-f32", {"gradients": False}, "gradients"),
        ("attention-nope-f32", {"use_nope": False}, "use_nope"),
        ("pool-paper-eq7", {"pooling_modes": ("overlap",)}, "pooling paper_eq7"),
        ("attend-f32", {"arithmetic": Arithmetic(products="tf32")}, "arithmetic.products"),
        ("attend-f16", {"arithmetic": Arithmetic(products="tf32")}, ""),
        ("attend-f16", {"arithmetic": Arithmetic(accumulate="float16")}, "arithmetic.accumulate"),
        ("attend-f32", {"arithmetic": Arithmetic(accumulate="float16")}, ""),
        ("score-exact-f16", {"arithmetic": Arithmetic(scores="bfloat16")}, "arithmetic.scores"),
        ("attend-f16", {"arithmetic": Arithmetic(scores="bfloat16")}, ""),
        ("attend-f16", {"arithmetic": Arithmetic(probabilities="bfloat16")}, "probabilities"),
    ],
)
def test_what_is_not_claimed_is_not_asked(goldens, name, claims, lacks):
    eager = load("eager")
    candidate = Candidate("some", eager.target, replace(eager.capabilities, **claims))
    (golden,) = [g for g in goldens if g.vector.name == name]
    found = unclaimed(golden, candidate)
    assert lacks in found
    assert bool(found) == bool(lacks)


def test_a_function_that_raises_has_failed(goldens):
    class Broken:
        def compress_keys(self, **_: Any):
            raise RuntimeError("no kernel image")

    candidate = Candidate("broken", Broken(), load("eager").capabilities)
    outcomes = judge(goldens, candidate)
    assert outcomes["compress-f16"].outcome == "failed"
    assert "no kernel image" in outcomes["compress-f16"].text
    assert outcomes["attend-f16"] == Outcome("attend-f16", "not claimed", None, "attend")


def test_a_vector_without_a_certain_selection_is_refused():
    vector = next(v for v in CATALOGUE if v.name == "attention-f32")
    tied = replace(vector, case=vector.case.with_(regime="constant"))
    with pytest.raises(UncertainError, match="attention-f32: a selection is not certain"):
        expect(tied, draw(tied))
