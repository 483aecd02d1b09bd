"""Every cheat of `cheats.py` must be exposed, by the rule that is named, in words that say how."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from infllmv2_conformance import judges
from infllmv2_conformance.canary import check_judges
from infllmv2_conformance.candidate import Candidate
from infllmv2_conformance.errors import UsageError
from infllmv2_conformance.failure import ConformanceFailure
from infllmv2_conformance.loading import load
from infllmv2_conformance.mutants.suite_tests import apply, rule_tests
from infllmv2_conformance.profiles import PROFILES
from infllmv2_conformance.rules import RULES
from infllmv2_conformance.runner import Runner

FILE = Path(__file__).with_name("cheats.py")
CHEATS = [
    ("CachedByShape", "contract.fresh-data", "is wrong"),
    ("CachedByAddress", "contract.fresh-data", "is wrong"),
    ("Unwritten", "attend.values", "the output is wrong"),
    ("UnwrittenByExtension", "contract.fully-written", "is wrong"),
    ("Zeros", "attend.values", "the output is wrong"),
    ("NaNs", "attend.values", "the output is wrong"),
    ("ReturnsItsInput", "attend.values", "the result out shares memory with the argument q"),
    ("StaticBuffer", "contract.own-memory", "two calls returned the result lse in the same memory"),
    ("Expanded", "attend.lse", "elements of the result lse share memory"),
    ("ReturnsEqualToEverything", "attend.values", "the result out is not a plain torch.Tensor"),
    ("ReturnsDeferred", "attend.values", "the result out is not a plain torch.Tensor"),
    ("PatchesEqual", "attend.values", "replaced torch.equal, which the suite judges with"),
    ("PatchesAllclose", "attend.values", "replaced torch.allclose"),
    ("PatchesLessEqual", "attend.values", "replaced torch.Tensor.__le__"),
    ("PatchesAbs", "attend.values", "replaced torch.Tensor.abs"),
    ("PatchesCheckValues", "attend.values", "replaced infllmv2_conformance.checks.check_values"),
    ("PatchesFail", "attend.values", "replaced infllmv2_conformance.failure.fail"),
    ("PatchesClock", "attend.values", "replaced time.perf_counter"),
    ("PatchesEvent", "attend.values", "replaced torch.cuda.Event"),
    ("PatchesCode", "attend.values", "replaced the code of infllmv2_conformance.checks"),
    ("LeavesFunctionMode", "attend.values", "left a mode that sees every operation"),
    ("LeavesDispatchMode", "attend.values", "left a mode that sees every operation"),
    ("LeavesGradOff", "contract.settings", "left the grad mode changed"),
    ("LeavesDefaultDtype", "contract.settings", "left the default dtype changed"),
    ("WalksTheStack", "attend.values", "looked for the oracle's results during the call"),
    ("WalksTheHeap", "attend.values", "the output is wrong"),
    ("Skips", "attend.values", "attend raised Skipped: not claimed: attend"),
    ("Fails", "attend.values", "attend raised XFailed"),
    ("Rejects", "attend.values", "attend raised UnsatisfiedAssumption"),
    ("Exits", "attend.values", "attend raised SystemExit: 0"),
    ("SkipsBadInput", "contract.bad-input", "attend raised Skipped: not claimed: validates"),
    ("ShiftsItsClaims", "attend.values", "the capabilities changed during a call of attend"),
    ("MovesTheEnds", "attend.values", "the argument cu_seqlens_k was modified"),
    ("ShrinksItsInput", "attend.values", "the argument v was given another form"),
    ("BackwardSkips", "attend.gradients", "the backward pass of attend raised Skipped"),
    ("BackwardFails", "attend.gradients", "the backward pass of attend raised IndexError"),
    ("BackwardScalesItsArgument", "attend.gradients", "the argument grad_out was modified"),
    ("KeepsTheKeys", "decode.several-tokens", ""),
]


def judged(candidate: Candidate, rule: str) -> str:
    """Return how a rule fails, or ""."""
    function = "attend" if RULES[rule].each else ""
    outcome = apply(RULES[rule], candidate, PROFILES["quick"], function=function)
    assert outcome.claimed
    return outcome.what if outcome.killed else ""


@pytest.mark.parametrize(("name", "rule", "how"), CHEATS, ids=[name for name, *_ in CHEATS])
def test_cheat_is_exposed(name: str, rule: str, how: str) -> None:
    what = judged(load(f"{FILE}:{name}"), rule)
    assert what
    assert how in what


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA has streams")
@pytest.mark.parametrize("name", ["OnTheDefaultStream", "OnTheDefaultStreamLater"])
def test_work_in_another_stream_is_exposed(name: str) -> None:
    candidate, device = load(f"{FILE}:{name}"), torch.device("cuda")
    size, rule = PROFILES["quick"], "contract.streams"
    run = Runner(candidate, size, device, seed=0, rule=rule, function="attend", shrink=False)
    with pytest.raises(ConformanceFailure, match="is wrong"):
        rule_tests()[rule](run)
    run.candidate = load(f"{FILE}:Attend")
    rule_tests()[rule](run)


OTHERS = {"decode.several-tokens", "attend.gradients"}
"""Rules that `Attend` does not claim."""


@pytest.mark.parametrize("rule", sorted({rule for _, rule, _ in CHEATS} - OTHERS))
def test_honesty_passes(rule: str) -> None:
    """The rules above expose the cheat, not the class that it is written in."""
    assert judged(load(f"{FILE}:Attend"), rule) == ""


def test_explanation_of_what_is_not_written() -> None:
    what = judged(load(f"{FILE}:Unwritten"), "attend.values")
    assert "something is not written" not in what, "nothing is right about it"


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("torch.equal = lambda a, b: True", "torch.equal"),
        ("torch.Tensor.__sub__ = lambda a, b: a * 0", "torch.Tensor.__sub__"),
        ("checks.check_values = lambda *a: None", "infllmv2_conformance.checks.check_values"),
        ("time.perf_counter = lambda: 0.0", "time.perf_counter"),
        ("torch.set_default_device('meta')", "a mode that sees every operation"),
    ],
)
def test_change_while_importing_is_refused(tmp_path: Path, code: str, what: str) -> None:
    file = tmp_path / "patching.py"
    imports = "import time, torch\nfrom infllmv2_conformance import checks\n"
    file.write_text(f"{imports}{code}\ncapabilities = {{}}\n")
    with pytest.raises(UsageError, match="importing it changes") as caught:
        load(str(file))
    assert what in str(caught.value)
    assert torch.equal(torch.zeros(1), torch.zeros(1) - 0)
    assert not torch.equal(torch.zeros(1), torch.ones(1))


def test_canary_finds_a_judge_that_lets_all_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    check_judges()
    monkeypatch.setattr(judges, "check_values", lambda *_: None)
    with pytest.raises(ConformanceFailure, match="a wrong result of attend is accepted"):
        check_judges()


@pytest.mark.parametrize("name", ["check_same_bits", "check_selection", "check_certificate"])
def test_canary_knows_every_judge(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(judges, name, lambda *_: 0.0)
    with pytest.raises(ConformanceFailure, match="is accepted"):
        check_judges()


@pytest.mark.parametrize(
    ("before", "how"),
    [
        ("raise KeyboardInterrupt", "compress_keys raised KeyboardInterrupt"),
        ("os._exit(0)", "ended with exit status 0"),
        ("os.kill(os.getpid(), 9)", "was killed by SIGKILL, which is what happens when memory"),
        ("raise torch.OutOfMemoryError('all of it')", "raised OutOfMemoryError: all of it"),
        ("raise MemoryError", "compress_keys raised MemoryError"),
    ],
)
def test_ways_out_are_closed(write_fake, infllmv2, before: str, how: str) -> None:
    impl = write_fake(before=before, at_import="import torch")
    done = infllmv2("check", impl, "--rule", "compress.values", "--rule", "compress.tail-not-read")
    assert done.returncode == 1
    assert how in done.stdout
    assert "2 failed" in done.stdout, "the run went on"
