"""Plots of a report as SVG elements, with text and lines in the color of the page. The output is deterministic."""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .parts import Plot

# A placeholder color, replaced in the SVG by the text color of the page, light or dark.
INK = "#123456"
PALETTE = ("#5b8def", "#d98a36", "#3fa37a", "#b06ac9", "#d0566b", "#8c8f3c", "#3aa6b9", "#9a7b62")
NAME = 22  # maximum number of characters of a name in a plot
LEAST_RANGE = 0.04  # minimum range of an axis of scores
WIDTH = 5.4  # inches; readable on a phone without scrolling
# Names come from users, so math text is off. Text is not converted to paths, so that it can be searched.
STYLE = {"text.parse_math": False, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}


def _draw(caption: str, size: tuple[float, float], draw: Callable, columns: int = 1, rows: int = 1) -> Plot:
    """Return the plot that `draw` draws on one axes or an array of axes, colored in `INK`; `size` in inches."""
    with rc_context({**STYLE, "svg.hashsalt": hashlib.sha256(caption.encode()).hexdigest()}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        draw(axes[0] if len(axes) == 1 else axes)
        for each in axes:
            each.tick_params(which="both", colors=INK)
            for spine in each.spines.values():
                spine.set_edgecolor(INK)
            for label in (each.xaxis.label, each.yaxis.label, each.title):
                label.set_color(INK)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return Plot(caption, text[text.index("<svg") :].replace(INK, "currentColor"))


def _short(name: str) -> str:
    return name if len(name) <= NAME else f"{name[: NAME - 1]}…"


def _legend(axes) -> None:
    """Add a legend above the axes, where it hides no data."""
    axes.legend(frameon=False, labelcolor=INK, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


def _errors(rows: Sequence[Mapping], scale: float) -> np.ndarray | None:
    """Return (2, rows): distances from the value to the low and high ends; None if no row has an interval."""
    if all(row["low"] is None for row in rows):
        return None
    ends = [(0, 0) if row["low"] is None else (row["mean"] - row["low"], row["high"] - row["mean"]) for row in rows]
    return scale * np.maximum(np.array(ends).T, 0)  # rounding can make a distance slightly negative


def scores_plot(caption: str, metrics: Mapping[str, str], systems: Mapping[str, Mapping]) -> Plot:
    """
    Plot each metric of each system with its confidence interval, one panel per metric.

    Args:
        metrics: {metric: title with unit}.
        systems: {name: {metric: `mean`, `low`, `high`}}.
    """
    columns = min(2, len(metrics))
    rows = -(-len(metrics) // columns)

    def draw(axes):
        panels = np.ravel(axes)
        for panel, metric in zip(panels, metrics, strict=False):
            found = [(place, each[metric]) for place, each in enumerate(systems.values()) if metric in each]
            values, places = [row for _, row in found], [place for place, _ in found]
            panel.errorbar(
                [row["mean"] for row in values], places, xerr=_errors(values, 1), fmt="o", color=PALETTE[0], capsize=3
            )
            panel.set_yticks(range(len(systems)), [_short(name) for name in systems])
            panel.set_ylim(len(systems) - 0.5, -0.5)
            panel.margins(x=0.15)
            low, high = panel.get_xlim()
            slack = max(LEAST_RANGE - (high - low), 0) / 2  # tiny differences must not look large
            panel.set_xlim(low - slack, high + slack)
            panel.locator_params(axis="x", nbins=3)
            panel.ticklabel_format(axis="x", useOffset=False, style="plain")
            panel.set_xlabel(metrics[metric])
            panel.grid(axis="x", alpha=0.3)
        for panel in panels[len(metrics) :]:
            panel.set_visible(False)
        for panel in panels[1::2] if columns == 2 else ():
            panel.tick_params(labelleft=False)

    return _draw(caption, (WIDTH, rows * (1.1 + 0.28 * len(systems))), draw, columns, rows)


def accuracy_plot(caption: str, rows: Mapping[str, Mapping]) -> Plot:
    """Plot accuracy by modality (Fig. 6): {modality: `mean`, `low`, `high`, each 0 to 1}."""

    def draw(axes):
        values = list(rows.values())
        bars = axes.bar(
            range(len(rows)), [100 * row["mean"] for row in values], yerr=_errors(values, 100), width=0.6, capsize=4,
            color=PALETTE[0], ecolor=INK,
        )  # fmt: skip
        axes.bar_label(bars, [f"{100 * row['mean']:.1f}" for row in values], label_type="center", color=INK)
        axes.set_xticks(range(len(rows)), [_short(name) for name in rows])
        axes.set_ylim(0, 105)
        axes.set_xlabel("input (T text, A audio, V video)")
        axes.set_ylabel("accuracy (%)")

    return _draw(caption, (WIDTH, 3.2), draw)


def confusion_plot(caption: str, confusion: Mapping[str, Mapping[str, int]]) -> Plot:
    """Plot a confusion matrix {true: {predicted: count}}, shaded by the share within each row."""
    true = list(confusion)
    named = list(dict.fromkeys(name for row in confusion.values() for name in row))
    counts = np.array([[row.get(name, 0) for name in named] for row in confusion.values()])
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)

    def draw(axes):
        for (i, j), count in np.ndenumerate(counts):
            square = [j, j + 1, j + 1, j], [i, i, i + 1, i + 1]
            axes.fill(*square, color=PALETTE[0], alpha=0.85 * shares[i, j], lw=0)
            axes.text(j + 0.5, i + 0.5, str(count), ha="center", va="center", color=INK)
        axes.set_xlim(0, len(named))
        axes.set_ylim(len(true), 0)
        axes.set_xticks(np.arange(len(named)) + 0.5, [_short(name) for name in named], rotation=40)
        axes.set_yticks(np.arange(len(true)) + 0.5, [_short(name) for name in true])
        axes.set_xlabel("predicted emotion (number of clips)")
        axes.set_ylabel("true emotion")

    return _draw(caption, (WIDTH, 1.4 + 0.34 * len(true)), draw)


def histogram_plot(
    caption: str, label: str, edges: Sequence[float], counts: Mapping[str, Sequence[int]], unit: str
) -> Plot:
    """
    Plot histograms over the same bins as outlines, each as shares of its own total.

    Args:
        label: label of the x axis.
        edges: edges of the bins.
        counts: {name: (bins,)}.
        unit: name of the counted items, for the label of the y axis.
    """

    def draw(axes):
        filled = [place for place in range(len(edges) - 1) if any(each[place] for each in counts.values())]
        for place, (name, each) in enumerate(counts.items()):
            shares = 100 * np.asarray(each) / max(sum(each), 1)
            color, style = PALETTE[place % len(PALETTE)], ("-", "--", ":", "-.")[place % 4]
            axes.stairs(shares, edges, color=color, linestyle=style, linewidth=1.8, label=_short(name))
            axes.stairs(shares, edges, color=color, alpha=0.12, fill=True)
        if filled:
            axes.set_xlim(edges[filled[0]], edges[filled[-1] + 1])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(label)
        axes.set_ylabel(f"share of {unit} (%)")
        _legend(axes)

    return _draw(caption, (WIDTH, 3 + 0.25 * -(-len(counts) // 2)), draw)


def cost_plot(caption: str, label: str, lines: Mapping[str, Mapping[int, float]]) -> Plot:
    """Plot a quantity by the number of utterances in the history, {name: {utterances: value}}, on log-log axes."""

    def draw(axes):
        lengths = sorted({length for line in lines.values() for length in line})
        for place, (name, line) in enumerate(lines.items()):
            color, style = PALETTE[place % len(PALETTE)], ("-", "--", "-.", ":")[place % 4]
            axes.plot(list(line), list(line.values()), style, marker="os^D"[place % 4], color=color, label=name)
        axes.set(xscale="log", yscale="log", xlabel="history (utterances)", ylabel=label)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        _legend(axes)

    return _draw(caption, (WIDTH, 3.8), draw)
