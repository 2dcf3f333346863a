"""The plots of a report, as SVG to stand inside the page. Text stays text; nothing is read from anywhere."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastmat.evaluation.results import Row, TrainingPoint
from fastmat.report.labels import attack_name, defence_name, radius, source, victim_name
from fastmat.report.tables import grouped

COLOURS = ("#8f9bab", "#d9913d", "#5a9e80", "#3d6ea8", "#a8587a", "#7d6bb0", "#5c5c5c")
PIXELS_PER_INCH = 106  # 9.6 inches fill the page
CROWDED = 8  # more labels than that would touch each other
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastmat",  # ids of markers and clips depend on their content alone
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3ad",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e6e9ec",
    "xtick.color": "#3a424b",
    "ytick.color": "#3a424b",
    "axes.labelcolor": "#3a424b",
    "text.color": "#3a424b",
    "legend.frameon": False,
}


def attacks_plot(rows: Sequence[Row]) -> str:
    """TR@1 of every victim, clean and under every white-box attack, with intervals; empty with a single row.

    Where an attack was run with several budgets, the one that most rows share is drawn.
    """
    rows = [row for row in rows if source(row) in ("", "white-box")]
    if len(rows) < 2:
        return ""
    series = series_of(rows)
    shared = Counter(row.threat for row in rows if row.attack != "none")
    groups = []
    for attack in dict.fromkeys(row.attack for row in sorted(rows, key=lambda row: row.attack != "none")):
        own = [row for row in rows if row.attack == attack]
        threat = max((row.threat for row in own), key=lambda threat: shared[threat])
        groups.append([row for row in own if row.threat == threat])
    with rc_context(STYLE):
        figure = Figure(figsize=(max(5.0, min(9.6, 1.6 + 1.5 * len(groups))), 3.1), layout="constrained")
        axes = figure.add_subplot()
        width = min(0.28, 0.82 / len(series))
        for place, group in enumerate(groups):
            for row in group:
                name = series_name(row, rows)
                i = list(series).index(name)
                x = place + (i - (len(series) - 1) / 2) * width
                low, high = row.ci.get("tr@1", (row.tr_1, row.tr_1))
                axes.bar(x, row.tr_1, width * 0.92, color=series[name])
                axes.vlines(x, low, high, color="#2b3138", linewidth=1)
                axes.text(x, high + 1.5, f"{row.tr_1:.0f}", ha="center", va="bottom", fontsize=7.5)
        labels = [group_label(group) for group in groups]
        axes.set(
            xticks=range(len(groups)), xticklabels=labels, ylim=(0, 108), ylabel="TR@1 (%)", yticks=range(0, 101, 20)
        )
        axes.tick_params(length=0)
        if len(groups) > CROWDED:
            axes.tick_params(axis="x", labelrotation=35)
            for label in axes.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
        legend(figure, axes, series)
    return to_svg(figure, "Bar plot: TR@1 clean and under each attack, by defence")


def eps_plot(rows: Sequence[Row]) -> str:
    """TR@1 against eps with its interval, one panel per white-box attack that was run at two radii or more; else empty.

    The clean value stands at the left edge, joined by a dotted line since an attack may change words as well.
    """
    rows = [row for row in rows if source(row) in ("", "white-box")]
    attacked = [row for row in rows if row.attack != "none" and row.max_distance > 0]
    panels = grouped((row, (row.attack, row.threat.norm, row.threat.max_words)) for row in attacked)
    panels = [panel for panel in panels if len({row.threat.eps for row in panel}) > 1]
    if not panels:
        return ""
    series = series_of(rows)
    clean = {series_name(row, rows): row for row in rows if row.attack == "none"}
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6 if len(panels) > 1 else 6.4, 3.1), layout="constrained")
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, panel in zip(all_axes, panels, strict=True):
            for line in grouped((row, series_name(row, rows)) for row in panel):
                line = sorted(line, key=lambda row: row.threat.eps)
                name = series_name(line[0], rows)
                x = [row.threat.eps for row in line]
                bounds = [row.ci.get("tr@1", (row.tr_1, row.tr_1)) for row in line]
                axes.fill_between(
                    x, [b[0] for b in bounds], [b[1] for b in bounds], color=series[name], alpha=0.15, lw=0
                )
                axes.plot(x, [row.tr_1 for row in line], color=series[name], marker="o", markersize=4)
                if name in clean:
                    start = [clean[name].tr_1, line[0].tr_1]
                    axes.plot(
                        [0, x[0]], start, color=series[name], linestyle=":", marker="o", markersize=4, markevery=[0]
                    )
            ticks = sorted({row.threat.eps for row in panel})
            norm = panel[0].threat.norm
            axes.set_title(attack_name(panel[0].attack), loc="left", fontsize=9, fontweight="bold")
            axes.set(xlabel="eps", ylim=(0, 104), yticks=range(0, 101, 20))
            axes.set_xticks([0, *ticks], ["clean", *(radius(eps, norm) for eps in ticks)])
        all_axes[0].set_ylabel("TR@1 (%)")
        legend(figure, all_axes[0], series)
    return to_svg(figure, "Line plot: TR@1 against eps, by defence")


def training_plot(training: Mapping[str, Sequence[TrainingPoint]]) -> str:
    """Loss against outer step of every defence; empty without points."""
    curves = {defence_name(name): points for name, points in training.items() if points}
    if not curves:
        return ""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 2.8), layout="constrained")
        axes = figure.add_subplot(xlabel="outer step", ylabel="training loss")
        series = dict(zip(curves, colours(len(curves)), strict=True))
        for name, points in curves.items():
            axes.plot([point.step for point in points], [point.loss for point in points], color=series[name], lw=1.2)
        legend(figure, axes, series)
    return to_svg(figure, "Line plot: training loss against outer step, by defence")


def series_of(rows: Sequence[Row]) -> dict[str, str]:
    """Label of every victim to its colour, the same in every plot of the same rows."""
    names = list(dict.fromkeys(series_name(row, rows) for row in rows))
    return dict(zip(names, colours(len(names)), strict=True))


def series_name(row: Row, rows: Sequence[Row]) -> str:
    """The defence, and the victim where several victims share it."""
    alone = len({other.victim for other in rows if other.defence == row.defence}) == 1
    return defence_name(row.defence) if alone else victim_name(row)


def colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def group_label(group: Sequence[Row]) -> str:
    row = group[0]
    name = attack_name(row.attack)
    used = row.threat.budgeted and any(other.max_distance > 0 for other in group)
    return f"{name}\neps {radius(row.threat.eps, row.threat.norm)}" if used else name


def legend(figure: Figure, axes: Axes, series: Mapping[str, str]) -> None:
    """Names with their colours above the plot."""
    handles = [axes.plot([], [], marker="s", linestyle="", color=colour)[0] for colour in series.values()]
    figure.legend(handles, list(series), loc="outside upper center", ncols=min(6, len(series)), handletextpad=0.2)


def to_svg(figure: Figure, description: str) -> str:
    """The figure as one <svg> element that shrinks with the page and never grows beyond its own size."""
    buffer = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    body = svg[svg.index(">", box.end()) + 1 :].replace("xlink:href", "href")
    # Matplotlib names groups alike in every figure; nothing refers to them, and ids must be unique on a page.
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    width = figure.get_figwidth() * PIXELS_PER_INCH
    return f'<svg {box[0]} style="max-width: {width:.0f}px" role="img" aria-label="{description}">{body}'
