"""Stage 7: a cache that grows token by token gives what one prefill gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from hypothesis import strategies as st

from infllmv2_conformance.cases import Case
from infllmv2_conformance.inputs import Inputs
from infllmv2_conformance.invalid import check_refused
from infllmv2_conformance.invalid_cache import (
    invalid_appends,
    invalid_caches,
    invalid_decodes,
    invalid_resets,
)
from infllmv2_conformance.programs import Machine, parse_steps, programs, write_steps
from infllmv2_conformance.rules import rule
from infllmv2_conformance.runner import Runner
from infllmv2_conformance.strategies import cases
from infllmv2_conformance.trial import Trial

DECISIVE = 12.0
"""The logit of a window that consists of the keys which a query looks for."""
REGIMES = ("normal", "peaked", "integers", "needles", "correlated")


@rule("decode.one-token")
def test_one_token(run: Runner) -> None:
    """Append a prompt, then append and decode one token at a time.

    Half of the cases are made so that the newest window decides. Mostly it lies in local blocks,
    which are forced; so these cases force the query's own block alone, end where a window that
    reaches into the block before is complete, and query for its last keys.
    """

    def change(case: Case) -> Case:
        if not _decided_by_newest(case):
            return case
        return replace(case, init_blocks=0, window_size=0, local_override=None, topk=2)

    def program(case: Case) -> str:
        end = case.sequences[0][1]
        if _decided_by_newest(case):
            overlap = case.kernel_size - case.kernel_stride
            boundary = (end - overlap) // case.block_size * case.block_size
            end = boundary + overlap if boundary > 0 else end
        last = min(end, 3 * case.kernel_stride + 2, 30)
        return write_steps([("a", (end - last,)), *[("a", (1,)), ("d", (1,))] * last])

    def check(trial: Trial) -> None:
        if _decided_by_newest(trial.case):
            trial.__dict__["inputs"] = _looking_back(trial)
        _check(trial)

    _run(run, program, batch=1, change=change, check=check)


@rule("decode.several-tokens")
def test_several_tokens(run: Runner) -> None:
    """Append and decode several tokens at a time: more than complete one window."""

    def program(case: Case) -> str:
        size = 2 + case.choice % (3 * case.kernel_stride)
        chunks = min(case.sequences[0][1] // size, 6)
        prompt = case.sequences[0][1] - chunks * size if case.choice % 2 else 0
        return write_steps([("a", (prompt,)), *[("a", (size,)), ("d", (size,))] * chunks])

    _run(run, program, batch=1)


@rule("decode.ragged")
def test_ragged(run: Runner) -> None:
    """Let the sequences of a batch advance by 0, 1 and several tokens."""

    def program(case: Case) -> str:
        first = tuple(s // (2 + i) for i, (_, s) in enumerate(case.sequences))
        steps = [("a", first), ("d", (1, 0)), ("a", (0, 1, 5)), ("d", (0, 1, 3))]
        return write_steps([*steps, ("a", (3, 0, 1)), ("d", (2, 1, 1))])

    _run(run, program, batch=3)


@rule("decode.switch")
def test_switch(run: Runner) -> None:
    """Cross dense_len while decoding."""

    def program(case: Case) -> str:
        return write_steps([("a", (max(case.dense_len - 3, 0),)), *[("a", (1,)), ("d", (1,))] * 6])

    def change(case: Case) -> Case:
        return case.with_(dense_len=max(case.sequences[0][1] - 3, 0))

    _run(run, program, batch=1, change=change)


@rule("decode.bad-input")
def test_bad_input(run: Runner) -> None:
    """Break one argument at a time, then go on as if nothing had been asked."""

    def check(trial: Trial) -> None:
        machine, claims = Machine(trial), trial.capabilities
        candidate, size = trial.candidate, machine.size
        counts = [1 + keys // 2 for _, keys in trial.case.sequences]
        machine.append(counts)
        for wrong in invalid_caches(claims):
            check_refused(wrong, candidate.error_of("new_cache", **(size | wrong.changes)))
        lengths = [len(rows) for rows in machine.rows]
        room = [size["max_seqlen_k"] - length for length in lengths]
        given = machine.append_arguments([2] * len(counts))
        for wrong in invalid_appends(given, room, claims):
            check_refused(wrong, candidate.error_of("append", **(given | wrong.changes)))
        given = machine.decode_arguments([1] * len(counts))
        for wrong in invalid_decodes(given, lengths, trial.case.kv_heads, claims):
            check_refused(wrong, candidate.error_of("decode", **(given | wrong.changes)))
        if candidate.offers("reset"):
            for wrong in invalid_resets(lengths, claims):
                error = candidate.error_of("reset", cache=machine.cache, **wrong.changes)
                check_refused(wrong, error)
        machine.append([2] * len(counts))
        machine.decode([3] * len(counts))

    if set(run.candidate.capabilities.validates) <= {"selected"}:
        run.unclaimed("a kind of bad input that a cache can get")
    drawn = cases(
        run,
        supply=True,
        max_keys=60,
        min_sequences=1,
        max_sequences=2,
        min_keys=4,
        use_nope=True,
    )
    run.cases(drawn, check, weight=0.2)


@rule("decode.windows")
def test_windows(run: Runner) -> None:
    """Look into the cache after every append."""

    def check(trial: Trial) -> None:
        machine = Machine(trial)
        machine.check_windows()
        for step in parse_steps(trial.case.steps):
            machine.run([step])
            machine.check_windows()

    drawn = cases(run, supply=True, max_keys=200, min_sequences=1, min_keys=1, regimes=REGIMES)
    operations = "aar" if run.candidate.offers("reset") else "a"
    run.cases(_with_steps(drawn, operations), check, weight=0.7)


@rule("decode.state-machine")
def test_state_machine(run: Runner) -> None:
    """Run drawn programs of appends, decodes and resets."""
    drawn = cases(
        run,
        supply=True,
        max_keys=240,
        min_sequences=1,
        min_keys=1,
        regimes=REGIMES,
        use_nope=True,
        competing=True,
    )
    run.cases(drawn.map(_rewritten), _check, weight=0.5)
    run.cases(_with_steps(drawn, "aaddr", prompt=True), _check, weight=1.2)


def _check(trial: Trial) -> None:
    Machine(trial).run(parse_steps(trial.case.steps))


def _decided_by_newest(case: Case) -> bool:
    return case.seed % 2 == 1


def _looking_back(trial: Trial) -> Inputs:
    """Return inputs in which every other query head looks for the keys of the last stride."""
    inputs, stride = trial.inputs, trial.case.kernel_stride
    total = torch.nn.functional.pad(inputs.k.double(), (0, 0, 0, 0, stride, 0)).cumsum(0)
    recent = (total[stride:] - total[:-stride]) / stride  # [total_k, HK, D]
    length = recent.square().sum(dim=-1, keepdim=True).clamp(min=1e-6)
    q = recent * (DECISIVE * trial.case.head_dim**0.5 / length)
    heads = torch.arange(trial.case.query_heads, device=trial.device) % trial.case.group
    q = q.repeat_interleave(trial.case.group, dim=1).to(inputs.q.dtype)
    return replace(inputs, q=torch.where(heads[:, None] % 2 == 0, q, inputs.q))


def _rewritten(case: Case) -> Case:
    """Fill the cache, take two thirds back, and fill it with other tokens."""
    lengths = [keys for _, keys in case.sequences]
    steps = [
        ("a", tuple(lengths)),
        ("r", tuple(2 * n // 3 for n in lengths)),
        ("a", tuple(lengths)),
        ("d", (2,)),
    ]
    sequences = tuple((2 * n, 2 * n) for n in lengths)
    return replace(case, sequences=sequences, steps=write_steps(steps))


def _with_steps(
    drawn: st.SearchStrategy[Case], operations: str, prompt: bool = False
) -> st.SearchStrategy[Case]:
    """Add a program, after a `prompt` of two thirds of the keys if that is asked for."""

    def add(case: Case) -> st.SearchStrategy[Case]:
        first = ("a", tuple(2 * keys // 3 for _, keys in case.sequences))
        start = write_steps([first]) + "-" if prompt else ""
        steps = programs(len(case.sequences), 60, operations)
        return steps.map(lambda program: replace(case, steps=start + program))

    return drawn.flatmap(add)


def _run(
    run: Runner,
    program: Callable[[Case], str],
    batch: int,
    change: Callable[[Case], Case] = lambda case: case,
    check: Callable[[Trial], None] = _check,
) -> None:
    drawn = cases(
        run,
        supply=True,
        max_keys=200,
        min_sequences=min(batch, 2),
        max_sequences=batch,
        min_keys=1,
        regimes=REGIMES,
        competing=True,
    )

    def with_program(case: Case) -> Case:
        case = change(case)
        return replace(case, steps=program(case))

    run.cases(drawn.map(with_program), check, weight=0.7)
