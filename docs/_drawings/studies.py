"""The drawings of the studies, from their stored results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, RED, SOFT, canvas

RESULTS = Path(__file__).resolve().parents[1] / "results" / "studies"
ONE, THREE = "one_stage", "three_stage"
SMALL = {"fontsize": 8, "color": INK}


def load(study: str) -> dict[str, Any]:
    """Return what a study stored."""
    return json.loads((RESULTS / f"{study}.json").read_text(encoding="utf-8"))


def needles_context() -> Figure:
    """Draw the recall of both compressions by context, one line per length of the needle."""
    results = load("needles")["results"]
    figure, panels = canvas(3.2, 1, 2, sharey=True)
    titles = ("white", "keys are white noise"), ("drifting", "a quarter of the variance drifts")
    for axes, (kind, title) in zip(panels, titles, strict=True):
        contexts = [int(s) for s in results[kind]]
        for length, colour in (("1", BLUE), ("2", ORANGE), ("4", GREEN), ("8", PURPLE)):
            for method, style in ((THREE, "o-"), (ONE, "s--")):
                recall = [results[kind][str(s)][method][length] for s in contexts]
                label = f"{length} token{'s' * (length != '1')}" if method == THREE else None
                axes.plot(contexts, recall, style, color=colour, label=label, markersize=3.5)
        axes.set(title=title, xlabel="context (keys)", ylim=(-0.03, 1.03))
        _contexts(axes, contexts)
        axes.grid(axis="y")
    panels[0].set_ylabel("recall of the needle")
    panels[0].plot([], [], "o-", color=SOFT, label="3-stage")
    panels[0].plot([], [], "s--", color=SOFT, label="1-stage")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def needles_offset() -> Figure:
    """Draw the recall of a needle of 8 tokens by where in its block it begins."""
    results = load("needles")["results"]["offset"]
    figure, (axes,) = canvas(2.5)
    offsets = [int(offset) for offset in results]
    for method, style, colour in ((THREE, "o-", BLUE), (ONE, "s--", ORANGE)):
        recall = [results[str(offset)][method]["8"] for offset in offsets]
        axes.plot(offsets, recall, style, color=colour, label=method.replace("_", "-"))
    axes.axvspan(56.5, 64, color=SOFT, alpha=0.15, linewidth=0)
    axes.text(63.5, 0.04, "reaches into\nthe next block", ha="right", **SMALL)
    axes.set(xlim=(-1, 64), ylim=(0, 1.03), ylabel="recall")
    axes.set_xlabel("offset of the needle's first token in its block")
    axes.set_xticks(range(0, 65, 16))
    axes.grid(axis="y")
    axes.legend(loc="lower left", ncols=2)
    return figure


def normaliser_spread() -> Figure:
    """Draw the measured spread of the group's factors, and both bounds on it."""
    results = load("normaliser")["results"]
    figure, panels = canvas(3.1, 1, 3, sharey=True)
    for axes, (kind, scales) in zip(panels, results.items(), strict=True):
        x = [_scale(name) for name in scales]
        for name, label, style, colour in (
            ("key_bound", "bound from the keys' spread", "^:", SOFT),
            ("logit_bound", "bound from the logits' spread", "s--", ORANGE),
            ("spread", "measured", "o-", BLUE),
        ):
            y = [scales[s]["group_8"][name] for s in scales]
            axes.plot(x, y, style, color=colour, label=label)
        axes.set(xscale="log", yscale="log", title=kind, xlabel="scale of the queries")
        axes.set_xticks(x, [f"{v:g}" for v in x])
        axes.minorticks_off()
        axes.grid(axis="y")
    panels[0].set_ylabel("spread of ln r over the group")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def normaliser_differs() -> Figure:
    """Draw how many rows select differently, by kind of input and scale of the queries."""
    results = load("normaliser")["results"]
    figure, (axes,) = canvas(2.5)
    kinds = (("white", FAINT), ("drifting", BLUE), ("needle", ORANGE))
    for i, (kind, colour) in enumerate(kinds):
        scales = results[kind]
        parts = [100 * scales[s]["group_8"]["differs"] for s in scales]
        places = [j + 0.27 * (i - 1) for j in range(len(scales))]
        axes.bar(places, parts, 0.25, color=colour, edgecolor=SOFT, linewidth=0.6, label=kind)
        for place, part in zip(places, parts, strict=True):
            axes.text(place, part + 1, f"{part:.0f}", ha="center", va="bottom", **SMALL)
    axes.set_xticks(range(len(scales)), [f"{_scale(s):g}" for s in scales])
    axes.set(xlabel="scale of the queries", ylabel="% of rows", ylim=(0, 112))
    axes.grid(axis="y")
    axes.legend(loc="upper left", ncols=3, bbox_to_anchor=(0, 1.13))
    return figure


def selection_time() -> Figure:
    """Draw where the time of a forward goes, with either normaliser."""
    times = load("selection-time")["results"]["131072"]
    figure, (axes,) = canvas(2.4)
    names = [("correlated", "select"), ("correlated", "select_exact")]
    names += [("random", "select"), ("random", "select_exact")]
    labels = [f"{k}, {'exact' if 'exact' in s else 'approximate'}" for k, s in names] + ["dense"]
    for y, (kind, select) in enumerate(names):
        left = 0.0
        parts = (times["compress"], SOFT), (times[select], ORANGE), (times[f"attend_{kind}"], BLUE)
        for width, colour in parts:
            axes.barh(y, width, 0.6, left=left, color=colour)
            left += width
        share = times[f"share_{select}_{kind}"]
        text = f"{left:.0f} ms, {share:.0%} of it to select"
        axes.text(left + 2, y, text, va="center", **SMALL)
    axes.barh(len(names), times["dense"], 0.6, color=FAINT, edgecolor=SOFT, linewidth=0.6)
    axes.text(
        times["dense"] - 3, len(names), f"{times['dense']:.0f} ms", va="center", ha="right", **SMALL
    )
    for label, colour in (("select", ORANGE), ("attend", BLUE)):
        axes.barh(0, 0, color=colour, label=label)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds, 128k tokens", xlim=(0, 250))
    axes.legend(loc="upper right", ncols=2, bbox_to_anchor=(1, 0.95))
    return figure


def coverage_one() -> Figure:
    """Draw the part of its context that one query attends, by budget."""
    results = load("coverage")["results"]["one_query"]
    figure, (axes,) = canvas(2.7)
    colours = (SOFT, GREEN, BLUE, ORANGE, PURPLE)
    for (budget, parts), colour in zip(results.items(), colours, strict=True):
        contexts = [int(s) for s in parts]
        axes.plot(contexts, [100 * p for p in parts.values()], "o-", color=colour)
        axes.text(contexts[-1] * 1.08, 100 * parts[str(contexts[-1])], budget, va="center", **SMALL)
    axes.set(xlabel="context (keys)", ylabel="% of tokens attended", yscale="log")
    axes.set_yticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
    axes.minorticks_off()
    _contexts(axes, contexts)
    axes.grid(axis="y")
    axes.text(contexts[-1] * 1.08, 16, "budget", va="center", **SMALL)
    return figure


def coverage_union() -> Figure:
    """Draw the part of the context that a tile of queries needs together."""
    results = load("coverage")["results"]["union"]
    figure, panels = canvas(3.0, 1, 2, sharey=True)
    for axes, context in zip(panels, ("32768", "131072"), strict=True):
        for (name, table), colour, mark in zip(
            results.items(), (RED, ORANGE, GREEN, BLUE), "o^sD", strict=True
        ):
            parts = table[context]["part"]
            alike = float(name.removeprefix("alike_").replace("_", "."))
            label = f"{alike:.0%} alike"
            tiles = [int(tile) for tile in parts]
            axes.plot(tiles, list(parts.values()), f"{mark}-", color=colour, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(tiles, [str(tile) for tile in tiles])
        axes.set(title=f"{int(context) // 1024}k keys", xlabel="queries of a tile", ylim=(0, 1.03))
        axes.grid(axis="y")
    panels[0].set_ylabel("part of all blocks")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def sensitivity() -> Figure:
    """Draw the recall of two needles under every variant, one panel per parameter."""
    record = load("sensitivity")
    results, trials = record["results"], record["parameters"]["trials"]
    titles = {
        "windows": ("window length, stride (l1, s1)", "32_16"),
        "coarse": ("normaliser (l2, s2)", "128_64"),
        "pooling": ("pooling", "overlap"),
        "budget": ("budget", "96"),
        "window_size": ("sliding window, budget 96", "2048"),
    }
    heights = [len(results[name]) for name in titles]
    figure, panels = canvas(6.6, 5, sharex=True, gridspec_kw={"height_ratios": heights})
    for axes, (parameter, (title, released)) in zip(panels, titles.items(), strict=True):
        names = list(results[parameter])[::-1]
        for needle, mark, colour, lift in (("2", "o", ORANGE, 0.12), ("8", "s", BLUE, -0.12)):
            recall = [results[parameter][name][f"recall_{needle}"] for name in names]
            error = [(p * (1 - p) / trials) ** 0.5 for p in recall]
            y = [i + lift for i in range(len(names))]
            axes.errorbar(recall, y, None, error, mark, color=colour, elinewidth=1)
        labels = [_variant(name) + (" *" if name == released else "") for name in names]
        axes.set_yticks(range(len(names)), labels)
        axes.set(ylim=(-0.6, len(names) - 0.4), xlim=(0, 1.02), title=title)
        axes.grid(axis="x")
    panels[-1].set_xlabel("recall of a needle of 2 tokens (circles) and of 8 (squares); * released")
    return figure


def local_lost() -> Figure:
    """Draw how many tokens of the window are lost, by offset of the query in its block."""
    results = load("local-blocks")["results"]
    figure, (axes,) = canvas(2.4)
    for count, colour, style in (("31", SOFT, ":"), ("32", ORANGE, "--"), ("33", BLUE, "-")):
        lost = results[f"local_{count}"]["by_offset"]
        axes.step(range(len(lost)), lost, where="mid", color=colour, ls=style)
        axes.text(len(lost), lost[-1], f"{count} local blocks", va="center", **SMALL)
    axes.set(xlim=(0, 63), ylim=(-3, 130), ylabel="tokens lost")
    axes.set_xlabel("offset of the query in its block")
    axes.set_xticks([0, 16, 32, 48, 63])
    axes.set_yticks([0, 31, 63, 95, 127])
    axes.grid(axis="y")
    return figure


def _contexts(axes: Axes, contexts: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{s // 1024}k" for s in contexts])


def _scale(name: str) -> float:
    return float(name.removeprefix("scale_").replace("_", "."))


def _variant(name: str) -> str:
    return name.replace("_", ", ") if name[0].isdigit() else name.replace("paper_eq7", "Eq. 7")


ALL = (
    needles_context,
    needles_offset,
    normaliser_spread,
    normaliser_differs,
    selection_time,
    coverage_one,
    coverage_union,
    sensitivity,
    local_lost,
)
