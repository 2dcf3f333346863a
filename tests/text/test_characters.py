"""Edits against a definition of each kind."""

import string

import pytest
from tiny_mlm import tiny_captions

from fastmat.errors import UserError
from fastmat.quirks import Quirks
from fastmat.text.candidates import CandidateSource
from fastmat.text.characters import BESIDE, LOOK_ALIKE, Characters, edits
from fastmat.text.words import is_stop_word

WORDS = ["dog", "a", "it", "running", "Snow", "q-z", "x2y", "aaaa", "犬達が", "ZOO"]


def kind_of(word: str, edit: str) -> str:
    """What was done to `word`, decided from the two strings alone."""
    if len(edit) == len(word) - 1:
        inner = range(1, len(word) - 1)
        return "delete" if edit in [word[:i] + word[i + 1 :] for i in inner] else "?"
    if len(edit) == len(word) + 1:
        return "double" if any(edit == word[:i] + word[i] + word[i:] for i in range(1, len(word))) else "?"
    wrong = [i for i in range(len(word)) if word[i] != edit[i]]
    if len(wrong) == 2 and wrong[1] == wrong[0] + 1 and wrong[0] > 0 and wrong[1] < len(word) - 1:
        i, j = wrong
        return "swap" if (edit[i], edit[j]) == (word[j], word[i]) else "?"
    if len(wrong) == 1:
        old, new = word[wrong[0]].lower(), edit[wrong[0]].lower()
        return "key" if new in BESIDE.get(old, "") else "look" if LOOK_ALIKE.get(old) == new else "?"
    return "?"


@pytest.mark.parametrize("word", WORDS)
def test_every_edit_is_of_a_known_kind_and_keeps_the_first_letter(word: str) -> None:
    found = edits(word)
    assert len(set(found)) == len(found)
    assert all(edit[0] == word[0] and edit != word and " " not in edit for edit in found)
    assert "?" not in {kind_of(word, edit) for edit in found}


@pytest.mark.parametrize("word", WORDS)
def test_no_edit_is_missing(word: str) -> None:
    """Among all strings that are one insertion, deletion, replacement or swap away."""
    letters = string.ascii_letters + string.digits + "@" + word
    near = {word[:i] + c + word[i + n :] for i in range(len(word) + 1) for c in ["", *letters] for n in (0, 1)}
    near |= {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    of_case = {edit for edit in near if not any(a.islower() and b.isupper() for a, b in zip(word, edit, strict=False))}
    wanted = {edit for edit in of_case if edit[:1] == word[0] and edit != word and kind_of(word, edit) != "?"}
    assert {edit.lower() for edit in wanted} == {edit.lower() for edit in edits(word)}


def test_the_first_few_hold_every_kind() -> None:
    kinds = [kind_of("sitting", edit) for edit in Characters(top_k=5)(["sitting"], quirks=Quirks())[0][0]]
    assert kinds == ["swap", "delete", "double", "key", "look"]


def test_neighbours_lie_side_by_side() -> None:
    assert (BESIDE["q"], BESIDE["g"], BESIDE["m"]) == ("w", "fh", "n")
    assert all(a in BESIDE[b] for a in BESIDE for b in BESIDE[a])


def test_captions() -> None:
    source, captions = Characters(top_k=4), tiny_captions(50, seed=1)
    found = source(captions, quirks=Quirks())
    assert isinstance(source, CandidateSource) and source.mlm is None
    for caption, of in zip(captions, found, strict=True):
        words = caption.split(" ")
        plain = [i for i, word in enumerate(words) if word.isascii() and word.isalpha() and len(word) > 2]
        assert {i for i in plain if not is_stop_word(words[i])} <= set(of)
        assert not any(is_stop_word(words[i]) for i in of)
        assert all(0 < len(candidates) <= 4 for candidates in of.values())
    assert source(captions[7:9], quirks=Quirks()) == found[7:9]
    every = Characters(top_k=None)(["a Snowy, day"], quirks=Quirks())[0]
    assert every[1] == tuple(f"{edit}," for edit in edits("Snowy"))


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="top_k"):
        Characters(top_k=0)
