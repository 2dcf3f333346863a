"""Rows of results, arranged for reading: one table per data set, one section per attack, one line per victim."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from fastmat.evaluation.results import Row
from fastmat.report.labels import attack_name, budget, defence_name, radius, source, words

COLUMNS = ("tr@1", "tr@5", "tr@10", "ir@1", "ir@5", "ir@10", "asr_tr@1", "asr_ir@1")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """value and interval as text, empty where there is none; best: of its section."""

    value: str
    interval: str
    best: bool


@dataclass(frozen=True, kw_only=True)
class Line:
    """One victim under one attack. found: largest distance and most words found on what was stored."""

    label: str
    victim: str
    cells: list[Cell]
    found: str
    speed: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """One attack with one budget from one kind of surrogate."""

    attack: str
    budget: str
    source: str
    lines: list[Line]


@dataclass(frozen=True, kw_only=True)
class Table:
    """One data set, scored in one way."""

    title: str
    rows: list[Row]
    sections: list[Section]


def tables(rows: list[Row]) -> list[Table]:
    made = []
    for group in grouped((row, query_key(row)) for row in rows):
        first = group[0]
        of = "" if first.gallery_images is None else f" attacked, of {first.gallery_images:,} images"
        scoring = "" if first.scoring == "itc" else f", scored by {first.scoring}"
        title = f"{first.dataset}, {first.split}: {first.n_images:,} images, {first.n_captions:,} captions{of}{scoring}"
        attacks = [attack for attack in dict.fromkeys(row.attack for row in group) if attack != "none"]
        ordered = sorted(group, key=lambda row: (["none", *attacks].index(row.attack), row.threat.norm, row.threat.eps))
        parts = grouped((row, (row.attack, row.threat, source(row))) for row in ordered)
        made.append(Table(title=title, rows=group, sections=[section(part) for part in parts]))
    return made


def query_key(row: Row) -> object:
    """Rows that share it have the same queries and gallery."""
    return row.dataset, row.split, row.scoring, row.n_images, row.n_captions, row.gallery_images


def section(rows: list[Row]) -> Section:
    """Rows that share attack, threat and source."""
    first = rows[0]
    best = {metric: best_value(rows, metric) for metric in COLUMNS}
    return Section(
        attack=attack_name(first.attack),
        budget=budget(first.threat, rows),
        source=source(first),
        lines=[line(row, best, seeds=len({other.seed for other in rows}) > 1) for row in rows],
    )


def best_value(rows: list[Row], metric: str) -> float | None:
    """The most robust of several victims: highest recall, lowest ASR. None on clean data and for a lone victim."""
    values = [value for row in rows if (value := row.value(metric)) is not None]
    if rows[0].attack == "none" or len(values) < 2:
        return None
    return min(values) if metric.startswith("asr") else max(values)


def line(row: Row, best: dict[str, float | None], *, seeds: bool) -> Line:
    found = [radius(row.max_distance, row.threat.norm)] if row.max_distance > 0 else []
    found += [words(row.max_words_changed)] if row.max_words_changed else []
    label = defence_name(row.defence)
    return Line(
        label=f"{label}, seed {row.seed}" if seeds else label,
        victim="" if row.victim == row.defence else row.victim,
        cells=[cell(row, metric, best[metric]) for metric in COLUMNS],
        found=", ".join(found),
        speed=""
        if row.pairs_per_s is None
        else f"{row.pairs_per_s:,.3g}"
        if row.pairs_per_s < 100
        else f"{row.pairs_per_s:,.0f}",
    )


def cell(row: Row, metric: str, best: float | None) -> Cell:
    value, interval = row.value(metric), row.ci.get(metric)
    return Cell(
        value="" if value is None else f"{value:.1f}",
        interval="" if value is None or interval is None else f"{interval[0]:.1f}\u2013{interval[1]:.1f}",
        best=value is not None and value == best,
    )


def grouped(keyed: Iterable[tuple[T, object]]) -> list[list[T]]:
    """Items with equal keys together, in order of first appearance.

    >>> grouped([("a", 1), ("b", 2), ("c", 1)])
    [['a', 'c'], ['b']]
    """
    groups: dict[object, list[T]] = {}
    for item, key in keyed:
        groups.setdefault(key, []).append(item)
    return list(groups.values())
