"""The report of a training run: what `log.jsonl` says, as curves on one page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastmat.evaluation.results import write_atomic
from fastmat.report.labels import defence_name
from fastmat.report.page import page
from fastmat.report.plots import COLOURS, STYLE, legend, to_svg
from fastmat.training.results import LoggedStep, TrainingLog, Validated, read_log

PARTS = {
    "text_attack": "text attack",
    "image_attack": "image attack",
    "outer": "outer step",
    "loading": "loading",
    "saving": "saving and validation",
}
WIDTH, HEIGHT = 9.6, 2.7


def write_training_report(folder: Path, *, about: Mapping[str, Any]) -> Path:
    """`folder/report.html` of `folder/log.jsonl`, written as a whole or not at all. about: what the run was told.

    Raises UserError where there is no log, or it is none.
    """
    log = read_log(folder / "log.jsonl")
    return write_atomic(folder / "report.html", render_training(log, about=about).encode())


def render_training(log: TrainingLog, *, about: Mapping[str, Any]) -> str:
    """The page. Every text out of the run is escaped."""
    best = log.best()
    return page("training").render(
        title=title_of(about),
        facts=facts(log),
        validation=validation_plot(log.validated, best),
        judged=log.validated,
        best=best.step if best else None,
        metric=best.validation.metric if best else "",
        plots=[
            (
                "Loss",
                loss_plot(log.steps),
                "Every term of the loss, with its weight, and their sum where there are several.",
            ),
            ("Learning rate and gradient", rate_plot(log.steps), "The gradient's 2-norm before it is clipped."),
            (
                "Speed",
                speed_plot(log.steps),
                "Image-caption pairs per second of all processes, and where the time went.",
            ),
        ],
        about=json.dumps(dict(about), indent=2, ensure_ascii=False),
    )


def title_of(about: Mapping[str, Any]) -> str:
    """The defence and the model it starts from."""
    config = about.get("config", {})
    names = [part.get("name") for part in (config.get("defence"), config.get("model")) if isinstance(part, Mapping)]
    defence, model = (*names, None, None)[:2]
    return " of ".join(str(name) for name in (defence_name(str(defence)) if defence else None, model) if name) or "Run"


def facts(log: TrainingLog) -> list[tuple[str, str]]:
    """What a reader looks for first."""
    if not log.steps:
        return [("Steps", "none logged")]
    last, best = log.steps[-1], log.best()
    found = [("Steps", f"{last.step:,}"), ("Loss", "not finite" if last.loss is None else f"{last.loss:.4g}")]
    if last.skipped:
        found.append(("Skipped, not finite", f"{last.skipped:,}"))
    typical = sorted(step.pairs_per_s for step in log.steps)[len(log.steps) // 2]
    found.append(("Speed", f"{typical:,.0f} pairs/s (median of the logged lines)"))
    spent = {part: sum(step.taken.get(part, 0.0) for step in log.steps) for part in PARTS}
    whole = sum(spent.values())
    if whole:
        shares = [f"{name} {100 * spent[part] / whole:.0f} %" for part, name in PARTS.items() if spent[part] > 0]
        found.append(("Time", ", ".join(shares)))
    if best is not None:
        found.append(("Best checkpoint", f"step {best.step:,}, score {best.validation.score:.1f}"))
    return found


def validation_plot(validated: Sequence[Validated], best: Validated | None) -> str:
    """TR@1 and IR@1 against steps, clean and robust; empty without a validation."""
    if not validated or best is None:
        return ""
    x = [line.step for line in validated]
    series = {"clean": COLOURS[3], "robust": COLOURS[1]}
    with rc_context(STYLE):
        figure, panels = two_panels()
        for axes, rate, name in zip(panels, ("tr", "ir"), ("TR@1 (%)", "IR@1 (%)"), strict=True):
            for kind, colour in series.items():
                values = [getattr(getattr(line.validation, kind), rate) for line in validated]
                axes.plot(x, values, color=colour, marker="o", markersize=4)
            mark = getattr(best.validation.robust, rate)
            axes.plot([best.step], [mark], "o", markersize=11, markerfacecolor="none", color=series["robust"])
            axes.set(xlabel="outer step", ylabel=name)
            axes.set_ylim(bottom=0)
            whole_numbers(axes)
        legend(figure, panels[0], series)
    return to_svg(figure, "Line plot: clean and robust TR@1 and IR@1 against outer step")


def loss_plot(steps: Sequence[LoggedStep]) -> str:
    """Every term against steps, and their sum; empty without steps."""
    if not steps:
        return ""
    names = list(dict.fromkeys(name for step in steps for name in step.terms))
    series = {name: COLOURS[(i + 1) % len(COLOURS)] for i, name in enumerate(names)}
    if len(names) > 1:
        series = {"sum": "#2b3138", **series}
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot(xlabel="outer step", ylabel="loss")
        for name, colour in series.items():
            values = [step.loss if name == "sum" else step.terms.get(name) for step in steps]
            curve(axes, steps, values, colour)
        whole_numbers(axes)
        legend(figure, axes, series)
    return to_svg(figure, "Line plot: the terms of the loss against outer step")


def rate_plot(steps: Sequence[LoggedStep]) -> str:
    """Learning rate and gradient norm against steps; empty without steps."""
    if not steps:
        return ""
    with rc_context(STYLE):
        figure, (left, right) = two_panels()
        curve(left, steps, [step.lr for step in steps], COLOURS[3])
        left.set(xlabel="outer step", ylabel="learning rate")
        curve(right, steps, [step.grad_norm for step in steps], COLOURS[4])
        right.set(xlabel="outer step", ylabel="gradient norm")
        for axes in (left, right):
            axes.set_ylim(bottom=0)
            whole_numbers(axes)
        left.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    return to_svg(figure, "Line plots: learning rate and gradient norm against outer step")


def speed_plot(steps: Sequence[LoggedStep]) -> str:
    """Pairs per second, and the shares of the time, against steps; empty without steps."""
    if not steps:
        return ""
    series = dict(zip(PARTS.values(), (COLOURS[i] for i in (2, 1, 3, 0, 6)), strict=True))
    with rc_context(STYLE):
        figure, (left, right) = two_panels()
        curve(left, steps, [step.pairs_per_s for step in steps], COLOURS[3])
        left.set(xlabel="outer step", ylabel="pairs/s")
        left.set_ylim(bottom=0)
        shown = [step for step in steps if sum(step.taken.values()) > 0]
        shares = [[100 * step.taken.get(part, 0.0) / sum(step.taken.values()) for step in shown] for part in PARTS]
        if shown:
            right.stackplot([step.step for step in shown], shares, colors=list(series.values()), lw=0)
        right.set(xlabel="outer step", ylabel="share of the time (%)", ylim=(0, 100))
        for axes in (left, right):
            whole_numbers(axes)
        legend(figure, right, series)
    return to_svg(figure, "Line plot: pairs per second; area plot: where the time went, against outer step")


def two_panels() -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    left, right = figure.subplots(1, 2)
    return figure, (left, right)


def curve(axes: Axes, steps: Sequence[LoggedStep], values: Sequence[float | None], colour: str) -> None:
    """A line that has gaps where there is no value; a single point shows as one."""
    y = [float("nan") if value is None else value for value in values]
    axes.plot([step.step for step in steps], y, color=colour, lw=1.2, marker="o" if len(steps) == 1 else None)


def whole_numbers(axes: Axes) -> None:
    """Steps are counted."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
