"""Bars of speed-up over every opponent, from rows alone, with the targets on them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from fastmat.benchmarks.attacks.rows import AttackRow
from fastmat.benchmarks.attacks.table import AttackRun, newest_runs, where
from fastmat.benchmarks.attacks.targets import TARGETS
from fastmat.benchmarks.plot import KINDS, OWN_STYLE, TARGET, plain_ticks


def write_plots(folder: Path, rows: Sequence[AttackRow]) -> list[str]:
    """`speed-PLACE.svg` for every place with rows; the names of the files."""
    names = []
    runs = newest_runs(rows)
    for place in dict.fromkeys((where(run[0]), run[0].machine) for run in runs):
        own = [run for run in runs if (where(run[0]), run[0].machine) == place]
        name = "speed-" + re.sub(r"[^a-zA-Z0-9]+", "-", place[0]).strip("-").lower() + ".svg"
        with rc_context(OWN_STYLE):
            draw(own).savefig(folder / name, format="svg", metadata={"Date": None, "Creator": None})
        names.append(name)
    return names


def draw(runs: Sequence[AttackRun]) -> Figure:
    bars = sum(len(run) for run in runs)
    figure = Figure(figsize=(7.5, max(2.4, 0.9 + 0.2 * bars)), layout="constrained")
    axes = figure.add_subplot()
    place, ticks, right = 0.0, [], 1.0
    for run in runs:
        top = place
        for row in run:
            for ours, ratio, bounds in ratios(row, run):
                axes.barh(place, ratio - 1, left=1, height=0.8, color=KINDS.get(row.kind, KINDS["fused"]))
                axes.vlines(bounds, place - 0.45, place + 0.45, color=TARGET, linewidth=1.6)
                end = max(ratio, 1, *bounds)
                axes.text(end * 1.04, place, f"{row.implementation} {ours}  {ratio:.3g}x", va="center", fontsize=7)
                right, place = max(right, end), place + 1
        ticks.append(((top + place - 1) / 2, f"{run[0].attack}\n{run[0].half}"))
        place += 0.7
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=7.5)
    axes.set(xscale="log", xlabel="how many times the speed of the opponent fastmat has; red: target")
    axes.set_xlim(0.5, right * 4)
    plain_ticks(axes.xaxis)
    axes.axvline(1, color="#2b3138", linewidth=0.8)
    axes.set_ylim(place - 0.7, -1)  # downwards
    axes.tick_params(length=0)
    figure.suptitle(f"{runs[0][0].machine}, {where(runs[0][0])}", fontsize=9)
    return figure


def ratios(row: AttackRow, run: AttackRun) -> list[tuple[str, float, list[float]]]:
    """(our dtype, speed-up, targets on it) of an opponent; one in fp32 is compared with both of ours where asked."""
    if row.kind in ("fastmat", "cold"):
        return []
    found = []
    for ours in (other for other in run if other.kind == "fastmat"):
        if ours.dtype == row.dtype or row.kind == "published":
            bounds = [
                target.bound
                for target in TARGETS
                if (target.device, target.attack, target.dtype, target.opponent)
                == (row.device, row.attack, ours.dtype, row.kind)
                and row.half == "both"
            ]
            short = {"float32": "fp32", "bfloat16": "bf16"}[ours.dtype]
            found.append((f"vs {short}", row.p50 / ours.p50, bounds))
    return found
