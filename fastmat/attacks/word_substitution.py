"""The search of BERT-Attack as vision-language attacks use it: rank words by importance, then try substitutes in turn.

Source: BERT-Attack (EMNLP 2020), with the choice by KL of Co-Attack (ACM MM 2022) or by cosine of SGA (ICCV 2023).
Words, candidates, importance and the clean embeddings depend on captions and models only: they make the plan. The
choice among candidates may depend on a guide: it is the search. One plan serves several searches, and what one search
has encoded the next one finds in the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.errors import UserError
from fastmat.models.protocol import TextTokens, VisionLanguageModel, token_batch
from fastmat.quirks import Quirks
from fastmat.text.candidates import CandidateSource, Found
from fastmat.text.encoded import EncodedTexts, Representation, represent
from fastmat.text.fused import FusedTexts
from fastmat.text.screening import estimates
from fastmat.text.spelling import UNKNOWN, Ids, RoundTrip, Speller

Choice = Literal["kl", "cosine"]


@dataclass(frozen=True, kw_only=True)
class TextPlan:
    """What a search needs of T captions, whatever it is guided by.

    words: the captions split on blanks; ids: as the victim reads them. candidates: word index to substitutes, best
    first. importance: word index to KL(clean || masked). order: word indices by decreasing importance.
    encoded: the victim's view of every text met, alone or beside its image; speller: how it reads.
    """

    texts: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]
    ids: tuple[Ids, ...]
    candidates: tuple[Found, ...]
    importance: tuple[dict[int, float], ...]
    order: tuple[tuple[int, ...], ...]
    speller: Speller
    encoded: EncodedTexts | FusedTexts


class Draft(NamedTuple):
    """A caption under attack. changed: words spent; origin: the ids that it was made of at this word."""

    words: tuple[str, ...]
    ids: Ids
    changed: int
    origin: Ids | None = None


class WordSubstitution:
    """Substitutes up to `max_words` words of each caption.

    candidates: what proposes substitutes.
    choice: "cosine" takes the text least similar to its guide; "kl" the one farthest from the clean caption.
    importance: the representation on which a word's importance is measured; compare: the one of choice "kl".
        SGA: "features"; Co-Attack and Sep-Attack: "embeds" for CLIP, "cls" or "tokens" for BERT towers, "fusion" (then
        both, and only with choice "kl") for what a fusion encoder makes of a caption beside its image.
    beam: texts per caption that are followed from word to word; 1, as published, follows the best one. The best text of
        the last beam is returned: with more than one word to spend, a wider beam can find pairs of words that are
        harmful together, at up to `beam` times the cost.
    screen: None encodes every candidate. A number encodes only as many of a word's, those that a first-order estimate
        puts first: an approximation, at the price of a forward and a backward per caption and word tried, so it pays
        with several dozen candidates.
    quirks: published departures; `text_max_length` also limits what the victim reads.
    """

    def __init__(
        self,
        *,
        candidates: CandidateSource,
        max_words: int = 1,
        choice: Choice = "cosine",
        importance: Representation = "features",
        compare: Representation = "features",
        beam: int = 1,
        screen: int | None = None,
        quirks: Quirks | None = None,
    ) -> None:
        if choice not in get_args(Choice):
            raise UserError(f"choice must be one of {', '.join(get_args(Choice))}, got {choice!r}")
        for name, value in (("importance", importance), ("compare", compare)):
            if value not in get_args(Representation):
                raise UserError(f"{name} must be one of {', '.join(get_args(Representation))}, got {value!r}")
        judged: Representation = "features" if choice == "cosine" else compare
        if (importance == "fusion") != (judged == "fusion"):
            raise UserError("'fusion' needs choice 'kl', and stands for both importance and compare or for neither")
        if beam < 1:
            raise UserError(f"beam must be at least 1, got {beam}")
        if screen is not None and screen < 1:
            raise UserError(f"screen must be at least 1, got {screen}")
        if screen is not None and choice == "kl":
            raise UserError("screen needs choice 'cosine': the KL from the clean caption has no slope at that caption")
        if max_words < 0:
            raise UserError(f"max_words must not be negative, got {max_words}")
        self.quirks = quirks or Quirks()
        if self.quirks.round_trip and candidates.mlm is None:
            raise UserError("the quirk round_trip (of parity: official) reads captions through a masked language model")
        self.candidates = candidates
        self.max_words = max_words
        self.choice = choice
        self.importance: Representation = importance
        self.judged = judged
        self.beam = beam
        self.screen = screen

    @torch.no_grad()
    def plan(self, model: VisionLanguageModel, texts: Sequence[str], *, fused: FusedTexts | None = None) -> TextPlan:
        """Candidates and word importance of T captions, each in a few large batches.

        fused: the captions beside their images, needed by "fusion" alone.
        """
        words = tuple(tuple(text.split(" ")) for text in texts)
        candidates = self.candidates(texts, quirks=self.quirks) if self.max_words else [{} for _ in texts]
        speller = self._speller(model)
        encoded: EncodedTexts | FusedTexts
        if self.judged != "fusion":
            encoded = EncodedTexts(model, parts=(self.importance, self.judged), length=speller.max_length)
        elif fused is not None:
            encoded = fused
        else:
            raise UserError("'fusion' needs an image beside each caption, which co_attack, sep and bert_attack give")
        ids = tuple(speller.ids(of) for of in words)
        importance = self._importance(words, ids, candidates, speller, encoded)
        return TextPlan(
            texts=tuple(texts),
            words=words,
            ids=ids,
            candidates=tuple(candidates),
            importance=tuple(importance),
            order=tuple(tuple(sorted(of, key=of.__getitem__, reverse=True)) for of in importance),
            speller=speller,
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
        clean = range(len(plan.ids))
        reference = guide if self.choice == "cosine" else seen(plan.encoded, plan.ids, clean, plan.ids)[self.judged]
        assert reference is not None
        beams = [[Draft(words, ids, 0)] for words, ids in zip(plan.words, plan.ids, strict=True)]
        for tried in range(max(map(len, plan.order))):
            active = [
                t
                for t, order in enumerate(plan.order)
                if tried < len(order) and any(draft.changed < self.max_words for draft in beams[t])
            ]
            if not active:
                break
            options = [self._options(plan, t, plan.order[t][tried], beams[t]) for t in active]
            if self.screen is not None:
                options = self._screened(model, active, options, reference)
            for t, of, scores in zip(active, options, self._scores(plan, active, options, reference), strict=True):
                # Sorting is stable: of equals the first, which is the current text, stands first.
                best = sorted(range(len(of)), key=scores.__getitem__, reverse=True)[: self.beam]
                beams[t] = [of[n] for n in best]
        return tuple(" ".join(drafts[0].words) for drafts in beams)

    @torch.no_grad()
    def features(
        self,
        model: VisionLanguageModel,
        texts: Sequence[str],
        *,
        max_length: int | None = None,
        plan: TextPlan | None = None,
    ) -> Tensor:
        """[T, E] unit features of `texts` as this search's victim reads them (through the round trip, if that is on).

        max_length: pieces kept, instead of `text_max_length`. plan: of the captions that `texts` were made of; what it
        has encoded is not encoded again.
        """
        speller = self._speller(model, max_length)
        rows = [speller.ids(text.split(" ")) for text in texts]
        if plan is None or isinstance(plan.encoded, FusedTexts) or {"tokens", "cls"} & set(plan.encoded.parts):
            return EncodedTexts(model, parts=("features",), length=speller.max_length)(rows)["features"]
        known = plan.encoded(rows, base=plan.ids)
        return known["features"] if "features" in known else F.normalize(known["embeds"], dim=-1)

    def read(self, model: VisionLanguageModel, texts: Sequence[str], *, max_length: int | None = None) -> TextTokens:
        """The tokens of T texts as this search's victim reads them; max_length: as in `features`."""
        speller, tokenizer = self._speller(model, max_length), model.tokenizer
        length = model.context_length if tokenizer.pad_to_context else None
        return token_batch([speller.ids(text.split(" ")) for text in texts], pad_id=tokenizer.pad_id, length=length)

    def _options(self, plan: TextPlan, t: int, word: int, drafts: Sequence[Draft]) -> list[Draft]:
        """Each draft of caption t as it is, followed by what may become of it."""
        found = []
        for draft in drafts:
            found.append(draft._replace(origin=None))
            if draft.changed < self.max_words:
                substitutes = plan.candidates[t][word]
                rows = plan.speller.variants(draft.words, word, substitutes)
                for substitute, ids in zip(substitutes, rows, strict=True):
                    words = (*draft.words[:word], substitute, *draft.words[word + 1 :])
                    found.append(Draft(words, ids, draft.changed + 1, draft.ids))
        return found

    def _screened(
        self, model: VisionLanguageModel, active: Sequence[int], options: Sequence[Sequence[Draft]], reference: Tensor
    ) -> list[list[Draft]]:
        """The options without those that a first-order estimate leaves out."""
        kept = [list(of) for of in options]
        bases = [(n, base) for n, of in enumerate(options) for base in of if base.origin is None]
        grown = [[draft for draft in options[n] if draft.origin is base.ids] for n, base in bases]
        own = reference[torch.tensor([active[n] for n, _ in bases], device=reference.device)]
        rises = estimates(
            model,
            [base.ids for _, base in bases],
            [[draft.ids for draft in of] for of in grown],
            lambda state: self._score(represent(state, self.judged), own),
        )
        for (n, _), of, rise in zip(bases, grown, rises, strict=True):
            worst = sorted(range(len(of)), key=rise.__getitem__, reverse=True)[self.screen :]
            left_out = {id(of[place]) for place in worst}
            kept[n] = [draft for draft in kept[n] if id(draft) not in left_out]
        return kept

    def _score(self, rows: Tensor, own: Tensor) -> Tensor:
        """What is maximised, of texts [N, D] against what is theirs [N, D]."""
        return -(rows * own).sum(-1) if self.choice == "cosine" else kl_divergence(own, rows)

    def _scores(
        self, plan: TextPlan, active: Sequence[int], options: Sequence[Sequence[Draft]], reference: Tensor
    ) -> Iterator[list[float]]:
        """What is maximised, of every option of every active caption."""
        owners = [t for t, of in zip(active, options, strict=True) for _ in of]
        texts = [draft.ids for of in options for draft in of]
        rows = seen(plan.encoded, plan.ids, owners, texts)[self.judged]
        own = reference[torch.tensor(owners, device=rows.device)]
        scores = self._score(rows, own).tolist()
        start = 0
        for of in options:
            yield scores[start : start + len(of)]
            start += len(of)

    def _speller(self, model: VisionLanguageModel, max_length: int | None = None) -> Speller:
        """The victim reads captions as they are, or as BERT's pieces spell them (`Quirks.round_trip`)."""
        quirks, mlm = self.quirks, self.candidates.mlm
        limit = max_length or quirks.text_max_length
        if not quirks.round_trip or mlm is None:
            return Speller(model, max_length=limit)
        pieces = min(limit or mlm.max_length, mlm.max_length)
        return Speller(model, trip=RoundTrip(mlm=mlm, append_sep=quirks.append_sep, max_length=pieces))

    def _importance(
        self,
        words: Sequence[Sequence[str]],
        ids: Sequence[Ids],
        candidates: Sequence[Found],
        speller: Speller,
        encoded: EncodedTexts | FusedTexts,
    ) -> list[dict[int, float]]:
        """Word index to importance, for the words that have candidates: no other can be substituted."""
        masked = [(t, i) for t, of in enumerate(candidates) for i in sorted(of)]
        found: list[dict[int, float]] = [{} for _ in words]
        if not masked:
            return found
        captions = [t for t, _ in masked]
        variants = [speller.variants(words[t], i, (UNKNOWN,))[0] for t, i in masked]
        other = seen(encoded, ids, captions, variants)[self.importance]
        clean = seen(encoded, ids, captions, [ids[t] for t in captions])[self.importance]
        values = kl_divergence(clean, other).tolist()
        for (t, i), value in zip(masked, values, strict=True):
            found[t][i] = value
        return found


def seen(
    encoded: EncodedTexts | FusedTexts, ids: Sequence[Ids], captions: Sequence[int], texts: Sequence[Ids]
) -> dict[Representation, Tensor]:
    """What the victim makes of each text, which is a variant of caption `captions[n]`; ids: of all captions."""
    if isinstance(encoded, FusedTexts):
        return encoded(texts, captions)
    return encoded(texts, base=[ids[t] for t in captions])


def kl_divergence(clean: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(other)) of rows [N, D], as [N] fp64: in fp32 rounding hides differences of 1e-7."""
    clean, other = clean.double(), other.double()
    return F.kl_div(other.log_softmax(-1), clean.softmax(-1), reduction="none").sum(-1)
