"""The plots of the study: misalignment layer by layer and channel by channel, and recall with each correction."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastmat.report.labels import ATTACKS
from fastmat.report.plots import STYLE, colours, legend, to_svg
from fastmat.studies.channel_alignment_answer import named
from fastmat.studies.channel_alignment_results import Layer, Row


def layer_plot(layers: Sequence[Layer]) -> str:
    """A column per encoder and attack, R^2 above, mean shift below; a line per model. Empty without layers."""
    columns = list(dict.fromkeys((layer.encoder, layer.attack) for layer in layers))
    if not columns:
        return ""
    models = list(dict.fromkeys(layer.model for layer in layers))
    shades = dict(zip(models, colours(len(models) + 1)[1:], strict=True))
    with rc_context(STYLE):
        figure = Figure(figsize=(max(4.6, 3.2 * len(columns)), 5.0), layout="constrained")
        panels = figure.subplots(2, len(columns), sharex="col", sharey="row", squeeze=False)
        for (upper, lower), (encoder, attack) in zip(panels.T, columns, strict=True):
            for place, model in enumerate(models):
                own = [x for x in layers if (x.encoder, x.attack, x.model) == (encoder, attack, model)]
                xs = [i + 0.12 * (place - (len(models) - 1) / 2) for i in range(len(own))]
                line(upper, xs, [x.explained_by_shift for x in own], colour=shades[model])
                low = [(x, layer.mean_shift) for x, layer in zip(xs, own, strict=True) if layer.mean_shift is not None]
                lower.plot(*zip(*low, strict=True), color=shades[model], marker="o", markersize=3.5, lw=1.2)
            names = [x.layer for x in layers if (x.encoder, x.attack, x.model) == (encoder, attack, models[0])]
            upper.set_title(
                f"{encoder} encoder, {ATTACKS.get(attack, attack)}", loc="left", fontsize=9, fontweight="bold"
            )
            lower.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
        panels[0][0].set(ylim=(0, 100), ylabel="R² of a constant (%)")
        panels[1][0].set_ylim(bottom=0)  # now that all is drawn
        panels[1][0].set_ylabel("mean shift (clean std)")
        legend(figure, panels[0][0], shades)
    return to_svg(figure, "Line plots: what a constant explains, and the mean shift, by layer")


def line(axes: Axes, xs: Sequence[float], values: Sequence[tuple[float, float, float] | None], *, colour: str) -> None:
    """Shares in percent with their intervals."""
    here = [(x, value) for x, value in zip(xs, values, strict=True) if value is not None]
    axes.plot([x for x, _ in here], [100 * v[0] for _, v in here], color=colour, marker="o", markersize=3.5, lw=1.2)
    for x, (_, low, high) in here:
        axes.vlines(x, 100 * low, 100 * high, color=colour, linewidth=1, alpha=0.6)


def channel_plot(layers: Sequence[Layer]) -> str:
    """A panel per place and attack; a line per model. Empty where no channel was listed."""
    shown = [layer for layer in layers if any(value is not None for value in layer.by_channel)]
    panels = list(dict.fromkeys((layer.encoder, layer.layer, layer.attack) for layer in shown))
    if not panels:
        return ""
    models = list(dict.fromkeys(layer.model for layer in shown))
    shades = dict(zip(models, colours(len(models) + 1)[1:], strict=True))
    with rc_context(STYLE):
        figure = Figure(figsize=(max(4.6, 3.2 * len(panels)), 2.9), layout="constrained")
        drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, key in zip(drawn, panels, strict=True):
            for layer in shown:
                if (layer.encoder, layer.layer, layer.attack) == key:
                    values = sorted((v for v in layer.by_channel if v is not None), reverse=True)
                    axes.plot(range(1, len(values) + 1), values, color=shades[layer.model], lw=1.4)
            encoder, place, attack = key
            title = f"{encoder} {place}, {ATTACKS.get(attack, attack)}"
            axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
            axes.set_xlabel("channel, sorted")
        drawn[0].set_ylim(bottom=0)
        drawn[0].set_ylabel("shift of the mean (clean std)")
        legend(figure, drawn[0], shades)
    return to_svg(figure, "Line plots: the mean shift of every channel, sorted, by model")


def recall_plot(rows: Sequence[Row]) -> str:
    """A row of panels per model, a column per attack that was also made without the correction; empty without one."""
    attacks = list(dict.fromkeys(row.attack for row in rows if row.made_on == "uncorrected"))
    models = list(dict.fromkeys(row.model for row in rows))
    if not attacks:
        return ""
    without, through, worst = colours(3)[0], colours(4)[3], colours(2)[1]
    found = {(row.model, row.correction, row.attack, row.made_on): row.values.get("mean") for row in rows}
    corrections = list(dict.fromkeys(row.correction for row in rows))
    images = {row.attack: row.n_images for row in rows}
    whole = [attack for attack in attacks if images[attack] == images["none"]]
    with rc_context(STYLE):
        width = max(7.2, 1.4 + 0.42 * len(corrections) * len(attacks))
        figure = Figure(figsize=(min(11.0, width), 0.9 + 1.9 * len(models)), layout="constrained")
        grid = figure.subplots(len(models), len(attacks), sharex=True, sharey="row", squeeze=False)
        for panels, model in zip(grid, models, strict=True):
            for axes, attack in zip(panels, attacks, strict=True):
                for x, correction in enumerate(corrections):
                    bar(axes, x - 0.2, found.get((model, correction, attack, "uncorrected")), without, hatch="////")
                    bar(axes, x + 0.2, found.get((model, correction, attack, "corrected")), through)
                    if attack in whole and (value := found.get((model, correction, "worst", ""))):
                        axes.plot([x], [value[0]], "D", color=worst, markersize=4, zorder=3)
                        axes.vlines(x, value[1], value[2], color=worst, linewidth=1, zorder=3)
                if attack in whole and (clean := found.get((model, "none", "none", ""))):
                    axes.axhline(clean[0], color="#5c5c5c", linestyle="--", linewidth=1)
                some = "" if attack in whole else f" ({images[attack]} images)"
                axes.set_title(
                    f"{model}, {ATTACKS.get(attack, attack)}{some}", loc="left", fontsize=9, fontweight="bold"
                )
                axes.set_xticks(
                    range(len(corrections)),
                    [named(name) for name in corrections],
                    rotation=40,
                    ha="right",
                    rotation_mode="anchor",
                    fontsize=8,
                )
            panels[0].set_ylabel("mean recall (%)")
            panels[0].set_ylim(bottom=0)  # now that the row is drawn
        series = {"made without the correction (no evidence)": without, "made through it": through}
        series["worst on all images"] = worst
        legend(figure, grid[0][0], series)
    return to_svg(figure, "Bar plots: mean recall by correction, not adaptive beside adaptive")


def bar(axes: Axes, x: float, value: tuple[float, float, float] | None, colour: str, *, hatch: str = "") -> None:
    if value is None:
        return
    axes.bar(x, value[0], 0.36, color="white" if hatch else colour, edgecolor=colour, hatch=hatch, linewidth=0.8)
    axes.vlines(x, value[1], value[2], color="#2b3138", linewidth=1)
