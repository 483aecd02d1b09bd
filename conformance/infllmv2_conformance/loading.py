"""Find an implementation by a built-in name, an entry point, a module attribute or a file.

A name that begins with `mutant:` is one of the deliberately wrong implementations of `mutants/`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, cast

from . import integrity, settings
from .candidate import Candidate
from .capabilities import Capabilities
from .errors import UsageError

BUILT_IN = {
    "eager": "infllmv2_impls.eager:IMPLEMENTATION",
    "sdpa": "infllmv2_impls.adapters.sdpa:IMPLEMENTATION",
    "flex_attention": "infllmv2_impls.adapters.flex_attention:IMPLEMENTATION",
    "infllm_v2": "infllmv2_impls.adapters.infllm_v2:IMPLEMENTATION",
    "triton": "infllmv2_impls.triton:TritonImplementation",
    "cupy": "infllmv2_impls.cupy:CupyImplementation",
}
ENTRY_POINTS = "infllmv2.impls"
MUTANT = "mutant:"
FORMS = "a known name, 'pkg.module:ATTR' or 'path/file.py:ATTR'"


class LoadError(UsageError):
    """Say in one line what was asked for, what was tried and what it must be."""


def load(spec: str) -> Candidate:
    """Load the implementation that `spec` names.

    Args:
        spec: a built-in name, the name of an entry point of the group `infllmv2.impls`,
            `pkg.module:ATTR`, `path/file.py:ATTR`, a module or file alone, or `mutant:ID`.

    Raises:
        LoadError: it cannot be found or imported, or what it names is no implementation.
    """
    if spec.startswith(MUTANT):
        from .mutants.build import load_mutant

        return load_mutant(spec.removeprefix(MUTANT))
    integrity.remember()
    modes = settings.mode_depths()
    target = _find(spec)
    if inspect.isclass(target):
        target = _guard(spec, f"{target.__name__}()", target)
    replaced = integrity.changes() + settings.drop_modes(modes)
    if replaced:
        raise LoadError(f"cannot load {spec!r}: importing it changes {', '.join(replaced)}")
    return Candidate(spec, target, _capabilities(spec, target))


def known_names() -> list[str]:
    """Return the names that need no module: built-in ones and installed entry points."""
    return [*BUILT_IN, *sorted({entry.name for entry in entry_points(group=ENTRY_POINTS)})]


def _find(spec: str) -> object:
    if spec in BUILT_IN:
        module, _, attribute = BUILT_IN[spec].partition(":")
        return _attribute(spec, _import(spec, module), attribute)
    for entry in entry_points(group=ENTRY_POINTS, name=spec):
        return _guard(spec, f"entry point {entry.value}", entry.load)
    file = re.fullmatch(r"(.+\.py)(?::([\w.]+))?", spec)
    if file or "/" in spec:
        path, attribute = file.groups() if file else (spec, None)
        return _attribute(spec, _import_file(spec, Path(path)), attribute or "")
    module, _, attribute = spec.partition(":")
    if not all(part.isidentifier() for part in module.split(".")):
        raise LoadError(f"{spec!r} names no implementation; it must be {FORMS}")
    return _attribute(spec, _import(spec, module), attribute)


def _import(spec: str, module: str) -> ModuleType:
    _allow_imports_from(Path.cwd())
    try:
        return _guard(spec, module, lambda: importlib.import_module(module))
    except _MissingError as missing:
        if module == missing.name or module.startswith(f"{missing.name}."):
            tried = f"there is no module {missing.name!r}"
            names = ", ".join(known_names())
            raise LoadError(f"unknown implementation {spec!r}: {tried}; known: {names}") from None
        raise


def _import_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise LoadError(f"cannot load {spec!r}: there is no file {str(path)!r}")
    _allow_imports_from(path.resolve().parent)
    name = f"infllmv2_candidate_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}"
    found = importlib.util.spec_from_file_location(name, path.resolve())
    if found is None or found.loader is None:
        raise LoadError(f"cannot load {spec!r}: {str(path)!r} is not a Python file")
    module, loader = importlib.util.module_from_spec(found), found.loader
    sys.modules[name] = module
    _guard(spec, str(path), lambda: loader.exec_module(module))
    return module


def _allow_imports_from(folder: Path) -> None:
    """Let modules of `folder` be imported, without letting them hide installed ones."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _attribute(spec: str, module: ModuleType, attribute: str) -> object:
    target: Any = module
    for name in attribute.split(".") if attribute else ():
        if not hasattr(target, name):
            found = [n for n, value in vars(module).items() if hasattr(value, "capabilities")]
            hint = f"; it has {', '.join(found)}" if found else ""
            raise LoadError(f"cannot load {spec!r}: no {attribute!r} in {module.__name__}{hint}")
        target = getattr(target, name)
    return target


def _capabilities(spec: str, target: object) -> Capabilities:
    claims: Any = getattr(target, "capabilities", None)
    if isinstance(claims, Capabilities):
        return claims
    if not isinstance(claims, Mapping):
        found = "has none" if claims is None else f"has {type(claims).__name__} instead"
        raise LoadError(
            f"cannot load {spec!r}: an implementation needs 'capabilities', a mapping with fields "
            f"of infllmv2_conformance.capabilities.Capabilities; {_describe(target)} {found}"
        )
    try:
        return Capabilities.from_mapping(cast("Mapping[str, Any]", claims))
    except (TypeError, ValueError) as error:
        raise LoadError(f"cannot load {spec!r}: {_one_line(error)}") from None


def _describe(target: object) -> str:
    if isinstance(target, ModuleType):
        return f"the module {target.__name__}"
    return f"this {type(target).__name__}"


class _MissingError(LoadError):
    """A module is not installed."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


def _guard(spec: str, what: str, action: Callable[[], Any]) -> Any:
    """Run code of the user and turn what it raises into one line."""
    try:
        return action()
    except KeyboardInterrupt:
        raise
    except ModuleNotFoundError as error:
        place = _place(error)
        message = f"cannot load {spec!r}: the package {error.name!r} is not installed{place}"
        raise _MissingError(message, error.name or "") from error
    except BaseException as error:
        _explain(spec, what, error)


def _explain(spec: str, what: str, error: BaseException) -> NoReturn:
    summary = f"{type(error).__name__}: {_one_line(error)}".rstrip(": ")
    raise LoadError(f"cannot load {spec!r}: {what} raised {summary}{_place(error)}") from error


def _one_line(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return " ".join(text.split())


def _place(error: BaseException) -> str:
    """Return where the user's code raised, as ` (file:line)`."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen") and frame.filename != __file__
    ]
    frames = [frame for frame in frames if not frame.filename.startswith(_IMPORTLIB)]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


_IMPORTLIB = str(Path(importlib.__file__).parent)
