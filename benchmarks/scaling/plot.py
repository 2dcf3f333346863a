"""Efficiency of MAT against GPUs, both bounds, and the memory of the state: one column per model."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastmat.benchmarks.plot import OWN_STYLE
from fastmat.benchmarks.scaling.cluster import H200
from fastmat.benchmarks.scaling.predict import BATCH, GPUS, Setup, efficiency, predict
from fastmat.benchmarks.scaling.shapes import MODELS
from fastmat.benchmarks.scaling.strategies import STRATEGIES
from fastmat.report.plots import COLOURS

NAMES = dict(zip(STRATEGIES, ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3, every pass"), strict=True))
LINES = ("ddp", "zero2", "zero3", "zero3-pass")  # zero1 exchanges what zero2 does
SHADES = dict(zip(STRATEGIES, (COLOURS[3], COLOURS[1], COLOURS[2], COLOURS[4], COLOURS[5]), strict=True))


def write_plot(folder: Path) -> str:
    name = "scaling.svg"
    with rc_context({**OWN_STYLE, "axes.grid.axis": "y"}):
        draw().savefig(folder / name, format="svg", metadata={"Date": None, "Creator": None})
    return name


def draw() -> Figure:
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    grid = figure.subplots(2, len(BATCH), sharey="row", sharex="col")
    for column, (model, batch) in enumerate(BATCH.items()):
        efficiency_axes(grid[0, column], model, batch)
        state_axes(grid[1, column], model, batch)
        grid[0, column].set_title(f"{MODELS[model].name}, {batch} pairs per GPU", fontsize=9, loc="left")
    grid[0, 0].set_ylabel("efficiency of a MAT step")
    grid[1, 0].set_ylabel("weights, gradients,\noptimiser, GB per GPU")
    handles, labels = grid[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.suptitle(
        f"Predicted, {H200.name}. Solid: collectives behind the computing; dashed: one after the other. "
        "ZeRO-1 goes as ZeRO-2.",
        fontsize=9,
    )
    return figure


def efficiency_axes(axes: Axes, model: str, batch: int) -> None:
    for strategy in LINES:
        own = [Setup(model=model, method="mat", strategy=strategy, gpus=gpus, batch=batch) for gpus in GPUS]
        colour = SHADES[strategy]
        places = range(len(GPUS))
        axes.plot(places, [efficiency(one) for one in own], color=colour, marker="o", markersize=3.5)
        axes.plot(places, [efficiency(one, serial=True) for one in own], color=colour, linestyle="--", linewidth=1.1)
    axes.set_ylim(0.75, 1.05)


def state_axes(axes: Axes, model: str, batch: int) -> None:
    width = 0.8 / len(STRATEGIES)
    for i, strategy in enumerate(STRATEGIES):
        own = [Setup(model=model, method="mat", strategy=strategy, gpus=gpus, batch=batch) for gpus in GPUS]
        state = [predict(one).memory.state / 1e9 for one in own]
        places = [place + (i - (len(STRATEGIES) - 1) / 2) * width for place in range(len(GPUS))]
        axes.bar(places, state, width=width * 0.9, color=SHADES[strategy], label=NAMES[strategy])
    axes.set_xticks(range(len(GPUS)), [f"{gpus}" for gpus in GPUS])
    axes.set_xlabel("GPUs")
