"""The plots of the study: recall, and both stages, against the weight of the contrastive loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastmat.report.plots import STYLE, colours, legend, to_svg
from fastmat.studies.results import Line

Names = Mapping[str, Callable[[str], str]]
Series = Mapping[str, Callable[[Line], bool]]


def part_plots(lines: Sequence[Line], *, names: Names) -> dict[str, tuple[str, str]]:
    """Name of a plot to (SVG, what it shows); lines of one part."""
    scorings = list(dict.fromkeys(line.scoring for line in lines))
    made = {}
    for way, told in (("tr", "Text retrieval"), ("ir", "Image retrieval")):
        of_scoring = [(names["scoring"](scoring), scoring, f"{way}@1") for scoring in scorings]
        made[f"{way}1"] = (
            grid(lines, of_scoring, names=names, what=f"{way.upper()}@1 (%)"),
            f"{told}: recall at 1 against the ratio of the weights, by scoring; a column per defence, a row per "
            "attack. Bars: 95 % intervals; small dots: seeds.",
        )
    if "itm" in scorings:
        for way in ("tr", "ir"):
            both = [
                ("survival", "itm", f"survival_{way}"),
                ("accuracy of ITM, given survival", "itm", f"accuracy_{way}"),
            ]
            made[f"stages-{way}"] = (
                grid(lines, both, names=names, what=f"{way.upper()} (%)"),
                f"Both stages of {way.upper()}: how often a right answer stays on the shortlist, and how often the "
                "matching head then puts one first.",
            )
    return made


def grid(lines: Sequence[Line], series: Sequence[tuple[str, str, str]], *, names: Names, what: str) -> str:
    """A panel per defence and attack. series: (label, scoring, metric)."""
    defences = list(dict.fromkeys(line.defence for line in lines))
    attacks = list(dict.fromkeys(line.attack for line in lines))
    weights = list(dict.fromkeys(line.weight for line in lines))
    shades = dict(zip((label for label, *_ in series), colours(len(series) + 1)[1:], strict=True))
    found = {(line.defence, line.attack, line.scoring, line.weight): line for line in lines}
    with rc_context(STYLE):
        figure = Figure(figsize=(max(4.2, 3.2 * len(defences)), 0.6 + 1.35 * len(attacks)), layout="constrained")
        panels = figure.subplots(len(attacks), len(defences), sharex=True, sharey=True, squeeze=False)
        for row, attack in zip(panels, attacks, strict=True):
            for axes, defence in zip(row, defences, strict=True):
                for place, (label, scoring, metric) in enumerate(series):
                    own = [found[defence, attack, scoring, weight] for weight in weights]
                    draw(axes, own, metric, colour=shades[label], shift=0.09 * (place - (len(series) - 1) / 2))
                axes.set(ylim=(-4, 104), yticks=(0, 50, 100), xlim=(-0.4, len(weights) - 0.6))
                if attack == attacks[0]:
                    axes.set_title(names["defence"](defence), loc="left", fontsize=9, fontweight="bold")
            row[0].set_ylabel(f"{names['attack'](attack)}\n{what}", fontsize=8)
        for axes in panels[-1]:
            axes.set_xticks(range(len(weights)), weights)
            axes.set_xlabel("weight of contrast : weight of the other term", fontsize=8)
        legend(figure, panels[0][0], shades)
    return to_svg(figure, f"Line plots: {what} against the ratio of the weights, by defence and attack")


def draw(axes: Axes, lines: Sequence[Line], metric: str, *, colour: str, shift: float) -> None:
    """One series: values with intervals, joined; seeds as small dots."""
    here = [(place + shift, line) for place, line in enumerate(lines) if line.values.get(metric) is not None]
    estimates = [line.values[metric] for _, line in here]
    xs = [x for x, _ in here]
    axes.plot(xs, [value for value, *_ in filter(None, estimates)], color=colour, marker="o", markersize=3.5, lw=1.2)
    for x, estimate in zip(xs, estimates, strict=True):
        assert estimate is not None
        axes.vlines(x, estimate[1], estimate[2], color=colour, linewidth=1, alpha=0.6)
    for x, line in here:
        seeds = [own[metric] for own in line.by_seed if metric in own]
        if len(seeds) > 1:
            axes.plot([x] * len(seeds), seeds, ".", color=colour, markersize=2.5, alpha=0.8)
