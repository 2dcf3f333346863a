"""Rows under other ground truths than the original pairs: both side by side, one table per truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastmat.evaluation.results import Row, UnderTruth
from fastmat.report.labels import attack_name, budget, defence_name, source
from fastmat.report.tables import Cell, grouped

COLUMNS = ("tr@1", "tr_rp", "tr_map@r", "ir@1", "ir_rp", "ir_map@r", "asr_tr@1", "asr_ir@1")


@dataclass(frozen=True, kw_only=True)
class TruthLine:
    """One victim under one attack. wide: under the truth; pairs: under the original pairs, of the same queries,
    empty where they were not judged."""

    label: str
    victim: str
    wide: list[Cell]
    pairs: list[Cell]


@dataclass(frozen=True, kw_only=True)
class TruthSection:
    attack: str
    budget: str
    source: str
    lines: list[TruthLine]


@dataclass(frozen=True, kw_only=True)
class TruthTable:
    """label: of the truth. queries: how many there are and how many right answers they have."""

    label: str
    queries: str
    sections: list[TruthSection]


def truth_tables(rows: Sequence[Row]) -> list[TruthTable]:
    """Of every truth that `rows`, of one data set, were judged under; clean rows first."""
    labels = dict.fromkeys(label for row in rows for label, _, _ in row.judged())
    return [truth_table(rows, label) for label in labels]


def truth_table(rows: Sequence[Row], label: str) -> TruthTable:
    judged = {
        id(row): [wide, *([pairs] if pairs else [])]
        for row in rows
        for name, wide, pairs in row.judged()
        if name == label
    }
    ordered = sorted((row for row in rows if id(row) in judged), key=lambda row: row.attack != "none")
    parts = grouped((row, (row.attack, row.threat, source(row))) for row in ordered)
    return TruthTable(
        label=label,
        queries=queries(judged[id(ordered[0])][0]),
        sections=[
            TruthSection(
                attack=attack_name(part[0].attack),
                budget=budget(part[0].threat, part),
                source=source(part[0]),
                lines=[
                    TruthLine(
                        label=defence_name(row.defence),
                        victim="" if row.victim == row.defence else row.victim,
                        wide=[cell(judged[id(row)][0], metric) for metric in COLUMNS],
                        pairs=[cell(found, metric) for found in judged[id(row)][1:] for metric in COLUMNS],
                    )
                    for row in part
                ],
            )
            for part in parts
        ],
    )


def queries(found: UnderTruth) -> str:
    sides = (
        (found.n_images, "images", found.right_captions, "captions"),
        (found.n_captions, "captions", found.right_images, "images"),
    )
    return ", ".join(f"{n:,} {what} with {right:.1f} right {items} each" for n, what, right, items in sides if right)


def cell(found: UnderTruth, metric: str) -> Cell:
    value, interval = found.metrics.get(metric), found.ci.get(metric)
    return Cell(
        value="" if value is None else f"{value:.1f}",
        interval="" if value is None or interval is None else f"{interval[0]:.1f}\u2013{interval[1]:.1f}",
        best=False,
    )
