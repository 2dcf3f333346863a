"""The report of an augmented set: `augment.json`, and a page with a table and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from fastmat.augment.results import Estimate, SourceReport
from fastmat.evaluation.results import write_atomic
from fastmat.report.page import page
from fastmat.report.plots import STYLE, colours, to_svg

NAMES = {
    "human": "Human",
    "eda": "EDA",
    "back_translation": "Back-translation",
    "rewrite": "Rewriting",
    "caption": "Image captioning",
    "text_to_image": "Text-to-image",
}
# Property, its name, digits.
PROPERTIES = (
    ("alignment", "alignment", 3),
    ("relative_alignment", "relative alignment", 3),
    ("diversity", "diversity", 3),
    ("word_diversity", "diversity of words", 3),
    ("gap", "distribution gap", 2),
)
DRAWN = (
    ("relative_alignment", "relative alignment", "better to the right; human captions: 0"),
    ("diversity", "diversity", "better to the right"),
    ("word_diversity", "diversity of words", "better to the right"),
    ("gap", "distribution gap", "better to the left; no gap: 0"),
)


def write_augmentation_report(
    folder: Path, reports: Sequence[SourceReport], *, title: str, about: Mapping[str, Any]
) -> Path:
    """`folder/augment.json` and `folder/augment.html`, each whole or not at all; returns the page.

    about: what the figures depend on besides, as JSON can hold it.
    """
    content = {**about, "sources": [report.plain() for report in reports]}
    write_atomic(folder / "augment.json", (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return write_atomic(folder / "augment.html", render_augmentation(reports, title=title, about=about).encode())


def render_augmentation(reports: Sequence[SourceReport], *, title: str, about: Mapping[str, Any]) -> str:
    """The page. Every text out of the data is escaped."""
    return page("augment").render(
        title=title,
        header=[name for _, name, _ in PROPERTIES],
        lines=[
            (source_name(report.source), f"{report.items:,} {report.made}s of {report.images:,} images", cells(report))
            for report in reports
        ],
        plot=properties_plot(reports),
        about=json.dumps(dict(about), indent=2, ensure_ascii=False),
    )


def source_name(source: str) -> str:
    return NAMES.get(source, source)


def cells(report: SourceReport) -> list[tuple[str, str]]:
    """(value, interval) of every property, as text, empty where it has no meaning."""
    made = []
    for key, _, digits in PROPERTIES:
        estimate: Estimate | None = getattr(report, key)
        if estimate is None:
            made.append(("", ""))
        else:
            interval = f"{estimate.low:.{digits}f} to {estimate.high:.{digits}f}"
            made.append((f"{estimate.value:.{digits}f}", interval))
    return made


def properties_plot(reports: Sequence[SourceReport]) -> str:
    """One panel per property, one line per source, with intervals; a source without a value has none."""
    named = list(zip(reports, colours(len(reports)), strict=True))
    with rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(9.6, 1.5 + 0.3 * len(reports)), layout="constrained")
        panels = figure.subplots(1, len(DRAWN), sharey=True)
        for axes, (key, name, hint) in zip(panels, DRAWN, strict=True):
            for place, (report, colour) in enumerate(named):
                estimate: Estimate | None = getattr(report, key)
                if estimate is not None:
                    axes.hlines(place, estimate.low, estimate.high, color=colour, linewidth=2)
                    axes.plot([estimate.value], [place], "o", color=colour, markersize=6)
            if key in ("relative_alignment", "gap"):
                axes.axvline(0, color="#2b3138", linewidth=0.8, linestyle=":")
            axes.set_title(name, loc="left", fontsize=9, fontweight="bold")
            axes.set_xlabel(hint, fontsize=7.5)
            axes.margins(x=0.15)
            axes.locator_params(axis="x", nbins=4)
            axes.tick_params(axis="y", length=0)
        panels[0].set_yticks(range(len(reports)), [source_name(report.source) for report in reports])
        panels[0].set_ylim(len(reports) - 0.5, -0.5)
    return to_svg(figure, "Dot plot: alignment, diversity and distribution gap of every source of captions and images")
