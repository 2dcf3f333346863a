"""Surrogate and victims apart: models of several resolutions, attacked directly and through a stored set."""

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
    assert fastmat("eval", *common, *VICTIMS, "surrogate=tiny", f"attacks.sga={SGA}", "--out", direct)[0] == 0
    assert fastmat("eval", *common, *VICTIMS, f"sets=[{stored}]", "--out", reused)[0] == 0

    timing = {"seconds", "pairs_per_s"}
    rows = {}
    for folder in (direct, reused):
        attacked = [row for row in read_results(folder).rows if row.attack == "sga"]
        rows[folder] = {row.victim: row.model_dump(exclude=timing) for row in attacked}
        assert [row.surrogate for row in attacked] == ["same", "tiny", "tiny"]  # the first is the white box
    assert list(rows[direct]) == ["same", "larger", "smaller"]
    assert rows[direct] == rows[reused]
    assert rows[direct]["larger"]["max_words_changed"] == 1
