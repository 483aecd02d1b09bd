"""The guards on their own: what they lend, what they notice, and what they leave alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from infllmv2_conformance import integrity, settings
from infllmv2_conformance.candidate import Candidate
from infllmv2_conformance.capabilities import Capabilities
from infllmv2_conformance.cases import Case
from infllmv2_conformance.failure import ConformanceFailure
from infllmv2_conformance.guards import (
    CALM,
    Loan,
    PoisonedMemory,
    RedZone,
    poison,
    same_bits,
    stale,
)
from infllmv2_conformance.loading import load
from infllmv2_conformance.mutants.suite_tests import apply
from infllmv2_conformance.padding import with_padding
from infllmv2_conformance.profiles import Profile
from infllmv2_conformance.returned import overlap, take
from infllmv2_conformance.rules import RULES, STAGE_FUNCTIONS
from infllmv2_conformance.trial import Trial
from infllmv2_reference import SparseConfig


def trial(function: str, **fields: object) -> Trial:
    """Return a small case of three sequences, one without queries."""
    case = Case(((20, 90), (0, 40), (7, 7)), kv_heads=2, group=2, choice=3, **fields)
    return Trial(case, load("eager"), torch.device("cpu"), lambda _: None, function)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.uint8])
def test_red_zone_keeps_values_and_strides(dtype: torch.dtype) -> None:
    x = torch.arange(24).reshape(2, 3, 4).to(dtype)
    for view in (x, x.transpose(0, 2), x[:, ::2], x[:0], x[:1].expand(5, 3, 4)):
        zone = RedZone(view)
        assert torch.equal(zone.tensor, view)
        if 0 not in view.stride():
            assert zone.tensor.stride() == view.stride()
        zone.check("x")


@pytest.mark.parametrize("offset", [-1, 0, 5, 23, 24])
def test_red_zone_notices_a_write(offset: int) -> None:
    zone = RedZone(torch.zeros(24))
    zone.buffer[4096 + offset] = 1
    inside = 0 <= offset < 24
    what = "the argument x was modified" if inside else "memory next to the argument x"
    with pytest.raises(ConformanceFailure, match=what):
        zone.check("x")


def test_red_zone_notices_a_gap_and_another_form() -> None:
    zone = RedZone(torch.zeros(4, 6)[:, :3])
    zone.buffer[4096 + 4] = 1  # between two rows
    with pytest.raises(ConformanceFailure, match="was modified"):
        zone.check("x")
    zone = RedZone(torch.zeros(4, 6))
    zone.tensor.t_()
    with pytest.raises(ConformanceFailure, match="was given another form"):
        zone.check("x")


def test_loan_lends_copies_and_takes_them_back() -> None:
    x, lengths, config = torch.ones(3), [1, 2], SparseConfig()
    loan = Loan({"x": x, "lengths": lengths, "config": config, "cache": self_made})
    lent = loan.arguments
    assert lent["cache"] is self_made
    assert lent["config"] == config
    assert lent["config"] is not config
    lent["lengths"].append(3)
    assert lengths == [1, 2]
    with pytest.raises(ConformanceFailure, match="the argument lengths was modified"):
        loan.check()
    loan.spoil()
    assert lent["x"].isnan().all()
    assert x.tolist() == [1, 1, 1]


self_made = object()


def test_fresh_memory_holds_what_is_asked_for() -> None:
    old = torch.arange(6.0)
    with PoisonedMemory(torch.nan):
        assert torch.empty(3).isnan().all()
        assert torch.zeros(3).new_empty(2, dtype=torch.int32).min() > 1 << 20
        assert torch.empty(2, requires_grad=True).isnan().all()
    with PoisonedMemory(stale([old])):
        assert torch.empty(2, 3).tolist() == [[0, 1, 2], [3, 4, 5]]
        assert torch.empty(7).tolist() == [0.25] * 7


def test_same_bits_tells_zeros_and_nans_apart() -> None:
    assert same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_overlap_is_exact() -> None:
    x = torch.zeros(10, 4)
    assert overlap(x, x[3:])
    assert not overlap(x[:5], x[5:])
    assert not overlap(x[:, :3], x[:, 3]), "interleaved, as a fused result is"
    assert overlap(x[:, :3], x[:, 2])
    assert not overlap(x[:0], x)
    assert overlap(x.view(torch.int16)[:, 7:], x[:, 3:])


def test_what_is_taken_cannot_be_changed_any_more() -> None:
    out, lse = torch.zeros(2, 1, 4), torch.zeros(2, 1)
    taken = take("attend", (out, lse), {})
    poison(out, torch.nan)
    assert taken[0].sum() == 0
    with pytest.raises(ConformanceFailure, match="the results out and lse share memory"):
        take("attend", (out, out.flatten()[:2].view(2, 1)), {})
    with pytest.raises(ConformanceFailure, match="requires a gradient"):
        take("attend", (out.requires_grad_(), lse), {})
    assert take("new_cache", self_made, {}) is self_made


@pytest.mark.parametrize("function", STAGE_FUNCTIONS)
def test_padding_changes_only_what_has_no_meaning(function: str) -> None:
    """The reference's answer stays, whatever stands there; and something does stand there."""
    here = trial(function, lse="exact", use_nope=function == "attention", dense_len=60)
    given = here.arguments(function)
    padded = with_padding(here, given, torch.nan)
    here.check(function, padded)
    changed = [n for n, x in given.items() if padded[n] is not x]
    expected = {
        "compress_keys": [],
        "score_windows": ["k_c1", "k_c2"],
        "score_blocks": ["k_c1", "k_c2"],
        "select": ["k_c1", "k_c2"],
        "pool_blocks": ["scores"],
        "select_blocks": ["block_scores"],
        "attend": ["k", "v"],
        "attention": ["k", "v", "selection_q", "selection_k"],
    }
    assert changed == expected[function]
    assert all(padded[n].isnan().any() for n in changed)


def test_settings_are_put_back() -> None:
    before = settings.current()
    torch.set_default_dtype(torch.float16)
    torch.set_grad_enabled(False)
    torch.set_float32_matmul_precision("medium")
    found = settings.restore(before)
    assert found == ["the grad mode", "the default dtype", "the precision of float32 products"]
    assert settings.restore(before) == []
    assert torch.is_grad_enabled()


def test_settings_are_put_back_if_the_call_raises() -> None:
    class Raises:
        def attend(self) -> None:
            torch.set_grad_enabled(False)
            raise ValueError("no")

    candidate = Candidate("x", Raises(), Capabilities())
    with pytest.raises(ConformanceFailure, match="attend raised ValueError: no"):
        candidate.call("attend")
    assert torch.is_grad_enabled()


def test_replaced_functions_are_put_back() -> None:
    integrity.remember()
    before = torch.Tensor.abs
    torch.Tensor.abs = lambda self: self  # type: ignore[method-assign]
    assert integrity.changes() == ["torch.Tensor.abs"]
    assert torch.Tensor.abs is before
    assert integrity.changes() == []


def test_no_contract_rule_passes_over_a_sound_implementation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rule that finds the function wrong on plain inputs checks nothing: here none may."""
    candidate = load("eager")
    is_sound, asked = Trial.is_sound, list[bool]()
    monkeypatch.setattr(Trial, "is_sound", lambda self: asked.append(is_sound(self)) or asked[-1])
    monkeypatch.setattr(integrity, "changes", lambda: [])  # which would put it back
    size = Profile("tiny", examples=5, shape_classes=2, max_keys=80, max_pairs=5_000)
    for rule in RULES.values():
        if rule.stage == "contract" and rule.id != "contract.batch-invariant":
            for function in rule.functions:
                assert not apply(rule, candidate, size, function=function).killed
    assert len(asked) > 100
    assert all(asked)


@pytest.mark.parametrize("rule", [r for r in RULES if r.startswith("contract.")])
def test_contract_rules_do_not_pass_a_function_that_is_always_wrong(rule: str) -> None:
    """That a rule found nothing where it never applied is no news, and no pass."""

    class Doubled:
        def attend(self, **given: object) -> object:
            out, lse = load("eager").target.attend(**given)  # type: ignore[attr-defined]
            return 2 * out, lse

    claims = replace(load("eager").capabilities, batch_invariant=True)
    size = Profile("tiny", examples=20, shape_classes=2, max_keys=80, max_pairs=5_000)
    outcome = apply(RULES[rule], Candidate("doubled", Doubled(), claims), size, function="attend")
    if rule in ("contract.inputs-unchanged", "contract.form", "contract.bad-input"):
        assert not outcome.killed, "these look at no value"
    elif rule == "contract.streams":
        assert not outcome.claimed, "on a CPU"
    else:
        assert outcome.killed
        assert outcome.what.startswith("cannot be tested: attend is wrong with nothing special")


def test_soundness_is_judged_in_calm_memory() -> None:
    """What relies on zeros is sound there, so that a rule about memory can name the fault."""

    class Lazy:
        def attend(self, **given: object) -> object:
            out, lse = load("eager").target.attend(**given)  # type: ignore[attr-defined]
            fresh = torch.empty_like(lse)
            return out, torch.where(lse == 0, fresh, lse)

    lazy = trial("attend")
    lazy.candidate = Candidate("lazy", Lazy(), load("eager").capabilities)
    assert lazy.is_sound()
    with lazy.candidate.surrounded(CALM):
        assert torch.zeros(1).sum() == 0
