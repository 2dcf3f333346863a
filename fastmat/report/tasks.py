"""A task's `results.json` and `examples.json` to one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from fastmat.evaluation.results import read_json, write_atomic
from fastmat.report.html import pretty
from fastmat.report.labels import attack_name, defence_name, radius, source, victim_name, words
from fastmat.report.page import page
from fastmat.report.plots import STYLE, colours, to_svg
from fastmat.report.tables import grouped
from fastmat.tasks.results import TaskExamples, TaskResults, TaskRow

ABOUT = {
    "grounding": "An expression is right when the box that holds most of its Grad-CAM overlaps the true one by half. "
    "Accuracy in percent, by part of the data.",
    "captioning": "CIDEr and BLEU of the captions against those of humans, times 100.",
    "entailment": "Accuracy in percent over entailment, neutral and contradiction.",
    "zero_shot": "Top-1 accuracy in percent: the picture's own class prompt is the nearest of all. Worst case: right "
    "before and after every attack of the budget.",
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One model under one attack. cells: (value, interval) as text."""

    attack: str
    budget: str
    model: str
    cells: list[tuple[str, str]]


def write_task_report(folder: Path) -> Path:
    """`folder/report.html`, as a whole or not at all. Raises UserError when a file does not follow its schema."""
    results = read_json(folder / "results.json", TaskResults)
    path = folder / "examples.json"
    examples = read_json(path, TaskExamples) if path.exists() else TaskExamples(chosen="", examples=[])
    return write_atomic(folder / "report.html", render_task(results, examples).encode())


def render_task(results: TaskResults, examples: TaskExamples) -> str:
    """The page. Every text out of the data is escaped."""
    header = columns(results.rows)
    first = results.rows[0] if results.rows else None
    return page("tasks").render(
        task=results.task,
        about=ABOUT.get(results.task, ""),
        title=f"{first.dataset}, {first.split}: {first.n_rows:,} rows, {first.n_images:,} images" if first else "",
        header=header,
        lines=[line(row, header) for row in ordered(results.rows)],
        plot=task_plot(results.rows),
        examples=examples,
        config=pretty(results.config),
        environment=results.environment,
    )


def columns(rows: Sequence[TaskRow]) -> list[str]:
    """The figures that any row has, and "asr" where one has it."""
    names = dict.fromkeys(name for row in rows for name in row.values)
    return [*names, *(["asr"] if any(row.asr is not None for row in rows) else [])]


def ordered(rows: Sequence[TaskRow]) -> list[TaskRow]:
    """Clean rows first, then attack by attack as they were asked for, each by radius."""
    attacks = list(dict.fromkeys(["none", *(row.attack for row in rows)]))
    return sorted(rows, key=lambda row: (attacks.index(row.attack), row.threat.eps))


def line(row: TaskRow, header: Sequence[str]) -> Line:
    spent = [f"eps {radius(row.threat.eps, row.threat.norm)}"] if row.max_distance > 0 else []
    spent += [words(row.threat.max_words)] if row.max_words_changed else []
    return Line(
        attack=" ".join(filter(None, (attack_name(row.attack), source(row)))),
        budget=", ".join(spent) if row.threat.budgeted else "no budget",
        model=victim_name(row),
        cells=[cell(row, name) for name in header],
    )


def cell(row: TaskRow, name: str) -> tuple[str, str]:
    value = row.asr if name == "asr" else row.values.get(name)
    if value is None:
        return "", ""
    low, high = row.ci[name]
    return f"{value:.1f}", f"{low:.1f}\u2013{high:.1f}"


def task_plot(rows: Sequence[TaskRow]) -> str:
    """The task's first figure of every model, clean and under each attack, with intervals; empty without attacks."""
    if len({row.attack for row in rows}) < 2:
        return ""
    metric = next(iter(rows[0].values))
    groups = grouped((row, (row.attack, row.threat, source(row))) for row in ordered(rows))
    names = list(dict.fromkeys(victim_name(row) for row in rows))
    colour = dict(zip(names, colours(len(names)), strict=True))
    with rc_context(STYLE):
        figure = Figure(figsize=(max(5.0, min(9.6, 1.6 + 1.5 * len(groups))), 3.1), layout="constrained")
        axes = figure.add_subplot(ylabel=metric)
        width = min(0.28, 0.82 / len(names))
        for place, group in enumerate(groups):
            for row in group:
                x = place + (names.index(victim_name(row)) - (len(names) - 1) / 2) * width
                value, (low, high) = row.values[metric], row.ci[metric]
                axes.bar(x, value, width * 0.92, color=colour[victim_name(row)])
                axes.vlines(x, low, high, color="#2b3138", linewidth=1)
        labels = [
            f"{attack_name(group[0].attack)}\n{line(group[0], ()).budget or source(group[0])}".rstrip()
            for group in groups
        ]
        axes.set_xticks(range(len(groups)), labels)
        axes.set_ylim(bottom=0)
        handles = [axes.plot([], [], marker="s", linestyle="", color=shade)[0] for shade in colour.values()]
        figure.legend(handles, names, loc="outside upper center", ncols=min(6, len(names)), handletextpad=0.2)
    return to_svg(figure, f"Bar plot: {metric} clean and under each attack, by model")


def table(rows: Sequence[TaskRow]) -> str:
    """One line per row, for the terminal."""
    header = columns(rows)
    lines = [("model", "attack", "budget", *header)]
    for row in ordered(rows):
        made = line(row, header)
        figures = (f"{value} [{interval}]" if value else "-" for value, interval in made.cells)
        model = (
            made.model
            if row.victim == row.defence or row.defence == "none"
            else f"{row.victim} ({defence_name(row.defence)})"
        )
        lines.append((model, made.attack, made.budget or "-", *figures))
    widths = [max(len(entry[i]) for entry in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(entry, widths, strict=True)).rstrip() for entry in lines)
