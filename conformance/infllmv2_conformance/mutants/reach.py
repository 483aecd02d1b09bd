"""Find out which contract functions an edit can affect, so that the others need not be run."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import FrameType
from typing import Any

import torch

from infllmv2_conformance.arguments import arguments
from infllmv2_conformance.candidate import Candidate
from infllmv2_conformance.capabilities import Capabilities
from infllmv2_conformance.cases import Case
from infllmv2_conformance.inputs import build_inputs
from infllmv2_conformance.oracle import Oracle
from infllmv2_conformance.programs import Machine
from infllmv2_conformance.rules import CACHE_FUNCTIONS, STAGE_FUNCTIONS, Rule
from infllmv2_conformance.trial import Trial

from .build import pristine, sources
from .model import Edit, Mutant

CACHE_ONLY = (*CACHE_FUNCTIONS, "reset", "cached_windows")
EVERYTHING = (*STAGE_FUNCTIONS, *CACHE_ONLY)
DIFFERENTIABLE = ("attend", "attention")
Place = tuple[str, str]
"""A module and the qualified name of a function in it."""

_SMALL = Case(((40, 90), (0, 30), (3, 3)), 2, 2, 16, topk=4, dense_len=60)
_CASES = (
    _SMALL,
    _SMALL.with_(lse="exact", dense_len=-1),
    _SMALL.with_(pooling="paper_eq7", use_nope=True),
    _SMALL.with_(sequences=()),
)


@dataclass(frozen=True)
class Reach:
    """Name the contract functions whose result a mutant may change.

    Args:
        forward: those that may return something else.
        backward: those that may send back another gradient.
    """

    forward: frozenset[str]
    backward: frozenset[str]

    def touches(self, rule: Rule) -> bool:
        """Say whether the outcome of a rule may differ from the original's."""
        changed = self.forward | self.backward if "gradients" in rule.claims else self.forward
        return bool(changed & set(rule.functions))


def reach(mutant: Mutant) -> Reach:
    """Return what a mutant may change; what it does not reach computes as the original does."""
    return Reach(_reached(mutant, backward=False), _reached(mutant, backward=True))


def _reached(mutant: Mutant, *, backward: bool) -> frozenset[str]:
    if mutant.base != "eager":
        return frozenset(mutant.functions)
    places = [place(edit) for edit in mutant.edits]
    found = {f for f in EVERYTHING if any(p is None or p in called(f, backward) for p in places)}
    if mutant.wrap and (backward or not mutant.wrap.backward):
        found |= set(mutant.wrap.functions)
    return frozenset(found & set(mutant.functions) if mutant.functions else found)


def place(edit: Edit) -> Place | None:
    """Return the function that an edit changes, or None if it changes more than one."""
    text = sources()[edit.module]
    start = text.find(edit.before)
    if start < 0:
        return None  # an edit of what another edit wrote
    first = text.count("\n", 0, start) + 1
    last = first + edit.before.count("\n")
    found = None
    for name, node in _functions(ast.parse(text)):
        if node.lineno <= first and last <= (node.end_lineno or 0):
            found = edit.module, name
    return found


def _functions(tree: ast.AST, prefix: str = "") -> list[tuple[str, ast.FunctionDef]]:
    rows: list[tuple[str, ast.FunctionDef]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            rows.append((f"{prefix}{node.name}", node))
        elif isinstance(node, ast.ClassDef):
            rows += _functions(node, f"{prefix}{node.name}.")
    return rows


@cache
def called(function: str, backward: bool) -> frozenset[Place]:
    """Return the functions of the original that a contract function calls, found by watching.

    Args:
        function: the contract function.
        backward: whether to watch its gradient instead of itself.
    """
    if backward and function not in DIFFERENTIABLE:
        return frozenset()
    seen: set[Place] = set()
    package = pristine().__name__ + "."

    def watch(frame: FrameType, event: str, _: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith(package):
            name = frame.f_code.co_qualname.split(".<locals>")[0]
            seen.add((module.removeprefix(package), name))

    for case in _CASES:
        act = _prepare(function, case)
        if backward:
            loss = act()[0].sum()
            act = loss.backward
        sys.setprofile(watch)
        try:
            act()
        finally:
            sys.setprofile(None)
    return frozenset(seen)


def _prepare(function: str, case: Case) -> Callable[[], Any]:
    """Return what calls a contract function of the original on a case."""
    target = pristine().IMPLEMENTATION
    candidate = Candidate("none", target, Capabilities.from_mapping(target.capabilities))
    if function in CACHE_ONLY:  # there every key needs a query
        case = case.with_(sequences=tuple((keys, keys) for _, keys in case.sequences))
        trial = Trial(case, candidate, torch.device("cpu"), lambda _: None)
        return partial(_use_cache, trial)
    inputs = build_inputs(case, torch.device("cpu"))
    oracle = Oracle(case, inputs, candidate.capabilities.arithmetic)
    given = arguments(function, inputs, oracle)
    if function in DIFFERENTIABLE:
        given |= {n: given[n].clone().requires_grad_() for n in ("q", "k", "v")}
    return partial(candidate.call_on, function, **given)


def _use_cache(trial: Trial) -> None:
    machine = Machine(trial)
    machine.run([("a", (9,)), ("a", (1, 0, 2)), ("r", (2,)), ("a", (25,)), ("d", (3,))])
    trial.candidate.call("cached_windows", cache=machine.cache)
