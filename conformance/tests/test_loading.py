from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from textwrap import dedent

import pytest

from infllmv2_conformance import loading
from infllmv2_conformance.errors import UsageError
from infllmv2_conformance.loading import LoadError, known_names, load

GOOD = """
    class Kernel:
        capabilities = {"dtypes": ["float32"], "arithmetic": {"accumulate": "float32"}}

        def attend(self, **given): ...

    KERNEL = Kernel()

    class Group:
        inner = KERNEL

    capabilities = {"head_dims": [64]}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(text: str, name: str = "kernel.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(dedent(text))
        return path

    return write


def error(spec: str) -> str:
    with pytest.raises(LoadError) as caught:
        load(spec)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_built_in():
    candidate = load("eager")
    assert candidate.name == "eager"
    assert candidate.offers("attend")
    assert not candidate.offers("nonsense")


def test_mutant():
    candidate = load("mutant:attend.diagonal-mask")
    assert candidate.name == "mutant:attend.diagonal-mask"
    assert candidate.offers("attend")


def test_unknown_mutant():
    with pytest.raises(UsageError, match="no-padding"):
        load("mutant:pool.no-paddin")


@pytest.mark.parametrize("spec", ["kernel.py:KERNEL", "kernel.py:Kernel", "kernel.py:Group.inner"])
def test_file_attribute(write, spec):
    write(GOOD)
    candidate = load(spec)
    assert candidate.name == spec
    assert candidate.offers("attend")
    assert candidate.capabilities.dtypes == ("float32",)


def test_file_alone(write):
    path = write(GOOD)
    assert load(str(path)).capabilities.head_dims == (64,)


def test_file_imports_its_siblings_but_hides_nothing_installed(write):
    write("VALUE = 1", "sibling_of_kernel.py")
    write("raise RuntimeError('hides the standard library')", "queue.py")
    write("import queue, sibling_of_kernel\n" + dedent(GOOD))
    sys.modules.pop("queue", None)
    assert load("kernel.py:Kernel").offers("attend")


def test_module(write):
    write(GOOD, "some_package/some_module.py")
    assert load("some_package.some_module:KERNEL").offers("attend")
    assert load("some_package.some_module").capabilities.head_dims == (64,)


def test_entry_point(write, monkeypatch):
    write(GOOD, "pointed_at.py")
    entry = EntryPoint("mine", "pointed_at:KERNEL", loading.ENTRY_POINTS)
    monkeypatch.setattr(
        loading, "entry_points", lambda **given: [entry] * (given.get("name", "mine") == "mine")
    )
    sys.path.append(str(Path.cwd()))
    assert "mine" in known_names()
    assert load("mine").offers("attend")


def test_unknown_name_lists_the_known_ones():
    message = error("triton_or_so")
    assert "unknown implementation 'triton_or_so'" in message
    assert "eager, sdpa, flex_attention, infllm_v2" in message


@pytest.mark.parametrize("spec", ["", ":", "no such name", "a b.c:D"])
def test_nonsense(spec):
    assert "must be a known name, 'pkg.module:ATTR' or 'path/file.py:ATTR'" in error(spec)


def test_missing_file(write):
    assert "there is no file 'nowhere.py'" in error("nowhere.py:X")


def test_missing_attribute_names_what_is_there(write):
    write(GOOD)
    assert "no 'KERNEL2' in infllmv2_candidate_kernel; it has Kernel, KERNEL" in error(
        "kernel.py:KERNEL2"
    )


def test_missing_optional_package_is_named_with_its_place(write):
    write("import package_nobody_has")
    message = error("kernel.py")
    assert "the package 'package_nobody_has' is not installed" in message
    assert "kernel.py:1" in message
    write("import package_nobody_has", "inner_module.py")
    assert "'package_nobody_has' is not installed" in error("inner_module:X")


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("x = 1\nraise ValueError('no GPU\\nhere')", "raised ValueError: no GPU here"),
        ("x = 1\nx = (1", "raised SyntaxError: '(' was never closed"),
        ("import sys\nsys.exit('bye')", "raised SystemExit: bye"),
        ("x = 1\n1 / 0", "raised ZeroDivisionError: division by zero"),
    ],
)
def test_cause_of_a_failed_import_stays_visible(write, code, cause):
    write(code)
    message = error("kernel.py:X")
    assert cause in message
    assert "kernel.py:2" in message


def test_class_that_cannot_be_made(write):
    write("class Kernel:\n    def __init__(self, size): ...")
    assert "Kernel() raised TypeError" in error("kernel.py:Kernel")


@pytest.mark.parametrize(
    ("claims", "cause"),
    [
        ("{'dtypes': ['float8']}", "capabilities.dtypes must be of"),
        ("{'dtype': ['float32']}", "capabilities has unknown names ['dtype']"),
        ("{'arithmetic': {'sum': 'float32'}}", "unexpected keyword argument 'sum'"),
        ("['float32']", "it has list instead"),
        ("None", "it has none"),
    ],
)
def test_bad_claims(write, claims, cause):
    write(f"capabilities = {claims}")
    message = error("kernel.py")
    assert cause in message.replace("the module infllmv2_candidate_kernel", "it")
