"""BERT-Attack, one caption and one text at a time, as the protocol reads; slow and plain."""

from dataclasses import dataclass
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertForMaskedLM, BertTokenizerFast

from fastmat.models.protocol import TextTokens, VisionLanguageModel
from fastmat.quirks import Quirks

CONTRACTIONS = [" .", " ?", " !", " ,"], [" n't", " 'm", " 's", " 've", " 're"]


@dataclass
class Oracle:
    """`gap` after a call: the smallest non-zero distance between any two scores that decided something. `margin`: of
    the substitutes that were chosen, the smallest lead over the best other one. `lead`: of the words that were tried,
    the smallest lead in importance over the next one."""

    bert: BertForMaskedLM
    tokenizer: BertTokenizerFast
    model: VisionLanguageModel
    stop_words: set[str]
    quirks: Quirks
    max_words: int
    choice: str
    importance: str
    compare: str
    top_k: int
    threshold: float
    gap: float = 0.0
    margin: float = 0.0
    lead: float = 0.0

    @torch.no_grad()
    def attack(self, text: str, guide: Tensor | None) -> str:
        self.gap = self.margin = self.lead = float("inf")
        words = text.split(" ")
        ids = self.ids(text)
        logits = self.bert(torch.tensor([ids])).logits[0]
        best = logits.topk(self.top_k)
        clean = self.encode(text)
        importance = []
        for i in range(len(words)):
            masked = self.encode(" ".join([*words[:i], "[UNK]", *words[i + 1 :]]))
            importance.append(self.kl(clean[self.importance], masked[self.importance]))
        order = sorted(range(len(words)), key=lambda i: -importance[i])
        changes, final = 0, list(words)
        position = 0
        spans = []
        for word in words:
            count = len(self.tokenizer(word, add_special_tokens=False).input_ids)
            spans.append((position, position + count))
            position += count
        open_words = [i for i in order if not self.stops(words[i]) and spans[i][0] <= self.length - 2]
        self.note([importance[i] for i in open_words])
        for rank, i in enumerate(open_words):
            if changes == self.max_words:
                break
            if rank + 1 < len(open_words):
                self.lead = min(self.lead, importance[i] - importance[open_words[rank + 1]])
            first, last = (bound + self.quirks.candidate_row_offset for bound in spans[i])
            candidates = self.candidates(best.indices[first:last].tolist(), best.values[first:last].tolist())
            candidates = [c for c in candidates if not self.filtered(words[i], c)]
            options = [words[i], *candidates]
            scores = []
            for option in options:
                encoded = self.encode(" ".join([*final[:i], option, *final[i + 1 :]]))
                if self.choice == "cosine":
                    scores.append(-float(encoded["features"] @ guide))
                else:
                    scores.append(self.kl(clean[self.compare], encoded[self.compare]))
            winner = scores.index(max(scores))
            others = [score for score in scores if score != scores[winner]]
            self.margin = min([self.margin, *(scores[winner] - score for score in others)])
            self.note(scores)
            final[i] = options[winner]
            changes += winner > 0
        return " ".join(final)

    @property
    def length(self) -> int:
        return self.quirks.text_max_length or self.bert.config.max_position_embeddings

    def ids(self, text: str) -> list[int]:
        pieces = self.tokenizer(text, add_special_tokens=False).input_ids
        if self.quirks.append_sep:
            return [self.tokenizer.cls_token_id, *pieces[: self.length - 2], self.tokenizer.sep_token_id]
        return [self.tokenizer.cls_token_id, *pieces[: self.length - 1]]

    def encode(self, text: str) -> dict[str, Tensor]:
        length = self.quirks.text_max_length
        if self.quirks.round_trip:
            text, length = self.round_trip(text), None
        state = self.model.encode_text(self.model.tokenize([text], max_length=length))
        encoded = {"features": state.features[0], "embeds": state.embeds[0]}
        if {"tokens", "cls"} & {self.importance, self.compare}:
            padded: TextTokens = self.model.tokenize([text], max_length=length, pad=True)
            tokens = self.model.encode_text(padded).tokens[0]
            encoded |= {"tokens": tokens.flatten(), "cls": tokens[0]}
        return encoded

    def round_trip(self, text: str) -> str:
        ids = self.ids(text)
        ids += [self.tokenizer.pad_token_id] * (self.length - len(ids))
        decoded = " ".join(self.tokenizer.convert_ids_to_tokens(ids)).replace(" ##", "")
        for mark in CONTRACTIONS[0]:
            decoded = decoded.replace(mark, mark[1:])
        decoded = decoded.replace(" ' ", "'")
        for ending in CONTRACTIONS[1]:
            decoded = decoded.replace(ending, ending[1:])
        return decoded.replace("[PAD]", "").replace("[CLS]", "").replace("[SEP]", "").strip()

    def candidates(self, ids: list[list[int]], logits: list[list[float]]) -> list[str]:
        if len(ids) == 0:
            return []
        if len(ids) == 1:
            words = []
            for piece, logit in zip(ids[0], logits[0], strict=True):
                if logit < self.threshold:
                    break
                words.append(self.tokenizer.convert_ids_to_tokens(piece))
            return words
        everything = list(product(*(row[:4] for row in ids[:12])))[:24]
        losses = []
        for combination in everything:
            predicted = self.bert(torch.tensor([combination])).logits[0]
            losses.append(float(F.cross_entropy(predicted, torch.tensor(combination))))
        self.note(losses)
        ranked = sorted(zip(losses, everything, strict=True), key=lambda pair: pair[0])
        return [" ".join(self.tokenizer.convert_ids_to_tokens(list(c))).replace(" ##", "") for _, c in ranked]

    def filtered(self, word: str, candidate: str) -> bool:
        if "##" in candidate or self.stops(candidate):
            return True
        if not self.quirks.blanks_in_candidates and (" " in candidate or candidate.startswith("[")):
            return True
        return candidate == word or (not self.quirks.case_sensitive_filters and candidate.lower() == word.lower())

    def stops(self, word: str) -> bool:
        return (word if self.quirks.case_sensitive_filters else word.lower()) in self.stop_words

    @staticmethod
    def kl(clean: Tensor, other: Tensor) -> float:
        p = clean.double().softmax(0)
        return float((p * (p.log() - other.double().log_softmax(0))).sum())

    def note(self, scores: list[float]) -> None:
        ordered = sorted(set(scores))
        for low, high in pairwise(ordered):
            self.gap = min(self.gap, high - low)
