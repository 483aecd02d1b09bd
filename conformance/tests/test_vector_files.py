"""Files of golden vectors: written alike and whole, read with care."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from infllmv2_conformance.cli import run_command
from infllmv2_conformance.vectors import folder as vectors_folder
from infllmv2_conformance.vectors.catalogue import CATALOGUE, Vector
from infllmv2_conformance.vectors.expected import Expected, UncertainError, expect
from infllmv2_conformance.vectors.folder import VectorsError, read_set, write_set
from infllmv2_conformance.vectors.verify import changes

COMMITTED = Path(__file__).parents[2] / "docs" / "results" / "vectors"
FEW = tuple(v for v in CATALOGUE if v.name in ("compress-f16", "select-ties", "attend-f16"))


@pytest.fixture
def small_set(tmp_path: Path) -> Path:
    """A set of three vectors that a test may spoil."""
    write_set(tmp_path / "set", FEW)
    return tmp_path / "set"


def test_writing_again_gives_the_same_bytes(tmp_path, small_set):
    write_set(tmp_path / "again", FEW)
    for path in small_set.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    written_by = json.loads((COMMITTED / "manifest.json").read_text())["torch"]
    if written_by == torch.__version__:
        for vector in FEW:
            name = f"{vector.name}.safetensors"
            assert (small_set / name).read_bytes() == (COMMITTED / name).read_bytes()


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
