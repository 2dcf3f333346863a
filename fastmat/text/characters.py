"""Candidates by small edits of a word's characters: slips of the fingers and look-alikes.

The kinds of edits are those of TextBugger (Li et al., NDSS 2019, arXiv 1812.05271, section III-B) and DeepWordBug (Gao
et al., 2018, arXiv 1801.04354). Their random choices are enumerated here.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastmat.errors import UserError
from fastmat.quirks import Quirks
from fastmat.text.by_word import candidates_by_word, in_turn
from fastmat.text.candidates import Found

KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
BESIDE = {row[i]: row[max(i - 1, 0) : i] + row[i + 1 : i + 2] for row in KEYBOARD for i in range(len(row))}
LOOK_ALIKE = {"a": "@", "b": "6", "e": "3", "g": "9", "i": "1", "l": "1", "o": "0", "s": "5", "t": "7", "z": "2"}


class Characters:
    """Words with one edit: two characters swapped, one deleted, one typed twice, one replaced by its neighbour on a
    keyboard or by an ASCII character that looks like it.

    The first character stays, and swaps and deletions spare the last one too (TextBugger: a reader hardly notices what
    happens between them). TextBugger's fifth edit, a blank, would make two words of one.

    top_k: candidates per word, taken from the kinds in turn; within a kind the edits in the middle of the word come
        first. None: all. This project's choices.
    Raises UserError for a top_k below 1.
    """

    def __init__(self, *, top_k: int | None = 10) -> None:
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k must be at least 1, got {top_k}")
        self.top_k = top_k

    @property
    def mlm(self) -> None:
        """None: no language model reads the captions."""

    def __call__(self, captions: Sequence[str], *, quirks: Quirks) -> list[Found]:
        return candidates_by_word(captions, lambda words: list(map(edits, words)), quirks=quirks, top_k=self.top_k)


def edits(word: str) -> list[str]:
    """All words that are one edit away, the kinds in turn.

    >>> edits("dog")
    ['dg', 'doog', 'dig', 'd0g', 'dogg', 'dof', 'do9', 'dpg', 'doh']
    """
    inner, rest = middle_out(range(1, len(word) - 1)), middle_out(range(1, len(word)))
    swapped = [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in inner if i + 2 < len(word)]
    deleted = [word[:i] + word[i + 1 :] for i in inner]
    doubled = [word[: i + 1] + word[i:] for i in rest]
    beside = [word[:i] + key + word[i + 1 :] for n in (0, 1) for i in rest for key in keys(word[i])[n : n + 1]]
    alike = [word[:i] + LOOK_ALIKE[word[i].lower()] + word[i + 1 :] for i in rest if word[i].lower() in LOOK_ALIKE]
    return [edit for edit in in_turn((swapped, deleted, doubled, beside, alike)) if edit != word]


def keys(character: str) -> str:
    """Its neighbours in the same row of a keyboard, in its case: left, right."""
    found = BESIDE.get(character.lower(), "")
    return found.upper() if character.isupper() else found


def middle_out(positions: range) -> list[int]:
    """
    >>> middle_out(range(1, 6))
    [3, 2, 4, 1, 5]
    """
    return sorted(positions, key=lambda i: abs(2 * i - positions.start - positions.stop + 1))
