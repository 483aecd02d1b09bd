"""Second-order mutation: edits that nobody thought of, run against the suite.

    python -m infllmv2_conformance.mutants.random_edits --number 300 --seed 0

Each edit is one slip in the source of the bundled implementation. One that no rule notices either
changes no result, and then `survivors.toml` says why, or shows a hole in the suite.
"""

from __future__ import annotations

import random
import tomllib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from infllmv2_conformance.names import check_names

from .build import sources, with_edits
from .model import Edit
from .operators import Change, changes

SURVIVORS = Path(__file__).with_name("survivors.toml")
SMALL_CHUNKS = Edit("places", "CHUNK_BYTES = 96 << 20", "CHUNK_BYTES = 1 << 22")
"""Cases are small: with chunks to match, the code that cuts rows into chunks is reached, too."""
KINDS = ("equal", "speed", "free", "defence", "unreachable")
"""Why an edit may survive: the code means the same; it is only slower or larger; the contract
leaves it open; it is a second safeguard behind a first; no legal argument comes there."""


@dataclass(frozen=True)
class RandomEdit:
    """Hold one edit of the bundled implementation.

    Args:
        module: the file's name without `.py`.
        change: where, and what stands there instead.
    """

    module: str
    change: Change

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Return module, function, and the lines before and after: what it is known by."""
        text = originals()[self.module]
        first = text.rfind("\n", 0, self.change.start) + 1
        last = text.find("\n", self.change.end)
        head, tail = text[first : self.change.start], text[self.change.end : last]
        before, after = text[first:last], head + self.change.after + tail
        return self.module, self.change.function, _squeeze(before), _squeeze(after)

    @property
    def texts(self) -> dict[str, str]:
        """Return the sources of all modules."""
        texts = dict(originals())
        return texts | {self.module: self.change.apply(texts[self.module])}

    def __str__(self) -> str:
        """Return the edit as a person reads it."""
        module, function, before, after = self.key
        return f"{module}.{function}: {self.change.operator}\n  - {before}\n  + {after}"


@dataclass(frozen=True)
class Verdict:
    """Say what became of an edit.

    Args:
        edit: the edit.
        end: "killed", "survived", "time", "died" or "unbuilt": its source cannot be imported.
        rule: the rule that noticed it, or was running.
        what: how it failed.
        seconds: how long it took.
    """

    edit: RandomEdit
    end: str
    rule: str = ""
    what: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Survivor:
    """Explain an edit that no rule can notice.

    Args:
        module: the module.
        function: the function.
        before: the lines as they are.
        after: the lines with the edit.
        kind: one of `KINDS`.
        reason: why no rule notices it.
    """

    module: str
    function: str
    before: str
    after: str
    kind: str
    reason: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Return what the edit is known by."""
        return self.module, self.function, self.before, self.after


@cache
def originals() -> dict[str, str]:
    """Return the sources that are edited: those of the implementation, with small chunks."""
    return with_edits("random", sources(), (SMALL_CHUNKS,))


@cache
def every_edit() -> dict[str, list[RandomEdit]]:
    """Return all edits of every module."""
    return {m: [RandomEdit(m, c) for c in changes(text)] for m, text in originals().items()}


def sample(number: int, seed: int, modules: Sequence[str] = ()) -> list[RandomEdit]:
    """Return edits of every module and of every kind of edit, in turn, until there are enough."""
    source = random.Random(seed)
    heaps: dict[tuple[str, str], list[RandomEdit]] = defaultdict(list)
    for module, edits in every_edit().items():
        for edit in edits if not modules or module in modules else []:
            heaps[module, edit.change.operator].append(edit)
    for heap in heaps.values():
        source.shuffle(heap)
    order = list(heaps.values())
    source.shuffle(order)
    chosen: list[RandomEdit] = []
    while order and len(chosen) < number:
        order = [heap for heap in order if heap]
        chosen += [heap.pop() for heap in order][: number - len(chosen)]
    return chosen


def read_survivors(path: Path = SURVIVORS) -> dict[tuple[str, str, str, str], Survivor]:
    """Return the explained survivors by their key.

    Raises:
        ValueError: a kind is unknown, a field is missing, or an edit is listed twice.
    """
    known: dict[tuple[str, str, str, str], Survivor] = {}
    rows = cast("list[dict[str, Any]]", tomllib.loads(path.read_text("utf-8")).get("survivor", []))
    for row in rows:
        try:
            survivor = Survivor(**row)
        except TypeError as error:
            raise ValueError(f"{path.name}: {row} has other fields than it must: {error}") from None
        if survivor.kind not in KINDS:
            raise ValueError(f"{path.name}: kind must be of {KINDS}, but is {survivor.kind!r}")
        if survivor.key in known:
            raise ValueError(f"{path.name}: this edit is listed twice: {survivor.key}")
        known[survivor.key] = survivor
    return known


def main(
    number: Annotated[int, typer.Option(min=1, help="How many edits.")] = 100,
    seed: Annotated[int, typer.Option(help="Which edits; the same seed chooses the same.")] = 0,
    module: Annotated[list[str] | None, typer.Option(help="Only this module; repeatable.")] = None,
    profile: Annotated[str, typer.Option(help="Size: small, quick, ci ...")] = "small",
    stages: Annotated[
        int, typer.Option(min=0, help="Only so many stages that an edit reaches; 0 for all.")
    ] = 0,
    limit: Annotated[int, typer.Option(min=1, help="CPU seconds that a rule may take.")] = 60,
    workers: Annotated[int, typer.Option("-n", min=1, help="Processes to share the work.")] = 2,
) -> None:
    """Run random edits of the bundled implementation against the suite."""
    from .edit_pool import SIZES, run_edits

    check_names("profile", [profile], SIZES)
    check_names("module", module, sources())
    known, holes, counts = read_survivors(), 0, defaultdict[str, int](int)
    edits = sample(number, seed, module or ())
    for verdict in run_edits(edits, profile, stages=stages, seconds=limit, workers=workers):
        survivor = known.get(verdict.edit.key)
        explained = verdict.end == "survived" and survivor is not None
        counts["explained" if explained else verdict.end] += 1
        holes += verdict.end == "survived" and not explained
        show(verdict, survivor)
    words = ", ".join(f"{count} {end}" for end, count in sorted(counts.items()))
    typer.echo(f"\n{len(edits)} edits: {words}")
    raise typer.Exit(1 if holes else 0)


def show(verdict: Verdict, survivor: Survivor | None) -> None:
    """Print what became of an edit; in full if it needs to be read."""
    if verdict.end == "survived" and survivor is None:
        typer.echo(f"survived {verdict.seconds:6.1f} s  {verdict.edit}")
        return
    end = "explained" if verdict.end == "survived" else verdict.end
    place = f"{verdict.edit.module}.{verdict.edit.change.function}"
    listed = "  (listed as a survivor)" if survivor and end != "explained" else ""
    typer.echo(
        f"{end:<9}{verdict.seconds:6.1f} s  {place}: {verdict.edit.change.operator}; "
        f"{verdict.rule} {verdict.what}{listed}"
    )


def _squeeze(lines: str) -> str:
    return " ".join(lines.split())


if __name__ == "__main__":
    typer.run(main)
