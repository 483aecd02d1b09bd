"""The rule for golden vectors in JavaScript, written from the documentation: it must agree."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from infllmv2_conformance.loading import load
from infllmv2_conformance.vectors import folder as vectors_folder
from infllmv2_conformance.vectors.answer import answer
from infllmv2_conformance.vectors.folder import Golden, read_set
from infllmv2_conformance.vectors.verify import verify

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs" / "results" / "vectors"
CHECKER = ROOT / "docs" / "examples" / "check_vectors.mjs"
NODE = shutil.which("node")
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(NODE is None, reason="needs node, to run the checker in JavaScript")


@pytest.fixture(scope="module")
def goldens() -> list[Golden]:
    return read_set(COMMITTED)


def spoil(answers: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = answers / f"{name}.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    path.write_bytes(safetensors.torch.save(tensors))


CORRUPTIONS: dict[str, tuple[str, Callable[[dict[str, Tensor]], object]]] = {
    "off by 10 %": ("attend-f16", lambda t: t["out"].mul_(1.1)),
    "NaN": ("attend-released-bf16", lambda t: t["out"][0, 0].fill_(torch.nan)),
    "infinity": ("attend-f32", lambda t: t["lse"].fill_(torch.inf)),
    "half a bound more": ("compress-f32", lambda t: t["windows"].add_(1e-6)),
    "undefined may be anything": (
        "score-exact-f16",
        lambda t: t["scores"].masked_fill_(t["scores"] == -torch.inf, torch.nan),
    ),
    "optional may be missing": ("attend-f16", lambda t: t.pop("lse")),
    "other results must be there": ("attend-f16", lambda t: t.pop("out")),
    "wrong shape": ("attend-f16", lambda t: t.update(out=t["out"][1:].clone())),
    "wrong dtype": ("select-ties", lambda t: t.update(selected=t["selected"].float())),
    "tie": (
        "fused-select-ties",
        lambda t: t["selected"][0, -1, :].copy_(torch.tensor([0, 4, 5, 11, 12])),
    ),
    "descending": (
        "fused-select-bf16",
        lambda t: t.update(selected=t["selected"].flip(-1).clone()),
    ),
    "one block for another": ("fused-select-f32", lambda t: swap_block(t["selected"])),
    "exact": ("select-random", lambda t: swap_block(t["selected"])),
    "dense rows are undefined": ("decode-switch-f32", lambda t: t["1.selected"].fill_(7)),
    "sparse rows are not": ("decode-switch-f32", lambda t: t["7.selected"].fill_(7)),
}
RIGHT = ("undefined may be anything", "optional may be missing", "dense rows are undefined")


def swap_block(selected: Tensor) -> None:
    """Replace the second block of the last row by another one that is free."""
    row = selected[0, -1]
    free = [b for b in range(int(row[0]) + 1, int(row[2])) if b != int(row[1])]
    row[1] = free[0] if free else row[1] + 100


@pytest.fixture(scope="module")
def right_answers(goldens, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("answers") / "eager"
    names = {name for name, _ in CORRUPTIONS.values()} | {"decode-ragged-f16", "compress-bf16"}
    eager = load("eager")
    answers = {g.vector.name: answer(g, eager, CPU) for g in goldens if g.vector.name in names}
    vectors_folder.write_answers(folder, answers)
    return folder


@pytest.mark.parametrize("corruption", [None, *CORRUPTIONS])
def test_javascript_agrees(goldens, right_answers, corruption, tmp_path, capsys):
    answers = tmp_path / "answers"
    shutil.copytree(right_answers, answers)
    if corruption:
        spoil(answers, *CORRUPTIONS[corruption])
    command = [str(NODE), str(CHECKER), str(COMMITTED), str(answers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert not done.stderr
    theirs = {
        line.split()[-1] if ":" not in line else line.split(":")[0].split()[-1]: line.split(" ")[0]
        for line in done.stdout.splitlines()[:-1]
    }

    def read(golden: Golden) -> dict[str, Tensor] | str:
        found = vectors_folder.read_answers(answers, golden.vector.name)
        return "no file" if found is None else found

    mine = {o.name: o.outcome.split(" ")[0] for o in verify(goldens, read)}
    assert theirs == mine
    failed = {name for name, outcome in mine.items() if outcome == "failed"}
    is_wrong = corruption is not None and corruption not in RIGHT
    assert failed == ({CORRUPTIONS[corruption][0]} if corruption and is_wrong else set())
    assert done.returncode == int(is_wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(spec_version="2.1.0"), "the set is of specification 2.1.0"),
        (lambda m: m.update(format_version=3), "not a set of vectors of format version 1"),
        (lambda m: m["vectors"][1].update(sha256="0"), "compress-f16 was changed"),
    ],
)
def test_javascript_refuses_other_sets(right_answers, change, message, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(COMMITTED, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    command = [str(NODE), str(CHECKER), str(folder), str(right_answers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert message in done.stderr
