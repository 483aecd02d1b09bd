"""The parameters: presets, the released JSON, and what is refused with which words."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from types import MappingProxyType
from typing import Any

import pytest

from infllmv2_reference import SparseConfig

MINICPM41 = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 2048,
    "topk": 64,
    "use_nope": False,
    "dense_len": 8192,
}
"""`sparse_config` of `config.json` of openbmb/MiniCPM4.1-8B, in its order."""


def test_released_preset() -> None:
    config = SparseConfig.minicpm4()
    assert (config.block_size, config.kernel_size, config.kernel_stride) == (64, 32, 16)
    assert (config.lse_kernel_size, config.lse_kernel_stride) == (128, 64)
    assert (config.init_blocks, config.local_blocks, config.budget) == (1, 33, 96)
    assert config.budget - config.init_blocks - config.local_blocks == 62  # scored
    assert (config.dense_len, config.use_nope) == (8192, False)
    assert (config.lse, config.pooling) == ("approximate", "overlap")


def test_paper_preset() -> None:
    config = SparseConfig.paper()
    assert (config.init_blocks, config.local_blocks, config.budget) == (1, 32, 96)
    assert config.budget - config.init_blocks - config.local_blocks == 63
    assert replace(config, local_override=None) == SparseConfig.minicpm4()


def test_one_stage_preset() -> None:
    config = SparseConfig.one_stage()
    assert config.kernel_size == config.kernel_stride == config.block_size == 64
    assert config.lse == "exact"
    assert (config.local_blocks, config.budget) == (33, 96)


def test_config_is_frozen_and_hashable() -> None:
    config = SparseConfig()
    with pytest.raises(FrozenInstanceError):
        config.topk = 3  # type: ignore[misc]
    assert {config: 1}[SparseConfig.minicpm4()] == 1


def test_derived_numbers() -> None:
    config = SparseConfig(block_size=16, kernel_size=8, kernel_stride=4, window_size=48, topk=7)
    assert (config.local_blocks, config.budget) == (48 // 16 + 1, 7 + 48 // 16)
    assert (config.lse_kernel_size, config.lse_kernel_stride) == (32, 16)
    other = replace(config, lse_kernel=(9, 2), local_override=2)
    assert (other.lse_kernel_size, other.lse_kernel_stride) == (9, 2)
    assert (other.local_blocks, other.budget) == (2, 10)
    assert replace(config, window_size=0).local_blocks == 1


@pytest.mark.parametrize(
    ("dense_len", "num_keys", "sparse"),
    [
        (8192, 8191, False),
        (8192, 8192, True),
        (8192, 8193, True),
        (1, 0, False),
        (0, 0, True),
        (-1, 0, True),
        (-1, 8191, True),
    ],
)
def test_switch(dense_len: int, num_keys: int, sparse: bool) -> None:
    """D8: sparse at or above dense_len, always with -1."""
    assert SparseConfig(dense_len=dense_len).is_sparse(num_keys) is sparse


def test_from_hf_reads_the_released_json() -> None:
    assert SparseConfig.from_hf(MINICPM41) == SparseConfig.minicpm4()
    assert SparseConfig.from_hf(MappingProxyType(MINICPM41)) == SparseConfig.minicpm4()
    other = SparseConfig.from_hf(MINICPM41 | {"topk": 128, "dense_len": -1, "use_nope": True})
    assert other == SparseConfig(topk=128, dense_len=-1, use_nope=True)


@pytest.mark.parametrize("key", MINICPM41)
def test_from_hf_names_a_missing_key(key: str) -> None:
    rest = {k: v for k, v in MINICPM41.items() if k != key}
    with pytest.raises(ValueError, match=rf"missing keys \['{key}'\] and unknown keys \[\]; it mu"):
        SparseConfig.from_hf(rest)


@pytest.mark.parametrize("key", ["top_k", "lse", "local_override", 7])
def test_from_hf_names_an_unknown_key(key: Any) -> None:
    with pytest.raises(ValueError, match=rf"missing keys \[\] and unknown keys \[{key!r}\]"):
        SparseConfig.from_hf(MINICPM41 | {key: 1})


def test_from_hf_wants_a_mapping() -> None:
    with pytest.raises(TypeError, match="sparse_config must be a mapping, but it is None"):
        SparseConfig.from_hf(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", [key for key in MINICPM41 if key != "use_nope"])
@pytest.mark.parametrize("value", [True, 16.0, "16", None])
def test_counts_are_ints(key: str, value: Any) -> None:
    """A bool is no count, though Python calls it an int."""
    with pytest.raises(TypeError, match=rf"^{key} must be an int, but it is {value!r}$"):
        SparseConfig.from_hf(MINICPM41 | {key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_nope": 0}, "use_nope must be a bool, but it is 0"),
        ({"use_nope": None}, "use_nope must be a bool, but it is None"),
        ({"lse_kernel": [128, 64]}, "lse_kernel must be None or a tuple (l2, s2), but it is [128,"),
        ({"lse_kernel": (128,)}, "lse_kernel must be None or a tuple (l2, s2), but it is (128,)"),
        ({"lse_kernel": (128, 64.0)}, "lse_kernel must be an int, but it is 64.0"),
        ({"local_override": True}, "local_override must be an int, but it is True"),
        ({"local_override": 2.0}, "local_override must be an int, but it is 2.0"),
    ],
)
def test_wrong_types_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as error:
        SparseConfig(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1, but it is 0"),
        ({"block_size": -64}, "block_size must be at least 1, but it is -64"),
        ({"kernel_size": 0}, "kernel_size must be at least 1, but it is 0"),
        ({"kernel_size": -1}, "kernel_size must be at least 1, but it is -1"),
        ({"kernel_stride": 0}, "kernel_stride must be in 1..kernel_size=32, but it is 0"),
        ({"kernel_stride": 33}, "kernel_stride must be in 1..kernel_size=32, but it is 33"),
        ({"lse_kernel": (0, 0)}, "lse_kernel must be (l2, s2) with 1 <= s2 <= l2, but it is (0, 0"),
        ({"lse_kernel": (8, 9)}, "lse_kernel must be (l2, s2) with 1 <= s2 <= l2, but it is (8, 9"),
        ({"init_blocks": -1}, "init_blocks must be at least 0, but it is -1"),
        (
            {"window_size": 100},
            "window_size must be a multiple of block_size=64, at least 0, but i",
        ),
        ({"window_size": -64}, "a multiple of block_size=64, at least 0, but it is -64"),
        ({"topk": -1}, "topk must be at least 0, but it is -1"),
        ({"dense_len": -2}, "dense_len must be -1 (always sparse) or at least 0, but it is -2"),
        ({"local_override": 0}, "local_override must be None or at least 1, but it is 0"),
        ({"local_override": -3}, "local_override must be None or at least 1, but it is -3"),
        ({"lse": "fast"}, "lse must be one of ('exact', 'approximate'), but it is 'fast'"),
        ({"lse": None}, "lse must be one of ('exact', 'approximate'), but it is None"),
        ({"pooling": "max"}, "pooling must be one of ('overlap', 'paper_eq7'), but it is 'max'"),
        (
            {"pooling": "paper_eq7", "kernel_stride": 12},
            "pooling must be 'overlap' unless kernel_stride=12 divides block_size=64 and "
            "kernel_size=32, but it is 'paper_eq7'",
        ),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"must be .*, but it is") as error:
        SparseConfig(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "topk"),
    [({}, 2), ({"init_blocks": 5}, 6), ({"local_override": 40}, 9), ({"window_size": 0}, 2)],
)
def test_budget_must_hold_the_forced_blocks(changes: dict[str, Any], topk: int) -> None:
    enough = SparseConfig(topk=topk, **changes)
    assert enough.budget == enough.init_blocks + enough.local_blocks
    with pytest.raises(ValueError, match=r"^topk must be large enough.* but it is \d+$") as error:
        replace(enough, topk=topk - 1)
    assert f"topk + window_size / block_size = {enough.budget - 1} holds" in str(error.value)
    assert f"init_blocks + local_blocks = {enough.budget} forced" in str(error.value)


def test_odd_but_legal_parameters() -> None:
    SparseConfig(block_size=7, kernel_size=10, kernel_stride=4, window_size=14, topk=3)
    SparseConfig(block_size=1, kernel_size=1, kernel_stride=1, window_size=0, init_blocks=0, topk=1)
    SparseConfig(pooling="paper_eq7")
