"""Second-order mutation: the edits are what they say, and the pool survives what they do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from infllmv2_conformance.mutants import edit_pool, random_edits
from infllmv2_conformance.mutants.operators import Change, changes
from infllmv2_conformance.mutants.random_edits import RandomEdit, every_edit, read_survivors, sample
from infllmv2_conformance.profiles import Profile

SOURCE = '''
def f(x: int, y: int = 3) -> int:
    """Return 1 + 2."""
    z = x.to(y)[1:, y]
    if x < 2 and not y:
        z += g(x, y)
    return -z
'''


def edits_of(text: str) -> set[tuple[str, str, str]]:
    return {(c.operator, text[c.start : c.end], c.after) for c in changes(text)}


@pytest.mark.parametrize(
    "edit",
    [
        ("comparison", "x < 2", "(x <= 2)"),
        ("comparison", "x < 2", "(x > 2)"),
        ("constant", "2", "(3)"),
        ("constant", "3", "(2)"),
        ("and, or", "x < 2 and not y", "(x < 2 or not y)"),
        ("sign or negation dropped", "not y", "(y)"),
        ("sign or negation dropped", "-z", "(z)"),
        ("method dropped", "x.to(y)", "(x)"),
        ("slice bound", "x.to(y)[1:, y]", "x.to(y)[1 - 1:, y]"),
        ("slice bound", "x.to(y)[1:, y]", "x.to(y)[:, y]"),
        ("slice bound", "x.to(y)[1:, y]", "x.to(y)[1:-1, y]"),
        ("arguments swapped", "g(x, y)", "(g(y, x))"),
        ("arithmetic", "z += g(x, y)", "z -= g(x, y)"),
        ("sum replaced by its last term", "z += g(x, y)", "z = g(x, y)"),
        ("statement dropped", "z += g(x, y)", "pass"),
        ("condition negated", "x < 2 and not y", "not (x < 2 and (not y))"),
    ],
)
def test_an_edit_of_every_kind_is_found(edit: tuple[str, str, str]) -> None:
    assert edit in edits_of(SOURCE)


def test_docstrings_and_annotations_are_left_alone() -> None:
    assert not any("Return" in before or before == "int" for _, before, _ in edits_of(SOURCE))


def test_every_edit_of_the_implementation_compiles_and_changes_something() -> None:
    found = every_edit()
    assert sum(map(len, found.values())) > 1500
    for module, edits in found.items():
        before = ast.dump(ast.parse(random_edits.originals()[module]))
        for edit in edits[::7]:
            assert ast.dump(ast.parse(edit.texts[module])) != before
        assert len({edit.change for edit in edits}) == len(edits)


def test_a_seed_chooses_the_same_edits_of_every_module() -> None:
    first, again = sample(120, 3), sample(120, 3)
    assert first == again
    assert first != sample(120, 4)
    assert {e.module for e in first} == {m for m, edits in every_edit().items() if edits}
    assert len({e.change.operator for e in first}) > 10
    assert {e.module for e in sample(10, 0, ["tiles"])} == {"tiles"}


def test_every_listed_survivor_is_an_edit_that_exists() -> None:
    """Else the source has moved on, and nobody has looked again."""
    keys = {edit.key for edits in every_edit().values() for edit in edits}
    assert [s for s in read_survivors().values() if s.key not in keys] == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("kind = 'speed'", "has other fields"),
        (
            "module='a'\nfunction='f'\nbefore='x'\nafter='y'\nkind='luck'\nreason='r'",
            "kind must be",
        ),
    ],
)
def test_survivors_are_checked(tmp_path: Path, row: str, message: str) -> None:
    file = tmp_path / "survivors.toml"
    file.write_text(f"[[survivor]]\n{row}\n")
    with pytest.raises(ValueError, match=message):
        read_survivors(file)


def edit_at(module: str, before: str, after: str) -> RandomEdit:
    text = random_edits.originals()[module]
    assert text.count(before) == 1
    start = text.index(before)
    return RandomEdit(module, Change("test", start, start + len(before), after, "compress"))


def test_pool_tells_every_end() -> None:
    """In a process of its own: one in which a backward pass has run cannot fork."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
    code += "import test_random_edits as t; t.check_every_end()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def check_every_end() -> None:
    tiny = Profile("tiny", examples=2, shape_classes=1, max_keys=40, max_pairs=2_000)
    edit_pool.SIZES["tiny"] = tiny
    edit_pool._warm_up = lambda _: None
    line = "    wide = wide_dtype(keys.dtype)\n    row_bytes"
    edits = {
        "killed": edit_at("windows", "[::stride] / size", "[::stride] * size"),
        "survived": edit_at("windows", "row_bytes = 4 *", "row_bytes = 5 *"),
        "time": edit_at("windows", line, "    while True: pass\n    row_bytes"),
        "died": edit_at("windows", line, "    import os; os._exit(3)\n    row_bytes"),
        "unbuilt": edit_at("windows", "from .places import", "from .nowhere import"),
    }
    verdicts = list(edit_pool.run_edits(list(edits.values()), "tiny", stages=1, seconds=30))
    assert {v.end: v.edit for v in verdicts} == edits
    ends = {v.end: v for v in verdicts}
    assert ends["killed"].rule == "compress.values"
    assert ends["died"].what == "exit status 3"
    assert "nowhere" in ends["unbuilt"].what
