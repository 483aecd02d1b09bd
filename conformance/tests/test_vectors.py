"""Golden vectors: written alike, read with care, judged by one rule in two languages."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from infllmv2_conformance.candidate import Candidate
from infllmv2_conformance.capabilities import Arithmetic
from infllmv2_conformance.cli import run_command
from infllmv2_conformance.loading import load
from infllmv2_conformance.mutants.bank import MUTANTS
from infllmv2_conformance.mutants.build import build
from infllmv2_conformance.vectors import folder as vectors_folder
from infllmv2_conformance.vectors.answer import answer, unclaimed
from infllmv2_conformance.vectors.catalogue import CATALOGUE, Vector
from infllmv2_conformance.vectors.compare import compare
from infllmv2_conformance.vectors.expected import Expected, UncertainError, expect
from infllmv2_conformance.vectors.folder import Golden, VectorsError, read_set, write_set
from infllmv2_conformance.vectors.verify import Outcome, changes, verify
from infllmv2_reference import SPEC_VERSION

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs" / "results" / "vectors"
CHECKER = ROOT / "docs" / "examples" / "check_vectors.mjs"
NODE = shutil.which("node")
CPU = torch.device("cpu")
REFERENCE = "infllmv2_conformance.reference_impl:IMPLEMENTATION"
FEW = tuple(v for v in CATALOGUE if v.name in ("compress-f16", "select-ties", "attend-f16"))


@pytest.fixture(scope="module")
def goldens() -> list[Golden]:
    return read_set(COMMITTED)


@pytest.fixture
def small_set(tmp_path: Path) -> Path:
    """A set of three vectors that a test may spoil."""
    write_set(tmp_path / "set", FEW)
    return tmp_path / "set"


def judge(goldens: list[Golden], candidate: Candidate) -> dict[str, Outcome]:
    def ask(golden: Golden) -> dict[str, Tensor] | str:
        return unclaimed(golden, candidate) or answer(golden, candidate, CPU)

    return {outcome.name: outcome for outcome in verify(goldens, ask)}


# The committed set


def test_committed_set_is_the_catalogue_and_small(goldens):
    assert [g.vector.name for g in goldens] == [v.name for v in CATALOGUE]
    sizes = [path.stat().st_size for path in COMMITTED.iterdir()]
    assert len(sizes) == len(CATALOGUE) + 1
    assert max(sizes) < 1_400_000
    assert sum(sizes) < 3_000_000
    assert json.loads((COMMITTED / "manifest.json").read_text())["spec_version"] == SPEC_VERSION


def test_every_function_and_dtype_has_a_vector():
    functions = {v.function for v in CATALOGUE}
    assert functions >= {"compress_keys", "score_windows", "pool_blocks", "select_blocks"}
    assert functions >= {"score_blocks", "select", "attend", "attention", "decode"}
    assert "attend_gradients" in functions
    assert {v.case.dtype for v in CATALOGUE} == {"bfloat16", "float16", "float32"}
    assert {v.case.lse for v in CATALOGUE if v.function == "score_windows"} == {
        "approximate",
        "exact",
    }


def test_committed_set_is_what_the_oracle_says_today(goldens):
    assert [problem for golden in goldens for problem in changes(golden)] == []


def test_writing_again_gives_the_same_bytes(tmp_path, small_set):
    write_set(tmp_path / "again", FEW)
    for path in small_set.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    written_by = json.loads((COMMITTED / "manifest.json").read_text())["torch"]
    if written_by == torch.__version__:
        for vector in FEW:
            name = f"{vector.name}.safetensors"
            assert (small_set / name).read_bytes() == (COMMITTED / name).read_bytes()


@pytest.mark.parametrize("name", ["eager", REFERENCE])
def test_right_implementations_pass_all(goldens, name):
    outcomes = judge(goldens, load(name)).values()
    assert [o for o in outcomes if o.outcome != "passed"] == []


KILLED_BY = {
    "compress.last-token-lost": {"compress-bf16", "compress-f16", "compress-f32"},
    "score.no-scale": {"score-approximate-bf16", "score-exact-f16", "fused-select-f32"},
    "score.visible-late": {"score-approximate-bf16"},
    "score.no-normaliser-one": {"score-no-normaliser-f32"},
    "pool.paper-span": {"pool-overlap"},
    "pool.trusts-padding": {"pool-overlap", "pool-odd"},
    "select.ties-to-larger": {"select-ties"},
    "select.local-one-short": {"select-tight", "select-paper-preset"},
    "select.row-maximum": {"select-random"},
    "fused_select.ties-to-larger": {"fused-select-ties"},
    "attend.diagonal-mask": {"attend-released-bf16", "attend-f16"},
    "attend.lse-base-2": {"attend-released-bf16", "attend-f16", "attend-f32"},
    "attend.empty-row-nan": {"attend-f32"},
    "attend.naive-exponential": {"attend-huge-f32"},
    "attend.at-most-16-blocks": {"attend-many-blocks-f16"},
    "attend.dq-no-scale": {"gradients-bf16", "gradients-f32"},
    "attention.switch-late": {"attention-switch-bf16"},
    "attention.selection-k-ignored": {"attention-nope-f32"},
    "decode.k-c2-not-updated": {"decode-several-tokens-f32", "decode-ragged-f16"},
    "decode.window-late": {"decode-one-token-f32"},
    "decode.selection-k-ignored": {"decode-nope-f32"},
    "decode.switch-late": {"decode-switch-f32"},
    "decode.reset-to-zero": {"decode-ragged-f16"},
}


@pytest.mark.parametrize("mutant", KILLED_BY)
def test_wrong_implementations_fail(goldens, mutant):
    """The vectors that show a fault fail; those of functions that it does not touch pass."""
    candidate = build(MUTANTS[mutant])
    stage = mutant.split(".")[0]
    earlier = {"compress-f32", "select-ties"} if stage in ("attend", "attention", "decode") else {}
    asked = [g for g in goldens if g.vector.name in {*KILLED_BY[mutant], *earlier}]
    outcomes = judge(asked, candidate)
    assert {n for n, o in outcomes.items() if o.outcome == "failed"} == KILLED_BY[mutant]


# The rule


VALUE = torch.tensor([[1.0, -torch.inf, 0.0], [2.0, 3.0, 4.0]], dtype=torch.float64)
BOUND = torch.tensor([[0.1, 0.0, 0.0], [torch.inf, 0.5, 0.0]], dtype=torch.float64)
DEFINED = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.uint8)
BOUNDED = Expected("out", "bound", {"value": VALUE, "bound": BOUND, "defined": DEFINED})


@pytest.mark.parametrize(
    ("place", "number", "right"),
    [
        ((0, 0), 1.09, True),
        ((0, 0), 1.11, False),
        ((0, 0), torch.nan, False),
        ((0, 0), torch.inf, False),
        ((0, 1), torch.inf, False),
        ((0, 1), -1e30, False),
        ((0, 2), -0.0, True),
        ((0, 2), 1e-30, False),
        ((1, 0), 1e30, True),
        ((1, 0), torch.inf, True),
        ((1, 0), torch.nan, False),
        ((1, 1), 3.5, True),
        ((1, 2), torch.nan, True),
    ],
)
def test_bound(place, number, right):
    actual = VALUE.float()
    assert compare(BOUNDED, actual, 0).problem == ""
    actual[place] = number
    verdict = compare(BOUNDED, actual, 0)
    assert (verdict.problem == "") == right
    assert verdict.ratio is not None
    assert (verdict.ratio <= 1) == right


@pytest.mark.parametrize("actual", [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32)])
def test_form_of_a_bounded_result(actual):
    assert "must be" in compare(BOUNDED, actual, 0).problem


def test_exact():
    value = torch.tensor([[0, 3, -1]], dtype=torch.int32)
    expected = Expected("selected", "exact", {"value": value})
    assert compare(expected, value, 0).problem == ""
    assert "dtype" in compare(expected, value.long(), 0).problem
    assert "at [0, 1] it must be 3" in compare(expected, value.where(value != 3, 2), 0).problem


SCORES = torch.tensor([[[9.0, 5.0, 5.05, 5.0, 1.0, 0.0, 7.0]]], dtype=torch.float64)
KIND = torch.tensor([[1, 2, 2, 2, 2, 1, 0]], dtype=torch.uint8)
CERTIFICATE = Expected(
    "selected",
    "certificate",
    {"value": SCORES, "bound": torch.full_like(SCORES, 0.1), "kind": KIND},
)


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        ([0, 1, 2, 5], ""),
        ([0, 1, 3, 5], ""),
        ([0, 2, 4, 5], "block 1 was passed over for block 4"),
        ([0, 2, 1, 5], "must ascend"),
        ([0, 2, 2, 5], "must ascend"),
        ([0, -1, 2, 5], "must ascend"),
        ([0, 2, 5, -2], "must ascend"),
        ([0, 2, 5, 6], "not visible"),
        ([0, 2, 5, 7], "not visible"),
        ([1, 2, 3, 5], "forced"),
        ([0, 2, 5, -1], "4 blocks must be selected"),
    ],
)
def test_certificate(ids, problem):
    verdict = compare(CERTIFICATE, torch.tensor([[ids]], dtype=torch.int32), 4)
    assert problem in verdict.problem
    assert bool(verdict.problem) == bool(problem)


def test_certificate_with_ties_and_unbounded_scores():
    tied = replace(CERTIFICATE, ties=True)
    third = torch.tensor([[[0, 2, 3, 5]]], dtype=torch.int32)
    assert (
        "block 1 was passed over for block 3, which scores the same"
        in compare(tied, third, 4).problem
    )
    assert compare(CERTIFICATE, third, 4).problem == ""
    bound = CERTIFICATE.tensors["bound"].clone()
    bound[..., 4] = torch.inf
    free = replace(CERTIFICATE, tensors=CERTIFICATE.tensors | {"bound": bound})
    assert compare(free, torch.tensor([[[0, 2, 4, 5]]], dtype=torch.int32), 4).problem == ""
    assert "dtype" in compare(CERTIFICATE, third.long(), 4).problem
    assert "shape" in compare(CERTIFICATE, third[..., :3], 4).problem


# What is claimed


@pytest.mark.parametrize(
    ("name", "claims", "lacks"),
    [
        ("compress-f16", {"dtypes": ("bfloat16",)}, "dtype float16"),
        ("compress-f16", {"windows": ((32, 16),)}, "windows 5/3"),
        ("attend-f16", {"head_dims": (64,)}, "head_dim 16"),
        ("attend-f16", {"group_sizes": (2,)}, "group 3"),
        ("attend-f16", {"block_sizes": (64,)}, "block_size 16"),
        ("attend-f16", {"windows": ((32, 16),)}, ""),
        ("attend-f16", {"packed": False}, "packed"),
        ("attend-f16", {"history": False}, "history"),
        ("compress-bf16", {"empty_sequences": False}, "empty_sequences"),
        ("gradients-f32", {"gradients": False}, "gradients"),
        ("attention-nope-f32", {"use_nope": False}, "use_nope"),
        ("pool-paper-eq7", {"pooling_modes": ("overlap",)}, "pooling paper_eq7"),
        ("attend-f32", {"arithmetic": Arithmetic(products="tf32")}, "arithmetic.products"),
        ("attend-f16", {"arithmetic": Arithmetic(products="tf32")}, ""),
        ("attend-f16", {"arithmetic": Arithmetic(accumulate="float16")}, "arithmetic.accumulate"),
        ("attend-f32", {"arithmetic": Arithmetic(accumulate="float16")}, ""),
        ("score-exact-f16", {"arithmetic": Arithmetic(scores="bfloat16")}, "arithmetic.scores"),
        ("attend-f16", {"arithmetic": Arithmetic(scores="bfloat16")}, ""),
        ("attend-f16", {"arithmetic": Arithmetic(probabilities="bfloat16")}, "probabilities"),
    ],
)
def test_what_is_not_claimed_is_not_asked(goldens, name, claims, lacks):
    eager = load("eager")
    candidate = Candidate("some", eager.target, replace(eager.capabilities, **claims))
    (golden,) = [g for g in goldens if g.vector.name == name]
    found = unclaimed(golden, candidate)
    assert lacks in found
    assert bool(found) == bool(lacks)


def test_a_function_that_raises_has_failed(goldens):
    class Broken:
        def compress_keys(self, **_: Any):
            raise RuntimeError("no kernel image")

    candidate = Candidate("broken", Broken(), load("eager").capabilities)
    outcomes = judge(goldens, candidate)
    assert outcomes["compress-f16"].outcome == "failed"
    assert "no kernel image" in outcomes["compress-f16"].text
    assert outcomes["attend-f16"] == Outcome("attend-f16", "not claimed", None, "attend")


# Reading


def spoil_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a file, and its size and hash in the manifest with them."""
    path = folder / f"{name}.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    data = safetensors.torch.save(tensors)
    path.write_bytes(data)

    def update(manifest: dict[str, Any]) -> None:
        (entry,) = [e for e in manifest["vectors"] if e["name"] == name]
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    spoil_manifest(folder, update)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), "is not a manifest of infllmv2-vectors"),
        (lambda m: m.update(format_version=2), "has format_version 2, but must have 1"),
        (lambda m: m.update(spec_version="2.0.0"), "of the specification 2.0.0, which differs"),
        (lambda m: m.update(arithmetic={}), "has bounds for another arithmetic"),
        (lambda m: m.update(vectors=[]), "must be a list of at least one"),
        (lambda m: m["vectors"][0].update(name="../../etc/passwd"), "has the name '../../etc"),
        (lambda m: m["vectors"][0].update(name=7), "has the name 7"),
        (lambda m: m["vectors"].append("x"), "has the name None"),
        (lambda m: m["vectors"][0].update(name="absent"), "absent.safetensors: No such file"),
        (lambda m: m["vectors"][0].update(bytes=5), "bytes, but the manifest says 5"),
        (lambda m: m["vectors"][0].update(sha256="0"), "it was changed"),
        (lambda m: m["vectors"][0].update(case="sequences=x"), "do not fit"),
        (lambda m: m["vectors"][0].update(tensors=["absent"]), "do not fit: KeyError"),
        (lambda m: m["vectors"][0].update(results=[{}]), "do not fit"),
        (lambda m: m["vectors"][0]["results"][0].update(check="guess"), "do not fit"),
        (lambda m: m["vectors"][0].pop("what"), "do not fit"),
    ],
)
def test_manifests_are_checked(small_set, change, message):
    spoil_manifest(small_set, change)
    with pytest.raises(VectorsError) as caught:
        read_set(small_set)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_are_checked(small_set, tmp_path, monkeypatch):
    path = small_set / "attend-f16.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(VectorsError, match=r"attend-f16\.safetensors has another SHA-256"):
        read_set(small_set)
    path.write_bytes(data[:-8])
    with pytest.raises(VectorsError, match="bytes, but the manifest says"):
        read_set(small_set)
    monkeypatch.setattr(vectors_folder, "MAX_FILE", 1000)
    with pytest.raises(VectorsError, match="must have at most 1000"):
        read_set(small_set)
    with pytest.raises(VectorsError, match=r"manifest\.json: No such file"):
        read_set(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(VectorsError, match="is not JSON"):
        read_set(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"out.value": t["out.value"].float()}),
        lambda t: t.update({"out.bound": t["out.bound"][1:].clone()}),
        lambda t: t.pop("lse.bound"),
        lambda t: t.pop("given.q"),
    ],
)
def test_tensors_must_fit(small_set, change):
    rewrite(small_set, "attend-f16", change)
    with pytest.raises(VectorsError, match="do not fit"):
        read_set(small_set)


def test_what_is_no_safetensors_file_is_not_read(small_set):
    path = small_set / "attend-f16.safetensors"
    data = b"\x80\x04pickled"
    path.write_bytes(data)

    def update(manifest: dict[str, Any]) -> None:
        manifest["vectors"][-1] |= {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }

    spoil_manifest(small_set, update)
    with pytest.raises(VectorsError, match="do not fit: SafetensorError"):
        read_set(small_set)


@pytest.mark.parametrize(
    ("name", "tensor", "change", "problem"),
    [
        ("attend-f16", "out.value", lambda x: x * (1 + 1e-9), "attend-f16: out: value differs"),
        ("attend-f16", "lse.bound", lambda x: x * 1.01, "attend-f16: lse: bound differs"),
        ("attend-f16", "given.v", lambda x: x * 2, "attend-f16: out: value differs"),
        ("select-ties", "selected.value", lambda x: x.flip(0), "select-ties: selected: value dif"),
    ],
)
def test_a_changed_specification_is_noticed(small_set, name, tensor, change, problem, capsys):
    rewrite(small_set, name, lambda t: t.update({tensor: change(t[tensor]).contiguous()}))
    assert run_command(["vectors", "verify", str(small_set), "eager"]) == 1
    out = capsys.readouterr().out
    assert "is not what today's oracle says" in out
    assert problem in out


def test_noise_of_float64_is_not_a_change(small_set):
    rewrite(
        small_set, "attend-f16", lambda t: t.update({"lse.value": t["lse.value"] * (1 + 1e-14)})
    )
    assert [p for golden in read_set(small_set) for p in changes(golden)] == []


# Writing


def test_nothing_of_others_is_overwritten(tmp_path, small_set):
    (small_set / "notes.txt").write_text("mine")
    with pytest.raises(VectorsError, match=r"holds notes\.txt, which is not ours"):
        write_set(small_set, FEW)
    assert (small_set / "notes.txt").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "data.safetensors").touch()
    with pytest.raises(VectorsError, match=r"holds data\.safetensors, which is not ours"):
        write_set(other, FEW)
    with pytest.raises(VectorsError, match="is not a folder"):
        write_set(other / "data.safetensors", FEW)
    (tmp_path / "link").symlink_to(small_set)
    with pytest.raises(VectorsError, match="is not a folder"):
        write_set(tmp_path / "link", FEW)


def test_a_set_is_replaced_whole_or_not_at_all(tmp_path, small_set, monkeypatch):
    before = {path.name: path.read_bytes() for path in small_set.iterdir()}

    def fail_late(vector: Vector, given: dict[str, Any]) -> list[Expected]:
        if vector.name == "select-ties":
            raise UncertainError("no")
        return expect(vector, given)

    monkeypatch.setattr(vectors_folder, "expect", fail_late)
    with pytest.raises(UncertainError):
        write_set(small_set, FEW)
    assert {path.name: path.read_bytes() for path in small_set.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    write_set(small_set, FEW[:1])
    assert sorted(p.name for p in small_set.iterdir()) == [
        "compress-f16.safetensors",
        "manifest.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "set").mkdir()
    write_set(tmp_path / "set", FEW[:1])
    assert len(read_set(tmp_path / "set")) == 1


def test_a_vector_without_a_certain_selection_is_refused():
    vector = next(v for v in CATALOGUE if v.name == "attention-f32")
    from infllmv2_conformance.vectors.draw import draw

    tied = replace(vector, case=vector.case.with_(regime="constant"))
    with pytest.raises(UncertainError, match="attention-f32: a selection is not certain"):
        expect(tied, draw(tied))


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("vectors verify nowhere eager", "manifest.json: No such file"),
        ("vectors verify {set}", "give an implementation, or --answers FOLDER"),
        ("vectors verify {set} eager --answers {set}", "give an implementation, or --answers"),
        ("vectors verify {set} --answers nowhere", "nowhere is not a folder"),
        ("vectors verify {set} nothing", "unknown implementation 'nothing'"),
        ("vectors verify {set} eager --device tpu", "device must be one of cpu, cuda"),
        ("vectors write {set}/manifest.json", "is not a folder"),
        ("vectors answer {set} eager {set}", "is not empty: not writing answers into it"),
    ],
)
def test_usage_errors_are_one_line(small_set, arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run_command(arguments.format(set=small_set).split()) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_commands(tmp_path, small_set, capsys):
    assert run_command(["vectors", "verify", str(small_set), "eager"]) == 0
    assert "eager: 3 vectors passed, 0 failed, 0 not claimed" in capsys.readouterr().out
    answers = tmp_path / "answers"
    assert run_command(["vectors", "answer", str(small_set), "eager", str(answers)]) == 0
    verify_answers = ["vectors", "verify", str(small_set), "--answers", str(answers)]
    assert run_command(verify_answers) == 0
    (answers / "compress-f16.safetensors").unlink()
    spoil(answers, "attend-f16", lambda t: t["out"].mul_(1.1))
    assert run_command(verify_answers) == 1
    out = capsys.readouterr().out
    assert "1 vectors passed, 1 failed, 1 not claimed" in out
    assert "+-" in out


def spoil(answers: Path, name: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = answers / f"{name}.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    path.write_bytes(safetensors.torch.save(tensors))


# The same rule in JavaScript, written from the documentation


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


@pytest.mark.skipif(NODE is None, reason="needs node, to run the checker in JavaScript")
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


@pytest.mark.skipif(NODE is None, reason="needs node, to run the checker in JavaScript")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(spec_version="2.1.0"), "the set is of specification 2.1.0"),
        (lambda m: m.update(format_version=3), "not a set of vectors of format version 1"),
        (lambda m: m["vectors"][1].update(sha256="0"), "select-ties was changed"),
    ],
)
def test_javascript_refuses_other_sets(small_set, right_answers, change, message):
    spoil_manifest(small_set, change)
    command = [str(NODE), str(CHECKER), str(small_set), str(right_answers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert message in done.stderr
