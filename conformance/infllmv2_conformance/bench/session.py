"""A whole benchmark: which workloads, in which order, until the time is up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from infllmv2_conformance.candidate import Candidate
from infllmv2_conformance.device import free_memory
from infllmv2_conformance.failure import ConformanceFailure
from infllmv2_conformance.loading import load

from .backward import BACKWARDS
from .baselines import BACKENDS, DENSE, dense_task
from .ceilings import measure_ceilings
from .counts import count
from .decoding import DECODES
from .field import Field
from .figures import Figure, identity, key_of, make_figures, not_run
from .machine import read_gpu
from .overlap import mean_union
from .record import OUT_OF_TIME, Record
from .rounds import Effort, Result, race
from .stages import STAGES, Maker
from .tasks import Task, unsupported
from .watches import Watch, make_watch
from .words import TASKS
from .workloads import Shape, Workload

PACKAGES = ("infllm_v2",)
"""Implementations of other people, timed beside ours where their package is installed."""
WHOLE = ("attention", "attention.backward", "decode")
"""What is timed of implementations that are only there to be compared with."""


@dataclass(frozen=True)
class Wish:
    """Say what is to be timed.

    Args:
        shapes: of models.
        lengths: in tokens.
        budgets: block budgets; the shape's own if empty.
        inputs: kinds of queries and keys.
        tasks: forward, backward, decode.
        batches: of `decode`.
        functions: only these; all if empty.
        baselines: dense backends, and implementations to compare with.
        l2: states of the caches.
        dtype: of q, k and v.
        seed: what tensors are drawn from.
        seconds: for everything.
        effort: seconds for the rounds of one workload.
        longest_call: seconds that no single call may take.
    """

    shapes: tuple[Shape, ...]
    lengths: tuple[int, ...]
    budgets: tuple[int, ...] = ()
    inputs: tuple[str, ...] = ("random", "correlated")
    tasks: tuple[str, ...] = TASKS
    batches: tuple[int, ...] = (1, 16)
    functions: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    l2: tuple[str, ...] = ("cold",)
    dtype: str = "bfloat16"
    seed: int = 0
    seconds: float = float("inf")
    effort: float = 2.0
    longest_call: float = 10.0

    def workloads(self) -> list[Workload]:
        """Return all workloads, short ones first.

        A backward is timed for the first budget only, decoding for the first budget and the first
        kind of inputs: a single query has no neighbours.
        """
        found, kinds = list[Workload](), self.inputs
        for length in sorted(self.lengths):
            for shape in self.shapes:
                budgets = self.budgets or shape.budgets
                first = Workload(shape, length, budgets[0], dtype=self.dtype, seed=self.seed)
                if "forward" in self.tasks:
                    found += [replace(first, budget=b, inputs=i) for b in budgets for i in kinds]
                if "backward" in self.tasks:
                    found += [replace(first, inputs=i, task="backward") for i in kinds]
                if "decode" in self.tasks:
                    step = replace(first, inputs=kinds[0], task="decode")
                    found += [replace(step, batch=n) for n in self.batches]
        return found

    def settings(self, names: list[str]) -> dict[str, Any]:
        """Return plain data about what is timed, for the record."""
        facts = {name: value for name, value in vars(self).items() if name != "seconds"}
        facts["shapes"] = [shape.name for shape in self.shapes]
        facts["dense"] = [name for name in self.baselines if name in BACKENDS]
        return {"implementations": names, **facts}


def default_baselines(device: torch.device, names: list[str]) -> tuple[str, ...]:
    """Return dense attention, `eager`, and other people's packages if they are installed."""
    found = [name for name in PACKAGES if device.type == "cuda" and find_spec(name)]
    others = [name for name in ("eager", *found) if name not in names]
    return (*DENSE[device.type], *others)


class Session:
    """Run a benchmark and keep its record.

    Args:
        candidates: the implementations.
        device: where.
        wish: what is timed.
        record: takes the figures.
        show: takes the figures of each workload as soon as they are there, and its overlap.
        watch: measures; that of the device unless given.
    """

    def __init__(
        self,
        candidates: list[Candidate],
        device: torch.device,
        wish: Wish,
        record: Record,
        show: Callable[[Workload, list[Figure], dict[str, Any] | None], None],
        watch: Watch | None = None,
    ) -> None:
        self.candidates, self.device, self.wish = candidates, device, wish
        self.record, self.show = record, show
        self.watch = watch or make_watch(device)
        self.others = [load(n) for n in wish.baselines if n not in BACKENDS]
        self._began, self._before = time.monotonic(), record.data["seconds"]

    @property
    def remaining(self) -> float:
        """Return the seconds that are left."""
        return self.wish.seconds - (time.monotonic() - self._began)

    def run(self) -> None:
        """Time every workload that the record does not hold yet."""
        if self.record.ceilings is None:
            self.measure_ceilings()
        for workload in self.wish.workloads():
            if self.is_done(workload):
                continue
            self.run_workload(workload)
        figures = self.record.figures.values()
        out_of_time = any((f["reason"] or "").startswith(OUT_OF_TIME) for f in figures)
        self.record.data["complete"] = not out_of_time
        self._save()

    def measure_ceilings(self) -> None:
        """Measure what the machine reaches, for the rooflines."""
        self.record.ceilings = measure_ceilings(self.watch, self.device, self.wish.dtype)

    def is_done(self, workload: Workload) -> bool:
        """Say whether the record holds all figures of a workload."""
        return all(
            self.record.has(key_of(identity(workload, who, what, state)))
            for who, what in self.entrants(workload)
            for state in self.wish.l2
        )

    def entrants(self, workload: Workload) -> list[tuple[str, str]]:
        """Return competitor and function of every figure of a workload."""
        return [(who, what) for who, what, _ in self._plan(workload)]

    def run_workload(self, workload: Workload) -> list[Figure]:
        """Time one workload, and return its figures."""
        states, who = self.wish.l2, self.entrants(workload)
        if self.remaining <= 0:
            figures = not_run(workload, who, states, f"{OUT_OF_TIME}: it ended before")
            return self._keep(workload, figures, None)
        try:
            place = Field(workload, self.device)
            overlap = self._overlap(place) if workload.task == "forward" else None
            results = self._race(workload, place)
        except (torch.OutOfMemoryError, ConformanceFailure) as error:
            reason = "out of memory: the inputs do not fit"
            if not isinstance(error, torch.OutOfMemoryError):
                reason = f"the inputs could not be prepared: {error}".split("\n")[0]
            del error
            free_memory()
            return self._keep(workload, not_run(workload, who, states, reason), None)
        ceilings, clocks = self.record.ceilings, read_gpu(self.device)
        assert ceilings is not None
        figures = make_figures(workload, results, states, ceilings, clocks)
        del place
        free_memory()
        return self._keep(workload, figures, overlap)

    def _keep(
        self, workload: Workload, figures: list[Figure], overlap: dict[str, Any] | None
    ) -> list[Figure]:
        if overlap:
            self.record.add_overlap(overlap)
        self.record.add(figures)
        self._save()
        self.show(workload, figures, overlap)
        return figures

    def _save(self) -> None:
        self.record.data["seconds"] = self._before + time.monotonic() - self._began
        self.record.save()

    def _race(self, workload: Workload, place: Field) -> list[Result]:
        results: list[Result] = []
        makers: list[tuple[str, str, Callable[[], Task]]] = []
        refused = {c.name: unsupported(c, workload) for c in [*self.candidates, *self.others]}
        for who, what, make in self._plan(workload):
            if refused.get(who):
                results.append(Result(who, what, "not run", refused[who] or ""))
            else:
                makers.append((who, what, partial(make, place)))
        effort = Effort(
            seconds=self.wish.effort,
            longest_call=self.wish.longest_call,
            l2=self.wish.l2,
            remaining=lambda: self.remaining,
            predict=partial(self._predict, workload),
        )
        return [*race(place, makers, self.watch, effort), *results]

    def _plan(self, workload: Workload) -> list[tuple[str, str, Callable[[Field], Task]]]:
        """Return all competitors of a workload; the dense ones come first."""
        table: dict[str, Maker] = {"forward": STAGES, "backward": BACKWARDS, "decode": DECODES}[
            workload.task
        ]
        dense = "dense.backward" if workload.task == "backward" else "dense"
        found: list[tuple[str, str, Callable[[Field], Task]]] = [
            (name, dense, lambda field, name=name: dense_task(name, field)())
            for name in self.wish.baselines
            if name in BACKENDS
        ]
        for candidate in [*self.candidates, *self.others]:
            ours = candidate in self.candidates
            for function, maker in table.items():
                if _offers(candidate, function) and self._wanted(function, ours):
                    found.append((candidate.name, function, partial(maker, candidate)))
        return found

    def _wanted(self, function: str, ours: bool) -> bool:
        if not ours and function not in WHOLE:
            return False
        contract_function = function.split("[")[0].split(".")[0]  # of `compress_keys[k_c2]`, too
        return not self.wish.functions or contract_function in self.wish.functions

    def _predict(
        self, workload: Workload, competitor: str, function: str
    ) -> tuple[float, float] | None:
        """Guess the seconds of a call from a shorter one: they grow with length, or with work."""
        known = [
            (f["length"], f["seconds"]["median"])
            for f in self.record.figures.values()
            if f["implementation"] == competitor
            and f["function"] == function
            and f["shape"] == workload.shape.name
            and f["batch"] == workload.batch
            and f["seconds"]
            and f["length"] <= workload.length
        ]
        if not known:
            return None
        length, seconds = max(known)
        now, then = (count(function, workload.at(n)) for n in (workload.length, length))
        pairs = [(now.flop, then.flop), (now.bytes, then.bytes), (now.exps, then.exps)]
        growth = [new / old for new, old in pairs if old]
        linear = 1.0 if workload.task == "decode" else workload.length / length
        return seconds * min([linear, *growth]), seconds * max([linear, *growth])

    def _overlap(self, place: Field) -> dict[str, Any]:
        w = place.workload
        names = {"shape": w.shape.name, "length": w.length, "budget": w.budget, "inputs": w.inputs}
        return names | {f"union_of_{n}": round(mean_union(place.selected, n), 2) for n in (1, 4, 8)}


def _offers(candidate: Candidate, function: str) -> bool:
    name = function.split(".")[0].split("[")[0]
    if function.endswith(".backward") and not candidate.capabilities.gradients:
        return False
    if function in DECODES:
        return all(candidate.offers(n) for n in ("new_cache", "append", "decode"))
    return candidate.offers(name)
