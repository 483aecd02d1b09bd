"""Judge results of any length by some of their rows: the oracle of a row costs little.

A row's oracle is the reference in float64 with the bounds of `bounds/`, on the keys up to the row's
position; where the row attends some blocks only, their tokens are gathered first.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from infllmv2_conformance import bounds
from infllmv2_conformance.bounds import Bounded
from infllmv2_conformance.capabilities import Arithmetic
from infllmv2_conformance.checks import check_values
from infllmv2_reference.geometry import num_windows
from infllmv2_reference.layout import Span

from .tensors import Tensors
from .workloads import Workload

SITES = 8
HEADS = 4
LAST_ROWS = 8
DENSE_REACH = 1 << 14
"""Rows of dense attention are judged up to here: behind it each costs as much as a whole matrix."""


@dataclass(frozen=True)
class Site:
    """Say which query is judged.

    Args:
        sequence: its sequence.
        row: its row in the packed queries.
        position: its position, p.
    """

    sequence: int
    row: int
    position: int

    @property
    def span(self) -> Span:
        """Return the sequence up to this query, with it as the only one."""
        return Span(self.sequence, slice(0, 1), slice(0, self.position + 1))


def choose_sites(workload: Workload, count: int = SITES) -> list[Site]:
    """Return the first and the last query, where selecting begins, the middle, and random ones."""
    rng = random.Random(workload.seed)
    if workload.task == "decode":
        chosen = sorted({0, workload.batch - 1, rng.randrange(workload.batch)})
        return [Site(i, i, workload.length - 1) for i in chosen]
    last = workload.length - 1
    begins = min(workload.budget * workload.shape.block_size, last)
    positions = {0, last, begins, last // 2}
    while len(positions) < min(count, workload.length):
        positions.add(rng.randrange(workload.length))
    return [Site(0, p, p) for p in sorted(positions)]


def choose_heads(workload: Workload, count: int = HEADS) -> list[int]:
    """Return the kv heads whose outputs are judged: first, last, and random ones."""
    heads = workload.shape.kv_heads
    others = random.Random(workload.seed + 1).sample(range(heads), heads)
    return sorted(list(dict.fromkeys([0, heads - 1, *others]))[:count])


Windows = tuple[tuple[Tensor, Tensor], ...]
Compressed = dict[tuple[int, Arithmetic], Windows]
"""K_C1 and K_C2 of each sequence, with how far honest ones may be off."""


class RowOracle:
    """Hold what single rows must be, for the tensors as they are when first asked.

    Args:
        workload: the shapes.
        tensors: q, k and v, on any device.
        arithmetic: what the implementation computes in.
        windows: K_C1 and K_C2 as the implementation is given them, packed; None if it compresses
            the keys itself.
        compressed: what earlier oracles of the same keys compressed; new windows are added.
    """

    def __init__(
        self,
        workload: Workload,
        tensors: Tensors,
        arithmetic: Arithmetic,
        windows: tuple[Tensor, Tensor] | None = None,
        compressed: Compressed | None = None,
    ) -> None:
        self.workload, self.tensors, self.arithmetic = workload, tensors, arithmetic
        self.config, self.given = workload.config, windows
        self._packs: Compressed = {} if compressed is None else compressed
        self._scores: dict[tuple[Site, bool], Bounded] = {}

    def scores(self, site: Site, end_to_end: bool) -> Bounded:
        """Return the scores of the windows that a row sees, `[HK, 1, C]`."""
        if (site, end_to_end) not in self._scores:
            (first, slack1), (second, slack2) = self._windows(site, end_to_end)
            q = self.tensors.q[site.row : site.row + 1].cpu()
            extra = (slack1, slack2) if end_to_end else ()
            self._scores[site, end_to_end] = bounds.scores(
                q, first, second, site.position + 1, self.config, self.arithmetic, *extra
            )
        return self._scores[site, end_to_end]

    def block_scores(self, site: Site, end_to_end: bool) -> Bounded:
        """Return the scores of the blocks up to a row's own, `[HK, 1, N]`."""
        scores = self.scores(site, end_to_end)
        return bounds.block_scores(scores, site.position + 1, self.config)

    def _windows(
        self, site: Site, end_to_end: bool
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        if end_to_end:
            pairs = self._compressed(site.sequence)
        else:
            assert site.sequence == 0
            pairs = tuple((x, torch.zeros(0)) for x in self._given_on_cpu)
        c, end = self.config, site.position + 1
        kernels = (c.kernel_size, c.kernel_stride), (c.lse_kernel_size, c.lse_kernel_stride)
        cut: list[tuple[Tensor, Tensor]] = []
        for (value, slack), kernel in zip(pairs, kernels, strict=True):
            seen = num_windows(end, *kernel)
            cut.append((value[:seen], slack[:seen]))
        return cut[0], cut[1]

    @cached_property
    def _given_on_cpu(self) -> tuple[Tensor, ...]:
        assert self.given is not None
        return tuple(x.cpu() for x in self.given)

    def _compressed(self, sequence: int) -> Windows:
        name = sequence, self.arithmetic
        if name not in self._packs:
            c, length = self.config, self.workload.length
            keys = self.tensors.k[sequence * length : (sequence + 1) * length].cpu()
            kernels = (c.kernel_size, c.kernel_stride), (c.lse_kernel_size, c.lse_kernel_stride)
            self._packs[name] = tuple(
                bounds.stored_windows(keys, size, stride, self.arithmetic)
                for size, stride in kernels
            )
        return self._packs[name]

    def check_output(
        self,
        out: Tensor,
        lse: Tensor | None,
        site: Site,
        selected: Tensor | None,
        note: _Note,
    ) -> None:
        """Fail unless a row's output `[HQ, D]` and LSE `[HQ]` are those of its blocks `[HK, K]`.

        Without a selection the row attends every token up to its own.
        """
        for head in choose_heads(self.workload):
            blocks = None if selected is None else selected[head]
            group = self._group(head)
            values = self._attend(site, head, blocks)
            axes = Span(site.sequence, slice(0, 1), slice(0, site.position + 1))
            if lse is not None:
                check_values("the LSE is wrong", lse[None, group], values[1], axes, "lse", note)
            check_values("the output is wrong", out[None, group], values[0], axes, "out", note)

    def _group(self, head: int) -> slice:
        group = self.workload.shape.group
        return slice(head * group, (head + 1) * group)

    def _attend(self, site: Site, head: int, blocks: Tensor | None) -> tuple[Bounded, Bounded]:
        keys, values, numbers = self._gather(site.sequence, site.position, head, blocks)
        q = self.tensors.q[site.row : site.row + 1, self._group(head)].cpu()
        return bounds.attend(
            q,
            keys,
            values,
            torch.arange(len(numbers), dtype=torch.int32)[None, None],
            self.config.block_size,
            self.arithmetic,
            self.workload.dtype,
        )

    def _gather(
        self, sequence: int, position: int, head: int, blocks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens of ascending blocks up to `position`, `[L, 1, D]`, and the blocks."""
        size = self.config.block_size
        own = position // size
        ids = torch.arange(own + 1) if blocks is None else blocks[blocks >= 0].long().cpu()
        tokens = (ids[:, None] * size + torch.arange(size)).flatten()
        tokens = tokens[tokens <= position] + sequence * self.workload.length
        tokens = tokens.to(self.tensors.k.device)
        keys, values = (x[tokens, head : head + 1].cpu() for x in (self.tensors.k, self.tensors.v))
        return keys, values, ids

    def check_gradients(
        self,
        gradients: tuple[Tensor, Tensor, Tensor],
        selected: Tensor,
        grad_out: Tensor,
        note: _Note,
        only_last: bool,
    ) -> None:
        """Fail unless the gradients of the last rows, and of the keys and values, are right.

        Args:
            gradients: of q, k and v, whole, on any device.
            selected: `[HK, n, K]`, the blocks of the last n rows.
            grad_out: `[n, HQ, D]`, the gradient of these rows' output.
            note: takes the worst difference over its bound.
            only_last: whether all other rows had gradient 0. Then k and v are judged everywhere;
                else only at the last n tokens, which no other row attends.
        """
        rows, length = len(grad_out), self.workload.length
        span = Span(0, slice(0, rows), slice(0, length))
        for head in choose_heads(self.workload):
            union = selected[head].unique()
            union = union[union >= 0]
            keys, values, ids = self._gather(0, length - 1, head, union)
            numbers = torch.searchsorted(ids, selected[head].long())
            numbers = numbers.where(selected[head] >= 0, -1).int()[None]
            group = self._group(head)
            q, g = self.tensors.q[-rows:, group].cpu(), grad_out[:, group].cpu()
            size, dtype = self.config.block_size, self.workload.dtype
            must = bounds.attend_gradients(
                q, keys, values, numbers, g, size, self.arithmetic, dtype
            )
            dq = gradients[0][-rows:, group].cpu()
            check_values("the gradient of q is wrong", dq, must[0], span, "q", note)
            for name, actual, expected in zip("kv", gradients[1:], must[1:], strict=True):
                what = f"the gradient of {name} is wrong"
                actual = actual[:, head : head + 1]
                if only_last:
                    expected = self._everywhere(expected, ids)
                else:
                    expected = Bounded(expected.value[-rows:], expected.bound[-rows:])
                    actual = actual[-rows:]
                check_values(what, actual.cpu(), expected, span, name, note)

    def _everywhere(self, part: Bounded, ids: Tensor) -> Bounded:
        """Put the gradients of gathered tokens to their places, with exact zeros between them."""
        size = self.config.block_size
        tokens = (ids[:, None] * size + torch.arange(size)).flatten()[: len(part.value)]
        whole = [torch.zeros(self.workload.length, *part.value.shape[1:]).double() for _ in "vb"]
        whole[0][tokens], whole[1][tokens] = part.value, part.bound
        return Bounded(*whole)

    def check_query_gradient(
        self, dq: Tensor, site: Site, selected: Tensor | None, grad_out: Tensor, note: _Note
    ) -> None:
        """Fail unless a row's gradient of q `[HQ, D]` is right; as `check_output`."""
        for head in choose_heads(self.workload):
            blocks = None if selected is None else selected[head]
            keys, values, ids = self._gather(0, site.position, head, blocks)
            group = self._group(head)
            must, _, _ = bounds.attend_gradients(
                self.tensors.q[site.row : site.row + 1, group].cpu(),
                keys,
                values,
                torch.arange(len(ids), dtype=torch.int32)[None, None],
                grad_out[None, group].cpu(),
                self.config.block_size,
                self.arithmetic,
                self.workload.dtype,
            )
            check_values("the gradient of q is wrong", dq[None, group], must, site.span, "q", note)


class Worst:
    """Remember the largest ratio of a difference to its bound."""

    def __init__(self) -> None:
        self.ratio = 0.0

    def __call__(self, ratios: Tensor) -> None:
        """Take ratios."""
        if ratios.numel():
            self.ratio = max(self.ratio, float(ratios.max()))


_Note = Worst
