"""Draw the tensors of a long case in segments, on the device that they are for.

Each segment of `SEGMENT` tokens has a generator of its own. So the rows of a chunk are those of the
prefill, whatever is drawn of it, and no more than one segment is ever held in float32. The numbers
repeat on the same kind of device; a CPU and a GPU draw different ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from infllmv2_conformance.cases import Case
from infllmv2_conformance.errors import UsageError
from infllmv2_conformance.inputs import Inputs
from infllmv2_reference.layout import cu_seqlens_of

from .needles import needle_windows

SEGMENT = 4096
CORRELATION = 0.97
_MEMORY = 256
"""Tokens after which a correlated draw has forgotten: 0.97 ** 256 is 0.0004."""


@dataclass(frozen=True)
class _Draw:
    """Say which tensor of which sequence is drawn.

    Args:
        case: the case.
        sequence: its index in the batch.
        name: "q", "k" or "v".
        device: where.
    """

    case: Case
    sequence: int
    name: str
    device: torch.device

    @property
    def heads(self) -> int:
        """Return HQ or HK."""
        return self.case.query_heads if self.name == "q" else self.case.kv_heads

    def generator(self, segment: int, name: str = "") -> torch.Generator:
        """Return the source of one segment's numbers; -1 is for what all segments share."""
        tensor = "qkvd".index(name or self.name)
        seed = ((self.case.seed * 1009 + self.sequence) * 4 + tensor) * 1_000_003 + segment + 1
        return torch.Generator(self.device).manual_seed(seed)

    def normal(self, segment: int) -> Tensor:
        """Return standard normal numbers, `[SEGMENT, heads, D]`."""
        shape = (SEGMENT, self.heads, self.case.head_dim)
        return torch.randn(shape, generator=self.generator(segment), device=self.device)

    def shared(self, name: str) -> Tensor:
        """Return standard normal numbers that belong to the whole sequence, `[HK, D]`."""
        shape = (self.case.kv_heads, self.case.head_dim)
        return torch.randn(shape, generator=self.generator(-1, name), device=self.device)

    def by_head(self, x: Tensor) -> Tensor:
        """Repeat `[HK, D]` for the heads of the tensor."""
        return x.repeat_interleave(self.heads // self.case.kv_heads, dim=0)


def check_long_case(case: Case) -> None:
    """Make sure that a case can be drawn here.

    Raises:
        UsageError: the regime is not one of long cases, or the case has what they do not.
    """
    if case.regime not in REGIMES or case.use_nope:
        known = ", ".join(REGIMES)
        raise UsageError(f"a long case has the regime {known}, and no use_nope, but it is: {case}")


def build_long_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw the tensors of a long case.

    Raises:
        UsageError: the case is not one that can be drawn here.
    """
    check_long_case(case)
    dtype = getattr(torch, case.dtype)
    q_lengths, k_lengths = [t for t, _ in case.sequences], [s for _, s in case.sequences]
    tensors: dict[str, Tensor] = {}
    for name, lengths in (("q", q_lengths), ("k", k_lengths), ("v", k_lengths)):
        heads = case.query_heads if name == "q" else case.kv_heads
        packed = torch.empty(sum(lengths), heads, case.head_dim, dtype=dtype, device=device)
        for part, draw, first in _parts(case, name, packed, device):
            _fill(part, draw, first)
        tensors[name] = packed
    return Inputs(
        **tensors,
        selection_q=None,
        selection_k=None,
        cu_seqlens_q=cu_seqlens_of(q_lengths, device),
        cu_seqlens_k=cu_seqlens_of(k_lengths, device),
        max_seqlen_q=max(q_lengths, default=0),
        max_seqlen_k=max(k_lengths, default=0),
    )


def _parts(
    case: Case, name: str, packed: Tensor, device: torch.device
) -> Iterator[tuple[Tensor, _Draw, int]]:
    """Yield the rows of every sequence in a packed tensor, and the position of the first."""
    start = 0
    for sequence, (num_queries, num_keys) in enumerate(case.sequences):
        length = num_queries if name == "q" else num_keys
        draw = _Draw(case, sequence, name, device)
        yield packed[start : start + length], draw, num_keys - length
        start += length


def _fill(rows: Tensor, draw: _Draw, first: int) -> None:
    """Write the tokens from position `first` on, segment by segment."""
    regime, end = REGIMES[draw.case.regime], first + len(rows)
    for segment in range(first // SEGMENT, -(-end // SEGMENT)):
        numbers = regime(draw, segment)  # [SEGMENT, heads, D]
        start = segment * SEGMENT
        cut = slice(max(first - start, 0), min(end - start, SEGMENT))
        rows[start + cut.start - first : start + cut.stop - first] = numbers[cut]


def _normal(draw: _Draw, segment: int) -> Tensor:
    """Independent standard normal numbers: the selections of neighbours share little."""
    return draw.normal(segment)


def _correlated(draw: _Draw, segment: int) -> Tensor:
    """Neighbours are alike (AR(1), new in every segment), and every channel of k has a mean."""
    numbers = draw.normal(segment)
    if draw.name == "v":
        return numbers
    numbers[1:] *= (1 - CORRELATION**2) ** 0.5
    step = 1
    while step < _MEMORY:  # sums of 2, 4, 8 ... terms of the moving average
        numbers[step:] += CORRELATION**step * numbers[:-step].clone()
        step *= 2
    return numbers + draw.shared("k") if draw.name == "k" else numbers


def _needles(draw: _Draw, segment: int) -> Tensor:
    """A faint background, and some windows that every query of their head looks for.

    A needle fills a window, so its mean keeps its full length: a logit of 6, against 0.
    """
    numbers = draw.normal(segment)
    if draw.name == "v":
        return numbers
    direction = torch.nn.functional.normalize(draw.shared("d"), dim=-1)  # [HK, D]
    if draw.name == "q":
        return numbers * 0.5 + 6 * draw.by_head(direction)
    numbers *= 0.1
    start, case = segment * SEGMENT, draw.case
    for window in needle_windows(case, draw.sequence):
        token = window * case.kernel_stride - start
        cut = slice(max(token, 0), min(token + case.kernel_size, SEGMENT))
        if cut.start < cut.stop:
            numbers[cut] += direction * case.head_dim**0.5
    return numbers


REGIMES: dict[str, Callable[[_Draw, int], Tensor]] = {
    "normal": _normal,
    "correlated": _correlated,
    "needles": _needles,
}
"""The kinds of numbers of long cases."""
