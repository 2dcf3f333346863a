"""Rates and their intervals, against a plain count; the journal; rows."""

import json
import random
from pathlib import Path

import pytest
import torch

from fastmat.errors import UserError
from fastmat.evaluation.results import Setting, Threat
from fastmat.pipeline.journal import Journal
from fastmat.pipeline.measure import agent_metrics, differ, expert_metrics, fewer, normalised
from fastmat.pipeline.results import Entry, PipelineRow
from fastmat.pipeline.rows import Case, Voice, rows_of
from fastmat.report.pipeline import answer, comparisons
from fastmat.tasks.base import Metric, estimates

WORDS = ["a dog", "A dog!", "two birds", "snow", "", None]
KEYS = {name: f"{number:064x}" for number, name in enumerate(("before", "after", "again", "before2", "after2"))}


def draw(seed: int, n: int = 40) -> list[str | None]:
    return random.Random(seed).choices(WORDS, k=n)


def value(metric: Metric) -> float:
    return float(metric.value(metric.sums.sum(0)))


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("A dog.", " a  dog", True),
        ("a dog", "a dogs", False),
        ("left", "upper left", False),
        ("Straße", "STRASSE", True),
        (None, " ?!", True),
        ("3.5", "35", False),
        ("un été", "un ete", False),
        ("\u72ac", "\u732b", False),
    ],
)
def test_what_counts_as_the_same_answer(first: str | None, second: str | None, same: bool) -> None:
    assert (normalised(first) == normalised(second)) is same
    assert differ([first], [second]).tolist() == [not same]


def test_rates_are_counts() -> None:
    before, after, again = draw(0), draw(1), draw(2)
    right = [{"a dog", "snow"} if i % 3 else {"two birds"} for i in range(40)]

    def plain(text: str | None) -> str:
        return "".join(c for c in (text or "").lower() if c.isalnum() or c == " ").strip()

    changed = [plain(a) != plain(b) for a, b in zip(before, after, strict=True)]
    was = [a in own for a, own in zip(before, right, strict=True)]
    now = [a in own for a, own in zip(after, right, strict=True)]
    lost = [a and not b for a, b in zip(was, now, strict=True)]
    found = {name: value(metric) for name, metric in expert_metrics(before, after, right).items()}
    assert found == pytest.approx(
        {
            "changed": 100 * sum(changed) / 40,
            "right_clean": 100 * sum(was) / 40,
            "right": 100 * sum(now) / 40,
            "asr": 100 * sum(lost) / sum(was),
        }
    )
    found = {name: value(metric) for name, metric in agent_metrics(before, after, again).items()}
    assert found == pytest.approx(
        {
            "changed": 100 * sum(changed) / 40,
            "unanswered_clean": 100 * sum(not plain(a) for a in before) / 40,
            "unanswered": 100 * sum(not plain(a) for a in after) / 40,
            "noise": 100 * sum(plain(a) != plain(b) for a, b in zip(before, again, strict=True)) / 40,
        }
    )
    assert "noise" not in agent_metrics(before, after, None)


def test_a_difference_has_the_interval_of_pairs() -> None:
    """Where both pipelines change on the same pictures the difference is certain, though neither rate is."""
    flags = torch.arange(40) % 2 == 0
    values, ci = estimates({"fewer": fewer(flags, flags)}, torch.arange(40), seed=0, resamples=200)
    assert values["fewer"] == 0 and ci["fewer"] == (0, 0)
    values, ci = estimates(
        {"fewer": fewer(flags, flags & (torch.arange(40) < 20))}, torch.arange(40), seed=0, resamples=500
    )
    assert values["fewer"] == pytest.approx(25) and ci["fewer"][0] > 0 and ci["fewer"][1] > values["fewer"]


def entries(key: str, answers: list[str | None], *, distance: float = 0.0) -> list[Entry]:
    return [
        Entry(key=KEYS[key], row=row, image=f"i{row}", asked="p.e", of="clean", answer=text, distance=distance)
        for row, text in enumerate(answers)
    ]


def test_a_journal_is_taken_up_where_it_was_cut(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    first = Journal(file)
    assert first.missing(KEYS["before"], range(3)) == [0, 1, 2] and first.taken_over == 0
    first.add(entries("before", ["a", "two\nlines \u72ac", None]))
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:20])  # a kill in the middle of a line
    second = Journal(file)
    assert second.taken_over == 3 and file.read_bytes() == whole
    assert [entry.answer for entry in second.answers(KEYS["before"], [2, 1, 0])] == [None, "two\nlines \u72ac", "a"]
    assert second.missing(KEYS["after"], range(2)) == [0, 1]
    second.add(entries("after", ["b"]))
    assert Journal(file).missing(KEYS["after"], range(2)) == [1]
    file.write_bytes(whole[:20])
    assert Journal(file).taken_over == 0 and file.read_bytes() == b""


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    Journal(file).add(entries("before", ["a"]))
    file.write_bytes(file.read_bytes() + b'{"row": 1}\n')
    with pytest.raises(UserError, match=r"answers\.jsonl, line 2: no answer as fastmat writes it"):
        Journal(file)


def case(victim: str, before: str, after: str, *, origin: str = "", attack: str = "pgd") -> Case:
    voices = tuple(
        Voice(
            label=label,
            before=KEYS[before],
            after=KEYS[after],
            again=KEYS["again"] if label == "agent" else None,
            rows=tuple(range(40)) if label == "retrieval" else (3, 5, 8),
            white_box=label == "retrieval",
            from_gallery=label == "retrieval",
        )
        for label in ("retrieval", "agent")
    )
    setting = Setting(
        surrogate=f"{victim}.retrieval",
        victim=victim,
        white_box=True,
        defence="none",
        attack=attack,
        threat=Threat(eps=8 / 255),
        dataset="d",
        split="test",
        seed=0,
    )
    return Case(setting=setting, pictures=KEYS[after], origin=origin, voices=voices)


def rows(tmp_path: Path) -> list[PipelineRow]:
    journal = Journal(tmp_path / "answers.jsonl")
    for number, key in enumerate(KEYS):
        journal.add(entries(key, draw(number), distance=0.03 if key.startswith("after") else 0.0))
    plain, hardened = case("plain", "before", "after"), case("hard", "before2", "after2")
    assert plain.same_attack(hardened) and not plain.same_attack(case("hard", "before2", "after2", attack="sga"))
    assert not plain.same_attack(case("hard", "before2", "after2", origin="b32"))
    captions = [{"a dog"}] * 40
    made = rows_of(plain, None, journal, captions=captions, resamples=50)
    return made + rows_of(hardened, plain, journal, captions=captions, resamples=50)


def test_rows_are_what_the_journal_says(tmp_path: Path) -> None:
    plain, agent, hardened, hardened_agent = rows(tmp_path)
    changed = differ(draw(0), draw(1)).float(), differ(draw(3), draw(4)).float()
    assert plain.values["changed"] == pytest.approx(100 * float(changed[0].mean()))
    assert hardened.values["fewer"] == pytest.approx(100 * float((changed[0] - changed[1]).mean()))
    assert hardened_agent.values["fewer"] == pytest.approx(100 * float((changed[0] - changed[1])[[3, 5, 8]].mean()))
    assert agent.values["noise"] == pytest.approx(100 * float(differ(draw(0), draw(2))[[3, 5, 8]].float().mean()))
    assert "fewer" not in plain.values and "right" in plain.values and "right" not in agent.values
    assert (plain.n_images, agent.n_images) == (40, 3)
    assert plain.white_box and not agent.white_box and plain.max_distance == 0.03
    assert json.loads(plain.model_dump_json())["expert"] == "retrieval"


def test_the_answer_says_what_intervals_allow(tmp_path: Path) -> None:
    made = rows(tmp_path)
    assert answer(made[:2]).endswith("No other pipeline is compared with it.")
    for bounds, said in (
        ((1.0, 9.0), "With hard, fewer change of retrieval ("),
        ((-9.0, -1.0), "With hard, more change of retrieval ("),
        ((-1.0, 1.0), "With hard, no difference is clear for retrieval and agent."),
    ):
        ci = {**made[2].ci, "fewer": bounds}
        other = {**made[3].ci, "fewer": (-1.0, 1.0)}
        told = answer([*made[:2], made[2].model_copy(update={"ci": ci}), made[3].model_copy(update={"ci": other})])
        assert said in told and told.startswith("Under PGD, eps 8/255, answers of plain change: ")
    spared = [row.model_copy(update={"white_box": False}) for row in made[2:]]
    assert "With hard, whose gradients the attack did not use, " in answer([*made[:2], *spared])
    (table,) = comparisons(made)
    assert [line[0] for line in table.lines] == ["retrieval", "agent"]
    assert table.columns[0] == ("changed", ["plain", "hard"]) and table.columns[1] == ("fewer", ["hard"])
    assert all(len(cells) == sum(len(pipelines) for _, pipelines in table.columns) for _, _, cells in table.lines)
    assert answer([]) == "" and comparisons([]) == []
