"""Perturbations from the command line, beside attacks: no budget holds them, and results say so."""

import json
from pathlib import Path

import pytest
from cli.conftest import Fastmat

from fastmat.evaluation.results import read_results

ATTACKS = (
    "attacks={pgd: {name: pgd, steps: 1}, fog1: {name: corruption, kind: fog, severity: 1}, "
    "fog5: {name: corruption, kind: fog, severity: 5}, swap: {name: text_perturbation, kind: word_swap, severity: 7}}"
)


def test_eval(fastmat: Fastmat, settings: list[str], tmp_path: Path) -> None:
    told = [*settings, ATTACKS, "victims={tiny: {model: tiny}}", "eps=[4/255]", "resamples=10", "examples=1"]
    code, shown, error = fastmat("eval", *told, "--out", tmp_path / "eval")
    assert code == 0, error
    rows = read_results(tmp_path / "eval").rows
    assert [row.attack for row in rows] == ["none", "pgd", "pgd", "fog1", "fog5", "swap"], "radii are for attacks"
    pgd, fog, swap = rows[1], rows[4], rows[5]
    assert pgd.threat.budgeted and pgd.max_distance <= pgd.threat.eps + 1e-6
    assert not fog.threat.budgeted and (fog.threat.eps, fog.threat.max_words) == (0, 0) and fog.max_distance > 8 / 255
    assert not swap.threat.budgeted and swap.max_distance == 0 and swap.max_words_changed > 1
    (line,) = (line for line in shown.splitlines() if "fog5" in line)
    assert line.split()[4:6] == ["none", "none"]
    page = (tmp_path / "eval/report.html").read_text()
    assert "multimodal impact score" in page and "no budget" in page


def test_a_stored_set(fastmat: Fastmat, settings: list[str], tmp_path: Path) -> None:
    attack = "attack={name: corruption, kind: contrast, severity: 5}"
    code, _, error = fastmat("attack", *settings, "model=tiny", attack, "--out", tmp_path / "set")
    assert code == 0, error
    assert json.loads((tmp_path / "set/manifest.json").read_text())["threat"]["budgeted"] is False
    told = [*settings, f"sets=[{tmp_path / 'set'}]", "victims={tiny: {model: tiny}}", "resamples=10", "examples=0"]
    code, _, error = fastmat("eval", *told, "--out", tmp_path / "eval")
    assert code == 0, error
    code, _, error = fastmat("export", tmp_path / "set", "--out", tmp_path / "png")
    assert code == 0, error
    assert len(list((tmp_path / "png/images").glob("*.png"))) == 6


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ("{name: corruption, kind: rain}", "attacks.a: there is no kind 'rain'"),
        ("{name: corruption, kind: fog, severity: 0}", "severity must be a whole number from 1 to 5, got 0"),
        ("{name: text_perturbation, kind: formal}", "attacks.a: kind 'formal' needs model"),
        ("{name: stylize, styles: nowhere, encoder: e, decoder: d}", "styles: nowhere holds no .png or .jpg"),
        ("{name: corruption}", "attacks.a: 'kind' is missing"),
    ],
)
def test_refusals(fastmat: Fastmat, settings: list[str], tmp_path: Path, attack: str, said: str) -> None:
    told = [*settings, f"attacks={{a: {attack}}}", "victims={tiny: {model: tiny}}"]
    code, _, error = fastmat("eval", *told, "--out", tmp_path / "eval")
    assert code == 2 and said in error and error.count("\n") == 1, error
