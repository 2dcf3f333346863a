"""Surrogates against victims: one matrix per attack and budget, white-box cells marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastmat.evaluation.results import Row
from fastmat.report.labels import attack_name, budget, victim_name
from fastmat.report.tables import grouped


@dataclass(frozen=True, kw_only=True)
class MatrixCell:
    """One direction of retrieval of one victim: ASR@1 and what is left of recall@1, empty where it was not run."""

    asr: str
    recall: str
    white_box: bool


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """victims: column heads. lines: surrogate, and two cells (TR, IR) for each victim."""

    attack: str
    budget: str
    victims: list[str]
    lines: list[tuple[str, list[MatrixCell]]]


def matrices(rows: Sequence[Row]) -> list[Matrix]:
    """Of every attack that was transferred; rows of one data set."""
    attacked = [row for row in rows if row.attack != "none"]
    groups = grouped((row, (row.attack, row.threat, row.seed)) for row in attacked)
    return [matrix(group) for group in groups if any(not row.white_box for row in group)]


def matrix(rows: list[Row]) -> Matrix:
    """Rows that share attack and threat; surrogates and victims in order of appearance."""
    victims = {row.victim: victim_name(row) for row in rows}
    own = {row.surrogate: victim_name(row) for row in rows if row.white_box and row.surrogate == row.victim}
    found = {(row.surrogate, row.victim): row for row in rows}
    return Matrix(
        attack=attack_name(rows[0].attack),
        budget=budget(rows[0].threat, rows),
        victims=list(victims.values()),
        lines=[
            (
                own.get(surrogate, surrogate),
                [cell(found.get((surrogate, victim)), way) for victim in victims for way in ("tr", "ir")],
            )
            for surrogate in dict.fromkeys(row.surrogate for row in rows)
        ],
    )


def cell(row: Row | None, way: str) -> MatrixCell:
    """way: "tr" or "ir"."""
    asr, recall = (None, None) if row is None else (row.value(f"asr_{way}@1"), row.value(f"{way}@1"))
    return MatrixCell(
        asr="" if asr is None else f"{asr:.1f}",
        recall="" if recall is None else f"{recall:.1f}",
        white_box=row is not None and row.white_box,
    )
