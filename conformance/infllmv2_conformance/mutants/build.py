"""Build a mutated copy of the eager implementation, in memory."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from infllmv2_conformance.candidate import Candidate
from infllmv2_conformance.capabilities import Capabilities
from infllmv2_conformance.errors import UsageError

from .model import Composite, Edit, Mutant

ORIGINAL = "infllmv2_impls.eager"
ATTRIBUTE = "IMPLEMENTATION"
PREFIX = "mutant:"


class MutantError(UsageError):
    """A mutant cannot be built: it is unknown, or its edits no longer fit the source."""


def load_mutant(spec: str) -> Candidate:
    """Return the mutant that `mutant:<id>` names.

    Raises:
        MutantError: there is none of this id, or it cannot be built.
    """
    from infllmv2_conformance.names import check_names

    from .bank import MUTANTS

    name = spec.removeprefix(PREFIX)
    check_names("mutant", [name], MUTANTS)
    return build(MUTANTS[name])


def build(mutant: Mutant) -> Candidate:
    """Build the implementation that `mutant` describes.

    Raises:
        MutantError: an edit does not fit.
    """
    copy: Any = _import(mutant.id, edited(mutant.edits, mutant.id)) if mutant.edits else pristine()
    target: object = getattr(copy, ATTRIBUTE)
    if mutant.wrap is not None:
        target = mutant.wrap(target)
    if mutant.functions:
        changed = {name: getattr(target, name) for name in mutant.functions}
        target = Composite(getattr(pristine(), ATTRIBUTE), changed)
    claims = Capabilities.from_mapping(getattr(copy, ATTRIBUTE).capabilities)
    return Candidate(PREFIX + mutant.id, target, replace(claims, **mutant.claims))


def build_texts(name: str, texts: Mapping[str, str]) -> Candidate:
    """Build an implementation from the sources of all modules; it claims what the original does.

    Raises:
        MutantError: they cannot be imported.
    """
    claims = Capabilities.from_mapping(getattr(pristine(), ATTRIBUTE).capabilities)
    return Candidate(PREFIX + name, getattr(_import(name, texts), ATTRIBUTE), claims)


@cache
def pristine() -> Any:
    """Return the copy without any edit."""
    return _import("none", dict(sources()))


@cache
def sources() -> Mapping[str, str]:
    """Return the source of every module of the original, by the name of its file.

    Raises:
        MutantError: the original is not installed.
    """
    try:
        spec = importlib.util.find_spec(ORIGINAL)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise MutantError(f"mutants need the package {ORIGINAL}, which is not installed")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}


def edited(edits: Sequence[Edit], name: str) -> dict[str, str]:
    """Return the sources with the edits applied, in order.

    Raises:
        MutantError: the text to replace is not there, or there more than once.
    """
    texts = dict(sources())
    for edit in edits:
        if edit.module not in texts:
            raise MutantError(f"mutant {name}: {ORIGINAL} has no module {edit.module!r}")
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

    def __init__(self, package: str, name: str, texts: Mapping[str, str]) -> None:
        self.files = {
            package if stem == "__init__" else f"{package}.{stem}": (f"mutant:{name}/{stem}.py", s)
            for stem, s in texts.items()
        }
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module of the package."""
        if fullname not in self.files:
            return None
        is_package = fullname == self.package
        return importlib.util.spec_from_loader(fullname, self, is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        """Run the text of a module."""
        file, text = self.files[module.__name__]
        exec(compile(text, file, "exec"), module.__dict__)


def _import(name: str, texts: Mapping[str, str]) -> Any:
    """Import the texts as a fresh package."""
    package = "infllmv2_mutant_" + re.sub(r"\W", "_", name)
    for module in [m for m in sys.modules if m == package or m.startswith(f"{package}.")]:
        del sys.modules[module]
    finder = _Sources(package, name, texts)
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module(package)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        raise MutantError(f"mutant {name}: its source cannot be imported: {text}") from error
    finally:
        sys.meta_path.remove(finder)
