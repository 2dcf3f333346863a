"""Retrieval in two stages: the `k` nearest by cosine, which the matching head puts in order (ALBEF, BLIP).

Exact: the scores of the published loop over queries, which recomputes the keys and values of every candidate, up to
rounding. The pairs of both directions are put together, each once, and grouped by image, so that an image's keys and
values exist while its own pairs are scored and no longer; its texts are packed, shortest first.
Memory, beside the model and one image's work: the texts' tokens without padding, and every image's tokens, on the
device while they fit into a part of it and in the host's memory beyond that, from where each passes to the device once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastmat.errors import UserError
from fastmat.memory import Chunks
from fastmat.models.protocol import (
    FusionModel,
    ImageKeys,
    ImageState,
    PackedTexts,
    TextState,
    VisionLanguageModel,
    fuses,
)
from fastmat.ops import topk_shortlist

# Tokens of texts at a time: on the CPU their hidden layer stays in a core's cache, on a GPU they fill it.
TOKENS = {"cpu": 2**10, "cuda": 2**15}
# The share of a GPU's free memory that image tokens may take.
SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Rerank:
    """How the second stage scores.

    k: candidates per query, `rerank_k`. plus_cosine: score by matching logit plus cosine, or by the logit alone; None:
    as the model was published (`FusionModel.ranks_with_cosine`).
    """

    k: int
    plus_cosine: bool | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"rerank_k must be at least 1, got {self.k}")

    def scoring(self, model: VisionLanguageModel) -> str:
        """ "itm" or "itm+cosine", as a row names it. Raises UserError for a model without a matching head."""
        if not fuses(model):
            raise UserError(
                f"rerank_k: {type(model).__name__} has no matching head to re-rank with; leave the key out, or choose "
                "a fusion model such as albef or blip"
            )
        plus = model.ranks_with_cosine if self.plus_cosine is None else self.plus_cosine
        return "itm+cosine" if plus else "itm"


class Shortlist(NamedTuple):
    """What is to be scored for N' query images and T' query texts.

    image, text [U]: the pairs, each once, by image and within an image by the text's length. image_cosine [N', k],
    text_cosine [T', k]: of each query's candidates, best first; image_pair, text_pair alike: their places in the pairs;
    image_candidates, text_candidates alike: their places in the gallery.
    """

    image: Tensor
    text: Tensor
    image_cosine: Tensor
    text_cosine: Tensor
    image_pair: Tensor
    text_pair: Tensor
    image_candidates: Tensor
    text_candidates: Tensor


class Reranked(NamedTuple):
    """Scores [N', k] and [T', k] of each query's candidates, with their places among the texts and the images."""

    image_scores: Tensor
    image_candidates: Tensor
    text_scores: Tensor
    text_candidates: Tensor


@dataclass(frozen=True, kw_only=True)
class Matching:
    """A gallery's second stage. images: N tensors [tokens, D], on the device or not; texts: T, on the device."""

    model: FusionModel
    rerank: Rerank
    images: Sequence[Tensor]
    texts: PackedTexts

    def overlaid(self, other: Matching, images: Tensor, texts: Tensor) -> Matching:
        """With those of `other` in the places `images` [B] and `texts` [R]."""
        held = list(self.images)
        for place, tokens in zip(images.tolist(), other.images, strict=True):
            held[place] = tokens
        count = len(self.texts.lengths)
        rows = torch.arange(count).index_copy(0, texts.cpu(), count + torch.arange(len(texts)))
        return replace(self, images=held, texts=PackedTexts.join((self.texts, other.texts)).take(rows))

    def scores(
        self, image_features: Tensor, text_features: Tensor, *, image_rows: Tensor, text_rows: Tensor
    ) -> Reranked:
        """Of the query images `image_rows` [N'] and texts `text_rows` [T'] among features [N, E] and [T, E].

        Raises UserError when a gallery is smaller than k, or when a logit is not finite.
        """
        found = shortlist(
            image_features,
            text_features,
            k=self.rerank.k,
            lengths=self.texts.lengths.to(image_features.device),
            image_rows=image_rows,
            text_rows=text_rows,
        )
        logits = match_pairs(self.model, self.images, self.texts, image=found.image, text=found.text)
        broken = (~logits.isfinite()).nonzero().flatten().tolist()
        if broken:
            image, text = int(found.image[broken[0]]), int(found.text[broken[0]])
            raise UserError(f"the model gives NaN or infinite logits for image {image} with caption {text} of the data")
        image_scores, text_scores = logits[found.image_pair], logits[found.text_pair]
        if self.rerank.scoring(self.model) == "itm+cosine":
            image_scores, text_scores = image_scores + found.image_cosine, text_scores + found.text_cosine
        return Reranked(image_scores, found.image_candidates, text_scores, found.text_candidates)


def shortlist(
    images: Tensor, texts: Tensor, *, k: int, lengths: Tensor, image_rows: Tensor, text_rows: Tensor
) -> Shortlist:
    """Unit features images [N, E], texts [T, E]; lengths [T] int64; queries image_rows [N'], text_rows [T'].

    Raises UserError when there are fewer than k images or texts to choose from.
    """
    for what, gallery in (("images", images), ("captions", texts)):
        if len(gallery) < k:
            raise UserError(f"rerank_k must be at most the {len(gallery)} {what} of the gallery, got {k}")
    image_cosine, captions = topk_shortlist(images[image_rows], texts, k)
    text_cosine, pictures = topk_shortlist(texts[text_rows], images, k)
    order = lengths.argsort(stable=True)
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    of_images = image_rows[:, None] * len(texts) + place[captions]
    of_texts = pictures * len(texts) + place[text_rows][:, None]
    pairs, where = torch.cat((of_images.flatten(), of_texts.flatten())).unique(return_inverse=True)
    split = of_images.numel()
    return Shortlist(
        image=pairs // len(texts),
        text=order[pairs % len(texts)],
        image_cosine=image_cosine,
        text_cosine=text_cosine,
        image_pair=where[:split].view_as(of_images),
        text_pair=where[split:].view_as(of_texts),
        image_candidates=captions,
        text_candidates=pictures,
    )


@torch.no_grad()
def match_pairs(
    model: FusionModel, images: Sequence[Tensor], texts: PackedTexts, *, image: Tensor, text: Tensor
) -> Tensor:
    """[U] fp32 matching logits of pairs of `image` and `text` [U], grouped by image, on the texts' device."""
    device = texts.tokens.device
    text = text.cpu()
    chunks = Chunks(TOKENS[device.type], item="caption", advice="use a device with more of it")
    logits, start = [], 0
    for row, count in zip(*(part.tolist() for part in image.unique_consecutive(return_counts=True)), strict=True):
        keys = model.image_keys(images[row].to(device, non_blocking=True)[None])
        rows = text[start : start + count]
        ends = [0, *texts.lengths[rows].cumsum(0).tolist()]
        logits += chunks.run(count, partial(match_some, model, keys, texts, rows), cost=partial(tokens_of, ends))
        start += count
    return torch.cat(logits)


def tokens_of(ends: Sequence[int], start: int, stop: int) -> int:
    return ends[stop] - ends[start]


def match_some(model: FusionModel, keys: ImageKeys, texts: PackedTexts, rows: Tensor, start: int, stop: int) -> Tensor:
    return model.match(keys, texts.take(rows[start:stop]))[:, 1]


def reranked_ranks(scores: Tensor, candidates: Tensor, *, query_group: Tensor, gallery_group: Tensor) -> Tensor:
    """[Q] int64 ranks of the best positive, as `fastmat.ops.ranks_of_scores` finds them in the published matrix: what
    is not on the shortlist has one score below all others there, and ties count half.

    scores [Q, k] fp32, finite; candidates [Q, k] places in the gallery; query_group [Q], gallery_group [G] int64.
    Raises UserError for a query without a positive.

    >>> reranked_ranks(
    ...     torch.tensor([[0.2, 0.9], [0.4, 0.3]]), torch.tensor([[0, 1], [1, 2]]),
    ...     query_group=torch.tensor([0, 0]), gallery_group=torch.tensor([0, 1, 2, 3]),
    ... ).tolist()
    [1, 2]
    """
    own = gallery_group[candidates] == query_group[:, None]
    best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    ranks = (scores > best).sum(1) + ((scores == best) & ~own).sum(1) // 2
    groups, counts = gallery_group.unique(return_counts=True)
    positives = counts[torch.searchsorted(groups, query_group).clamp_max(len(groups) - 1)]
    alone = (~torch.isin(query_group, groups)).nonzero().flatten().tolist()
    if alone:
        raise UserError(
            f"query {alone[0]} has no positive: its group {int(query_group[alone[0]])} is not in the gallery"
        )
    behind = scores.shape[1] + (len(gallery_group) - scores.shape[1] - positives) // 2
    return torch.where(own.any(1), ranks, behind)


@dataclass(kw_only=True)
class Keeper:
    """Keeps of a gallery, as it is encoded, what the second stage needs. room: bytes for image tokens on the device."""

    model: FusionModel
    rerank: Rerank
    room: int
    images: list[Tensor] = field(default_factory=list)
    texts: list[PackedTexts] = field(default_factory=list)

    @classmethod
    def of(cls, model: VisionLanguageModel, rerank: Rerank) -> Keeper:
        """Raises UserError for a model without a matching head."""
        rerank.scoring(model)
        assert fuses(model)
        device = model.logit_scale.device
        room = int(SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0
        return cls(model=model, rerank=rerank, room=room)

    def keep_images(self, state: ImageState) -> None:
        tokens = state.tokens
        assert tokens is not None
        self.room -= tokens.nbytes
        # Contiguous, so that no larger tensor stays alive behind them.
        self.images += tokens.contiguous() if self.room >= 0 else tokens.cpu()

    def keep_texts(self, state: TextState) -> None:
        self.texts.append(self.model.pack_texts(state))

    def matching(self) -> Matching:
        return Matching(model=self.model, rerank=self.rerank, images=self.images, texts=PackedTexts.join(self.texts))
