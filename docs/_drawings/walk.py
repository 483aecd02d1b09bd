"""One query's way through the stages, with the numbers of a real run."""

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from infllmv2_reference import SparseConfig, attend_blocks, compress_keys, score_windows
from infllmv2_reference.geometry import is_forced, num_blocks, num_windows, window_span

from .example import run_stages, walk_run
from .style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    SOFT,
    bare,
    canvas,
    cell,
    key,
    seamless,
)


def walk() -> Figure:
    """Draw windows, their scores, block scores, the selection and the attended tokens."""
    run = walk_run()
    figure, (windows, blocks, chosen) = canvas(
        4.0, 3, sharex=True, gridspec_kw={"height_ratios": [1.25, 1.25, 0.55]}
    )
    size, stride, block_size = (
        run.config.kernel_size,
        run.config.kernel_stride,
        run.config.block_size,
    )
    for window, score in enumerate(run.scores[-1].tolist()):
        first, end = window_span(window, size, stride)
        windows.plot([first, end], [score, score], color=BLUE, linewidth=2.2)
        blocks.plot([first, end], [score, score], color=FAINT, linewidth=2.2)
    windows.set_ylabel("score of\nwindows")
    for block, score in enumerate(run.block_scores[-1].tolist()):
        start = block * block_size
        blocks.plot([start, start + block_size], [score, score], color=ORANGE, linewidth=2.6)
    blocks.set_ylabel("score of\nblocks")
    for axes in (windows, blocks):
        axes.set_ylim(bottom=0)
    _selected_blocks(chosen, run.selected[-1].tolist(), run.config)
    for axes in (windows, blocks, chosen):
        for edge in range(0, run.num_keys + 1, block_size):
            axes.axvline(edge, color=FAINT, linewidth=0.8, zorder=0)
    chosen.set(xlim=(-0.5, run.num_keys + 0.5), xlabel="token; vertical lines are block borders")
    chosen.set_xticks(range(0, run.num_keys + 1, block_size))
    return figure


def _selected_blocks(axes: Axes, selected: list[int], config: SparseConfig) -> None:
    size, position = config.block_size, 63
    for block in range(position // size + 1):
        name, colour = "no", FAINT
        if block in selected:
            name, colour = "best", ORANGE
            if is_forced(block, position, size, config.init_blocks, config.local_blocks):
                name, colour = ("initial", PURPLE) if block < config.init_blocks else ("local", SKY)
        cell(axes, block * size, 0, size, 1, colour, name)
    axes.set_ylim(0, 1)
    bare(axes, "selected")


def heads() -> Figure:
    """Draw the weights of four heads, summed, under both normalisers."""
    config = SparseConfig(
        block_size=8, kernel_size=4, kernel_stride=2, window_size=8, topk=4, lse="exact"
    )
    generator = torch.Generator().manual_seed(5)
    k = torch.randn(64, 1, 16, generator=generator)
    q = torch.randn(1, 4, 16, generator=generator) * torch.tensor([2.5, 1.5, 1.0, 0.5])[:, None]
    k_c1, k_c2 = compress_keys(k, 4, 2), compress_keys(k, 16, 8)
    figure, panels = canvas(3.3, 2, sharex=True)
    for axes, lse in zip(panels, ("exact", "approximate"), strict=True):
        one = SparseConfig(**(vars(config) | {"lse": lse}))
        bottom = torch.zeros(len(k_c1))
        for head, colour in enumerate((BLUE, ORANGE, GREEN, PURPLE)):
            weights = score_windows(q[:, head : head + 1], k_c1, k_c2, 64, one)[0, 0]
            axes.bar(range(len(weights)), weights, 0.8, bottom, color=colour, label=f"head {head}")
            bottom += weights
        axes.set_ylabel(f"score, {lse}")
    key(panels[0], {"head 0": BLUE, "head 1": ORANGE, "head 2": GREEN, "head 3": PURPLE})
    panels[1].set_xlabel("window")
    panels[1].set_xlim(-0.7, len(k_c1) - 0.3)
    return figure


def attended() -> Figure:
    """Draw which tokens every query of a small run attends, as the gradient of values shows it."""
    run = walk_run()
    config, size = run.config, run.config.block_size
    generator = torch.Generator().manual_seed(8)
    q, k = torch.randn(64, 1, 16, generator=generator), torch.randn(64, 1, 16, generator=generator)
    selected = run_stages(q, k, config).selected
    one_hot = torch.eye(64)[:, None]  # value j is 1 in channel j: the output is the weights
    weights, _ = attend_blocks(q.new_zeros(64, 1, 64), one_hot, one_hot, selected[None], size)
    figure, (axes,) = canvas(3.6)
    for position, row in enumerate(weights[:, 0] > 0):
        for first, end in _stretches(row.tolist()):
            seamless(axes, first, position, end - first, 1, BLUE)
        for first, end in _stretches([not x for x in row.tolist()[: position + 1]]):
            seamless(axes, first, position, end - first, 1, FAINT)
    axes.set(xlim=(0, 64), ylim=(64, 0), xlabel="key token", ylabel="query at position")
    axes.set_xticks(range(0, 65, size))
    axes.set_yticks(range(0, 65, size))
    key(axes, {"attended": BLUE, "before the query, in a block that it did not select": FAINT})
    return figure


def _stretches(row: list[bool]) -> list[tuple[int, int]]:
    """Return the half-open ranges in which `row` is true."""
    edges = [i for i in range(len(row) + 1) if (i < len(row) and row[i]) != (i > 0 and row[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def growth() -> Figure:
    """Draw how many windows and blocks there are as tokens arrive."""
    figure, (axes,) = canvas(2.5)
    tokens = range(0, 513)
    for label, lift, colour, style, count in (
        ("windows of K_C1, 32 every 16", 0, BLUE, "-", lambda s: num_windows(s, 32, 16)),
        ("blocks of 64", 0.9, ORANGE, "--", lambda s: num_blocks(s, 64)),
        ("windows of K_C2, 128 every 64", -0.9, GREEN, "-.", lambda s: num_windows(s, 128, 64)),
    ):
        axes.step(tokens, [count(s) for s in tokens], where="post", color=colour, ls=style)
        axes.text(516, count(512) + lift, label, va="center", color=INK, fontsize=8)
    axes.axvspan(300, 400, color=SOFT, alpha=0.15, linewidth=0)
    new = num_windows(400, 32, 16) - num_windows(300, 32, 16)
    text = f"a piece of 100 tokens\ncompletes {new} windows of K_C1"
    axes.annotate(text, (298, 21), ha="right", va="center", fontsize=8)
    axes.set(xlim=(0, 512), ylim=(0, 32), xlabel="tokens so far", ylabel="how many")
    axes.set_xticks(range(0, 513, 64))
    axes.grid(axis="y")
    return figure


ALL = (walk, heads, attended, growth)
