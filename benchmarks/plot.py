"""Plots from rows alone: how many times faster than each opponent, with targets, and peak memory against N."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from fastmat.benchmarks.rows import Row
from fastmat.benchmarks.table import Run, newest_runs, place_of, speed_up
from fastmat.benchmarks.targets import TARGETS
from fastmat.report.plots import COLOURS, STYLE

KINDS = {"published": COLOURS[0], "tuned": COLOURS[1], "fused": COLOURS[4], "fastmat": COLOURS[3]}
TARGET = "#b3261e"
MEMORY_HEIGHT = 4.0  # inches
OWN_STYLE = {**STYLE, "svg.fonttype": "path", "axes.grid.axis": "x"}


def write_plots(folder: Path, rows: Sequence[Row]) -> list[str]:
    """`speed-PLACE.svg` for every place with rows, of its last machine; the names of the files."""
    names = []
    for place in dict.fromkeys(map(place_of, rows)):
        runs = newest_runs(row for row in rows if place_of(row) == place)
        runs = [run for run in runs if run[0].machine == runs[-1][0].machine]
        name = f"speed-{place.replace(', ', '-').replace(' ', '-')}.svg"
        with rc_context(OWN_STYLE):
            draw(runs).savefig(folder / name, format="svg", metadata={"Date": None, "Creator": None})
        names.append(name)
    return names


def draw(runs: Sequence[Run]) -> Figure:
    """Bars of speed-up beside lines of memory; one machine."""
    memory = {
        run[0].shape["rows"]: run for run in runs if run[0].operator == "contrastive_loss" and run[0].dtype == "float32"
    }
    bars = sum(len(run) for run in runs)
    with_memory = len(memory) > 1
    height = max(2.4, 0.9 + 0.2 * bars)
    figure = Figure(figsize=(11.5 if with_memory else 7.5, height), layout="constrained")
    grid = figure.add_gridspec(
        2,
        2 if with_memory else 1,
        height_ratios=(MEMORY_HEIGHT, max(0.01, height - MEMORY_HEIGHT)),
        width_ratios=(1.5, 1) if with_memory else (1,),
    )
    speed_axes(figure.add_subplot(grid[:, 0]), runs)
    if with_memory:
        memory_axes(figure.add_subplot(grid[0, 1]), list(memory.values()))
    first = runs[0][0]
    threads = "1 thread" if first.threads == 1 else f"{first.threads} threads"
    figure.suptitle(f"{first.machine}, {threads}, torch {first.versions['torch']}", fontsize=9)
    return figure


def speed_axes(axes: Axes, runs: Sequence[Run]) -> None:
    place, ticks, targets = 0.0, [], False
    for run in runs:
        opponents = [(row, ratio) for row in run if (ratio := speed_up(row, run)) is not None]
        top = place
        for row, ratio in opponents:
            axes.barh(place, ratio - 1, left=1, height=0.8, color=KINDS[row.kind])
            bounds = bounds_for(row)
            targets = targets or bool(bounds)
            axes.vlines(bounds, place - 0.45, place + 0.45, color=TARGET, linewidth=1.6)
            right = max(ratio, 1, *bounds) * 1.04
            axes.text(right, place, f"{row.implementation}  {ratio:.3g}x", va="center", fontsize=7)
            place += 1
        if opponents:
            ticks.append(((top + place - 1) / 2, f"{run[0].operator}\n{run[0].case}"))
            place += 0.7
    axes.set_yticks([where for where, _ in ticks], [label for _, label in ticks], fontsize=7.5)
    axes.set(xscale="log", xlabel="how many times the speed of the opponent fastmat has")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.5), high * 3)
    plain_ticks(axes.xaxis)
    axes.axvline(1, color="#2b3138", linewidth=0.8)
    axes.set_ylim(place - 0.7, -1)  # downwards
    axes.tick_params(length=0)
    kinds = [kind for kind in KINDS if any(row.kind == kind for run in runs for row in run) and kind != "fastmat"]
    handles = [axes.plot([], [], marker="s", linestyle="", color=KINDS[kind])[0] for kind in kinds]
    if targets:
        handles += axes.plot([], [], marker="|", markersize=9, markeredgewidth=1.6, linestyle="", color=TARGET)
        kinds.append("target")
    axes.legend(handles, kinds, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(kinds), fontsize=7.5)


def bounds_for(row: Row) -> list[float]:
    """Targets on the speed-up over this opponent."""
    return [
        target.bound if target.quantity == "speed-up" else 1 / target.bound
        for target in TARGETS
        if (target.device, target.operator, target.case) == (row.device, row.operator, row.case)
        and target.quantity in ("speed-up", "time")
        and row.implementation in target.opponents
    ]


def plain_ticks(axis: Axis) -> None:
    """1, 2, 5, 10, ... on a logarithmic axis, written as such."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def memory_axes(axes: Axes, runs: Sequence[Run]) -> None:
    runs = sorted(runs, key=lambda run: run[0].shape["rows"])
    names = dict.fromkeys(row.implementation for run in runs for row in run if row.peak)
    for name in names:
        points = [
            (row.shape["rows"], row.peak / 1e6)
            for run in runs
            for row in run
            if row.implementation == name and row.peak
        ]
        kind = next(row.kind for run in runs for row in run if row.implementation == name)
        line = axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=KINDS[kind], linewidth=1.3)[0]
        line.set_linestyle("--" if "compiled" in name else "-")
        line.set_label(name)
    axes.set(xscale="log", yscale="log", xlabel="N", ylabel="peak memory above the inputs, MB")
    axes.set_xticks([run[0].shape["rows"] for run in runs], [str(run[0].shape["rows"]) for run in runs])
    axes.xaxis.minorticks_off()
    plain_ticks(axes.yaxis)
    axes.set_title("contrastive_loss, forward and backward", loc="left", fontsize=8.5, fontweight="bold")
    axes.legend(fontsize=7.5)
