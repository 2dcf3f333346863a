"""Captions as token ids of a victim, spelt word by word.

A variant of a caption is a splice: the ids of the words before, of the substitute, and of the words after. Where a
word's ids may depend on the words around it, the whole text is tokenised instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastmat.models.protocol import Tokenizer, VisionLanguageModel
from fastmat.text.mlm import DROPPED, MaskedLanguageModel

Ids = tuple[int, ...]
UNKNOWN = "[UNK]"  # what the published code masks a word with; not [MASK]
MARKS = (".", "?", "!", ",")  # decoding takes away the blank before them


class Spelt(NamedTuple):
    """A word's ids; the rest is about the round trip. pieces: BERT's. glued: what it begins with, if that is a mark
    and joins the word before. tail: what stands behind its last blank."""

    ids: Ids
    pieces: int = 0
    glued: str = ""
    tail: str = ""


@dataclass(frozen=True, kw_only=True)
class RoundTrip:
    """A text through BERT's pieces and back (`Quirks.round_trip`), cut to `max_length` of them."""

    mlm: MaskedLanguageModel
    append_sep: bool
    max_length: int

    def __call__(self, text: str) -> str:
        return self.mlm.round_trip(text, append_sep=self.append_sep, max_length=self.max_length)

    @property
    def room(self) -> int:
        """Pieces that fit beside the special tokens."""
        return self.max_length - 1 - self.append_sep


class Speller:
    """ids(words) is what the victim reads of " ".join(words), cut to `max_length` (None: the context).

    retokenised: texts so far that could not be spliced.
    """

    def __init__(
        self, model: VisionLanguageModel, *, max_length: int | None = None, trip: RoundTrip | None = None
    ) -> None:
        self.tokenizer = model.tokenizer
        self.max_length = min(max_length or model.context_length, model.context_length)
        self.trip = trip
        self.retokenised = 0
        self._known: dict[str, Spelt | None] = {}
        self._joins: dict[tuple[str, str], bool] = {}

    def ids(self, words: Sequence[str]) -> Ids:
        """Of one caption, split on single blanks."""
        return self._join(words, [self._word(word) for word in words])

    def variants(self, words: Sequence[str], index: int, substitutes: Sequence[str]) -> list[Ids]:
        """Of the caption with word `index` replaced by each of the substitutes."""
        spelt = [self._word(word) for word in words]
        found = []
        for substitute in substitutes:
            spelt[index] = self._word(substitute)
            found.append(self._join((*words[:index], substitute, *words[index + 1 :]), spelt))
        return found

    def _join(self, words: Sequence[str], spelt: Sequence[Spelt | None]) -> Ids:
        ids: list[int] = []
        pieces, tail = 0, ""
        for word in spelt:
            if word is None or (word.glued and tail and not self._may_join(tail, word.glued)):
                break
            ids += word.ids
            pieces += word.pieces
            if word.tail:  # a word without pieces leaves no trace
                tail = tail + word.tail if word.glued == word.tail else word.tail
        else:
            if self.trip is None or pieces <= self.trip.room:
                return tuple(self.tokenizer.frame(ids, self.max_length))
        self.retokenised += 1
        text = " ".join(words)
        return tuple(self.tokenizer(text if self.trip is None else self.trip(text), self.max_length))

    def _may_join(self, left: str, right: str) -> bool:
        """Whether the ids of two strings stay what they are when the blank between them goes."""
        key = (left, right)
        if key not in self._joins:
            spell = self.tokenizer.word
            a, b, both = spell(left), spell(right), spell(left + right)
            self._joins[key] = a is not None and b is not None and both == (*a, *b)
        return self._joins[key]

    def _word(self, word: str) -> Spelt | None:
        if word not in self._known:
            if self.trip is None:
                ids = concatenated(word, self.tokenizer)
                self._known[word] = None if ids is None else Spelt(ids)
            else:
                self._known[word] = decoded(word, self.trip.mlm, self.tokenizer)
        return self._known[word]


def concatenated(text: str, tokenizer: Tokenizer) -> Ids | None:
    """Ids of words between blanks, one after the other; None where one of them may depend on its neighbours."""
    ids: Ids = ()
    for word in text.split(" "):
        own = tokenizer.word(word)
        if own is None:
            return None
        ids += own
    return ids


def decoded(word: str, mlm: MaskedLanguageModel, tokenizer: Tokenizer) -> Spelt | None:
    """A word (or a substitute of several) after BERT's encoding and decoding.

    None where clean-up may change it together with its neighbours in another way than by gluing a mark: at an
    apostrophe on the edge, or before the negation "n't".
    """
    pieces = mlm.pieces(word)
    text = mlm.cleaned_up(mlm.join(pieces))
    loose = "'" in text and not (text[0].isalnum() and text[-1].isalnum() and not text.startswith("n't"))
    ids = concatenated(text, tokenizer)
    if ids is None or loose or any(special in text for special in DROPPED):
        return None
    first, last = text.split(" ", 1)[0], text.rsplit(" ", 1)[-1]
    return Spelt(ids, len(pieces), glued=first if first.startswith(MARKS) else "", tail=last)


def shared(a: Ids, b: Ids) -> int:
    """How many ids two texts have in common from the start on.

    >>> shared((1, 5, 7, 2), (1, 5, 8, 2)), shared((1, 2), (1, 2))
    (2, 2)
    """
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
