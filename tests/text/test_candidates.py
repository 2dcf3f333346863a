from itertools import product

import pytest
from tiny_mlm import tiny_captions, tiny_mlm

from fastmat.quirks import Quirks
from fastmat.text import candidates
from fastmat.text.candidates import above, allowed, combinations, find_candidates, word_rows
from fastmat.text.mlm import MaskedLanguageModel
from fastmat.text.words import attackable, split

PUBLISHED = Quirks.official()


def find(texts: list[str], quirks: Quirks, *, threshold: float = 1.5, max_length: int = 64) -> list[dict]:
    mlm = tiny_mlm()
    captions = [split(text, mlm) for text in texts]
    wanted = [attackable(c, max_length=max_length, case_sensitive=quirks.case_sensitive_filters) for c in captions]
    return find_candidates(mlm, captions, wanted, top_k=10, threshold=threshold, quirks=quirks, max_length=max_length)


def test_above_stops_at_the_first_below() -> None:
    assert above([5, 6, 7, 8], [0.9, 0.3, 0.29, 0.5], 0.3) == [5, 6]
    assert above([5], [0.2], 0.3) == []
    assert above([5, 6], [2.0, 1.0], 0.3) == [5, 6]


@pytest.mark.parametrize("rows", [2, 3, 5, 7])
def test_combinations_are_the_first_of_the_full_product(rows: int) -> None:
    ids = [[100 * row + i for i in range(10)] for row in range(rows)]
    assert combinations(ids) == list(product(*(row[:4] for row in ids)))[:24]


def test_a_hundred_pieces_cost_nothing() -> None:
    found = combinations([[4 * row + i for i in range(4)] for row in range(100)])
    assert [len(c) for c in found] == [12] * 24


def test_rows_of_a_word() -> None:
    assert word_rows((0, 1), 5, offset=1) == range(1, 2)
    assert word_rows((0, 1), 5, offset=0) == range(1)
    assert word_rows((2, 9), 5, offset=1) == range(3, 5)


@pytest.mark.parametrize(
    ("word", "candidate", "correct", "published"),
    [
        ("dog", "cat", True, True),
        ("dog", "dog", False, False),
        ("Dog", "dog", False, True),
        ("dog", "the", False, False),
        ("dog", "The", False, True),
        ("dog", "##s", False, False),
        ("dog", "cat##s", False, False),
        ("dogs", "big cat", False, True),
        ("dog", "[UNK]", False, True),
        ("dog", "[unused17]", False, True),
        ("dog", "[mask", True, True),
    ],
)
def test_allowed(word: str, candidate: str, correct: bool, published: bool) -> None:
    assert allowed(word, candidate, Quirks()) is correct
    assert allowed(word, candidate, PUBLISHED) is published


def test_one_piece_reads_its_own_row_or_published_its_neighbours() -> None:
    mlm = tiny_mlm()
    ids = mlm.sequence(mlm.pieces("red dog"), append_sep=True, max_length=64)
    ((rows, logits),) = mlm.top_k([ids], [[1, 2]], k=10)
    for offset, row in ((1, 1), (0, 0)):
        (found,) = find(["red dog"], Quirks(candidate_row_offset=offset))
        expected = [mlm.tokens[i] for i, logit in zip(rows[row], logits[row], strict=True) if logit >= 1.5]
        assert list(found[1]) == [word for word in expected if allowed("dog", word, Quirks())]
        assert 0 < len(found[1]) < 10


def test_several_pieces_are_ranked_and_ignore_the_threshold() -> None:
    mlm = tiny_mlm()
    ids = mlm.sequence(mlm.pieces("a bcd"), append_sep=False, max_length=64)
    ((rows, _),) = mlm.top_k([ids], [[1, 2, 3]], k=10)
    ranked = sorted(combinations(rows), key=lambda combination: mlm.log_perplexity([combination])[0])
    assert ranked != combinations(rows)
    (found,) = find(["a bcd"], PUBLISHED, threshold=1e9)
    assert list(found[1]) == [mlm.join(c) for c in ranked if allowed("bcd", mlm.join(c), PUBLISHED)]
    assert len(found[1]) > 10


def test_all_words_of_all_captions_are_ranked_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    ranked: list[int] = []
    score = MaskedLanguageModel.log_perplexity

    def counting(self, sequences):
        ranked.append(len(sequences))
        return score(self, sequences)

    monkeypatch.setattr(MaskedLanguageModel, "log_perplexity", counting)
    find(["a bcd", "red dogs", "bcd bcd"], PUBLISHED)
    assert len(ranked) == 1
    assert ranked[0] > 40


def test_no_blanks_in_correct_candidates() -> None:
    texts = tiny_captions(40)
    assert any(" " in c for of in find(texts, PUBLISHED) for words in of.values() for c in words)
    assert not any(" " in c for of in find(texts, Quirks()) for words in of.values() for c in words)


@pytest.mark.parametrize("quirks", [Quirks(), PUBLISHED], ids=["correct", "official"])
def test_a_batch_changes_nothing(quirks: Quirks) -> None:
    texts = tiny_captions(20, seed=4)
    assert find(texts, quirks, max_length=9) == [find([text], quirks, max_length=9)[0] for text in texts]


def test_filtering_first_gives_the_list_that_filtering_last_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tiny_captions(20, seed=6)
    mlm = tiny_mlm()
    filtered = find(texts, Quirks())
    monkeypatch.setattr(candidates, "allowed", lambda word, candidate, quirks: True)
    for text, raw, kept in zip(texts, find(texts, Quirks()), filtered, strict=True):
        words = split(text, mlm).words
        expected = {i: tuple(c for c in of if allowed(words[i], c, Quirks())) for i, of in raw.items()}
        assert kept == {i: of for i, of in expected.items() if of}
