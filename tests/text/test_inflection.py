"""Forms against a list, and back again."""

import pytest

from fastmat.text.inflection import FORMS, Form, inflected, lemmas_of

NOUN, THIRD, GERUND, PAST = FORMS
TABLE = {
    NOUN: "dog dogs, box boxes, city cities, boy boys, bus buses, glass glasses, watch watches, radio radios, "
    "cuff cuffs, quiz quizzes",
    THIRD: "play plays, try tries, go goes, watch watches, fix fixes, run runs, quiz quizzes, toss tosses",
    GERUND: "jog jogging, ride riding, lie lying, see seeing, dye dyeing, play playing, fix fixing, open opening, "
    "swim swimming, quit quitting, sew sewing, look looking, ski skiing, agree agreeing",
    PAST: "jump jumped, stop stopped, dance danced, try tried, play played, agree agreed, tie tied, visit visited, "
    "row rowed, kick kicked, dye dyed",
}
PAIRS = [(form, *pair.split()) for form, pairs in TABLE.items() for pair in pairs.split(", ")]


@pytest.mark.parametrize(("form", "lemma", "word"), PAIRS)
def test_there_and_back(form: Form, lemma: str, word: str) -> None:
    assert inflected(lemma, form) == word
    assert lemma in lemmas_of(word, form)


@pytest.mark.parametrize(
    ("form", "lemmas"),
    [
        (NOUN, "man woman fireman men child wolf knife potato people's species hands A ice-cream".split(" ")),  # noqa: SIM905
        (PAST, ["run", "sit", "be", "have", "throw", "hot dog"]),
        (GERUND, ["be", "have", "run away", "2d", "x", ""]),
    ],
)
def test_what_has_no_regular_form(form: Form, lemmas: list[str]) -> None:
    assert [inflected(lemma, form) for lemma in lemmas] == [None] * len(lemmas)


def test_nothing_is_undone_that_was_not_done() -> None:
    assert lemmas_of("grass", NOUN) == lemmas_of("sat", PAST) == lemmas_of("", NOUN) == []
    assert "rid" not in lemmas_of("riding", GERUND) and "hop" not in lemmas_of("hoping", GERUND)
