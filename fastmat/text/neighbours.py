"""Candidates nearest to a word in a space of word vectors, as in CMI-Attack (Fu et al., 2024, arXiv 2403.10883)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fastmat.errors import UserError
from fastmat.quirks import Quirks
from fastmat.text.by_word import candidates_by_word, core_of
from fastmat.text.candidates import CandidateSource, Found
from fastmat.text.mlm import MaskedLanguageModel
from fastmat.text.vectors import read_vectors

COSINES = 1 << 24  # at a time: 64 MiB of them
SPARE = 8  # nearest ones beyond top_k that are ranked again in double precision


class Neighbours:
    """The `top_k` words of largest cosine, nearest first, ties in the order of the file.

    path: word vectors, as `fastmat.text.vectors.read_vectors` takes them; CMI-Attack: GloVe with 300 dimensions.
    top_k: 10, as the authors' code leaves it. Counted before the filters, as there: a word may have fewer candidates.
    min_cosine: the least cosine of a candidate; -1 is none, as published.
    fallback: asked about words without a vector; None: they have no candidates. CMI-Attack: `MaskedCandidates`.

    A word is looked up as it stands, then in lower case; under `Quirks.case_sensitive_filters` only as it stands, as
    published, where "Dog" is unknown to GloVe. Candidates with a full stop are dropped, also the fallback's (authors'
    code). Neighbours are computed once per word and remembered.
    Raises UserError for a top_k below 1, a min_cosine outside [-1, 1], and a file that cannot be used.
    """

    def __init__(
        self, *, path: Path, top_k: int = 10, min_cosine: float = -1.0, fallback: CandidateSource | None = None
    ) -> None:
        if top_k < 1:
            raise UserError(f"top_k must be at least 1, got {top_k}")
        if not -1 <= min_cosine <= 1:
            raise UserError(f"min_cosine must lie in [-1, 1], got {min_cosine}")
        self.top_k = top_k
        self.min_cosine = min_cosine
        self.fallback = fallback
        self.words, self.vectors = read_vectors(Path(path))
        self._row = {word: row for row, word in enumerate(self.words)}
        self._known: dict[str, tuple[str, ...]] = {}

    @property
    def mlm(self) -> MaskedLanguageModel | None:
        return None if self.fallback is None else self.fallback.mlm

    def __call__(self, captions: Sequence[str], *, quirks: Quirks) -> list[Found]:
        def propose(words: Sequence[str]) -> list[tuple[str, ...]]:
            entries = [self._entry(word, quirks) for word in words]
            self._remember([entry for entry in entries if entry is not None])
            return [() if entry is None else self._known[entry] for entry in entries]

        found = candidates_by_word(captions, propose, quirks=quirks)
        if self.fallback is not None:
            for of, other in zip(found, self._of_unknown(captions, self.fallback, quirks), strict=True):
                of.update(other)
        return found

    def _entry(self, word: str, quirks: Quirks) -> str | None:
        """How the vocabulary spells a word; None where it lacks it."""
        spellings = (word,) if quirks.case_sensitive_filters else (word, word.lower())
        return next((spelling for spelling in spellings if spelling in self._row), None)

    def _remember(self, words: Sequence[str]) -> None:
        """Neighbours of words that have a vector."""
        new = [word for word in dict.fromkeys(words) if word not in self._known]
        size = max(1, COSINES // len(self.words))
        for start in range(0, len(new), size):
            chunk = new[start : start + size]
            rows = torch.tensor([self._row[word] for word in chunk])
            own = self.vectors[rows]
            cosines = own @ self.vectors.T
            cosines[torch.arange(len(rows)), rows] = -torch.inf
            near = cosines.topk(min(self.top_k + SPARE, len(self.words) - 1)).indices
            # Again, in double precision: which words come in one chunk shall not show in the order.
            finer = (self.vectors[near].double() * own[:, None].double()).sum(-1)
            for word, indices, values in zip(chunk, near.tolist(), finer.tolist(), strict=True):
                ranked = sorted(zip(values, indices, strict=True), key=lambda pair: (-pair[0], pair[1]))
                chosen = [self.words[row] for cosine, row in ranked[: self.top_k] if cosine >= self.min_cosine]
                self._known[word] = tuple(neighbour for neighbour in chosen if "." not in neighbour)

    def _of_unknown(self, captions: Sequence[str], fallback: CandidateSource, quirks: Quirks) -> list[Found]:
        """The fallback's candidates for words that have no vector; it is not asked about captions without one."""
        unknown = []
        for caption in captions:
            cores = [core_of(word, quirks=quirks) for word in caption.split(" ")]
            unknown.append({i for i, core in enumerate(cores) if core and self._entry(core.word, quirks) is None})
        asked = [caption for caption, of in zip(captions, unknown, strict=True) if of]
        answers = iter(fallback(asked, quirks=quirks) if asked else [])
        found: list[Found] = []
        for of in unknown:
            answer = {i: [c for c in words if "." not in c] for i, words in next(answers).items()} if of else {}
            found.append({i: tuple(words) for i, words in answer.items() if i in of and words})
        return found
