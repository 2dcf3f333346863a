"""What the sources without a language model share: which words, which marks stay, which candidates pass."""

from fastmat.quirks import Quirks
from fastmat.text.by_word import candidates_by_word, in_turn

OFFICIAL = Quirks(case_sensitive_filters=True, blanks_in_candidates=True)


def test_words_with_letters_or_digits_that_are_no_stop_words_are_asked_about_once() -> None:
    asked: list[str] = []

    def propose(words):
        asked.extend(words)
        return [[word + "x"] for word in words]

    captions = ["The dog , a (dog)", "-- 42 犬", "", "the, two  Dogs."]
    assert candidates_by_word(captions, propose, quirks=Quirks()) == [
        {1: ("dogx",), 4: ("(dogx)",)},
        {1: ("42x",), 2: ("犬x",)},
        {},
        {1: ("twox",), 3: ("Dogsx.",)},
    ]
    assert asked == ["dog", "42", "犬", "two", "Dogs"]


def test_as_published_a_word_is_all_between_blanks() -> None:
    found = candidates_by_word(["The (dog) --"], lambda words: [[word + "x"] for word in words], quirks=OFFICIAL)
    assert found == [{0: ("Thex",), 1: ("(dog)x",), 2: ("--x",)}]


def test_the_filters_of_the_other_sources_apply() -> None:
    proposed = ["", "dog", "DOG", "the", "a cat", "##s", "[UNK]", "cat", "cat", "hound"]

    def found(quirks: Quirks, top_k: int | None):
        return candidates_by_word(["dog"], lambda words: [proposed for _ in words], quirks=quirks, top_k=top_k)

    assert found(Quirks(), None) == [{0: ("cat", "hound")}]
    assert found(Quirks(), 1) == [{0: ("cat",)}]
    assert found(OFFICIAL, None) == [{0: ("DOG", "a cat", "[UNK]", "cat", "hound")}]


def test_words_without_candidates_are_left_out() -> None:
    assert candidates_by_word(["dog cat"], lambda words: [[], ["dog"]], quirks=Quirks()) == [{1: ("dog",)}]
    assert candidates_by_word([], lambda words: [[] for _ in words], quirks=Quirks()) == []


def test_taking_turns() -> None:
    assert in_turn([]) == []
    assert in_turn([["a"], [], ["b", "c", "a"]]) == ["a", "b", "c"]
