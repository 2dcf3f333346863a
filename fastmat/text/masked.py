"""Candidates from a masked language model, for any caption: BERT-Attack's source of substitutes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastmat.errors import UserError
from fastmat.quirks import Quirks
from fastmat.text.candidate_cache import CAPTIONS_PER_WRITE, CandidateCache
from fastmat.text.candidates import Found, find_candidates
from fastmat.text.mlm import MaskedLanguageModel
from fastmat.text.words import attackable, split


class MaskedCandidates:
    """The likeliest pieces at a word's place, the word itself not masked.

    top_k, threshold: candidates per piece, and the least logit they may have (SGA and Co-Attack: 10, 0.3).
    candidate_cache: a folder where they are kept for every other attack, epoch and process, or an open one, which
        several sources may share; None: computed each time.
    Raises UserError for a top_k below 1, or a folder that cannot be used.
    """

    def __init__(
        self,
        *,
        mlm: MaskedLanguageModel,
        top_k: int = 10,
        threshold: float = 0.3,
        candidate_cache: CandidateCache | Path | None = None,
    ) -> None:
        if top_k < 1:
            raise UserError(f"top_k must be at least 1, got {top_k}")
        self.mlm = mlm
        self.top_k = top_k
        self.threshold = threshold
        if isinstance(candidate_cache, Path):
            candidate_cache = CandidateCache(folder=candidate_cache)
        self.cache = candidate_cache

    def __call__(self, captions: Sequence[str], *, quirks: Quirks) -> list[Found]:
        """`Quirks.text_max_length` limits what the language model reads."""
        mlm = self.mlm
        max_length = min(quirks.text_max_length or mlm.max_length, mlm.max_length)
        words = [split(caption, mlm) for caption in captions]
        case_sensitive = quirks.case_sensitive_filters
        return (self.cache or find_candidates)(
            mlm,
            words,
            [attackable(of, max_length=max_length, case_sensitive=case_sensitive) for of in words],
            top_k=self.top_k,
            threshold=self.threshold,
            quirks=quirks,
            max_length=max_length,
        )

    def fill(self, captions: Sequence[str], *, quirks: Quirks) -> int:
        """Store what a search with these quirks will ask for; returns how many captions had to be computed.

        A chunk that is filled survives a kill: the next call goes on from there. Needs a candidate_cache.
        """
        assert self.cache is not None, "there is no candidate_cache to fill"
        before, distinct = self.cache.misses, list(dict.fromkeys(captions))
        for start in range(0, len(distinct), CAPTIONS_PER_WRITE):
            self(distinct[start : start + CAPTIONS_PER_WRITE], quirks=quirks)
        return self.cache.misses - before
