"""From a kernel to a cubin: NVRTC at the first use, for one architecture, kept on disk.

No GPU is needed. Several processes may compile the same kernel at once: a file appears whole.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CUDA = Path(__file__).parent / "cuda"
INSTALL = "install infllmv2-conformance[cupy13], or [cupy12] for a driver of CUDA 12"
OPTIONS = ("--std=c++17", "-lineinfo")
OLDEST = (8, 0)


@dataclass(frozen=True)
class Kernel:
    """Name a kernel and the macros that it is compiled with.

    Args:
        file: its file in `cuda/`.
        name: the `extern "C" __global__` function.
        defines: macros and their values.
        hopper: whether it uses instructions of sm_90a, and runs on compute capability 9.0 alone.
    """

    file: str
    name: str
    defines: tuple[tuple[str, str | int], ...] = ()
    hopper: bool = False

    def options(self) -> tuple[str, ...]:
        """Return the macros as options of a compiler."""
        return tuple(f"-D{name}={value}" for name, value in self.defines)


@dataclass(frozen=True)
class Compiled:
    """Hold what the compiler returns: the cubin and its log."""

    cubin: bytes
    log: str


def architecture(capability: tuple[int, int], hopper: bool = False) -> str:
    """Return the architecture to compile for.

    >>> architecture((8, 6)), architecture((9, 0)), architecture((9, 0), hopper=True)
    ('sm_86', 'sm_90', 'sm_90a')

    Raises:
        RuntimeError: the kernels, or this one, cannot run on such a device.
    """
    major, minor = capability
    if capability < OLDEST:
        raise RuntimeError(
            f"the CuPy kernels need compute capability 8.0 or higher, but it is {major}.{minor}"
        )
    if hopper and capability != (9, 0):
        raise RuntimeError(f"this kernel needs compute capability 9.0, but it is {major}.{minor}")
    return f"sm_{major}{minor}" + ("a" if hopper else "")


def import_cupy(module: str = "cupy") -> Any:
    """Import CuPy, or a module of it.

    Raises:
        RuntimeError: it is not installed, or broken.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(f"the CuPy kernels need CuPy ({error}); {INSTALL}") from error


def cubin_file(kernel: Kernel, arch: str) -> Path:
    """Return the cubin of a kernel and its whole file, which is compiled unless it exists.

    It lies in `$INFLLMV2_CACHE_DIR`, or else in `~/.cache/infllmv2/cubins`; its name depends on all
    sources, options and versions.
    """
    folder = _folder()
    path = folder / f"{Path(kernel.file).stem}-{arch}-{_key(kernel, arch)}.cubin"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_whole(path, compile_kernel(kernel, arch).cubin)
    return path


def compile_kernel(kernel: Kernel, arch: str, *options: str) -> Compiled:
    """Compile a kernel with NVRTC.

    Raises:
        RuntimeError: NVRTC is missing or does not take the source; the message has its log.
    """
    nvrtc = import_cupy("cupy_backends.cuda.libs.nvrtc")
    _version()
    sources = _sources(kernel.file)
    names = [name.encode() for name in sources if name != kernel.file]
    headers = [text.encode() for name, text in sources.items() if name != kernel.file]
    program = nvrtc.createProgram(sources[kernel.file], kernel.file, headers, names)
    every = (*OPTIONS, f"--gpu-architecture={arch}", *kernel.options(), *options)
    try:
        nvrtc.compileProgram(program, every)
        return Compiled(nvrtc.getCUBIN(program), nvrtc.getProgramLog(program))
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(
            f"NVRTC {_version()} cannot compile {kernel.name} of {kernel.file} for {arch} with "
            f"{' '.join(every)}: {error}\n{log}"
        ) from error
    finally:
        nvrtc.destroyProgram(program)


def _folder() -> Path:
    chosen = os.environ.get("INFLLMV2_CACHE_DIR")
    return Path(chosen) if chosen else Path.home() / ".cache" / "infllmv2" / "cubins"


@cache
def _key(kernel: Kernel, arch: str) -> str:
    """Return a digest of all that the cubin depends on."""
    texts = [item for pair in sorted(_sources(kernel.file).items()) for item in pair]
    versions = (_version(), import_cupy().__version__)
    parts = (*texts, *OPTIONS, *kernel.options(), arch, *versions)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@cache
def _sources(file: str) -> dict[str, str]:
    """Return the text of a `.cu` file and of all headers, by name."""
    paths = [CUDA / file, *sorted(CUDA.glob("*.cuh"))]
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


@cache
def _version() -> str:
    """Return the version of NVRTC.

    Raises:
        RuntimeError: CuPy does not find it.
    """
    nvrtc = import_cupy("cupy_backends.cuda.libs.nvrtc")
    try:
        return ".".join(map(str, nvrtc.getVersion()))
    except Exception as error:  # CuPy raises what the loader raises
        raise RuntimeError(
            f"the CuPy kernels need NVRTC, and CuPy does not find it ({error}); "
            "install CUDA's toolkit or cupy-cuda13x[ctk]"
        ) from error


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file so that no other process ever sees a part of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
