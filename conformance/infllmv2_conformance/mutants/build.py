"""Build a mutated copy of an implementation, in memory."""

from __future__ import annotations

import importlib
import linecache
import os
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from infllmv2_conformance.candidate import Candidate
from infllmv2_conformance.capabilities import Capabilities
from infllmv2_conformance.errors import UsageError
from infllmv2_conformance.loading import MUTANT
from infllmv2_conformance.names import check_names

from .model import Composite, Edit, Mutant

BASES = {"eager": "infllmv2_impls.eager", "triton": f"{__package__}.kernels"}
"""The packages that are changed. That of Triton runs in the interpreter, on every machine."""
ATTRIBUTE = "IMPLEMENTATION"
INTERPRET = "TRITON_INTERPRET"


class MutantError(UsageError):
    """A mutant cannot be built: it is unknown, or its edits no longer fit the source."""


class OriginalMissingError(MutantError):
    """The implementation that mutants are made of is not installed."""


def load_mutant(name: str) -> Candidate:
    """Return the mutant of an id, as `mutant:<id>` names it on the command line.

    Raises:
        UsageError: there is none of this id.
        MutantError: it cannot be built.
    """
    from .bank import LONG_MUTANTS, MUTANTS

    known = MUTANTS | LONG_MUTANTS
    check_names("mutant", [name], known)
    return build(known[name])


def build(mutant: Mutant) -> Candidate:
    """Build the implementation that `mutant` describes.

    Raises:
        MutantError: an edit does not fit.
    """
    original = pristine(mutant.base)
    copy = _import(mutant.id, edited(mutant)) if mutant.edits else original
    target: object = getattr(copy, ATTRIBUTE)
    if mutant.wrap is not None:
        target = mutant.wrap(target)
    if mutant.functions:
        changed = {name: getattr(target, name) for name in mutant.functions}
        target = Composite(getattr(original, ATTRIBUTE), changed)
    claims = Capabilities.from_mapping(getattr(copy, ATTRIBUTE).capabilities)
    return Candidate(f"{MUTANT}{mutant.id}", target, replace(claims, **mutant.claims))


def missing(mutant: Mutant) -> str:
    """Return the package that a mutant lacks here, "" if it can be built."""
    return "triton" if mutant.base == "triton" and find_spec("triton") is None else ""


def build_texts(name: str, texts: Mapping[str, str]) -> Candidate:
    """Build an implementation from the sources of all modules; it claims what the original does.

    Raises:
        MutantError: they cannot be imported.
    """
    claims = Capabilities.from_mapping(getattr(pristine(), ATTRIBUTE).capabilities)
    return Candidate(f"{MUTANT}{name}", getattr(_import(name, texts), ATTRIBUTE), claims)


@cache
def pristine(base: str = "eager") -> Any:
    """Return the copy of an original without any edit.

    Raises:
        OriginalMissingError: what it needs is not installed.
    """
    if base == "triton":
        _interpret()
    return _import(f"{base}_itself", dict(sources(base)))


def _interpret() -> None:
    """Let Triton interpret its kernels, so that they run without a GPU."""
    if find_spec("triton") is None:
        raise OriginalMissingError("mutants of Triton kernels need triton, which is not installed")
    os.environ[INTERPRET] = "1"
    language: Any = importlib.import_module("triton.language")
    if type(language.sum).__name__ != "InterpretedFunction":
        raise MutantError(f"set {INTERPRET}=1: this process has imported triton without it")


@cache
def sources(base: str = "eager") -> Mapping[str, str]:
    """Return the source of every module of an original, by the name of its file.

    Raises:
        OriginalMissingError: the original is not installed.
    """
    try:
        spec = find_spec(BASES[base])
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise OriginalMissingError(f"mutants need {BASES[base]}, which is not installed")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}


def edited(mutant: Mutant) -> dict[str, str]:
    """Return the sources of a mutant: those of its base with the edits applied, in order.

    Raises:
        MutantError: the text to replace is not there, or there more than once.
    """
    return with_edits(mutant.id, sources(mutant.base), mutant.edits)


def with_edits(name: str, originals: Mapping[str, str], edits: Sequence[Edit]) -> dict[str, str]:
    """Return sources with edits applied, in order; `name` is that of the mutant in errors.

    Raises:
        MutantError: the text to replace is not there, or there more than once.
    """
    texts = dict(originals)
    for edit in edits:
        if edit.module not in texts:
            raise MutantError(f"mutant {name}: its base has no module {edit.module!r}")
        count = texts[edit.module].count(edit.before)
        if count != 1:
            raise MutantError(
                f"mutant {name}: the text to replace in {edit.module}.py must occur exactly once, "
                f"but it occurs {count} times: {edit.before!r}"
            )
        texts[edit.module] = texts[edit.module].replace(edit.before, edit.after)
    return texts


class _Sources(MetaPathFinder, Loader):
    """Import a package from texts."""

    def __init__(self, package: str, texts: Mapping[str, str]) -> None:
        self.files = {
            package if stem == "__init__" else f"{package}.{stem}": (stem, text)
            for stem, text in texts.items()
        }
        self.package = package

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - the signature is Python's
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """Return the spec of a module of the package."""
        if fullname not in self.files:
            return None
        is_package = fullname == self.package
        return spec_from_loader(fullname, self, is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        """Run the text of a module."""
        exec(_compiled(*self.files[module.__name__]), module.__dict__)


@cache
def _compiled(stem: str, text: str) -> CodeType:
    """Compile a module, and keep its text for tracebacks and for Triton; mutants share most."""
    file = f"mutant/{zlib.crc32(text.encode()):08x}/{stem}.py"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    return compile(text, file, "exec")


def _import(name: str, texts: Mapping[str, str]) -> Any:
    """Import the texts as a fresh package."""
    package = "infllmv2_mutant_" + re.sub(r"\W", "_", name)
    for module in [m for m in sys.modules if m == package or m.startswith(f"{package}.")]:
        del sys.modules[module]
    finder = _Sources(package, texts)
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module(package)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        raise MutantError(f"mutant {name}: its source cannot be imported: {text}") from error
    finally:
        sys.meta_path.remove(finder)
