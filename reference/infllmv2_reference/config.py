"""The parameters of InfLLM-V2 attention, validated once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Lse = Literal["exact", "approximate"]
Pooling = Literal["overlap", "paper_eq7"]

_INTS = (
    "block_size",
    "kernel_size",
    "kernel_stride",
    "init_blocks",
    "window_size",
    "topk",
    "dense_len",
)
_HF_KEYS = (*_INTS, "use_nope")


@dataclass(frozen=True)
class SparseConfig:
    """Hold every parameter of the attention; field names are those of the released `sparse_config`.

    Args:
        block_size: B, tokens in one key/value block.
        kernel_size: l1, tokens in one window of K_C1.
        kernel_stride: s1, tokens from one window of K_C1 to the next.
        init_blocks: blocks at the start of the sequence that every query attends.
        window_size: w, tokens of the sliding window; a multiple of `block_size`.
        topk: a query selects `topk + window_size / block_size` blocks, the forced ones included.
        dense_len: sequences of fewer key tokens run dense attention; -1 means never dense.
        use_nope: selection reads its own (un-rotated) queries and keys.
        lse: the normaliser of the scores: "exact" over K_C1, or "approximate" over K_C2.
        lse_kernel: (l2, s2), window length and stride of K_C2; 4 * (l1, s1) unless given.
        local_override: the number of forced blocks that end at the query's own; w / B + 1 unless
            given. A smaller number lets the sliding window lose tokens (the paper's preset does).
        pooling: "overlap" (windows that touch the block), or the literal Eq. 7, "paper_eq7".

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range; the message names it, its value and what it must be.

    Source: arXiv 2509.24663, Sec. 3.2-3.3 and 4.1; MiniCPM4.1-8B `config.json`.
    """

    block_size: int = 64
    kernel_size: int = 32
    kernel_stride: int = 16
    init_blocks: int = 1
    window_size: int = 2048
    topk: int = 64
    dense_len: int = 8192
    use_nope: bool = False
    lse: Lse = "approximate"
    lse_kernel: tuple[int, int] | None = None
    local_override: int | None = None
    pooling: Pooling = "overlap"

    def __post_init__(self) -> None:
        _check_types(self)
        _check_ranges(self)

    @property
    def lse_kernel_size(self) -> int:
        """Return l2, the tokens in one window of K_C2."""
        return self.lse_kernel[0] if self.lse_kernel else 4 * self.kernel_size

    @property
    def lse_kernel_stride(self) -> int:
        """Return s2, the tokens from one window of K_C2 to the next."""
        return self.lse_kernel[1] if self.lse_kernel else 4 * self.kernel_stride

    @property
    def local_blocks(self) -> int:
        """Return how many blocks, the query's own being the last, are forced (decision D6)."""
        return self.local_override or self.window_size // self.block_size + 1

    @property
    def budget(self) -> int:
        """Return K, the most blocks that one query selects, be they initial, local or scored."""
        return self.topk + self.window_size // self.block_size

    def is_sparse(self, num_keys: int) -> bool:
        """Say whether a sequence of `num_keys` key tokens runs sparse attention (decision D8)."""
        return self.dense_len < 0 or num_keys >= self.dense_len

    @classmethod
    def minicpm4(cls) -> SparseConfig:
        """Return the released MiniCPM4.1 parameters: 1 init + 33 local + 62 scored blocks."""
        return cls()

    @classmethod
    def paper(cls) -> SparseConfig:
        """Return the paper's Sec. 4.1 parameters: 1 init + 32 local + 63 scored blocks."""
        return cls(local_override=32)

    @classmethod
    def one_stage(cls) -> SparseConfig:
        """Return 1-stage compression: one window per block, scored with the exact normaliser."""
        return cls(kernel_size=64, kernel_stride=64, lse="exact")

    @classmethod
    def from_hf(cls, sparse_config: Mapping[str, object]) -> SparseConfig:
        """Read the `sparse_config` entry of a released model's `config.json`.

        Args:
            sparse_config: the mapping as loaded from JSON, for example
                `{"kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "block_size": 64,
                "window_size": 2048, "topk": 64, "use_nope": false, "dense_len": 8192}`.

        Raises:
            TypeError: `sparse_config` is not a mapping, or a value has the wrong type.
            ValueError: a key is missing or unknown, or a value is out of range.
        """
        _require(
            isinstance(sparse_config, Mapping),
            TypeError,
            "sparse_config",
            sparse_config,
            "a mapping",
        )
        missing = [key for key in _HF_KEYS if key not in sparse_config]
        unknown = [key for key in sparse_config if key not in _HF_KEYS]
        if missing or unknown:
            raise ValueError(
                f"sparse_config has missing keys {missing} and unknown keys {unknown}; "
                f"it must have exactly {list(_HF_KEYS)}"
            )
        return cls(**dict(sparse_config))  # type: ignore[arg-type]


def _check_types(config: SparseConfig) -> None:
    for name in _INTS:
        _check_int(name, getattr(config, name))
    _require(isinstance(config.use_nope, bool), TypeError, "use_nope", config.use_nope, "a bool")
    for name, kinds in (("lse", get_args(Lse)), ("pooling", get_args(Pooling))):
        value = getattr(config, name)
        _require(value in kinds, ValueError, name, value, f"one of {kinds}")
    if config.lse_kernel is not None:
        is_pair = isinstance(config.lse_kernel, tuple) and len(config.lse_kernel) == 2
        _require(is_pair, TypeError, "lse_kernel", config.lse_kernel, "None or a tuple (l2, s2)")
        for value in config.lse_kernel:
            _check_int("lse_kernel", value)
    if config.local_override is not None:
        _check_int("local_override", config.local_override)


def _check_int(name: str, value: object) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    _require(is_int, TypeError, name, value, "an int")


def _check_ranges(c: SparseConfig) -> None:
    def check(ok: bool, name: str, what: str) -> None:
        _require(ok, ValueError, name, getattr(c, name), what)

    check(c.block_size >= 1, "block_size", "at least 1")
    check(c.kernel_size >= 1, "kernel_size", "at least 1")
    check(
        1 <= c.kernel_stride <= c.kernel_size, "kernel_stride", f"in 1..kernel_size={c.kernel_size}"
    )
    check(
        1 <= c.lse_kernel_stride <= c.lse_kernel_size, "lse_kernel", "(l2, s2) with 1 <= s2 <= l2"
    )
    check(c.init_blocks >= 0, "init_blocks", "at least 0")
    is_window = c.window_size >= 0 and c.window_size % c.block_size == 0
    check(is_window, "window_size", f"a multiple of block_size={c.block_size}, at least 0")
    check(c.local_override is None or c.local_override >= 1, "local_override", "None or at least 1")
    check(c.topk >= 0, "topk", "at least 0")
    check(c.dense_len >= -1, "dense_len", "-1 (always sparse) or at least 0")
    forced = c.init_blocks + c.local_blocks
    check(
        c.budget >= forced,
        "topk",
        f"large enough that the budget topk + window_size / block_size = {c.budget} holds the "
        f"init_blocks + local_blocks = {forced} forced blocks",
    )
    divides = c.block_size % c.kernel_stride == 0 and c.kernel_size % c.kernel_stride == 0
    check(
        c.pooling == "overlap" or divides,
        "pooling",
        f"'overlap' unless kernel_stride={c.kernel_stride} divides block_size={c.block_size} "
        f"and kernel_size={c.kernel_size}",
    )


def _require(ok: bool, error: type[Exception], name: str, value: object, what: str) -> None:
    if not ok:
        raise error(f"{name} must be {what}, but it is {value!r}")
