"""Integers drawn: where windows and blocks lie, and who sees them."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from infllmv2_reference import SparseConfig
from infllmv2_reference.geometry import (
    num_selected,
    num_windows,
    overlapping_windows,
    paper_eq7_windows,
    window_span,
)
from infllmv2_reference.score import visible_windows

from .style import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, SKY, SOFT, bare, box, canvas, cell

TOKENS = 320
BLOCK = 64


def windows() -> Figure:
    """Draw the windows of K_C1 and K_C2 over tokens and blocks."""
    figure, (axes,) = canvas(2.6)
    _blocks(axes, 4.0, TOKENS)
    _windows(axes, 2.7, 32, 16, BLUE)
    _windows(axes, 0.7, 128, 64, GREEN)
    axes.set(xlim=(0, TOKENS), ylim=(-0.1, 4.9), xlabel="token")
    axes.set_yticks(
        [1.15, 3.15, 4.35],
        [
            f"K_C2: {num_windows(TOKENS, 128, 64)} windows\nof 128 every 64",
            f"K_C1: {num_windows(TOKENS, 32, 16)} windows\nof 32 every 16",
            "blocks of 64",
        ],
    )
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xticks(range(0, TOKENS + 1, BLOCK))
    return figure


def _blocks(axes: Axes, y: float, tokens: int) -> None:
    for block in range(tokens // BLOCK):
        cell(axes, block * BLOCK, y, BLOCK, 0.7, FAINT, f"block {block}")
        axes.axvline((block + 1) * BLOCK, color=FAINT, linewidth=0.8, zorder=0)


def _windows(axes: Axes, y: float, size: int, stride: int, colour: str) -> None:
    """Draw complete windows in two rows, neighbours one above the other."""
    for window in range(num_windows(TOKENS, size, stride)):
        first, end = window_span(window, size, stride)
        level = y + 0.45 * (1 - window % 2)
        box(axes, first + 0.7, level, end - first - 1.4, 0.36, colour, linewidth=0)


def pooled() -> Figure:
    """Draw which windows block 2 pools, by overlap and by Eq. 7 read literally."""
    figure, (axes,) = canvas(2.7)
    _blocks(axes, 5.3, TOKENS)
    readings = ((2.9, overlapping_windows, BLUE), (0.0, paper_eq7_windows, ORANGE))
    for y, windows_of, colour in readings:
        first, end = windows_of(2, BLOCK, 32, 16)
        for window in range(5, 14):
            start, stop = window_span(window, 32, 16)
            level = y + 0.5 * (3 - window % 4)
            inside = first <= window < end
            fill = colour if inside else FAINT
            cell(axes, start + 0.7, level, stop - start - 1.4, 0.44, fill, str(window))
    axes.axvspan(128, 192, color=SOFT, alpha=0.12, linewidth=0)
    axes.set(xlim=(64, 256), ylim=(-0.15, 6.1), xlabel="token")
    axes.set_yticks([0.95, 3.85, 5.65], ["Eq. 7, literally", "overlap", "blocks"])
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xticks(range(64, 257, 32))
    return figure


def staircase() -> Figure:
    """Draw which windows of K_C1 and K_C2 every query position sees."""
    tokens, block = 48, 8
    figure, panels = canvas(3.3, 1, 2, sharey=True, gridspec_kw={"width_ratios": [1.6, 1]})
    for axes, size, stride, colour, name in (
        (panels[0], 4, 2, BLUE, "K_C1: windows of 4 tokens every 2"),
        (panels[1], 16, 8, GREEN, "K_C2: windows of 16 tokens every 8"),
    ):
        visible = visible_windows(tokens, tokens, size, stride)  # [T, C]
        for window in range(visible.shape[1]):
            seen = int(visible[:, window].sum())
            box(axes, window, 0, 1, tokens - seen, FAINT)
            box(axes, window, tokens - seen, 1, seen, colour)
        axes.set(xlim=(0, visible.shape[1]), ylim=(tokens, 0), title=name, xlabel="window")
        axes.set_yticks(range(0, tokens + 1, block))
        axes.axhline(21.5, color=INK, linewidth=0.9, linestyle=":")
        count = int(visible[21].sum())
        text = f"position 21 sees {count}"
        axes.text(visible.shape[1], 20.8, text, ha="right", va="bottom", fontsize=8)
    panels[0].set_ylabel("query position")
    return figure


def packing() -> Figure:
    """Draw a batch of three sequences laid end to end, queries above keys."""
    queries, keys = [2, 0, 3], [5, 4, 3]
    figure, (axes,) = canvas(2.0)
    starts = [sum(keys[:i]) for i in range(3)]
    firsts = [sum(queries[:i]) for i in range(3)]
    for i, colour in enumerate((BLUE, ORANGE, GREEN)):
        for j in range(keys[i]):
            asks = j >= keys[i] - queries[i]
            cell(axes, starts[i] + j, 0, 1, 1, colour if asks else FAINT, str(j))
        for j in range(queries[i]):
            row, column = firsts[i] + j, starts[i] + keys[i] - queries[i] + j
            cell(axes, row, 1.9, 1, 1, colour, str(keys[i] - queries[i] + j))
            axes.plot([row + 0.5, column + 0.5], [1.9, 1.0], color=colour, linewidth=0.9)
    axes.set(xlim=(-0.1, 12.1), ylim=(-0.75, 3.5))
    axes.set_yticks([0.5, 2.4], ["rows of k, v", "rows of q"])
    axes.tick_params(length=0)
    axes.set_xticks([])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    for edge in (*starts, sum(keys)):
        axes.text(edge, -0.2, str(edge), ha="center", va="top", fontsize=8)
    for edge, text in ((0, "0"), (2, "2, 2"), (5, "5")):
        axes.text(edge, 3.0, text, ha="center", va="bottom", fontsize=8)
    axes.text(12.1, 2.4, "cell: position in its own sequence", ha="right", va="center", fontsize=8)
    return figure


def switch() -> Figure:
    """Draw how many tokens the last query attends, by the number of keys."""
    config = SparseConfig.minicpm4()
    figure, (axes,) = canvas(2.5)
    dense = range(0, config.dense_len, 8)
    sparse = range(config.dense_len, 20481)
    axes.plot(dense, dense, color=BLUE)
    axes.plot(sparse, [_attended(s, config) for s in sparse], color=ORANGE)
    axes.plot([config.dense_len, 20480], [config.dense_len, 20480], ":", color=SOFT, linewidth=1.1)
    axes.axvline(config.dense_len, color=SOFT, linewidth=0.8, linestyle="--")
    axes.text(config.dense_len + 150, 700, "dense_len", va="top", fontsize=8)
    axes.text(3200, 4400, "dense: all", ha="right", fontsize=8)
    axes.text(20300, 6800, "sparse: at most 96 blocks of 64", ha="right", fontsize=8)
    axes.text(11500, 10900, "all keys", va="center", color=INK, fontsize=8)
    axes.set(xlim=(0, 20480), ylim=(0, 12500), xlabel="keys S", ylabel="tokens attended")
    axes.set_xticks(range(0, 20481, 4096))
    axes.set_yticks(range(0, 12289, 2048))
    axes.grid(axis="y")
    return figure


def _attended(num_keys: int, config: SparseConfig) -> int:
    """Count the tokens of the last query's blocks; its own one reaches up to itself."""
    position = num_keys - 1
    c = config
    blocks = num_selected(position, c.block_size, c.init_blocks, c.local_blocks, c.budget)
    return (blocks - 1) * c.block_size + position % c.block_size + 1


def local_blocks() -> Figure:
    """Draw a sliding window of 2 blocks over 2 and 3 local blocks, at three positions."""
    size, w = 4, 8
    figure, panels = canvas(2.4, 1, 3, sharey=True)
    for axes, position in zip(panels, (16, 18, 19), strict=True):
        own = position // size
        for row, count in ((1, w // size + 1), (0, w // size)):
            for block in range(own - count + 1, own + 1):
                box(axes, block * size, row, size, 0.55, SKY, linewidth=1.5)
            lost = max(0, (own - count + 1) * size - (position - w + 1))
            if lost:
                box(axes, position - w + 1, row, lost, 0.55, ORANGE, hatch="///", linewidth=0.6)
        box(axes, position - w + 1, 2, w, 0.35, PURPLE, linewidth=0)
        axes.set(xlim=(4, 20), ylim=(-0.2, 2.6), title=f"query at {position}", xlabel="token")
        axes.set_xticks(range(4, 21, size))
        bare(axes)
    panels[0].set_yticks([0.27, 1.27, 2.17], ["w/B blocks", "w/B + 1 blocks", "window w"])
    for axes in panels:
        axes.tick_params(axis="y", length=0)
    return figure


ALL = (windows, pooled, staircase, packing, switch, local_blocks)
