"""Gradients of a long call: only sampled rows send one back, each through blocks of its own.

So the gradient of every token comes from one row at most, and the oracle of that row is enough. All
other rows send exactly 0, and all tokens that no sampled row selected must get exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infllmv2_conformance import bounds
from infllmv2_conformance.bounds import Bounded
from infllmv2_conformance.checks import check_values
from infllmv2_conformance.failure import fail
from infllmv2_conformance.gradients import Gradients, differentiate
from infllmv2_conformance.trial import Trial
from infllmv2_reference.layout import Span

from .given import long_arguments
from .judges import moved, row_span, rows_of
from .oracle import LongOracle
from .trials import long_oracle

SENDERS = 6
"""Rows of a sequence that send a gradient back."""
ROWS = 1 << 14
"""Rows of a gradient that are looked at at once."""


def check_gradients(trial: Trial) -> None:
    """Differentiate `attend` on a long case, and judge the gradients."""
    oracle = long_oracle(trial)
    given = long_arguments("attend", oracle)
    sent = torch.zeros_like(trial.inputs.q)
    senders = {span.sequence: _senders(oracle, span) for span in oracle.spans}
    for span in oracle.spans:
        for number, row in enumerate(senders[span.sequence]):
            at = span.queries.start + row
            given["selected"][:, at] = _own_blocks(oracle, span, row, number)
            shape = sent[at].shape
            sent[at] = torch.randn(shape, generator=trial.generator).to(sent)
    gradients = differentiate(trial, "attend", given, sent)
    for span in oracle.spans:
        for row in senders[span.sequence]:
            selected = given["selected"][:, span.queries.start + row].cpu()
            _check_row(trial, oracle, span, row, selected, sent, gradients)
    _check_rest(gradients)


def _senders(oracle: LongOracle, span: Span) -> list[int]:
    """Return a few of the rows that are judged, the first and the last of them included."""
    rows = rows_of(oracle, span)
    if len(rows) <= SENDERS:
        return rows
    return [rows[i * (len(rows) - 1) // (SENDERS - 1)] for i in range(SENDERS)]


def _own_blocks(oracle: LongOracle, span: Span, row: int, number: int) -> Tensor:
    """Return blocks `[K]` that no other sender selects: every sixth, spread over the context."""
    last = row_span(span, row).num_keys - 1
    blocks = torch.arange(number, last // oracle.config.block_size + 1, SENDERS)
    budget = oracle.config.budget
    if len(blocks) > budget:
        blocks = blocks[torch.arange(1, budget + 1) * len(blocks) // budget - 1]
    selected = torch.full((budget,), -1, dtype=torch.int32)
    selected[: len(blocks)] = blocks.int()
    return selected.to(oracle.inputs.q.device)


def _check_row(
    trial: Trial,
    oracle: LongOracle,
    span: Span,
    row: int,
    selected: Tensor,
    sent: Tensor,
    gradients: Gradients,
) -> None:
    """Judge what one row sends to q, k and v, and overwrite it with 0."""
    group, one = trial.case.group, row_span(span, row)
    for head in range(trial.case.kv_heads):
        tokens = oracle.tokens_of(selected[head], one.num_keys - 1)
        if not len(tokens):
            continue  # nothing to attend: its gradient is 0, as that of the rows that send none
        rows = (tokens + span.keys.start).to(sent.device)
        heads = slice(head * group, (head + 1) * group)
        places = (
            (slice(one.queries.start, one.queries.stop), heads),
            (rows, slice(head, head + 1)),
            (rows, slice(head, head + 1)),
        )
        expected = _expected(oracle, one, head, tokens, sent)
        names = zip("qkv", gradients, places, expected, strict=True)
        for name, gradient, place, bounded in names:
            what = f"the gradient of {name} is wrong"
            actual = gradient[place]
            here = {"query": row, "head": head * group} if name == "q" else {"kv_head": head}
            real = None if name == "q" else tokens
            with moved(real, **here):
                check_values(what, actual, bounded, one, name, trial.note)
            gradient[place] = 0


def _expected(
    oracle: LongOracle, one: Span, head: int, tokens: Tensor, sent: Tensor
) -> tuple[Bounded, Bounded, Bounded]:
    """Return the gradients of one row and one key/value head, with respect to its tokens alone."""
    inputs, group, size = oracle.inputs, oracle.case.group, oracle.config.block_size
    heads = slice(head * group, (head + 1) * group)
    rows = (tokens + one.keys.start).to(sent.device)
    k, v = (x[rows, head : head + 1].cpu() for x in (inputs.k, inputs.v))
    every = torch.arange(-(-len(tokens) // size), dtype=torch.int32)[None, None]
    q, g = (x[one.queries, heads].cpu() for x in (inputs.q, sent))
    return bounds.attend_gradients(q, k, v, every, g, size, oracle.arithmetic, oracle.case.dtype)


def _check_rest(gradients: Gradients) -> None:
    """Fail unless all that was not judged is exactly 0."""
    for name, gradient in zip("qkv", gradients, strict=True):
        for first in range(0, len(gradient), ROWS):
            part = gradient[first : first + ROWS]
            bad = ~(part == 0)
            if bool(bad.any()):
                row, head, channel = (int(i) for i in bad.nonzero()[0])
                fail(
                    f"a gradient of {name} is not 0, although no row sends one there",
                    where={"packed row": first + row, "head": head, "channel": channel},
                    expected="0",
                    actual=repr(float(part[row, head, channel])),
                    count=int(bad.sum()),
                )
