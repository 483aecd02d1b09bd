"""How long to search: from a first look to a night."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """Set the size of the search.

    Args:
        name: what `--profile` takes.
        examples: cases drawn for a rule of ordinary weight, on top of its fixed corner cases.
        shape_classes: combinations of group, head dim, block size and windows that are visited.
        max_keys: the longest sequence drawn.
        max_pairs: most query-key pairs of a case, over all heads: what bounds its time on a CPU.
        database: whether Hypothesis remembers failing cases from run to run.
    """

    name: str
    examples: int
    shape_classes: int
    max_keys: int
    max_pairs: int = 400_000
    database: bool = False


PROFILES = {
    p.name: p
    for p in (
        Profile("quick", examples=20, shape_classes=7, max_keys=400),
        Profile("ci", examples=60, shape_classes=14, max_keys=1200),
        Profile("thorough", examples=250, shape_classes=28, max_keys=5000, database=True),
        Profile("nightly", examples=1500, shape_classes=56, max_keys=8000, database=True),
    )
}
