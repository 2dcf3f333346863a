"""Relative drops by hand."""

import pytest
from report.samples import made_row

from fastmat.evaluation.results import Examples, Results, Row, Threat
from fastmat.report.html import render
from fastmat.report.labels import budget
from fastmat.report.perturbations import perturbation_drops, relative_drop

CONFIG = {
    "attacks": {
        "fog1": {"name": "corruption", "kind": "fog", "severity": 1},
        "fog3": {"name": "corruption", "kind": "fog"},
        "keys": {"name": "text_perturbation", "kind": "keyboard"},
        "sga": {"name": "sga"},
    }
}


def perturbed(attack: str, tr: float, **changes: object) -> Row:
    return made_row(attack=attack, tr=tr, threat=Threat(budgeted=False), max_distance=0.7, **changes)


def test_by_hand() -> None:
    clean = made_row(attack="none", tr=60.0)
    rows = [clean, made_row(tr=5.0), perturbed("fog1", 50.0), perturbed("fog3", 20.0), perturbed("keys", 40.0)]
    # tr@1, 5, 10 are tr, tr + 20, tr + 28, and every ir 6 less: the sum is 6 tr + 78.
    total = {tr: 6 * tr + 78 for tr in (60, 50, 40, 20)}
    drops = {tr: 100 * (total[60] - total[tr]) / total[60] for tr in total}
    assert relative_drop(clean, rows[2]) == pytest.approx(drops[50])
    (table,) = perturbation_drops(rows, CONFIG)
    assert table.severities == [1, 3]
    assert table.lines == [
        ("fog", [f"{drops[50]:.1f}", f"{drops[20]:.1f}"], f"{(drops[50] + drops[20]) / 2:.1f}"),
        ("keyboard", [f"{drops[40]:.1f}", ""], f"{drops[40]:.1f}"),
    ]
    assert budget(rows[2].threat, rows[2:3]) == "no budget"
    page = render(Results(rows=rows, config=CONFIG, environment={}), Examples(chosen="", examples=[]))
    assert page.count("multimodal impact score") == 1 and f"{drops[20]:.1f}" in page
    attacked = render(Results(rows=rows[:2], config=CONFIG, environment={}), Examples(chosen="", examples=[]))
    assert "multimodal impact score" not in attacked


def test_nothing_to_compare_with() -> None:
    assert perturbation_drops([perturbed("fog1", 50.0)], CONFIG) == []
    lost = made_row(attack="none", tr=0.0, **{f"{way}@{k}": 0.0 for way in ("tr", "ir") for k in (1, 5, 10)})
    assert relative_drop(lost, lost) is None
    (table,) = perturbation_drops([lost, perturbed("mist", 0.0)], {})
    assert table.lines == [("mist", [""], "")]
