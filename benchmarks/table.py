"""Rows as text: a table for the terminal, and README.md beside the rows, both of the newest run of every case."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fastmat.benchmarks.rows import Row
from fastmat.benchmarks.targets import TARGETS, Target

Run = tuple[Row, ...]
HEADER = ("case", "implementation", "kind", "ms", "p20 to p80", "fastmat's speed", "GB/s", "peak MB", "error")


def place_of(row: Row) -> str:
    """Where a row was measured: "cuda", "cpu, 1 thread".

    Rows of different places are never compared.
    """
    if row.device != "cpu":
        return row.device
    return f"cpu, {row.threads} thread{'s' if row.threads > 1 else ''}"


def newest_runs(rows: Iterable[Row]) -> list[Run]:
    """The rows of the newest run of every case on every machine, in the order in which cases were first measured."""
    runs: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        own = runs.setdefault((place_of(row), row.machine, row.operator, row.case), [])
        if own and row.time > own[0].time:
            own.clear()
        own.append(row)
    return [tuple(run) for run in runs.values()]


def speed_up(row: Row, run: Run) -> float | None:
    """How many times the speed of `row` fastmat has, in the same run."""
    ours = next((other for other in run if other.kind == "fastmat"), None)
    return None if ours is None or row is ours or row.kind == "limit" else row.p50 / ours.p50


def cells(row: Row, run: Run) -> tuple[str, ...]:
    ratio = speed_up(row, run)
    return (
        f"{row.operator} {row.case}",
        row.implementation,
        row.kind,
        number(row.p50),
        f"{number(row.p20)} to {number(row.p80)}",
        "" if ratio is None else f"{number(ratio)}x",
        "" if row.moved is None else number(row.moved / row.p50 / 1e6),
        "" if row.peak is None else f"{row.peak / 1e6:.0f}",
        "" if row.error is None else f"{row.error:.0e}" if row.error else "0",
    )


def number(value: float) -> str:
    """Three digits.

    >>> number(0.01234), number(12.345), number(1234.5)
    ('0.0123', '12.3', '1234')
    """
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def target_lines(runs: Sequence[Run], target: Target) -> list[tuple[str, ...]]:
    """One line per place where the target's case was measured; one with dashes where there is none."""
    what = (f"{target.operator} {target.case}", target.asked())
    lines = []
    for run in runs:
        if (run[0].device, run[0].operator, run[0].case) != (target.device, target.operator, target.case):
            continue
        figure = target.measured(run)
        if figure is not None:
            missed = f"no: {target.limit}" if target.limit else "no"
            lines.append((place_of(run[0]), *what, number(figure), "yes" if target.met(figure) else missed))
    return lines or [(target.device, *what, "-", "-")]


def for_terminal(runs: Sequence[Run]) -> str:
    """Both tables, in columns; a target without rows is left out."""
    body = [cells(row, run) for run in runs for row in run]
    goals = [line for target in TARGETS for line in target_lines(runs, target) if line[3] != "-"]
    parts = [columns([HEADER, *body])]
    if goals:
        parts.append(columns([("device", "target", "asked", "measured", "met"), *goals]))
    return "\n\n".join(parts)


def columns(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def markdown(lines: Sequence[tuple[str, ...]]) -> str:
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def page(rows: Sequence[Row], plots: Sequence[str]) -> str:
    """README.md of a results folder: targets, plots, then every case by machine."""
    runs = newest_runs(rows)
    goals = [("device", "case", "asked", "measured", "met")]
    goals += [line for target in TARGETS for line in target_lines(runs, target)]
    parts = [
        "# Operators: speed and memory",
        "Written by `fastmat bench ops` from [rows.jsonl](rows.jsonl), the newest run of every case; do not edit. "
        "Milliseconds are medians of one call; opponents ran in turn in the same process. A result was held to the "
        "exact one before any figure (error: largest difference over the largest entry). Speed 3x: fastmat's median is "
        "a third. GB/s: bytes that must move over the median. Peak MB: above the inputs, results and gradients "
        "included. A limit computes something else. A dash: not measured.",
        "## Targets",
        markdown(goals),
        *(f"![Speed-up of fastmat over each opponent, and peak memory]({plot})" for plot in plots),
    ]
    for place, machine in dict.fromkeys((place_of(run[0]), run[0].machine) for run in runs):
        own = [run for run in runs if (place_of(run[0]), run[0].machine) == (place, machine)]
        parts += [
            f"## {machine} ({place})",
            provenance(own),
            markdown([HEADER, *(cells(r, run) for run in own for r in run)]),
        ]
    return "\n\n".join(parts) + "\n"


def provenance(runs: Sequence[Run]) -> str:
    """Commands, threads, versions and commits behind some runs, each distinct one once."""
    rows = [run[0] for run in runs]
    said = {
        "command": [f"`{row.command}`" for row in rows],
        "threads": [str(row.threads) for row in rows],
        "versions": [", ".join(f"{name} {version}" for name, version in row.versions.items()) for row in rows],
        "commit": [row.commit or "none" for row in rows],
    }
    return "\n".join(f"- {key}: {'; '.join(dict.fromkeys(values))}" for key, values in said.items())


def write_page(folder: Path, rows: Sequence[Row], plots: Sequence[str]) -> None:
    (folder / "README.md").write_text(page(rows, plots), encoding="utf-8")
