"""Substitutes for words, proposed by a masked language model (BERT-Attack, EMNLP 2020, section 3.2).

They depend on caption and language model only, never on the victim or the image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice, product
from typing import Protocol, runtime_checkable

from fastmat.quirks import Quirks
from fastmat.text.mlm import MaskedLanguageModel
from fastmat.text.words import Words, is_stop_word

ROWS_PER_WORD = 12
IDS_PER_ROW = 4
COMBINATIONS = 24
SPECIAL = re.compile(r"\[(PAD|UNK|CLS|SEP|MASK|unused\d+)\]")  # no words, though in BERT's vocabulary

Rows = list[list[int]]
Found = dict[int, tuple[str, ...]]  # of one caption: word index to its candidates


@runtime_checkable
class CandidateSource(Protocol):
    """What proposes substitutes. mlm: the masked language model behind it, if there is one."""

    @property
    def mlm(self) -> MaskedLanguageModel | None: ...

    def __call__(self, captions: Sequence[str], *, quirks: Quirks) -> list[Found]:
        """For each caption, split on single blanks: word index to its candidates, best first.

        Words that may not be attacked, and words without any candidate, are left out.
        """
        ...


def find_candidates(
    mlm: MaskedLanguageModel,
    captions: Sequence[Words],
    wanted: Sequence[Sequence[int]],
    *,
    top_k: int,
    threshold: float,
    quirks: Quirks,
    max_length: int,
) -> list[Found]:
    """For each caption: word index to its candidates, best first; words without any are left out.

    wanted: word indices of each caption, from `attackable`. A word of one piece gets the `top_k` pieces, in order, up
        to the first whose logit is below `threshold`; a word of several gets combinations of pieces, likeliest first.
    max_length: ids of a caption that the language model reads.
    """
    sequences = [mlm.sequence(c.pieces, append_sep=quirks.append_sep, max_length=max_length) for c in captions]
    spans = [
        [word_rows(caption.spans[i], len(sequence), offset=quirks.candidate_row_offset) for i in indices]
        for caption, sequence, indices in zip(captions, sequences, wanted, strict=True)
    ]
    predictions = mlm.top_k(sequences, [[row for span in of for row in span] for of in spans], k=top_k)

    found: list[Found] = [{} for _ in captions]
    several: list[tuple[int, int, tuple[int, ...]]] = []  # (caption, word, combination), to be ranked together
    for n, (caption, indices, (ids, logits)) in enumerate(zip(captions, wanted, predictions, strict=True)):
        start = 0
        for i, span in zip(indices, spans[n], strict=True):
            stop = start + len(span)
            if len(span) == 1:
                proposed = above(ids[start], logits[start], threshold)
                found[n][i] = tuple(mlm.tokens[j] for j in proposed if allowed(caption.words[i], mlm.tokens[j], quirks))
            else:
                kept = (c for c in combinations(ids[start:stop]) if allowed(caption.words[i], mlm.join(c), quirks))
                several += [(n, i, combination) for combination in kept]
            start = stop
    # Filtering before ranking gives the same list and ranks far fewer.
    surprise = mlm.log_perplexity([combination for _, _, combination in several])
    for _, (n, i, combination) in sorted(zip(surprise, several, strict=True), key=lambda pair: pair[0]):
        found[n][i] = (*found[n].get(i, ()), mlm.join(combination))
    return [{i: words for i, words in of.items() if words} for of in found]


def word_rows(span: tuple[int, int], length: int, *, offset: int) -> range:
    """The rows of a sequence of `length` ids, [CLS] in row 0, from which a word's candidates are read.

    `offset` 1 is right; 0 is published: the rows of the pieces one to the left.

    >>> word_rows((2, 4), 8, offset=1), word_rows((2, 4), 8, offset=0), word_rows((2, 9), 5, offset=1)
    (range(3, 5), range(2, 4), range(3, 5))
    """
    return range(min(span[0] + offset, length), min(span[1] + offset, length))


def above(ids: Sequence[int], logits: Sequence[float], threshold: float) -> list[int]:
    """Ids in order until the first whose logit is below the threshold."""
    cut = next((n for n, logit in enumerate(logits) if logit < threshold), len(ids))
    return list(ids[:cut])


def combinations(rows: Rows) -> list[tuple[int, ...]]:
    """The first 24 of all ways to take one of the first 4 ids of each row (at most 12 rows), last row fastest."""
    return list(islice(product(*(row[:IDS_PER_ROW] for row in rows[:ROWS_PER_WORD])), COMBINATIONS))


def allowed(word: str, candidate: str, quirks: Quirks) -> bool:
    """Whether a candidate may replace a word: another one, whole, and no stop word.

    One word replaces one word: several, or a special token, pass only as published (`Quirks.blanks_in_candidates`).

    >>> allowed("dog", "cat", Quirks()), allowed("Dog", "dog", Quirks()), allowed("dog", "a cat", Quirks())
    (True, False, False)
    """
    exact = quirks.case_sensitive_filters
    same = candidate == word if exact else candidate.lower() == word.lower()
    no_word = not quirks.blanks_in_candidates and (" " in candidate or SPECIAL.fullmatch(candidate))
    return not (same or no_word or "##" in candidate or is_stop_word(candidate, case_sensitive=exact))
