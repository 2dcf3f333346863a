"""The answer says what the figures say, either way."""

from fastmat.studies.itc_weight_answer import answer
from fastmat.studies.results import Line

SCORINGS = {"itc": "ITC", "itm": "ITM"}


def line(
    weight: str, attack: str, tr: float, *, scoring: str = "itc", defence: str = "mat", part: str = "clip"
) -> Line:
    values = {"tr@1": (tr, tr - 2, tr + 2), "ir@1": (1.0, 0.0, 2.0)}
    return Line(
        part=part, defence=defence, weight=weight, attack=attack, scoring=scoring, values=values, by_seed=[{"tr@1": tr}]
    )


def said(*lines: Line) -> str:
    return answer(lines, adversarial=["itc", "sga"], scorings=SCORINGS, defences={"mat": "MAT"})


def test_the_worst_attack_decides_and_blur_is_none() -> None:
    lines = [line("1:1", "itc", 50), line("1:1", "sga", 20), line("1:0", "itc", 30), line("1:0", "zoom_blur", 1)]
    assert said(*lines) == (
        "Under its worst attack, a dual encoder (MAT, ranked by ITC) keeps most at 1:0, TR@1 30.0 [28.0, 32.0] "
        "against 20.0 [18.0, 22.0] at 1:1; clearly less is left at 1:1."
    )
    near = [line("1:1", "sga", 20), line("1:0", "sga", 23)]
    assert said(*near).endswith("at 1:1; the weights differ inside the intervals.")


def test_where_nothing_is_left_no_weight_is_praised() -> None:
    lines = [line("1:1", "itc", 0), line("1:0", "itc", 0)]
    assert said(*lines).startswith("Under its worst attack nothing is left of a dual encoder, whatever the weights")


def test_the_best_of_the_others_stands_in_for_the_published_weights() -> None:
    lines = [line("1:1", "itc", 50), line("1:0", "itc", 30), line("0:1", "itc", 40)]
    assert "keeps most at 1:1" in said(*lines) and said(*lines).endswith(
        "40.0 [38.0, 42.0] at 0:1; clearly less is left at 1:0 and 0:1."
    )
    assert said(line("1:1", "itc", 50)).endswith("TR@1 50.0 [48.0, 52.0].")
    assert said(line("1:1", "none", 50)) == "Nothing attacked a dual encoder."


def test_a_fusion_model_is_also_told_by_its_rankings() -> None:
    lines = [
        line("1:1", attack, tr, scoring=scoring, defence="finetune", part="fusion")
        for attack, scoring, tr in (("none", "itc", 60), ("none", "itm", 70), ("itc", "itc", 10), ("itc", "itm", 50))
    ]
    assert said(*lines).endswith(
        "Fine-tuned at 1:1, ranking by ITC has TR@1 60.0 [58.0, 62.0] when clean and 10.0 [8.0, 12.0] under an "
        "attack on ITC, re-ranking by ITM 70.0 [68.0, 72.0] and 50.0 [48.0, 52.0]."
    )
    assert "keeps most at 1:1, TR@1 50.0" in said(*lines), "the ranking that stands most"
