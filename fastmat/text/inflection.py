"""English words in their regular forms: nouns with -s, verbs with -s, -ing and -ed.

Rules and back: the lemma of a form is found by trying what the rules may have done to it, as WordNet's Morphy does.
Words that follow no rule are listed by lemma and have no form here.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

IRREGULAR_NOUNS = frozenset(
    """
    aircraft child clothes deer die fish foot goose louse mouse ox pants person scissors series sheep species tooth
    trout trousers
    """.split()  # noqa: SIM905
)
# Of -ed; their other forms are regular.
IRREGULAR_VERBS = frozenset(
    """
    arise awake bear beat become begin bend bet bind bite bleed blow break breed bring build burst buy cast catch
    choose cling come cost creep cut deal dig dive do draw drink drive eat fall feed feel fight find flee fling fly
    forget forgive freeze get give go grind grow hang have hear hide hit hold hurt keep kneel know lay lead leave
    lend let lie light lose make mean meet outrun overcome overtake partake pay put quit read rend ride ring rise run
    say see seek sell send set sew shake shed shine shoot show shrink shut sing sink sit sleep slide sling slit sow
    speak speed spend spin spit split spread spring stand steal stick sting stink stride strike string strive swear
    sweep swell swim swing take teach tear tell think throw thrust tread understand undertake wake wear weave weep
    win wind withdraw wring write
    """.split()  # noqa: SIM905
)


class Form(NamedTuple):
    """part: n or v, as lexicons have it."""

    part: str
    ending: Literal["s", "ing", "ed"]


FORMS = (Form("n", "s"), Form("v", "s"), Form("v", "ing"), Form("v", "ed"))


def inflected(lemma: str, form: Form) -> str | None:
    """The regular form of one word in lower-case letters; None where there is none.

    >>> [inflected(lemma, Form("v", "ing")) for lemma in ("jog", "ride", "lie", "play", "open")]
    ['jogging', 'riding', 'lying', 'playing', 'opening']
    >>> [inflected(lemma, Form("n", "s")) for lemma in ("dog", "box", "city", "boy", "man", "hot dog")]
    ['dogs', 'boxes', 'cities', 'boys', None, None]
    """
    if not re.fullmatch("[a-z]{2,}", lemma) or not is_regular(lemma, form):
        return None
    if form.ending == "s":
        return plural(lemma, form.part)
    if form.ending == "ing" and lemma.endswith("ie"):
        return f"{lemma[:-2]}ying"
    if form.ending == "ed" and re.search("[^aeiou]y$", lemma):
        return f"{lemma[:-1]}ied"
    if re.search("e$" if form.ending == "ed" else "[^eoy]e$", lemma):
        return lemma[:-1] + form.ending
    # One vowel, then one consonant, which is doubled; words of several syllables are taken to end unstressed.
    double = re.fullmatch("(qu|[^aeiou])*[aeiouy][^aeiouwxy]", lemma)
    return lemma + lemma[-1] * bool(double) + form.ending


def plural(lemma: str, part: str) -> str:
    """With -s; of verbs, the third person."""
    if re.search("[^aeiou]y$", lemma):
        return f"{lemma[:-1]}ies"
    if lemma.endswith("iz"):
        return f"{lemma}zes"
    return lemma + ("es" if re.search("(s|x|z|ch|sh)$", lemma) or (part == "v" and lemma.endswith("o")) else "s")


def is_regular(lemma: str, form: Form) -> bool:
    """Nouns in -f, in -o after a consonant, in -man and in a single -s (mostly plurals already) may be either."""
    if form.part == "n":
        return lemma not in IRREGULAR_NOUNS and not re.search("([^f]fe?|[^aeiou]o|m[ae]n|[^su]s)$", lemma)
    return lemma not in ("be", "have") and not (form.ending == "ed" and lemma in IRREGULAR_VERBS)


def lemmas_of(word: str, form: Form) -> list[str]:
    """Every string whose form is `word`; a lexicon knows which of them are words.

    >>> lemmas_of("running", Form("v", "ing")), lemmas_of("riding", Form("v", "ing")), lemmas_of("men", Form("n", "s"))
    (['run', 'runn', 'runne'], ['ride'], [])
    """
    if not word.endswith(form.ending):
        return []
    stem = word[: -len(form.ending)]
    tried = (stem[:-1], stem, stem[:-2], f"{stem}e", f"{stem[:-1]}y", f"{stem[:-2]}y", f"{stem[:-1]}ie")
    return [lemma for lemma in dict.fromkeys(tried) if inflected(lemma, form) == word]
