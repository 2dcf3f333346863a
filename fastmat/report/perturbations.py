"""How much of its recall a model loses to perturbations: relative drops, by kind and severity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmat.evaluation.results import Row
from fastmat.report.labels import victim_name

RECALLS = ("tr@1", "tr@5", "tr@10", "ir@1", "ir@5", "ir@10")


@dataclass(frozen=True, kw_only=True)
class Drops:
    """One victim. severities: column heads; lines: the kind, its drop at every severity (empty where it was not run)
    and their mean."""

    victim: str
    severities: list[int]
    lines: list[tuple[str, list[str], str]]


def perturbation_drops(rows: Sequence[Row], config: Mapping[str, Any]) -> list[Drops]:
    """Of every victim that was perturbed; rows of one data set, scored in one way. config: of the evaluation, which
    says what an attack's label stands for."""
    clean = {row.victim: row for row in rows if row.attack == "none"}
    perturbed = [row for row in rows if not row.threat.budgeted and row.victim in clean]
    made = []
    for victim in dict.fromkeys(row.victim for row in perturbed):
        found: dict[str, dict[int, float | None]] = {}
        for row in perturbed:
            if row.victim == victim:
                kind, severity = told(row.attack, config)
                found.setdefault(kind, {})[severity] = relative_drop(clean[victim], row)
        severities = sorted({severity for drops in found.values() for severity in drops})
        made.append(
            Drops(
                victim=victim_name(clean[victim]),
                severities=severities,
                lines=[
                    (kind, [percent(drops.get(severity)) for severity in severities], percent(mean(drops)))
                    for kind, drops in found.items()
                ],
            )
        )
    return made


def relative_drop(clean: Row, perturbed: Row) -> float | None:
    """The share, in percent, of the sum of all recalls that is gone; None where there was none.

    (clean - perturbed) / clean is the multimodal impact score, MMI, of Qiu et al. (arXiv 2212.08044); of the sum, and
    of the mean over severities, are this project's choices.
    """
    before, after = (sum(row.value(recall) or 0.0 for recall in RECALLS) for row in (clean, perturbed))
    return 100 * (before - after) / before if before else None


def told(label: str, config: Mapping[str, Any]) -> tuple[str, int]:
    """(kind, severity) of an attack by its label; the label itself where the config does not say."""
    attack = (config.get("attacks") or {}).get(label) or {}
    severity = attack.get("severity", 1 if attack.get("name") == "text_perturbation" else 3)
    return attack.get("kind") or attack.get("name") or label, severity


def mean(drops: Mapping[int, float | None]) -> float | None:
    values = [drop for drop in drops.values() if drop is not None]
    return sum(values) / len(values) if values else None


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
