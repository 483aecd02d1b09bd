"""The studies compute what they say, and a stored result that is not theirs is noticed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import data
import needles
import normaliser
from infllmv2_reference import compress_for_selection

FOLDER = Path(data.__file__).parent


@pytest.fixture(scope="module")
def command():
    """Return the module that `python docs/_studies` runs."""
    spec = importlib.util.spec_from_file_location("studies_command", FOLDER / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method", needles.METHODS)
@pytest.mark.parametrize("length", [1, 7, 64])
def test_needles_in_windows(method: str, length: int) -> None:
    """Windows that are compressed again in part are those of the planted keys."""
    random = data.generator("test", method, length)
    keys = data.background(random, 8192, 4, needles.DIM, 0.25)
    q = torch.randn(1, 4 * needles.GROUP, needles.DIM, generator=random)
    config, firsts = needles.METHODS[method], [64, 77, 3000, 5123]
    planted = keys.clone()
    for head, first in enumerate(firsts):
        looking = q[0, head * needles.GROUP :][:2]
        logit = data.half_of_the_weight(8192, length, needles.SCALE)
        planted[first : first + length, head] += data.towards(looking, logit)
    windows = compress_for_selection(keys, config)
    got = needles._plant(keys, q, firsts, length, 2, windows, config)
    assert all(map(torch.equal, got, compress_for_selection(planted, config)))


@pytest.mark.parametrize("length", [1, 16])
def test_needle_draws_half_of_the_weight(length: int) -> None:
    random = data.generator("test", length)
    keys = data.background(random, 65536, 1, 32, 0.0)[:, 0]
    q = torch.randn(1, 32, generator=random)
    scale = float(q.norm()) / 32**0.5
    logit = data.half_of_the_weight(65536, length, scale)
    noise = (keys[length:] @ q[0] * 32**-0.5).exp().sum()
    needle = (q[0] @ data.towards(q, logit) * 32**-0.5).exp() * length
    assert 0.4 < float(needle / (needle + noise)) < 0.6


def test_spread_is_bounded_for_any_keys() -> None:
    """The bounds of the normaliser study hold for windows that are anything at all."""
    random = data.generator("test bounds")
    for size in (0.1, 1.0, 10.0):
        q, k_c2 = torch.randn(8, 16, generator=random), torch.randn(9, 16, generator=random)
        k_c1 = torch.randn(40, 16, generator=random)
        row = normaliser._spread((size * q).double(), k_c1.double(), k_c2.double())
        assert 0 < row["spread"] <= row["logit_bound"] <= row["key_bound"]


def test_check_notices(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    small = {"positions": 2304, "local_blocks": [32]}
    monkeypatch.setattr(command.STUDIES["local-blocks"], "FULL", small)
    monkeypatch.setattr(command.STUDIES["local-blocks"], "SMALL", small)
    assert command.store("local-blocks")
    assert command.check("local-blocks")
    stored = json.loads((tmp_path / "local-blocks.json").read_text())
    for part, value in (("mean_lost", 31.4), ("most_lost", 64), ("by_offset", [0])):
        changed = json.loads(json.dumps(stored))
        changed["small"]["local_32"][part] = value
        (tmp_path / "local-blocks.json").write_text(json.dumps(changed))
        assert not command.check("local-blocks")
    stored["parameters"]["positions"] = 1
    (tmp_path / "local-blocks.json").write_text(json.dumps(stored))
    assert not command.check("local-blocks")
