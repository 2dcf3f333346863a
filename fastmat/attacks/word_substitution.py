"""The search of BERT-Attack as vision-language attacks use it: rank words by importance, then try substitutes in turn.

Source: BERT-Attack (EMNLP 2020), with the choice by KL of Co-Attack (ACM MM 2022) or by cosine of SGA (ICCV 2023).
Words, candidates, importance and the clean embeddings depend on captions and models only: they make the plan. The
choice among candidates may depend on a guide: it is the search. One plan serves several searches, and what one search
has encoded the next one finds in the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.quirks import Quirks
from fastmat.text.candidates import CandidateSource, find_candidates
from fastmat.text.encoded import EncodedTexts, Representation
from fastmat.text.mlm import MaskedLanguageModel
from fastmat.text.words import attackable, replaced, split

Choice = Literal["kl", "cosine"]
UNKNOWN = "[UNK]"  # what the published code masks a word with; not [MASK]


@dataclass(frozen=True, kw_only=True)
class TextPlan:
    """What a search needs of T captions, whatever it is guided by.

    words: the captions split on blanks. candidates: word index to substitutes, best first. importance: word index to
    KL(clean || masked). order: word indices by decreasing importance. encoded: the victim's view of every text met.
    """

    texts: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]
    candidates: tuple[dict[int, tuple[str, ...]], ...]
    importance: tuple[dict[int, float], ...]
    order: tuple[tuple[int, ...], ...]
    encoded: EncodedTexts


class WordSubstitution:
    """Substitutes up to `max_words` words of each caption.

    mlm: proposes the candidates. candidates: computes them, or reads them from disk (`CandidateCache`).
    choice: "cosine" takes the text least similar to its guide; "kl" the one farthest from the clean caption.
    importance: the representation on which a word's importance is measured; compare: the one of choice "kl".
        SGA: "features"; Co-Attack and Sep-Attack: "embeds" for CLIP, "cls" or "tokens" for BERT towers.
    top_k, threshold: candidates per piece, and the least logit they may have (SGA and Co-Attack: 10, 0.3).
    quirks: published departures; `text_max_length` also limits what the language model reads.
    chunk: texts per forward of the victim.
    """

    def __init__(
        self,
        *,
        mlm: MaskedLanguageModel,
        max_words: int = 1,
        choice: Choice = "cosine",
        importance: Representation = "features",
        compare: Representation = "features",
        top_k: int = 10,
        threshold: float = 0.3,
        quirks: Quirks | None = None,
        chunk: int = 64,
        candidates: CandidateSource = find_candidates,
    ) -> None:
        if choice not in get_args(Choice):
            raise UserError(f"choice must be one of {', '.join(get_args(Choice))}, got {choice!r}")
        for name, value in (("importance", importance), ("compare", compare)):
            if value not in get_args(Representation):
                raise UserError(f"{name} must be one of {', '.join(get_args(Representation))}, got {value!r}")
        if top_k < 1 or chunk < 1:
            raise UserError(f"top_k and chunk must be at least 1, got {top_k} and {chunk}")
        if max_words < 0:
            raise UserError(f"max_words must not be negative, got {max_words}")
        self.mlm = mlm
        self.max_words = max_words
        self.choice = choice
        self.importance: Representation = importance
        self.judged: Representation = "features" if choice == "cosine" else compare
        self.top_k = top_k
        self.threshold = threshold
        self.quirks = quirks or Quirks()
        self.chunk = chunk
        self.candidates = candidates
        self.max_length = min(self.quirks.text_max_length or mlm.max_length, mlm.max_length)

    @torch.no_grad()
    def plan(self, model: VisionLanguageModel, texts: Sequence[str]) -> TextPlan:
        """Candidates and word importance of T captions, each in a few large batches."""
        quirks = self.quirks
        captions = [split(text, self.mlm) for text in texts]
        wanted = [
            attackable(caption, max_length=self.max_length, case_sensitive=quirks.case_sensitive_filters)
            for caption in captions
        ]
        candidates = self.candidates(
            self.mlm,
            captions,
            wanted,
            top_k=self.top_k,
            threshold=self.threshold,
            quirks=quirks,
            max_length=self.max_length,
        )
        encoded = self._encoder(self.importance, self.judged)
        words = tuple(caption.words for caption in captions)
        importance = self._importance(model, texts, words, candidates, encoded)
        return TextPlan(
            texts=tuple(texts),
            words=words,
            candidates=tuple(candidates),
            importance=tuple(importance),
            order=tuple(tuple(sorted(of, key=of.__getitem__, reverse=True)) for of in importance),
            encoded=encoded,
        )

    @torch.no_grad()
    def search(self, model: VisionLanguageModel, plan: TextPlan, guide: Tensor | None = None) -> tuple[str, ...]:
        """T adversarial captions.

        guide: [T, E] unit image features, one row per caption; needed by choice "cosine" alone.

        Words are tried by decreasing importance, all captions in step. The current text competes with its variants;
        when it wins, nothing is spent and the next word is tried.
        """
        if self.choice == "cosine" and (guide is None or len(guide) != len(plan.texts)):
            raise ValueError(f"choice 'cosine' needs a guide with {len(plan.texts)} rows, one per caption")
        if self.max_words == 0 or not any(plan.order):
            return plan.texts
        reference = guide if self.choice == "cosine" else plan.encoded(model, plan.texts)[self.judged]
        assert reference is not None
        words = [list(of) for of in plan.words]
        tried, changed = [0] * len(words), [0] * len(words)
        while active := [
            t for t, order in enumerate(plan.order) if tried[t] < len(order) and changed[t] < self.max_words
        ]:
            current = [plan.order[t][tried[t]] for t in active]
            options = [(words[t][i], *plan.candidates[t][i]) for t, i in zip(active, current, strict=True)]
            variants = [
                [replaced(words[t], i, word) for word in of] for t, i, of in zip(active, current, options, strict=True)
            ]
            best = self._best(model, plan.encoded, reference, active, variants)
            for t, i, of, choice in zip(active, current, options, best, strict=True):
                tried[t] += 1
                changed[t] += choice > 0
                words[t][i] = of[choice]
        return tuple(" ".join(of) for of in words)

    @torch.no_grad()
    def features(self, model: VisionLanguageModel, texts: Sequence[str], *, max_length: int | None = None) -> Tensor:
        """[T, E] unit features of `texts` as this search's victim reads them (through the round trip, if that is on).

        max_length: pieces kept, instead of `text_max_length`.
        """
        read = self._encoder("features", max_length=max_length)
        return read(model, texts)["features"]

    def _best(
        self,
        model: VisionLanguageModel,
        encoded: EncodedTexts,
        reference: Tensor,
        active: Sequence[int],
        variants: Sequence[Sequence[str]],
    ) -> list[int]:
        """For each active caption the variant that scores highest, the first of equals."""
        rows = encoded(model, [text for of in variants for text in of])[self.judged]
        owner = torch.tensor([t for t, of in zip(active, variants, strict=True) for _ in of], device=rows.device)
        if self.choice == "cosine":
            scores = -(rows * reference[owner]).sum(-1)
        else:
            scores = kl_divergence(reference[owner], rows)
        counts = torch.tensor([[len(of)] for of in variants], device=rows.device)
        table = scores.new_full((len(variants), max(map(len, variants))), -torch.inf)
        table[torch.arange(table.shape[1], device=rows.device) < counts] = scores
        return table.argmax(1).tolist()

    def _encoder(self, *parts: Representation, max_length: int | None = None) -> EncodedTexts:
        """The victim reads captions as they are, or as BERT's pieces spell them (`Quirks.round_trip`)."""
        if not self.quirks.round_trip:
            return EncodedTexts(parts=parts, chunk=self.chunk, max_length=max_length or self.quirks.text_max_length)
        pieces, append_sep = max_length or self.max_length, self.quirks.append_sep
        return EncodedTexts(
            parts=parts,
            chunk=self.chunk,
            prepare=lambda text: self.mlm.round_trip(text, append_sep=append_sep, max_length=pieces),
        )

    def _importance(
        self,
        model: VisionLanguageModel,
        texts: Sequence[str],
        words: Sequence[Sequence[str]],
        candidates: Sequence[dict[int, tuple[str, ...]]],
        encoded: EncodedTexts,
    ) -> list[dict[int, float]]:
        """Word index to importance, for the words that have candidates: no other can be substituted."""
        masked = [(t, i) for t, of in enumerate(candidates) for i in sorted(of)]
        found: list[dict[int, float]] = [{} for _ in texts]
        if not masked:
            return found
        clean = encoded(model, texts)[self.importance]
        variants = self._encoder(self.importance)(model, [replaced(words[t], i, UNKNOWN) for t, i in masked])
        owner = torch.tensor([t for t, _ in masked], device=clean.device)
        values = kl_divergence(clean[owner], variants[self.importance]).tolist()
        for (t, i), value in zip(masked, values, strict=True):
            found[t][i] = value
        return found


def kl_divergence(clean: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(other)) of rows [N, D], as [N]."""
    return F.kl_div(other.log_softmax(-1), clean.softmax(-1), reduction="none").sum(-1)
