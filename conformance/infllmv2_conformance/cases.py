"""A case: a record of integers and names from which all tensors of a test follow."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from infllmv2_reference import SparseConfig

REGIMES = (
    "normal",
    "peaked",
    "integers",
    "needles",
    "constant",
    "correlated",
    "huge",
    "tiny",
    "indexed",
)
"""Kinds of input; `inputs.py` says what each one is and which fault it reveals."""

WITHOUT_OVERFLOW = tuple(regime for regime in REGIMES if regime != "huge")
"""Regimes in which no score exceeds the range of float32, whatever the normaliser."""


@dataclass(frozen=True)
class Case:
    """Describe one input of the suite completely; its text is what `infllmv2 repro` takes.

    Args:
        sequences: (T, S) of every sequence of the batch: query and key tokens, T <= S.
        kv_heads: HK.
        group: G, query heads per key/value head.
        head_dim: D.
        dtype: of q, k and v.
        lse_ratio: windows of K_C2 are so many times as long, and as far apart, as those of K_C1.
        regime: the kind of numbers.
        seed: what the numbers are drawn from.
        choice: a free number that a rule may read, for example to place a split.
        steps: what happens to a cache: `a2.0` appends 2 tokens to the first sequence and none to
            the second, `d1.1` decodes their last token, `r5.0` takes 5 tokens back; joined by `-`.

    The other fields are those of `SparseConfig`.
    """

    sequences: tuple[tuple[int, int], ...]
    kv_heads: int = 1
    group: int = 1
    head_dim: int = 32
    dtype: str = "float32"
    block_size: int = 16
    kernel_size: int = 8
    kernel_stride: int = 4
    init_blocks: int = 1
    window_size: int = 16
    topk: int = 3
    dense_len: int = -1
    use_nope: bool = False
    lse: str = "approximate"
    lse_ratio: int = 4
    pooling: str = "overlap"
    local_override: int | None = None
    regime: str = "normal"
    seed: int = 0
    choice: int = 0
    steps: str = ""

    @property
    def config(self) -> SparseConfig:
        """Return the parameters of the attention."""
        names = {f.name for f in fields(SparseConfig)}
        ratio = self.lse_ratio
        kernel = None if ratio == 4 else (ratio * self.kernel_size, ratio * self.kernel_stride)
        given = {n: v for n, v in vars(self).items() if n in names}
        return SparseConfig(**given, lse_kernel=kernel)

    @property
    def query_heads(self) -> int:
        """Return HQ."""
        return self.kv_heads * self.group

    def with_(self, **changes: Any) -> Case:
        """Return a changed copy."""
        return replace(self, **changes)

    def __str__(self) -> str:
        """Return the fields that differ from their defaults, as `name=value,name=value`."""
        parts = ["sequences=" + "+".join(f"{t}/{s}" for t, s in self.sequences)]
        for f in fields(self)[1:]:
            value = getattr(self, f.name)
            if value != f.default:
                parts.append(f"{f.name}={value}")
        return ",".join(parts)

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read what `str` wrote.

        Raises:
            ValueError: a name is unknown or a value does not parse.
        """
        known = {f.name: f.default for f in fields(cls)}
        values: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = part.partition("=")
            if name not in known:
                raise ValueError(f"case has the unknown name {name!r}; known are {sorted(known)}")
            try:
                values[name] = _parse_value(name, known[name], value)
            except ValueError:
                raise ValueError(f"case has {name}={value!r}, which does not parse") from None
        if "sequences" not in values:
            raise ValueError("case must name its sequences, as in sequences=T/S+T/S")
        return cls(**values)


def _parse_value(name: str, default: object, text: str) -> Any:
    if name == "sequences":
        pairs = [pair.split("/") for pair in text.split("+")] if text else []
        sequences = tuple((int(t), int(s)) for t, s in pairs)
        if any(not 0 <= t <= s for t, s in sequences):
            raise ValueError(text)
        return sequences
    if isinstance(default, bool):
        return {"True": True, "False": False}[text] if text in ("True", "False") else int("x")
    if isinstance(default, str):
        return text
    return int(text)
