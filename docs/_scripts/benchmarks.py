"""Fill in tables and plots of stored benchmarks, from `<!-- benchmark: ... -->` to `<!-- end -->`.

`python docs/_scripts/benchmarks.py` rewrites the pages and draws the plots. With `--check` it only
says what is out of date, and ends with status 1 if anything is.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / package) for package in ("reference", "conformance")]

import matplotlib  # noqa: E402

from infllmv2_conformance.bench.derived import breakdowns, exponents, limited_by  # noqa: E402
from infllmv2_conformance.bench.figures import key_of  # noqa: E402
from infllmv2_conformance.bench.gate import spread  # noqa: E402
from infllmv2_conformance.bench.plots import PANELS, PLOTS, THEMES, digest, draw_all  # noqa: E402
from infllmv2_conformance.bench.record import load  # noqa: E402
from infllmv2_conformance.bench.table import seconds_text  # noqa: E402
from infllmv2_conformance.bench.workloads import short  # noqa: E402

FILES = ("README.md", "docs/benchmarks.md", "docs/results/benchmarks/index.md")
PLACE = re.compile(
    r"(?P<begin><!-- benchmark: (?P<kind>[a-z]+) (?P<files>[^\n]+?) -->\n)(?P<body>.*?)"
    r"(?P<end><!-- end -->)",
    re.DOTALL,
)
DASH = "-"
Data = dict[str, Any]


def main() -> int:
    """Rewrite or check the pages, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    options = parser.parse_args()
    stale = list(find_stale()) if options.check else []
    for what in stale:
        print(f"{what} is out of date: run python docs/_scripts/benchmarks.py")
    if not options.check:
        for name in FILES:
            path = ROOT / name
            path.write_text(fill_in(path.read_text(encoding="utf-8"), path), encoding="utf-8")
        for benchmark in benchmarks():
            draw_all(load(benchmark), folder_of(benchmark))
    return 1 if stale else 0


def find_stale(files: tuple[str, ...] = FILES) -> Iterator[str]:
    """Yield the pages whose tables, and the plots whose drawings, are not those of the data."""
    for name in files:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        if text.count("<!-- benchmark:") != len(PLACE.findall(text)):
            yield f"{name}: a benchmark without '<!-- end -->'"
        elif fill_in(text, path) != text:
            yield name
    for benchmark in benchmarks():
        yield from stale_plots(benchmark, folder_of(benchmark))


def stale_plots(benchmark: Path, folder: Path) -> Iterator[str]:
    """Yield plots that were drawn from other data or, by this matplotlib, would look different."""
    data = load(benchmark)
    with tempfile.TemporaryDirectory() as scratch:
        fresh = {path.name: path for path in draw_all(data, Path(scratch))}
        found = {path.name: path for path in folder.glob("*.svg")}
        for name in sorted(fresh.keys() | found.keys()):
            if name not in fresh or name not in found:
                yield f"{folder.name}/{name}"
                continue
            old = found[name].read_text(encoding="utf-8")
            ours = f"matplotlib {matplotlib.__version__}<" in old
            same = not ours or old == fresh[name].read_text(encoding="utf-8")
            if digest(data) not in old or not same:
                yield f"{folder.name}/{name}"


def benchmarks() -> list[Path]:
    """Return the stored benchmarks that are plotted: those that a page names."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in FILES]
    places = [place for text in texts for place in PLACE.finditer(text)]
    plotted = [place for place in places if place["kind"] in ("headline", "plots")]
    return list(dict.fromkeys(ROOT / place["files"].split()[0] for place in plotted))


def folder_of(benchmark: Path) -> Path:
    """Return where the plots of a benchmark lie."""
    return benchmark.with_suffix("")


def fill_in(text: str, page: Path) -> str:
    """Return a page with every place filled in from the data."""

    def body(place: re.Match[str]) -> str:
        paths = [ROOT / name for name in place["files"].split()]
        lines = KINDS[place["kind"]](paths, page)
        return place["begin"] + "\n".join(lines) + "\n" + place["end"]

    return PLACE.sub(body, text)


def forward(paths: list[Path], page: Path) -> list[str]:
    """Return the whole forward against dense attention."""
    del page
    data = load(paths[0])
    rows = whole(data, "forward")
    who = list(dict.fromkeys(name for _, name in rows))
    lengths = sorted({length for length, _ in rows})
    return table(
        ["tokens", *who],
        [[short(n), *(cell(rows.get((n, name))) for name in who)] for n in lengths],
    )


def headline(paths: list[Path], page: Path) -> list[str]:
    """Return the whole forward against dense attention, and its plot, as GitHub shows them."""
    folder = relative(folder_of(paths[0]), page)
    return [
        *forward(paths, page),
        "",
        "<picture>",
        f'  <source media="(prefers-color-scheme: dark)" srcset="{folder}/latency-dark.svg">',
        f'  <img alt="Time over length, beside dense attention" src="{folder}/latency-light.svg">',
        "</picture>",
        "",
        machine_text(load(paths[0])),
    ]


def whole(data: Data, task: str) -> dict[tuple[int, str], Any]:
    """Return the figures of whole tasks by length and who, for the first shape and budget."""
    figures = [f for f in data["figures"] if f["task"] == task and f["seconds"]]
    first = {"shape": data["settings"]["shapes"][0]}
    first |= {name: figures[0][name] for name in ("budget", "batch", "l2")} if figures else {}
    found: dict[tuple[int, str], Any] = {}
    for figure in figures:
        if any(figure[name] != value for name, value in first.items()):
            continue
        if figure["function"].startswith("dense"):
            found.setdefault((figure["length"], f"dense, {figure['implementation']}"), figure)
        elif figure["function"] == PANELS[task]:
            found[figure["length"], f"{figure['implementation']}, {figure['inputs']}"] = figure
    return found


def cell(figure: Any) -> str:
    """Return a time and how it compares with dense attention."""
    if figure is None:
        return DASH
    ratio, text = figure["ratio_to_dense"], time_text(figure)
    if ratio is None or figure["dense"] == figure["implementation"]:
        return text
    return f"{text} ({1 / ratio:.2g}x)"


def time_text(figure: Any) -> str:
    """Return the median; `h` marks a time during which the device waited for the host."""
    mark = " h" if limited_by(figure) == "host" else ""
    return seconds_text(figure["seconds"]["median"]) + mark


def figures(paths: list[Path], page: Path) -> list[str]:
    """Return every figure that has a number."""
    del page
    data = load(paths[0])
    titles = ["function", "workload", "time", "IQR", "min", "rounds"]
    titles += ["x dense", "roofline", "memory"]
    rows = [
        [
            f"{f['implementation']} `{f['function']}`",
            workload_text(f),
            time_text(f),
            f"{100 * f['seconds']['iqr'] / f['seconds']['median']:.0f} %",
            seconds_text(f["seconds"]["min"]),
            str(len(f["seconds"]["rounds"])),
            DASH if f["ratio_to_dense"] is None else f"{f['ratio_to_dense']:.3g}",
            f"{100 * f['roofline']['share']:.2g} % {f['roofline']['bound_by']}",
            DASH if f["memory_bytes"] is None else f"{f['memory_bytes'] / 2**20:.0f} MiB",
        ]
        for f in data["figures"]
        if f["seconds"]
    ]
    return [machine_text(data), "", *table(titles, rows)]


def workload_text(f: Any) -> str:
    """Return what a figure was given."""
    batch = f" of {f['batch']}" if f["task"] == "decode" else ""
    return f"{f['shape']} {short(f['length'])} {f['task']}{batch}, {f['inputs']}, {f['l2']}"


def noise(paths: list[Path], page: Path) -> list[str]:
    """Return by how much two runs differ, for figures that the device limits, and for the rest."""
    del page
    first, second = (load(path) for path in paths)
    spreads = spread(first, second)
    limits = {key_of(f): limited_by(f) for f in first["figures"] if f["seconds"]}
    others = {key_of(f): limited_by(f) for f in second["figures"] if f["seconds"]}
    rows: list[list[str]] = []
    for key, found in spreads.items():
        host = "host" in (limits[key], others[key])
        ratio = DASH if found["ratio"] is None else f"{100 * found['ratio']:.1f} %"
        limit = "host" if host else "device"
        rows.append([f"`{key}`", limit, f"{100 * found['seconds']:.1f} %", ratio])
    rows.sort(key=lambda row: row[1])
    return table(["figure", "limited by", "medians differ by", "ratios to dense by"], rows)


def summary(paths: list[Path], page: Path) -> list[str]:
    """Return stages, growth and overlap."""
    del page
    data = load(paths[0])
    stages = [
        [
            f"{row['implementation']} {short(row['length'])} {row['inputs']}",
            *(seconds_text(row[part]) for part in ("compress", "select", "attend")),
            f"{100 * row['selection_share']:.0f} %",
        ]
        for row in breakdowns(data["figures"])
    ]
    growth = [
        [
            f"{row['implementation']} `{row['function']}`, {row['task']}",
            row["inputs"],
            f"{row['exponent']:.2f}",
            f"{short(row['lengths'][0])} to {short(row['lengths'][-1])}",
        ]
        for row in exponents(data["figures"])
    ]
    overlap = [
        [row["shape"], short(row["length"]), str(row["budget"]), row["inputs"]]
        + [f"{row[f'union_of_{n}']:.0f}" for n in (1, 4, 8)]
        for row in data["overlap"]
    ]
    return [
        *table(["forward", "compress", "select", "attend", "selecting is"], stages),
        "",
        *table(["time grows as length to the", "inputs", "exponent", "from"], growth),
        "",
        *table(["shape", "tokens", "budget", "inputs", "one", "union of 4", "of 8"], overlap),
    ]


def plots(paths: list[Path], page: Path) -> list[str]:
    """Return the plots of a benchmark as the documentation shows them."""
    data, folder = load(paths[0]), relative(folder_of(paths[0]), page)
    lines = [machine_text(data), ""]
    with tempfile.TemporaryDirectory() as scratch:
        drawn = {path.name for path in draw_all(data, Path(scratch))}
    for name in PLOTS:
        for theme in THEMES:
            file = f"{name}-{theme.name}.svg"
            if file in drawn:
                lines += [f"```{{image}} {folder}/{file}", f":class: only-{theme.name}"]
                lines += [f":alt: {name.replace('-', ' ')}", "```", ""]
    return lines[:-1]


def machine_text(data: Data) -> str:
    """Return where a benchmark was measured, and what exactly."""
    machine, settings = data["machine"], data["settings"]
    gpu = machine.get("gpu") or {"name": machine["processor"]}
    driver = f", driver {gpu['driver']}" if "driver" in gpu else ""
    packages = machine["packages"]
    versions = [f"{name} {packages[name]}" for name in ("torch", "triton") if name in packages]
    cuda = f", CUDA {machine['cuda']}" if machine["cuda"] else ""
    commit = (machine["commit"] or "unknown")[:9] + (" (changed)" if machine["changed"] else "")
    return (
        f"{gpu['name']}{driver}, {', '.join(versions)}{cuda}, {settings['dtype']}, "
        f"{' and '.join(settings['l2'])} L2, seed {settings['seed']}, commit {commit}. "
        f"Medians; h: the device waited for the host."
    )


def relative(path: Path, page: Path) -> str:
    """Return a path as a link on a page."""
    folder, ups = page.parent, ""
    while not path.is_relative_to(folder):
        folder, ups = folder.parent, f"{ups}../"
    return ups + path.relative_to(folder).as_posix()


def table(titles: list[str], rows: list[list[str]]) -> list[str]:
    """Return a Markdown table, numbers to the right; nothing if there are no rows."""
    if not rows:
        return []
    rules = ["---", *["---:"] * (len(titles) - 1)]
    return [f"| {' | '.join(row)} |" for row in (titles, rules, *rows)]


KINDS: dict[str, Callable[[list[Path], Path], list[str]]] = {
    "headline": headline,
    "forward": forward,
    "figures": figures,
    "noise": noise,
    "summary": summary,
    "plots": plots,
}

if __name__ == "__main__":
    sys.exit(main())
