"""Write a set of vectors to a folder, whole or not at all; read one, and trust nothing in it."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from infllmv2_conformance.cases import Case
from infllmv2_conformance.errors import UsageError
from infllmv2_reference import SPEC_VERSION, SparseConfig

from .catalogue import Vector
from .draw import Given, draw
from .expected import ARITHMETIC, Expected, expect

FORMAT, FORMAT_VERSION = "infllmv2-vectors", 1
MANIFEST = "manifest.json"
MAX_MANIFEST, MAX_FILE = 1 << 20, 16 << 20
"""Bytes that are read at most."""
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_CHECKS = {
    "bound": ({"value", "bound"}, {"defined"}),
    "exact": ({"value"}, {"defined"}),
    "certificate": ({"value", "bound", "kind"}, set[str]()),
}


class VectorsError(UsageError):
    """A set of vectors cannot be read or written."""


@dataclass(frozen=True)
class Golden:
    """Hold one vector as it was read.

    Args:
        vector: what it is.
        given: the arguments of its function, without `config`.
        expected: its results.
    """

    vector: Vector
    given: Given
    expected: list[Expected]


def write_set(folder: Path, catalogue: Sequence[Vector]) -> int:
    """Write the vectors of a catalogue, and return the bytes written.

    The folder appears complete or not at all. One that is there is replaced if it holds a set of
    vectors and nothing else.

    Raises:
        VectorsError: the folder holds what is not ours, or cannot be written.
    """
    _check_replaceable(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
            fresh, old = Path(work) / "new", Path(work) / "old"
            fresh.mkdir()
            size = _write_files(fresh, catalogue)
            fresh.chmod(0o755)
            if folder.exists():
                folder.rename(old)
            try:
                fresh.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
    except OSError as error:
        raise VectorsError(f"cannot write vectors to {folder}: {error.strerror}") from None
    return size


def _check_replaceable(folder: Path) -> None:
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise VectorsError(f"{folder} is not a folder")
    present = {path.name for path in folder.iterdir()}
    if not present:
        return
    names = {MANIFEST}
    if MANIFEST in present:
        names |= {f"{entry['name']}.safetensors" for entry in _entries(_read_manifest(folder))}
    foreign = sorted(present - names)
    if MANIFEST not in present or foreign:
        found = foreign[0] if foreign else "no manifest"
        raise VectorsError(f"{folder} holds {found}, which is not ours: not overwriting it")


def _write_files(folder: Path, catalogue: Sequence[Vector]) -> int:
    entries: list[dict[str, Any]] = []
    for vector in catalogue:
        given = draw(vector)
        expected = expect(vector, given)
        entry = _entry(vector, given, expected)
        tensors = {f"given.{n}": x for n, x in given.items() if isinstance(x, Tensor)}
        tensors |= {f"{e.name}.{n}": x for e in expected for n, x in e.tensors.items()}
        tensors = {name: x.detach().clone().contiguous() for name, x in tensors.items()}
        # one key: the library writes several in an order of its own
        about = {"format": FORMAT, "spec_version": SPEC_VERSION, "vector": vector.name}
        data = safetensors.torch.save(tensors, {"infllmv2": json.dumps(about, sort_keys=True)})
        (folder / f"{vector.name}.safetensors").write_bytes(data)
        entries.append(entry | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "spec_version": SPEC_VERSION,
        "arithmetic": asdict(ARITHMETIC),
        "torch": torch.__version__,
        "vectors": entries,
    }
    text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return len(text) + sum(entry["bytes"] for entry in entries)


def _entry(vector: Vector, given: Given, expected: list[Expected]) -> dict[str, Any]:
    config = vector.case.config
    derived = ("budget", "local_blocks", "lse_kernel_size", "lse_kernel_stride")
    return {
        "name": vector.name,
        "what": vector.what,
        "function": vector.function,
        "case": str(vector.case),
        "config": {f.name: getattr(config, f.name) for f in fields(SparseConfig)},
        "derived": {name: getattr(config, name) for name in derived},
        "tensors": [name for name, x in given.items() if isinstance(x, Tensor)],
        "numbers": {name: x for name, x in given.items() if not isinstance(x, Tensor)},
        "results": [
            {
                "name": e.name,
                "check": e.check,
                "optional": e.optional,
                **({"ties": e.ties} if e.check == "certificate" else {}),
            }
            for e in expected
        ],
    }


def read_set(folder: Path) -> list[Golden]:
    """Read a set of vectors, and check sizes, hashes, names, dtypes and shapes.

    Raises:
        VectorsError: something is missing, changed, too large or of another version.
    """
    manifest = _read_manifest(folder)
    return [_read_vector(folder, entry) for entry in _entries(manifest)]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    text = _read_bytes(path, MAX_MANIFEST)
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        raise VectorsError(f"{path} is not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:  # pyright: ignore[reportUnknownMemberType]
        raise VectorsError(f"{path} is not a manifest of {FORMAT}")
    manifest = cast("dict[str, Any]", manifest)
    if manifest.get("format_version") != FORMAT_VERSION:
        was = manifest.get("format_version")
        raise VectorsError(f"{path} has format_version {was}, but must have {FORMAT_VERSION}")
    spec = str(manifest.get("spec_version"))
    if spec.split(".")[0] != SPEC_VERSION.split(".")[0]:
        raise VectorsError(
            f"{path} holds vectors of the specification {spec}, which differs from {SPEC_VERSION}: "
            f"get the set of {SPEC_VERSION}, or the package of {spec}"
        )
    if manifest.get("arithmetic") != asdict(ARITHMETIC):
        raise VectorsError(f"{path} has bounds for another arithmetic than {asdict(ARITHMETIC)}")
    return manifest


def _entries(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    entries = manifest.get("vectors")
    if not isinstance(entries, list) or not entries:
        raise VectorsError(f"{MANIFEST}: 'vectors' must be a list of at least one")
    for entry in cast("list[Any]", entries):
        name = entry.get("name") if isinstance(entry, dict) else None  # pyright: ignore
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise VectorsError(f"{MANIFEST}: a vector has the name {name!r}")
    return cast("list[dict[str, Any]]", entries)


def _read_bytes(path: Path, most: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > most:
            raise VectorsError(f"{path} has {size} bytes, but must have at most {most}")
        return path.read_bytes()
    except OSError as error:
        raise VectorsError(f"cannot read {path}: {error.strerror}") from None


def _read_vector(folder: Path, entry: dict[str, Any]) -> Golden:
    name = entry["name"]
    path = folder / f"{name}.safetensors"
    data = _read_bytes(path, MAX_FILE)
    if len(data) != entry.get("bytes"):
        raise VectorsError(f"{path} has {len(data)} bytes, but the manifest says {entry['bytes']}")
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise VectorsError(f"{path} has another SHA-256 than the manifest says: it was changed")
    try:
        tensors = safetensors.torch.load(data)
        case = Case.parse(entry["case"])
        given = {n: tensors[f"given.{n}"] for n in entry["tensors"]} | entry["numbers"]
        kind = "ties" if any(r.get("ties") for r in entry["results"]) else ""
        vector = Vector(name, entry["function"], case, entry["what"], kind)
        expected = [_read_result(r, tensors) for r in entry["results"]]
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise VectorsError(f"{path} and the manifest do not fit: {what}") from None
    return Golden(vector, given, expected)


def _read_result(entry: dict[str, Any], tensors: dict[str, Tensor]) -> Expected:
    name, check = entry["name"], entry["check"]
    needed, possible = _CHECKS[check]
    parts = {
        part: tensors[f"{name}.{part}"]
        for part in (*needed, *possible)
        if part in needed or f"{name}.{part}" in tensors
    }
    shape = parts["value"].shape
    for part, tensor in parts.items():
        kind = torch.uint8 if part in ("defined", "kind") else torch.float64
        wanted = shape[1:] if part == "kind" else shape
        if tensor.shape != wanted or (tensor.dtype != kind and check != "exact"):
            raise ValueError(f"{name}.{part} is {tensor.dtype} {list(tensor.shape)}")
    return Expected(name, check, parts, bool(entry["optional"]), bool(entry.get("ties")))


def write_answers(folder: Path, answers: dict[str, dict[str, Tensor]]) -> None:
    """Write an implementation's results, a file for each vector, into an empty or new folder.

    Raises:
        VectorsError: the folder holds something, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise VectorsError(f"{folder} is not empty: not writing answers into it")
        for name, tensors in answers.items():
            data = {n: x.detach().cpu().clone().contiguous() for n, x in tensors.items()}
            (folder / f"{name}.safetensors").write_bytes(safetensors.torch.save(data))
    except OSError as error:
        raise VectorsError(f"cannot write answers to {folder}: {error.strerror}") from None


def read_answers(folder: Path, name: str) -> dict[str, Tensor] | None:
    """Read the results for one vector, None if there is no file.

    Raises:
        VectorsError: the file is too large or no safetensors file.
    """
    path = folder / f"{name}.safetensors"
    if not path.exists():
        return None
    try:
        return safetensors.torch.load(_read_bytes(path, MAX_FILE))
    except SafetensorError as error:
        raise VectorsError(f"{path} is no safetensors file: {error}") from None
