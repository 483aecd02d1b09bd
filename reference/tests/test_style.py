"""The style of CONTRIBUTING.md as tests: short functions, docstrings, who may import whom."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

import pytest

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "reference" / "infllmv2_reference"
IMPLS = ROOT / "impls" / "infllmv2_impls"
CONFORMANCE = ROOT / "conformance" / "infllmv2_conformance"

FILES = sorted(REFERENCE.rglob("*.py"))
STAGES = {  # the public function of every stage
    "compress": ["compress_keys"],
    "score": ["score_windows"],
    "pool": ["pool_blocks"],
    "select": ["select_blocks"],
    "attend": ["attend_blocks"],
    "pipeline": ["attention"],
    "cache": ["append_tokens", "decode"],
}
CONTRACT = ("score_windows", "pool_blocks", "select_blocks", "compress_keys", "attend_blocks")
DEVICE = re.compile(r"(cpu|cuda|mps|xpu|hip|meta)(:\d+)?")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = Function | ast.ClassDef | ast.Module

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def functions(path: Path) -> list[Function]:
    return [node for node in ast.walk(parse(path)) if isinstance(node, Function)]


def body_length(function: Function) -> int:
    """Count the lines of a body without its docstring, from its first statement to its last."""
    has_docstring = ast.get_docstring(function) is not None
    statements = function.body[1:] if has_docstring else function.body
    if not statements:
        return 0
    return (function.end_lineno or 0) - statements[0].lineno + 1


def public(path: Path) -> Iterator[tuple[str, Documented]]:
    """Yield the module and its public classes, functions and methods, with their names."""
    module = parse(path)
    yield path.name, module
    for node in module.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            for member in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(member, Function) and not member.name.startswith("_"):
                    yield f"{node.name}.{member.name}", member


def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports, relative ones made absolute."""
    root = next(r for r in (REFERENCE, IMPLS, CONFORMANCE) if path.is_relative_to(r))
    parts = path.relative_to(root.parent).parts
    names: set[str] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = parts[: len(parts) - node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def strings(path: Path) -> list[ast.Constant]:
    """Return the string literals of a file that are not docstrings."""
    module = parse(path)
    prose = {node.value for node in ast.walk(module) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(module) if isinstance(node, ast.Constant)]
    return [node for node in constants if isinstance(node.value, str) and node not in prose]


def test_the_files_are_found() -> None:
    """A style test of nothing would pass."""
    assert {path.stem for path in FILES} >= {*STAGES, "config", "geometry", "layout"}
    assert (IMPLS / "__init__.py").exists()
    assert (CONFORMANCE / "protocol.py").exists()
    assert "infllmv2_reference.geometry.num_windows" in imports(REFERENCE / "compress.py")


@every_file
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 400


def test_bodies_are_short() -> None:
    """Style rule 1."""
    lengths = {f"{p.stem}.{f.name}": body_length(f) for p in FILES for f in functions(p)}
    assert median(lengths.values()) <= 15
    assert quantiles(lengths.values(), n=10)[8] <= 25
    assert {name: length for name, length in lengths.items() if length > 40} == {}


def test_stage_functions_are_short() -> None:
    """Style rule 1, where it matters: properties of one line cannot make up for a long stage."""
    lengths = [
        body_length(function)
        for path in FILES
        for function in functions(path)
        if function.name in STAGES.get(path.stem, [])
    ]
    assert len(lengths) == sum(map(len, STAGES.values()))
    assert median(lengths) <= 15
    assert max(lengths) <= 25


@every_file
def test_public_names_are_documented_by_one_imperative_sentence(path: Path) -> None:
    """Style rule 3; a class or a module may be described by a noun."""
    for name, node in public(path):
        docstring = ast.get_docstring(node)
        assert docstring, f"{path.name}: {name} has no docstring"
        first, *rest = docstring.splitlines()
        assert re.fullmatch(r"[A-Z].*[^.]\.", first), f"{path.name}: {name}: {first}"
        assert ". " not in re.sub(r"\b(Eq|Sec|Fig)\. ", "", first), (
            f"{path.name}: {name}: more than one sentence: {first}"
        )
        assert not rest or rest[0] == "", f"{path.name}: {name}: no empty line after: {first}"
        if isinstance(node, Function):
            verb = first.split()[0].rstrip(",")
            bad = re.search(r"(?<!s)s$|ing$|ed$", verb) or verb in ("A", "An", "The", "It")
            assert not bad, f"{path.name}: {name}: not imperative: {first}"


@pytest.mark.parametrize("stem", STAGES)
def test_stages_name_arguments_results_and_source(stem: str) -> None:
    """Style rule 3: Args with every argument, Returns, Source; Free where others implement it."""
    found = {f.name: f for f in functions(REFERENCE / f"{stem}.py")}
    for name in STAGES[stem]:
        docstring = ast.get_docstring(found[name]) or ""
        assert re.search(r"^Args:$", docstring, re.M), name
        assert re.search(r"^Returns:$", docstring, re.M), name
        assert re.search(r"^Source: \S", docstring, re.M), name
        assert (name not in CONTRACT) or re.search(r"^Free: \S", docstring, re.M), name
        documented = re.findall(r"^    (\w+): \S", docstring.split("Args:")[1], re.M)
        arguments = [argument.arg for argument in found[name].args.args]
        assert documented[: len(arguments)] == arguments, name


@every_file
def test_signatures_are_annotated(path: Path) -> None:
    """Style rule 2: shapes stand in the signature."""
    for function in functions(path):
        assert function.returns is not None, f"{path.name}: {function.name}"
        for argument in [*function.args.args, *function.args.kwonlyargs]:
            implied = argument.arg in ("self", "cls")
            assert implied or argument.annotation, f"{path.name}: {function.name}: {argument.arg}"


@every_file
def test_reference_imports_torch_and_itself(path: Path) -> None:
    allowed = {"torch", "jaxtyping", "infllmv2_reference"} | sys.stdlib_module_names
    assert {name.split(".")[0] for name in imports(path)} <= allowed


@every_file
def test_reference_imports_at_the_top_and_unconditionally(path: Path) -> None:
    """Style rule 6: no optional import."""
    module = parse(path)
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert node in module.body, f"{path.name}:{node.lineno}"


@every_file
def test_reference_names_no_device(path: Path) -> None:
    """Style rule 6: no device literal but a parameter's default, and no way round it."""
    defaults = [d for f in functions(path) for d in (*f.args.defaults, *f.args.kw_defaults)]
    default_strings = [d for d in defaults if isinstance(d, ast.Constant)]
    for node in strings(path):
        if DEVICE.fullmatch(str(node.value)):
            assert node.value == "cpu", f"{path.name}:{node.lineno}"
            assert any(
                ast.dump(node) == ast.dump(d) and node.lineno == d.lineno for d in default_strings
            ), f"{path.name}:{node.lineno}"
    attributes = {node.attr for node in ast.walk(parse(path)) if isinstance(node, ast.Attribute)}
    assert attributes.isdisjoint({"cuda", "mps", "is_cuda", "cpu"})


@every_file
def test_reference_calls_no_in_place_method(path: Path) -> None:
    """Style rule 6; `test_no_input_is_modified` sees what this cannot."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            assert name.startswith("__") or not name.endswith("_"), f"{path.name}:{node.lineno}"
            assert all(keyword.arg != "out" for keyword in node.keywords), path.name


@every_file
def test_reference_assigns_to_no_element_of_an_argument(path: Path) -> None:
    """Style rule 6: only what a function made itself is filled by index."""
    for function in functions(path):
        arguments = {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}
        for node in ast.walk(function):
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.AugAssign):
                targets = [node.target]
            for target in targets:
                if isinstance(target, ast.Subscript | ast.Attribute):
                    base = re.match(r"\w*", ast.unparse(target))
                    assert base, f"{path.name}:{node.lineno}"
                    assert base[0] not in arguments, f"{path.name}:{node.lineno}: {base[0]}"


def test_impls_import_the_references_config_geometry_and_layout_only() -> None:
    """They may share parameters and integers, never a stage function, and never the suite."""
    allowed = re.compile(r"infllmv2_reference\.(config|geometry|layout)(\..*)?")
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in IMPLS.rglob("*.py")
        for name in imports(path)
        if name.startswith("infllmv2_")
        if not (name.startswith("infllmv2_impls") or allowed.fullmatch(name))
    }
    assert wrong == set()


def test_conformance_imports_no_implementation() -> None:
    """It finds them by name, at run time, as it finds everybody's."""
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in CONFORMANCE.rglob("*.py")
        for name in imports(path)
        if name.startswith("infllmv2_impls")
    }
    assert wrong == set()
