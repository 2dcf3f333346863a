"""The plots of the study of test-time defences: what is claimed and what is left, and what the detectors see."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

from fastmat.report.plots import COLOURS, STYLE, colours, legend, to_svg
from fastmat.studies.test_time_results import Detection, Estimate, Verdict

SHADES = {
    "clean": COLOURS[0],
    "claimed: the attacker does not know it": COLOURS[1],
    "adaptive: the attacker does": COLOURS[3],
}


def verdict_plot(
    verdicts: Sequence[Verdict], bare: tuple[Estimate, Estimate], *, named: Callable[[str], str], at: int
) -> str:
    """Bars of one model: the bare one, clean and under its strongest attack (`bare`), then every guard."""
    clean, broken = bare
    groups: list[tuple[str, tuple[Estimate | None, ...]]] = [("no guard", (clean, None, broken))]
    groups += [(named(own.guard), (own.clean, own.claimed, own.adaptive)) for own in verdicts]
    with rc_context(STYLE):
        figure = Figure(figsize=(max(5.0, 1.4 + 1.5 * len(groups)), 3.1), layout="constrained")
        axes = figure.add_subplot()
        width = 0.28
        for place, (_, bars) in enumerate(groups):
            for i, (bar, colour) in enumerate(zip(bars, SHADES.values(), strict=True)):
                if bar is None:
                    continue
                x, (value, low, high) = place + (i - 1) * width, bar
                axes.bar(x, value, width * 0.92, color=colour)
                axes.vlines(x, low, high, color="#2b3138", linewidth=1)
                axes.text(x, high + 1.5, f"{value:.0f}", ha="center", va="bottom", fontsize=7.5)
        axes.axhline(broken[0], color="#2b3138", linewidth=0.8, linestyle=":")
        axes.set(
            xticks=range(len(groups)),
            xticklabels=[name for name, _ in groups],
            ylim=(0, 108),
            yticks=range(0, 101, 20),
            ylabel=f"mean of TR@{at} and IR@{at} (%)",
        )
        axes.tick_params(length=0)
        legend(figure, axes, SHADES)
    return to_svg(figure, "Bar plot: recall clean, under attacks made without the guard, and through it, by guard")


def roc_plot(detections: Sequence[Detection], *, named: Callable[[str], str]) -> str:
    """Curves of one model's detector."""
    shades = dict(zip((own.against for own in detections), colours(len(detections)), strict=True))
    told = {f"{named(own.against)}: AUC {own.auc[0] / 100:.2f}": shades[own.against] for own in detections}
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0, 100], [0, 100], color="#c4cad0", linewidth=0.8, linestyle=":")
        for own in detections:
            axes.plot(*zip(*own.curve, strict=True), color=shades[own.against], linewidth=1.4)
        axes.set(
            xlim=(-1, 101), ylim=(-1, 103), xlabel="clean images flagged (%)", ylabel="attacked images flagged (%)"
        )
        axes.axvline(detections[0].false_alarms[0], color="#2b3138", linewidth=0.8, linestyle=":")
        handles = [axes.plot([], [], color=colour)[0] for colour in told.values()]
        axes.legend(handles, list(told), loc="lower right", fontsize=8)
    return to_svg(figure, "ROC curves of the detector, by attack")
