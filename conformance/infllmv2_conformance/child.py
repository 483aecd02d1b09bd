"""The process that runs the suite: how it is started, what it last said, how it is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .rules import LONG

PACKAGE = Path(__file__).parent
PACKAGES = ("infllmv2_conformance", "infllmv2_reference", "infllmv2_impls")
STACK_HEADS = ("Current thread", "Stack (most recent call first)")
LINES = 12


@dataclass(frozen=True)
class Order:
    """What to run; the fields are the options of `plugin.OPTIONS`.

    Args:
        rule_timeout: seconds after which a rule counts as hanging.
        workers: processes to share the rules, with pytest-xdist; 0 for one without it.
        fail_fast: stop at the first failure.
    """

    impl: str
    profile: str = "quick"
    device: str | None = None
    seed: int = 0
    known_failures: Path | None = None
    stage: tuple[str, ...] = ()
    rule: tuple[str, ...] = ()
    function: tuple[str, ...] = ()
    case: str | None = None
    long: int = 0
    rule_timeout: float = 300.0
    workers: int = 0
    fail_fast: bool = False

    @property
    def size(self) -> str:
        """Return the size of the search as a report names it: a profile, or "long 131072"."""
        return f"{LONG} {self.long}" if self.long else self.profile


class Child:
    """A running pytest process, apart from the configuration and plugins of where it is called.

    Args:
        order: what to run.
        folder: where its output and its events go.
        resume: leave out what the events say has begun.
    """

    def __init__(self, order: Order, folder: Path, *, resume: bool) -> None:
        self.stdout, self.stderr = folder / "stdout", folder / "stderr"
        with self.stdout.open("ab") as out, self.stderr.open("ab") as err:
            self.process = subprocess.Popen(
                _command(order, folder / "events", resume),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for the supervisor, which then ends the child
            )

    def running(self) -> bool:
        """Say whether it still runs."""
        return self.process.poll() is None

    def status(self) -> int:
        """Return its exit status, negative for a signal."""
        return self.process.wait()

    def kill(self) -> None:
        """End it and all processes that it has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def kill_hanging(self, pid: int) -> None:
        """End one of its processes, after it has written where it is."""
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
            time.sleep(0.3)
            os.kill(pid, signal.SIGKILL)


def last_words(file: Path, offset: int = 0) -> str:
    """Return the end of an output; of a stack that Python printed, the user's own frames."""
    with file.open("rb") as stream:
        stream.seek(offset)
        lines = stream.read().decode(errors="replace").strip().splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith(STACK_HEADS)]
    if not heads:
        return "\n".join(lines[-LINES:])
    before = [line for line in lines[: heads[-1]] if line.strip() and not _is_stack(line)]
    frames = lines[heads[-1] + 1 :]
    ours = next((i for i, line in enumerate(frames) if str(PACKAGE) in line), len(frames))
    return "\n".join([*before[-LINES:], *frames[: min(max(ours, 3), LINES)]])


def _is_stack(line: str) -> bool:
    return line.startswith(("  File ", "Thread 0x"))


def how_it_ended(status: int | None) -> str:
    """Return an exit status in words."""
    if status is None:
        return "died"
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = ", which is what happens when memory runs out" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


def _command(order: Order, events: Path, resume: bool) -> list[str]:
    workers = ["-p", "xdist", "-n", str(order.workers), "--maxschedchunk", "1"]
    workers += ["--max-worker-restart", "1000"]
    return [
        *(sys.executable, "-P", "-m", "pytest", "--pyargs", "infllmv2_conformance.suite"),
        *("-p", "infllmv2_conformance.plugin", "-c", str(PACKAGE / "isolated.ini")),
        *("--rootdir", str(PACKAGE), "--noconftest", "-p", "no:cacheprovider", "--capture=no"),
        *("--import-mode=importlib", "--strict-markers", "-q", "--no-header", "--tb=short"),
        *(workers if order.workers else []),
        *_option("events", events),
        *(["--infllmv2-resume"] if resume else []),
        *_option("impl", order.impl),
        *_option("profile", order.profile),
        *_option("device", order.device),
        *_option("seed", order.seed),
        *_option("known-failures", order.known_failures),
        *_option("case", order.case),
        *_option("long", order.long),
        *(word for stage in order.stage for word in _option("stage", stage)),
        *(word for rule in order.rule for word in _option("rule", rule)),
        *(word for function in order.function for word in _option("function", function)),
    ]


def _option(name: str, value: object) -> list[str]:
    return [] if value is None else [f"--infllmv2-{name}={value}"]


def _environment() -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    cache = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    env.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(cache / "infllmv2" / "hypothesis"))
    env.setdefault("OMP_NUM_THREADS", "1")  # cases are small: threads would only wait
    paths = [*_source_folders(), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return env


def _source_folders() -> list[str]:
    """Return where our packages lie, unless they are installed."""
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    specs = [find_spec(name) for name in PACKAGES]
    folders = [str(Path(spec.origin).parent.parent) for spec in specs if spec and spec.origin]
    return [folder for folder in dict.fromkeys(folders) if folder not in installed]
