"""What an implementation claims: the suite tests all of it, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from infllmv2_reference import SparseConfig

DTYPES = ("float16", "bfloat16", "float32", "float64")
VALIDATES = ("shapes", "dtypes", "devices", "cu_seqlens", "selected", "config")
"""Kinds of bad input. "cu_seqlens" and "selected" mean values, which live on the device."""


@dataclass(frozen=True)
class Arithmetic:
    """State the precision an implementation computes in; the error bounds follow from it.

    Args:
        accumulate: dtype of sums: dot products, softmax denominators, means. Inputs of a wider
            dtype are summed in their own.
        products: "ieee" if factors enter products unrounded, "tf32" if float32 ones are rounded.
        probabilities: dtype of softmax numerators when they multiply values, and of what they are
            multiplied with in the backward pass; "input" is that of v.
        scores: dtype in which window and block scores are stored.
        group_sum: "accumulate" if the gradients that a group's query heads send to one key or value
            are added before rounding, "input" if each is first rounded to the dtype of k.
    """

    accumulate: str = "float32"
    products: str = "ieee"
    probabilities: str = "input"
    scores: str = "float32"
    group_sum: str = "accumulate"


@dataclass(frozen=True)
class Capabilities:
    """Claim what an implementation supports. A field left at None makes no restriction.

    Args:
        devices: torch device types it runs on.
        dtypes: names of the dtypes of q, k and v.
        head_dims: head dims D.
        group_sizes: query heads per key/value head, G.
        block_sizes: block sizes B.
        windows: (kernel_size, kernel_stride) pairs.
        lse_modes: normalisers of the scores.
        lse_ratios: how many times longer the windows of K_C2 may be than those of K_C1.
        pooling_modes: readings of Eq. 7.
        history: sequences may have more keys than queries.
        packed: more than one sequence per call.
        empty_sequences: sequences without queries or keys may stand in a batch.
        non_contiguous: q, k and v may be strided views.
        gradients: `attend` is differentiable by q, k and v.
        returns_lse: `attend`, `attention` and `decode` return the LSE.
        returns_selection: `attention` and `decode` return the selection.
        use_nope: `attention` takes `selection_q` and `selection_k`.
        skips_unselected: tokens of unselected blocks are never loaded: NaN there does not spread.
        deterministic: the same call gives the same bits.
        batch_invariant: a row's bits do not depend on the other rows and sequences of the call.
        validates: kinds of bad input that raise a clear error.
        longest_context: the most keys of one sequence.
        arithmetic: the precision it computes in.
    """

    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    head_dims: tuple[int, ...] | None = None
    group_sizes: tuple[int, ...] | None = None
    block_sizes: tuple[int, ...] | None = None
    windows: tuple[tuple[int, int], ...] | None = None
    lse_modes: tuple[str, ...] = ("exact", "approximate")
    lse_ratios: tuple[int, ...] | None = (4,)
    pooling_modes: tuple[str, ...] = ("overlap",)
    history: bool = True
    packed: bool = True
    empty_sequences: bool = True
    non_contiguous: bool = True
    gradients: bool = False
    returns_lse: bool = True
    returns_selection: bool = True
    use_nope: bool = False
    skips_unselected: bool = True
    deterministic: bool = True
    batch_invariant: bool = False
    validates: tuple[str, ...] = VALIDATES
    longest_context: int = 1 << 20
    arithmetic: Arithmetic = field(default_factory=Arithmetic)

    def __post_init__(self) -> None:
        _check_members("dtypes", self.dtypes, DTYPES)
        _check_members("devices", self.devices, ("cpu", "cuda"))
        _check_members("lse_modes", self.lse_modes, ("exact", "approximate"))
        _check_members("pooling_modes", self.pooling_modes, ("overlap", "paper_eq7"))
        _check_members("validates", self.validates, VALIDATES)
        _check_members("arithmetic.accumulate", (self.arithmetic.accumulate,), DTYPES)
        _check_members("arithmetic.products", (self.arithmetic.products,), ("ieee", "tf32"))
        _check_members(
            "arithmetic.probabilities", (self.arithmetic.probabilities,), ("input", *DTYPES)
        )
        group_sums = ("accumulate", "input")
        _check_members("arithmetic.group_sum", (self.arithmetic.group_sum,), group_sums)
        _check_members("arithmetic.scores", (self.arithmetic.scores,), DTYPES)

    @classmethod
    def from_mapping(cls, claims: Mapping[str, Any]) -> Capabilities:
        """Build from plain data; lists become tuples, and `arithmetic` may be a mapping.

        Raises:
            ValueError: a name is unknown, or a value is not one of the allowed ones.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(claims) - known)
        if unknown:
            raise ValueError(f"capabilities has unknown names {unknown}; known are {sorted(known)}")
        values = {name: _freeze(value) for name, value in claims.items()}
        if isinstance(claims.get("arithmetic"), Mapping):
            values["arithmetic"] = Arithmetic(**claims["arithmetic"])
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Return plain data that `from_mapping` reads back."""
        return asdict(self)

    def supports(self, config: SparseConfig) -> bool:
        """Say whether these parameters are claimed."""
        window = (config.kernel_size, config.kernel_stride)
        lse_window = (config.lse_kernel_size, config.lse_kernel_stride)
        ratios = self.lse_ratios
        known = ratios is None or lse_window in [(r * window[0], r * window[1]) for r in ratios]
        return (
            config.lse in self.lse_modes
            and (known or config.lse == "exact")
            and config.pooling in self.pooling_modes
            and (self.block_sizes is None or config.block_size in self.block_sizes)
            and (self.windows is None or window in self.windows)
            and (self.use_nope or not config.use_nope)
        )


def _freeze(value: Any) -> Any:
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(_freeze(v) for v in value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return value


def _check_members(name: str, values: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    wrong = [value for value in values if value not in allowed]
    if wrong:
        raise ValueError(f"capabilities.{name} must be of {list(allowed)}, but has {wrong}")
