"""Surrogate and victims apart: models of several resolutions, attacked directly and through a stored set."""

import json
from collections.abc import Callable
from pathlib import Path

from fastmat.evaluation.results import read_results

Fastmat = Callable[..., tuple[int, str, str]]
VICTIMS = [
    "victims.same={model: {name: tiny}}",
    "victims.larger={model: {name: tiny, image_size: 48, seed: 1}, defence: mat}",
    "victims.smaller={model: {name: tiny, image_size: 24, seed: 2}}",
    "resamples=20",
    "examples=2",
]
SGA = "{name: sga, steps: 2, scales: [0.5]}"


def test_a_stored_set_and_the_attack_itself_give_the_same_rows(
    fastmat: Fastmat, settings: list[str], tmp_path: Path
) -> None:
    stored, direct, reused = tmp_path / "set", tmp_path / "direct", tmp_path / "reused"
    common = [*settings, "threat.eps=8/255"]
    assert fastmat("attack", *common, "model=tiny", f"attack={SGA}", "--out", stored)[0] == 0
    assert fastmat("eval", *common, *VICTIMS, "surrogates.tiny=tiny", f"attacks.sga={SGA}", "--out", direct)[0] == 0
    assert fastmat("eval", *common, *VICTIMS, f"sets=[{stored}]", "--out", reused)[0] == 0

    timing = {"seconds", "pairs_per_s", "inputs"}
    rows = {}
    for folder in (direct, reused):
        attacked = [row for row in read_results(folder).rows if row.attack == "sga"]
        rows[folder] = {row.victim: row.model_dump(exclude=timing) for row in attacked}
        assert [row.surrogate for row in attacked] == ["tiny"] * 3
        assert [row.white_box for row in attacked] == [True, False, False]
    assert list(rows[direct]) == ["same", "larger", "smaller"]
    assert rows[direct] == rows[reused]
    assert rows[direct]["larger"]["max_words_changed"] == 1


def test_a_stored_set_beyond_its_own_budget_is_refused(fastmat: Fastmat, settings: list[str], tmp_path: Path) -> None:
    """The manifest may claim less than the images do: they are measured against the clean ones."""
    stored = tmp_path / "set"
    words = [*settings, "model=tiny", "attack={name: pgd, steps: 2}", "threat.eps=8/255", "--out", stored]
    assert fastmat("attack", *words)[0] == 0
    manifest = json.loads((stored / "manifest.json").read_text())
    manifest["threat"]["eps"] = 4 / 255
    (stored / "manifest.json").write_text(json.dumps(manifest))
    code, _, error = fastmat("eval", *settings, *VICTIMS, f"sets=[{stored}]", "--out", tmp_path / "eval")
    assert code == 2
    assert "the budget is 0.015686" in error
