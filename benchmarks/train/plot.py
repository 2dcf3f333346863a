"""Where the time of a step goes, contestant by contestant, from rows alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastmat.benchmarks.attacks.table import newest_runs, where
from fastmat.benchmarks.plot import OWN_STYLE
from fastmat.benchmarks.train.rows import TrainRow
from fastmat.benchmarks.train.table import TrainRun
from fastmat.benchmarks.train.targets import NAMES
from fastmat.report.plots import COLOURS


def write_plots(folder: Path, rows: Sequence[TrainRow]) -> list[str]:
    """`split-PLACE.svg` for every place with rows; the names of the files."""
    runs = newest_runs(rows)
    names = []
    for place in dict.fromkeys(where(run[0]) for run in runs):
        own = [run for run in runs if where(run[0]) == place]
        names.append("split-" + re.sub(r"\W+", "-", place).strip("-").lower() + ".svg")
        with rc_context(OWN_STYLE):
            draw(own).savefig(folder / names[-1], format="svg", metadata={"Date": None, "Creator": None})
    return names


def draw(runs: Sequence[TrainRun]) -> Figure:
    """Stacked bars, one panel per step, each with its own scale."""
    bars = [len(run) for run in runs]
    figure = Figure(figsize=(7.5, 1.2 + sum(0.24 * n + 0.5 for n in bars)), layout="constrained")
    panels = figure.subplots(len(runs), squeeze=False, height_ratios=bars)
    for axes, run in zip(panels[:, 0], runs, strict=True):
        panel(axes, run)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=7.5)
    panels[-1, 0].set_xlabel("milliseconds per pair")
    figure.suptitle(f"{runs[0][0].machine}, {where(runs[0][0])}", fontsize=9)
    return figure


def panel(axes: Axes, run: TrainRun) -> None:
    for place, row in enumerate(run):
        left, per_pair = 0.0, row.p50 / row.pairs
        for part, colour in zip(NAMES, COLOURS, strict=False):
            wide = row.shares[part] * per_pair
            axes.barh(place, wide, left=left, height=0.75, color=colour, label=NAMES[part] if not place else None)
            left += wide
        if row.floor is not None:
            axes.vlines(row.floor / row.pairs, place - 0.45, place + 0.45, color="#2b3138", linewidth=1.2)
        axes.text(left, place, f" {per_pair:,.0f}" if per_pair >= 1000 else f" {per_pair:.3g}", va="center", fontsize=7)
    axes.set_yticks(range(len(run)), [f"{row.kind}, {row.dtype}" for row in run], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    floor = "" if all(row.floor is None for row in run) else " (black: the floor)"
    axes.set_title(run[0].attack + floor, loc="left", fontsize=8.5)
