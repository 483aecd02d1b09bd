"""Judge answers to a set of vectors, and see that the set still says what the oracle says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from infllmv2_conformance.device import choose_device
from infllmv2_conformance.failure import ConformanceFailure
from infllmv2_conformance.loading import load

from .answer import Answers, answer, unclaimed
from .compare import Verdict, compare, oracle_problem
from .expected import UncertainError, expect
from .folder import Golden, read_answers

Ask = Callable[[Golden], Answers | str]
"""Returns the answers to a vector, or says what is not claimed."""


@dataclass(frozen=True)
class Outcome:
    """Say what became of one vector.

    Args:
        name: of the vector.
        outcome: "passed", "failed" or "not claimed".
        ratio: the largest difference over its bound; None if no numbers were compared.
        text: what is wrong or missing.
    """

    name: str
    outcome: str
    ratio: float | None = None
    text: str = ""


def asking(impl: str, device: str | None) -> Ask:
    """Return what asks an implementation.

    Raises:
        UsageError: it cannot be loaded, or does not run on the device.
    """
    candidate = load(impl)
    where = choose_device(candidate.capabilities, device)
    return lambda golden: unclaimed(golden, candidate) or answer(golden, candidate, where)


def reading(folder: Path) -> Ask:
    """Return what reads the answers that another program has written."""

    def read(golden: Golden) -> Answers | str:
        answers = read_answers(folder, golden.vector.name)
        return "no file of answers" if answers is None else answers

    return read


def changes(golden: Golden) -> list[str]:
    """Return how a stored vector differs from today's oracle on the stored inputs."""
    try:
        today = expect(golden.vector, golden.given)
    except UncertainError as error:
        return [str(error)]
    if [e.name for e in today] != [e.name for e in golden.expected]:
        return [f"{golden.vector.name}: its results were {[e.name for e in golden.expected]}"]
    pairs = zip(golden.expected, today, strict=True)
    problems = [(stored.name, oracle_problem(stored, now)) for stored, now in pairs]
    return [f"{golden.vector.name}: {name}: {what}" for name, what in problems if what]


def verify(goldens: list[Golden], ask: Ask) -> Iterator[Outcome]:
    """Yield what becomes of every vector."""
    for golden in goldens:
        name = golden.vector.name
        try:
            answers = ask(golden)
        except ConformanceFailure as failure:
            yield Outcome(name, "failed", None, failure.finding.what)
            continue
        if isinstance(answers, str):
            yield Outcome(name, "not claimed", None, answers)
            continue
        yield _judge(golden, answers)


def _judge(golden: Golden, answers: Answers) -> Outcome:
    budget = golden.vector.case.config.budget
    ratios: list[float] = []
    for expected in golden.expected:
        actual = answers.get(expected.name)
        if actual is None:
            if expected.optional:
                continue
            return Outcome(golden.vector.name, "failed", None, f"{expected.name} is missing")
        verdict: Verdict = compare(expected, actual, budget)
        ratios += [] if verdict.ratio is None else [verdict.ratio]
        if verdict.problem:
            text = f"{expected.name}: {verdict.problem}"
            return Outcome(golden.vector.name, "failed", max(ratios, default=None), text)
    return Outcome(golden.vector.name, "passed", max(ratios, default=None))
