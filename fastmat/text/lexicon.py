"""Candidates out of a lexicon of synonyms, such as WordNet's (Miller, 1995), in the form in which the word stands."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from fastmat.errors import UserError
from fastmat.quirks import Quirks
from fastmat.text.by_word import candidates_by_word, in_turn
from fastmat.text.candidates import Found
from fastmat.text.inflection import FORMS, inflected, lemmas_of

Entries = Mapping[str, Mapping[str, Sequence[str]]]


class Lexicon:
    """Synonyms of any sense; what fits the caption is for the attack to find out.

    A word is read as a lemma, and as a regular form of one: a plural, or a verb with -s, -ing or -ed. Synonyms are put
    into the same form; those that have none by rule ("man", "run" with -ed) are left out, as are words that are
    irregular themselves ("men"), since a wrong form would be no word at all.

    path: a JSON file, gzipped if it ends in .gz, of {lemma: {part of speech: [synonyms]}}, lemmas in lower case, parts
        of speech n, v, a, r; only n and v are inflected. In its order; of a word with several readings or parts of
        speech, from each in turn.
    top_k: candidates per word (this project's choice: as many as from a language model).
    Synonyms of several words are left out, except as published (`Quirks.blanks_in_candidates`) and for a word that is a
    lemma itself.
    Raises UserError for a top_k below 1 and for a file that is missing or says something else.
    """

    def __init__(self, *, path: Path, top_k: int = 10) -> None:
        if top_k < 1:
            raise UserError(f"top_k must be at least 1, got {top_k}")
        self.top_k = top_k
        self.entries = read_lexicon(Path(path))

    @property
    def mlm(self) -> None:
        """None: no language model reads the captions."""

    def __call__(self, captions: Sequence[str], *, quirks: Quirks) -> list[Found]:
        return candidates_by_word(
            captions, lambda words: [self.synonyms(word) for word in words], quirks=quirks, top_k=self.top_k
        )

    def synonyms(self, word: str) -> list[str]:
        """Of a word in any form, from its readings in turn."""
        return in_turn(self._readings(word.lower()))

    def _readings(self, word: str) -> Iterator[list[str]]:
        for synonyms in self.entries.get(word, {}).values():
            yield list(synonyms)
        for form in FORMS:
            for lemma in lemmas_of(word, form):
                synonyms = self.entries.get(lemma, {}).get(form.part, ())
                forms = [inflected(synonym, form) for synonym in synonyms]
                yield [synonym for synonym in forms if synonym is not None]


def read_lexicon(path: Path) -> Entries:
    """The lexicon in a file. Raises UserError, in one sentence that names the file."""
    try:
        packed = path.read_bytes()
        entries = json.loads(gzip.decompress(packed) if path.suffix == ".gz" else packed)
    except OSError as error:  # gzip's own, too
        raise UserError(
            f"lexicon {path} cannot be read ({error.strerror or error}); give a .json or .json.gz file"
        ) from error
    except (EOFError, zlib.error, ValueError, RecursionError) as error:
        raise UserError(f"lexicon {path} is damaged or not JSON ({error}); make or fetch it anew") from error
    wrong = f"lexicon {path} must hold {{lemma: {{part of speech: [synonyms]}}}}"
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{wrong}, got {'nothing' if entries == {} else type(entries).__name__}")
    for lemma, parts in entries.items():
        if not isinstance(parts, dict) or not all(map(is_list_of_words, parts.values())):
            raise UserError(f"{wrong}, got something else at {lemma!r}")
    return cast("Entries", entries)


def is_list_of_words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
