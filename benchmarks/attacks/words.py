"""BERT-Attack on captions as Co-Attack and SGA run it (attack/bert_attack.py, 96f2c0e; attacker.py, f49e692), twice.

`Published` goes caption by caption: every text padded to the full length, every word masked, masked texts in batches of
32, candidates of a word read from CUDA scalar by scalar. `Tuned` is the same search with generic engineering: weights
frozen, no graph, all captions in step, texts by 32 and padded to the longest only, language model batched, the first 24
combinations generated directly. Neither knows prefixes, caches, or which words are worth masking. Written from reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise, product
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertForMaskedLM, BertTokenizerFast

from fastmat.models.dual_encoder import DualEncoder
from fastmat.text.words import STOP_WORDS

Part = Literal["features", "embeds"]
Item = TypeVar("Item")
TOP_K, THRESHOLD, BATCH = 10, 0.3, 32
ROWS, IDS, COMBINATIONS = 12, 4, 24
UNKNOWN = "[UNK]"


@dataclass(kw_only=True)
class Trace:
    """Of the latest pass over the captions: words L, words tried T and candidate texts of each (c + 1, with the current
    text), and how clear every caption's decisions were: the chosen text's lead over the runner-up, and the lead in
    importance (relative) of every word tried over the next one."""

    words: list[int] = field(default_factory=list)
    tried: list[int] = field(default_factory=list)
    options: list[int] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    order: list[float] = field(default_factory=list)


def read(tokenizer: BertTokenizerFast, text: str, length: int) -> list[int]:
    """`[CLS] pieces`, cut and padded to `length`, without [SEP] as the bundled tokenizer."""
    ids = [tokenizer.cls_token_id, *tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))][:length]
    return ids + [tokenizer.pad_token_id] * (length - len(ids))


def spell(tokenizer: BertTokenizerFast, ids: Sequence[int]) -> str:
    """What CLIP's tokenizer is given."""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=True)
    for special in ("[PAD]", "[CLS]", "[SEP]"):
        text = text.replace(special, "")
    return text.strip()


def spans(tokenizer: BertTokenizerFast, words: Sequence[str]) -> list[tuple[int, int]]:
    """Pieces of each word, counted without [CLS]: used as rows of an output that has it, as published."""
    found, start = [], 0
    for word in words:
        stop = start + len(tokenizer.tokenize(word))
        found.append((start, stop))
        start = stop
    return found


def joined(tokenizer: BertTokenizerFast, ids: Sequence[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(list(ids))).replace(" ##", "")


def variants(words: Sequence[str], i: int, candidates: Sequence[str]) -> list[tuple[str, str]]:
    """(word, text), the current ones first, of candidates that are neither the word, a piece nor a stop word."""
    kept = [c for c in candidates if c != words[i] and "##" not in c and c not in STOP_WORDS]
    return [(word, " ".join([*words[:i], word, *words[i + 1 :]])) for word in (words[i], *kept)]


def divergence(clean: Tensor, other: Tensor) -> Tensor:
    return F.kl_div(other.log_softmax(-1), clean.softmax(-1).expand_as(other), reduction="none").sum(-1)


def leads(values: Sequence[float], tried: int) -> float:
    """The smallest lead of the first `tried` over their successors, relative to the largest.

    >>> leads([4.0, 3.0, 2.9], 1)
    0.25
    """
    gaps = [a - b for a, b in pairwise(values[: tried + 1])]
    return min(gaps, default=float("inf")) / max(abs(values[0]), 1e-30) if values else float("inf")


def lead(scores: Tensor) -> float:
    """Of the best over the runner-up; infinite without one."""
    return float("inf") if len(scores) < 2 else float(-scores.topk(2).values.diff())


class Published:
    """length: BERT pieces that are read. part: where importance and choice are measured. with_graph: SGA runs its
    guided text attack outside `no_grad`, Co-Attack inside."""

    def __init__(
        self,
        *,
        model: DualEncoder,
        bert: BertForMaskedLM,
        tokenizer: BertTokenizerFast,
        length: int,
        part: Part,
        with_graph: bool,
    ) -> None:
        self.model, self.bert, self.tokenizer = model, bert, tokenizer
        self.length = min(length, bert.config.max_position_embeddings)
        self.part = part
        self.with_graph = with_graph
        self.trace = Trace()

    def encode(self, texts: Sequence[str], *, part: Part | None = None, length: int | None = None) -> Tensor:
        """[T, E], read by BERT's pieces, spelt out again, padded to the model's full length; one forward."""
        device = self.model.logit_scale.device
        ids = torch.tensor([read(self.tokenizer, text, length or self.length) for text in texts], device=device)
        spelt = [spell(self.tokenizer, row.tolist()) for row in ids]
        state = self.model.encode_text(self.model.tokenize(spelt, pad=True).to(device))
        return state.features if (part or self.part) == "features" else state.embeds

    def __call__(self, texts: Sequence[str], guide: Tensor | None = None) -> list[str]:
        """guide: [T, E] features of each caption's image, to move away from; None: away from the caption itself."""
        with torch.set_grad_enabled(self.with_graph):
            return self.attack(texts, guide)

    def attack(self, texts: Sequence[str], guide: Tensor | None) -> list[str]:
        self.trace = Trace()
        device = self.model.logit_scale.device
        ids = torch.tensor([read(self.tokenizer, text, self.length) for text in texts], device=device)
        logits = self.bert(ids, attention_mask=(ids != self.tokenizer.pad_token_id).long()).logits
        scores, pieces = logits.topk(TOP_K, dim=-1)
        clean = self.encode(texts).detach()
        return [
            self.one(text, clean[i], None if guide is None else guide[i], pieces[i], scores[i])
            for i, text in enumerate(texts)
        ]

    def one(self, text: str, clean: Tensor, guide: Tensor | None, pieces: Tensor, scores: Tensor) -> str:
        words = text.split(" ")
        masked = [" ".join([*words[:i], UNKNOWN, *words[i + 1 :]]) for i in range(len(words))]
        embeds = [self.encode(masked[start : start + BATCH]).detach() for start in range(0, len(masked), BATCH)]
        importance = divergence(clean, torch.cat(embeds))
        order = sorted(enumerate(importance), key=lambda pair: pair[1], reverse=True)  # compares on the device
        where = spans(self.tokenizer, words)
        final, changed, tried, margin = list(words), 0, 0, float("inf")
        for i, _ in order:
            if changed >= 1:
                break
            start, stop = where[i]
            if words[i] in STOP_WORDS or start > self.length - 2:
                continue
            options = variants(final, i, self.candidates(pieces[start:stop], scores[start:stop]))
            encoded = self.encode([option for _, option in options])
            score = divergence(clean, encoded) if guide is None else -(encoded * guide).sum(-1)
            best = options[int(score.argmax())][0]
            changed += best != words[i]
            final[i] = best
            tried += 1
            margin = min(margin, lead(score.detach()))
            self.trace.options.append(len(options))
        self.note(words, where, order, tried, margin)
        return " ".join(final)

    def candidates(self, pieces: Tensor, scores: Tensor) -> list[str]:
        """[pieces of the word, 10] to words."""
        if not len(pieces):
            return []
        if len(pieces) == 1:
            found = []
            for piece, score in zip(pieces[0], scores[0], strict=True):
                if score < THRESHOLD:
                    break
                found.append(self.tokenizer.convert_ids_to_tokens(int(piece)))
            return found
        every: list[list[int]] = [[]]
        for row in pieces[:ROWS, :IDS]:
            every = [[*done, int(piece)] for done in every for piece in row]
        some = torch.tensor(every)[:COMBINATIONS].to(pieces.device)
        predicted = self.bert(some).logits
        loss = F.cross_entropy(predicted.flatten(0, 1), some.flatten(), reduction="none")
        ranking = loss.view(some.shape).mean(-1).exp().sort().indices
        return [joined(self.tokenizer, [int(piece) for piece in some[n]]) for n in ranking]

    def note(
        self,
        words: Sequence[str],
        where: Sequence[tuple[int, int]],
        order: Sequence[tuple[int, Tensor]],
        tried: int,
        margin: float,
    ) -> None:
        open_words = [float(v) for i, v in order if words[i] not in STOP_WORDS and where[i][0] <= self.length - 2]
        self.trace.words.append(len(words))
        self.trace.tried.append(tried)
        self.trace.margin.append(margin)
        self.trace.order.append(leads(open_words, tried))


class Tuned:
    """The same search; `model` is frozen."""

    def __init__(
        self, *, model: DualEncoder, bert: BertForMaskedLM, tokenizer: BertTokenizerFast, length: int, part: Part
    ) -> None:
        self.model, self.bert, self.tokenizer = model, bert, tokenizer
        self.length = min(length, bert.config.max_position_embeddings)
        self.part = part

    def encode(self, texts: Sequence[str], *, part: Part | None = None, length: int | None = None) -> Tensor:
        device = self.model.logit_scale.device
        spelt = [spell(self.tokenizer, read(self.tokenizer, text, length or self.length)) for text in texts]
        found = []
        for chunk in by_32(spelt):
            state = self.model.encode_text(self.model.tokenize(chunk).to(device))
            found.append(state.features if (part or self.part) == "features" else state.embeds)
        return torch.cat(found)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], guide: Tensor | None = None) -> list[str]:
        words = [text.split(" ") for text in texts]
        where = [spans(self.tokenizer, own) for own in words]
        clean = self.encode(texts)
        order = self.order(words, clean)
        found = self.candidates(texts, words, where)
        final, changed, tried = [list(own) for own in words], [False] * len(texts), [0] * len(texts)
        while active := [t for t, own in enumerate(order) if not changed[t] and tried[t] < len(own)]:
            options = []
            for t in active:
                i = order[t][tried[t]]
                skip = words[t][i] in STOP_WORDS or where[t][i][0] > self.length - 2
                options.append([] if skip else variants(final[t], i, found[t].get(i, [])))
            tests = [(t, text) for t, own in zip(active, options, strict=True) for _, text in own]
            if tests:
                rows = torch.tensor([t for t, _ in tests], device=clean.device)
                encoded = self.encode([text for _, text in tests])
                score = divergence(clean[rows], encoded) if guide is None else -(encoded * guide[rows]).sum(-1)
                parts = iter(score.cpu().split([len(own) for own in options if own]))
            for t, own in zip(active, options, strict=True):
                if own:
                    best = own[int(next(parts).argmax())][0]
                    changed[t] = best != words[t][order[t][tried[t]]]
                    final[t][order[t][tried[t]]] = best
                tried[t] += 1
        return [" ".join(own) for own in final]

    def order(self, words: Sequence[Sequence[str]], clean: Tensor) -> list[list[int]]:
        masked = [" ".join([*own[:i], UNKNOWN, *own[i + 1 :]]) for own in words for i in range(len(own))]
        counts = [len(own) for own in words]
        owner = torch.arange(len(words), device=clean.device).repeat_interleave(
            torch.tensor(counts, device=clean.device)
        )
        importance = divergence(clean[owner], self.encode(masked)).cpu()
        return [of.argsort(descending=True, stable=True).tolist() for of in importance.split(counts)]

    def candidates(
        self, texts: Sequence[str], words: Sequence[Sequence[str]], where: Sequence[Sequence[tuple[int, int]]]
    ) -> list[dict[int, list[str]]]:
        """Of every word that is no stop word."""
        found: list[dict[int, list[str]]] = [{} for _ in texts]
        device, pad = self.bert.device, self.tokenizer.pad_token_id
        for chunk in by_32(range(len(texts))):
            rows = [read(self.tokenizer, texts[t], self.length) for t in chunk]
            longest = max(self.length - row.count(pad) for row in rows)
            ids = torch.tensor([row[:longest] for row in rows], device=device)
            best = self.bert(ids, attention_mask=(ids != pad).long()).logits.topk(TOP_K, dim=-1)
            pieces, scores = best.indices.tolist(), best.values.tolist()
            for n, t in enumerate(chunk):
                for i, (start, stop) in enumerate(where[t]):
                    if start < stop and words[t][i] not in STOP_WORDS:
                        found[t][i] = self.of_word(pieces[n][start:stop], scores[n][start:stop])
        return found

    def of_word(self, pieces: list[list[int]], scores: list[list[float]]) -> list[str]:
        if not pieces:
            return []
        if len(pieces) == 1:
            cut = next((n for n, score in enumerate(scores[0]) if score < THRESHOLD), TOP_K)
            return [self.tokenizer.convert_ids_to_tokens(piece) for piece in pieces[0][:cut]]
        some = torch.tensor(list(islice(product(*(row[:IDS] for row in pieces[:ROWS])), COMBINATIONS)))
        some = some.to(self.bert.device)
        loss = F.cross_entropy(self.bert(some).logits.flatten(0, 1), some.flatten(), reduction="none")
        ranking = loss.view(some.shape).mean(-1).argsort()
        return [joined(self.tokenizer, row) for row in some[ranking].tolist()]


def by_32(items: Sequence[Item]) -> Iterator[list[Item]]:
    for start in range(0, len(items), BATCH):
        yield list(items[start : start + BATCH])
