"""What is timed: shapes of models, and one workload of one shape."""

from __future__ import annotations

from dataclasses import dataclass, replace

from infllmv2_conformance.errors import UsageError
from infllmv2_reference import SparseConfig

UNITS = {"k": 1 << 10, "m": 1 << 20}


@dataclass(frozen=True)
class Shape:
    """Fix heads, head dim and block geometry; at least two kv heads, so that they can be swapped.

    Args:
        name: what `--shapes` takes.
        query_heads: HQ.
        kv_heads: HK.
        head_dim: D.
        budgets: the block budgets that are timed unless others are asked for.
        block_size: B.
        kernel_size: l1.
        kernel_stride: s1.
        window_size: w; `w / B + 1` blocks are local.
    """

    name: str
    query_heads: int
    kv_heads: int
    head_dim: int
    budgets: tuple[int, ...] = (96, 64)
    block_size: int = 64
    kernel_size: int = 32
    kernel_stride: int = 16
    window_size: int = 2048

    @property
    def group(self) -> int:
        """Return G."""
        return self.query_heads // self.kv_heads

    def config(self, budget: int) -> SparseConfig:
        """Return the parameters of the attention, sparse at every length.

        Raises:
            UsageError: the budget does not hold the forced blocks.
        """
        local = self.window_size // self.block_size
        try:
            return SparseConfig(
                block_size=self.block_size,
                kernel_size=self.kernel_size,
                kernel_stride=self.kernel_stride,
                window_size=self.window_size,
                topk=budget - local,
                dense_len=-1,
            )
        except ValueError as error:
            forced = local + 2
            raise UsageError(
                f"budget must be at least {forced} for the shape {self.name}, but it is {budget}"
            ) from error


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("minicpm4", 32, 2, 128),
        Shape("mha16", 16, 16, 64),
        Shape("gqa8", 64, 8, 128),
        Shape("tiny", 4, 2, 32, (12, 8), 16, 8, 4, 64),
    )
}
"""MiniCPM4.1; no groups and a small head; a wide model with groups of 8; one for CPUs."""


@dataclass(frozen=True)
class Workload:
    """Describe completely what the competitors of one comparison are given.

    Args:
        shape: of the model.
        length: S, key tokens of every sequence; as many queries, except in `decode`: one.
        budget: K, blocks that every query selects.
        inputs: one of `words.INPUTS`.
        task: one of `words.TASKS`.
        batch: sequences; 1 except in `decode`.
        dtype: of q, k and v.
        seed: what the tensors are drawn from.
    """

    shape: Shape
    length: int
    budget: int
    inputs: str = "random"
    task: str = "forward"
    batch: int = 1
    dtype: str = "bfloat16"
    seed: int = 0

    @property
    def config(self) -> SparseConfig:
        """Return the parameters of the attention."""
        return self.shape.config(self.budget)

    @property
    def queries(self) -> int:
        """Return T, the queries of one sequence."""
        return 1 if self.task == "decode" else self.length

    def at(self, length: int) -> Workload:
        """Return the same at another length."""
        return replace(self, length=length)

    def __str__(self) -> str:
        """Return it in words, for example `minicpm4 32k forward, budget 96, random`."""
        batch = f" of {self.batch}" if self.task == "decode" else ""
        where = f"{self.shape.name} {short(self.length)} {self.task}{batch}"
        return f"{where}, budget {self.budget}, {self.inputs}"


def short(length: int) -> str:
    """Write a number of tokens as a person does.

    >>> [short(n) for n in (512, 8192, 1 << 20, 1000)]
    ['512', '8k', '1M', '1000']
    """
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if length >= size and length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def parse_lengths(text: str) -> list[int]:
    """Read lengths, for example `8k,32k,1M`.

    >>> parse_lengths("512,8k,1M")
    [512, 8192, 1048576]

    Raises:
        UsageError: a part is no positive number, with or without `k` or `M`.
    """
    lengths: list[int] = []
    for part in text.split(","):
        word = part.strip().lower()
        unit = UNITS.get(word[-1:], 1)
        digits = word[:-1] if word[-1:] in UNITS else word
        if not digits.isdecimal() or int(digits) == 0:
            raise UsageError(f"lengths must be numbers such as 8k,128k,1M, but one is {part!r}")
        lengths.append(int(digits) * unit)
    return lengths
