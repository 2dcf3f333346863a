"""`fastmat eval` with a second stage: rows, what they depend on, examples, refusals."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fastmat.evaluation.results import read_examples, read_results

Fastmat = Callable[..., tuple[int, str, str]]
COMMON = ["resamples=20", "examples=1", "threat.eps=8/255", "attacks.pgd={name: pgd, steps: 1}"]
VICTIMS = [
    "victims.plain={model: {name: tiny_albef}}",
    "victims.albef={model: {name: tiny_albef}, rerank_k: 4}",
    "victims.both={model: {name: tiny_albef}, rerank_k: 4, rerank_cosine: true}",
    "victims.blip={model: {name: tiny_blip}, rerank_k: 4}",
]


def test_rows_of_both_stages_clean_and_attacked(fastmat: Fastmat, settings: list[str], tmp_path: Path) -> None:
    words = ["eval", *settings, *COMMON, "surrogates.albef={name: tiny_albef}", "--out", tmp_path]
    code, out, error = fastmat(*words, *VICTIMS)
    assert code == 0, error
    rows = read_results(tmp_path).rows
    scoring = {"plain": "itc", "albef": "itm", "both": "itm+cosine", "blip": "itm+cosine"}
    assert {(row.victim, row.attack): row.scoring for row in rows} == {
        (victim, attack): name for victim, name in scoring.items() for attack in ("none", "pgd")
    }
    values = {row.victim: [row.value(f"{way}@{k}") for way in ("tr", "ir") for k in (1, 5)] for row in rows}
    assert values["plain"] != values["albef"]
    assert "scored by itm+cosine" in (tmp_path / "report.html").read_text()
    # What a query shows first is what its rank says.
    for example in read_examples(tmp_path / "examples.json").examples:
        if example.image_rank_after == 1 and example.setting.scoring != "itc":
            assert example.texts_after[0].correct
    inputs = {row.victim: row.inputs for row in rows if row.attack == "none"}
    changed = [*VICTIMS[:1], VICTIMS[1].replace("rerank_k: 4", "rerank_k: 3"), *VICTIMS[2:]]
    code, out, error = fastmat(*words, *changed, "--resume")
    assert code == 0, error
    assert "6 of 8 rows kept" in out
    again = {row.victim: row.inputs for row in read_results(tmp_path).rows if row.attack == "none"}
    assert {victim for victim in inputs if inputs[victim] != again[victim]} == {"albef"}


@pytest.mark.parametrize(
    ("victim", "said"),
    [
        ("{model: {name: tiny}, rerank_k: 2}", "rerank_k: DualEncoder has no matching head to re-rank with"),
        (
            "{model: {name: tiny_blip}, rerank_k: 7}",
            "victims.v.rerank_k must be at most 6, got 7: six/test has 6 images",
        ),
        ("{model: {name: tiny_blip}, rerank_k: 0}", "greater than 0"),
    ],
)
def test_refusals(victim: str, said: str, fastmat: Fastmat, settings: list[str], tmp_path: Path) -> None:
    code, _, error = fastmat("eval", *settings, f"victims.v={victim}", "--out", tmp_path / "out")
    assert code == 2
    assert said in error
