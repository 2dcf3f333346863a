"""The words of a caption, their pieces, and which of them may be attacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from fastmat.text.mlm import MaskedLanguageModel


def _read_stop_words() -> frozenset[str]:
    lines = resources.files("fastmat.text").joinpath("stop_words.txt").read_text(encoding="utf-8").split("\n")
    return frozenset(line for line in lines if line and not line.startswith("# "))


STOP_WORDS = _read_stop_words()


@dataclass(frozen=True)
class Words:
    """A caption split on single blanks; an empty string between two blanks is a word without pieces.

    spans: for each word the half-open range of its pieces, counted without [CLS]. pieces: all ids.
    """

    words: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    pieces: tuple[int, ...]


def split(text: str, mlm: MaskedLanguageModel) -> Words:
    """Words, spans and pieces of a caption."""
    words = tuple(text.split(" "))
    pieces: list[int] = []
    spans = []
    for word in words:
        start = len(pieces)
        pieces += mlm.pieces(word)
        spans.append((start, len(pieces)))
    return Words(words, tuple(spans), tuple(pieces))


def replaced(words: Sequence[str], index: int, word: str) -> str:
    """The caption with one word replaced.

    >>> replaced(("a", "red", "dog"), 1, "blue")
    'a blue dog'
    """
    return " ".join((*words[:index], word, *words[index + 1 :]))


def is_stop_word(word: str, *, case_sensitive: bool = False) -> bool:
    """Whether BERT-Attack's filter list holds the word.

    >>> is_stop_word("The"), is_stop_word("The", case_sensitive=True), is_stop_word("dog")
    (True, False, False)
    """
    return (word if case_sensitive else word.lower()) in STOP_WORDS


def attackable(caption: Words, *, max_length: int, case_sensitive: bool = False) -> tuple[int, ...]:
    """Words that have pieces, are no stop words and begin where the masked language model, cut to `max_length`
    positions, still reads."""
    return tuple(
        i
        for i, (word, (start, stop)) in enumerate(zip(caption.words, caption.spans, strict=True))
        if start < stop and start <= max_length - 2 and not is_stop_word(word, case_sensitive=case_sensitive)
    )
