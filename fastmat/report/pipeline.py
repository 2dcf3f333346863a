"""A pipeline's `results.json` and `examples.json` to one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from fastmat.evaluation.results import read_json, write_atomic
from fastmat.pipeline.results import AGENT, PipelineExamples, PipelineResults, PipelineRow
from fastmat.report.html import pretty
from fastmat.report.labels import attack_name, radius, victim_name
from fastmat.report.page import page
from fastmat.report.plots import STYLE, colours, legend, to_svg
from fastmat.report.study import Rate
from fastmat.report.tables import grouped

# Columns of one pipeline, those that any row has.
COLUMNS = {
    "changed": "changed",
    "fewer": "fewer",
    "right_clean": "right, clean",
    "right": "right, attacked",
    "asr": "asr",
    "noise": "changed, clean again",
    "unanswered_clean": "no answer, clean",
    "unanswered": "no answer, attacked",
}


def write_pipeline_report(folder: Path) -> Path:
    """`folder/report.html`, as a whole or not at all. Raises UserError when a file does not follow its schema."""
    results = read_json(folder / "results.json", PipelineResults)
    path = folder / "examples.json"
    examples = read_json(path, PipelineExamples) if path.exists() else PipelineExamples(chosen="", examples=[])
    return write_atomic(folder / "report.html", render_pipeline(results, examples).encode())


def render_pipeline(results: PipelineResults, examples: PipelineExamples) -> str:
    """The page. Every text out of the data is escaped."""
    rows = results.rows
    first = rows[0] if rows else None
    return page("pipeline").render(
        answer=answer(rows),
        question=results.question,
        title=f"{first.dataset}, {first.split}: {max(row.n_images for row in rows):,} pictures" if first else "",
        plot=pipeline_plot(rows),
        tables=comparisons(rows),
        examples=examples,
        agent=AGENT,
        config=pretty(results.config),
        environment=results.environment,
    )


def by_attack(rows: Sequence[PipelineRow]) -> list[list[PipelineRow]]:
    """Rows that are compared: one attack at one radius, in the order of the run."""
    return grouped((row, (row.attack, row.threat, row.origin)) for row in rows)


def title_of(row: PipelineRow) -> str:
    through = f" on {row.origin}" if row.origin else ""
    spent = f", eps {radius(row.threat.eps, row.threat.norm)}" if row.threat.budgeted else ", no budget"
    return f"{attack_name(row.attack)}{through}{spent}"


def answer(rows: Sequence[PipelineRow]) -> str:
    """What the first attack did, in two sentences: how much changed, and whether hardening helped."""
    if not rows:
        return ""
    group = by_attack(rows)[0]
    first, *others = grouped((row, victim_name(row)) for row in group)
    shares = listed([f"{row.values['changed']:.0f} % of {row.expert}" for row in first])
    said = f"Under {title_of(first[0])}, answers of {victim_name(first[0])} change: {shares}."
    if not others:
        return f"{said} No other pipeline is compared with it."
    return f"{said} {'; '.join(verdict(own, first) for own in others)}."


def verdict(rows: Sequence[PipelineRow], first: Sequence[PipelineRow]) -> str:
    """Of which experts of a pipeline fewer answers change than of the first one's, as far as intervals tell.

    Where the attack used the first one's gradients alone, this says so: it is no fair comparison.
    """
    of: dict[str, list[str]] = {"fewer": [], "more": [], "unclear": []}
    for row in rows:
        low, high = row.ci["fewer"]
        kind = "fewer" if low > 0 else "more" if high < 0 else "unclear"
        of[kind].append(row.expert if kind == "unclear" else f"{row.expert} ({row.values['changed']:.0f} %)")
    parts = [f"{kind} change of {listed(of[kind])}" for kind in ("fewer", "more") if of[kind]]
    parts += [f"no difference is clear for {listed(of['unclear'])}"] if of["unclear"] else []
    spared = any(row.white_box for row in first) and not any(row.white_box for row in rows)
    aside = ", whose gradients the attack did not use" if spared else ""
    return f"With {victim_name(rows[0])}{aside}, {', '.join(parts)}"


def listed(words: Sequence[str]) -> str:
    """In a sentence.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One attack. columns: a figure and the pipelines that have it; lines: an expert, through whose gradients, and a
    cell for every pipeline of every column."""

    title: str
    columns: Sequence[tuple[str, Sequence[str]]]
    lines: Sequence[tuple[str, str, Sequence[Rate]]]


def comparisons(rows: Sequence[PipelineRow]) -> list[Comparison]:
    """The pipelines side by side, one table for each attack."""
    made = []
    for group in by_attack(rows):
        found = {(row.expert, victim_name(row)): row for row in group}
        columns = {
            name: list(dict.fromkeys(victim_name(row) for row in group if name in row.values)) for name in told(group)
        }
        made.append(
            Comparison(
                title=title_of(group[0]),
                columns=[(COLUMNS[name], pipelines) for name, pipelines in columns.items() if pipelines],
                lines=[
                    (
                        expert,
                        " / ".join(dict.fromkeys(through(row) for row in group if row.expert == expert)),
                        [rate(found.get((expert, one)), name) for name, all_ in columns.items() for one in all_],
                    )
                    for expert in dict.fromkeys(row.expert for row in group)
                ],
            )
        )
    return made


def told(rows: Sequence[PipelineRow]) -> list[str]:
    """The columns that say something: answers that nobody left out need none."""
    return [
        name
        for name in COLUMNS
        if any(name in row.values and (row.values[name] or not name.startswith("unanswered")) for row in rows)
    ]


def through(row: PipelineRow) -> str:
    """Whose gradients made the pictures that an expert sees."""
    if row.white_box:
        return "white-box" if row.expert != AGENT else "white-box for some of its experts"
    return f"through {row.surrogate}"


def rate(row: PipelineRow | None, name: str) -> Rate:
    if row is None or name not in row.values:
        return Rate()
    return Rate.of((row.values[name], *row.ci[name]))


def pipeline_plot(rows: Sequence[PipelineRow]) -> str:
    """What changes of the answers of each expert, by pipeline, one panel for each attack; empty without rows."""
    groups = by_attack(rows)
    if not groups:
        return ""
    names = list(dict.fromkeys(victim_name(row) for row in rows))
    series = dict(zip(names, colours(len(names)), strict=True))
    experts = list(dict.fromkeys(row.expert for row in rows))
    width = min(0.28, 0.82 / len(names))
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 0.3 + 2.8 * len(groups)), layout="constrained")
        panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
        for axes, group in zip(panels, groups, strict=True):
            for row in group:
                x = experts.index(row.expert) + (names.index(victim_name(row)) - (len(names) - 1) / 2) * width
                value, (low, high) = row.values["changed"], row.ci["changed"]
                axes.bar(x, value, width * 0.92, color=series[victim_name(row)])
                axes.vlines(x, low, high, color="#2b3138", linewidth=1)
                axes.text(x, high + 1.5, f"{value:.0f}", ha="center", va="bottom", fontsize=7.5)
            axes.set_title(title_of(group[0]), loc="left", fontsize=9, fontweight="bold")
            axes.set(xticks=range(len(experts)), xticklabels=experts, ylim=(0, 112), yticks=range(0, 101, 20))
            axes.set_ylabel("answers changed (%)")
            axes.tick_params(length=0)
        legend(figure, panels[0], series)
    return to_svg(figure, "Bar plot: share of answers that attacks change, by expert and pipeline")


def table(rows: Sequence[PipelineRow]) -> str:
    """One line per row, for the terminal."""
    columns = told(rows)
    lines = [("pipeline", "attack", "expert", "through", *(COLUMNS[name] for name in columns))]
    for row in rows:
        figures = (rate(row, name).plain() for name in columns)
        lines.append((victim_name(row), title_of(row), row.expert, through(row), *figures))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
